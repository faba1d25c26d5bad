"""The command line: `python -m longrope_jax.main --config=FILE --workdir=DIR [--config.any.field=value]`.

`--mode=generate --prompt_file=FILE` continues a text, with a model of the experiment's or `--pretrained=PATH`.
`--mode=compile --topology=v5p:4x4x4` compiles every stage for that slice, without one, and says what will fit.
`--mode=compare DIR DIR...` compares finished work directories; it writes compare.md and compare.html to --workdir.

Exit status: 0 done; 2 the user can mend it; 75 (EX_TEMPFAIL) asked to stop, everything is saved; 130 interrupted from
the keyboard.
"""

import contextlib
import io
import os
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

# The library is imported where it is used: JAX takes a second, which `--help` and a mistyped flag need not wait for.

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "The work directory. compare: where it is written, . by default.")
_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "Where compiled programs are kept for the next start; on accelerators by default in the "
    "work directory, '' keeps none."
)  # fmt: skip
_MODE = flags.DEFINE_enum(
    "mode", "run", ["run", "generate", "compile", "compare"], "Run the experiment, write text with a model, compile "
    "all stages for a slice of TPUs that need not be there, or compare finished work directories."
)  # fmt: skip
_TOPOLOGY = flags.DEFINE_string("topology", None, "compile: chip and shape of the slice, such as v5p:4x4x4.")
_PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "generate: a Hugging Face folder or .gguf file, for no experiment."
)
_MESH = flags.DEFINE_string("mesh", "data:1", "generate: devices for a pretrained model, such as seq:4,tensor:2.")
_MODEL = flags.DEFINE_string("model", "", "generate: the stage whose model writes; the latest by default.")
_FACTORS = flags.DEFINE_string(
    "factors", "", "generate: a table, search or load stage, or a file of factors for a pretrained model; by default "
    "what the model was trained with."
)  # fmt: skip
_PROMPT_FILES = flags.DEFINE_multi_string("prompt_file", [], "generate: a text to go on from; several make a batch.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "generate: at most so many tokens a prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "generate: 0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "generate: draw from the k likeliest tokens only; 0 for all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "generate: draw from the likeliest tokens that have this share.")
_SEED = flags.DEFINE_integer("seed", 0, "generate: of the draws.")
_SWITCH = flags.DEFINE_enum(
    "switch",
    "ahead",
    ["ahead", "running"],
    "generate: factors of prompt and new tokens together, or of the length so far.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0 where several processes work together, or auto: ask the cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes; with a coordinator's address.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")


def main(argv: list[str]) -> None:
    """Runs the experiment; what the user can mend ends in one line and exit status 2."""
    logging.set_verbosity(logging.WARNING)  # libraries log much at INFO
    with contextlib.ExitStack() as until_done:
        _run(argv, until_done)


def _run(argv: list[str], until_done: contextlib.ExitStack) -> None:
    from longrope_jax import experiment, files
    from longrope_jax.interop.export import UnsupportedByFormat
    from longrope_jax.report.compare import write_comparison
    from longrope_jax.runtime import lock, processes
    from longrope_jax.runtime.preemption import Preempted
    from longrope_jax.training.progress import Diverged

    try:
        if _MODE.value == "compile":
            return _compile()
        if _MODE.value == "compare":
            return print(f"report: {write_comparison(argv[1:], _WORKDIR.value or '.')}")
        processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        files.see_what_others_write()
        keep_programs(_CACHE.value, _WORKDIR.value)
        if _MODE.value == "generate":
            return _generate()
        _require(config=_CONFIG.value, workdir=_WORKDIR.value)
        until_done.enter_context(lock.hold(_WORKDIR.value))
        prepared = experiment.prepare(_CONFIG.value, _WORKDIR.value)
    except (ValueError, OSError, RuntimeError) as error:
        _fail(error)
    try:
        experiment.execute(*prepared)
    except (UnsupportedByFormat, Diverged, FloatingPointError, OSError) as error:
        _fail(error)
    except Preempted as saved:
        print(f"\n{saved}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _compile() -> None:
    import jax

    from longrope_jax.commands import compile

    _require(config=_CONFIG.value, workdir=_WORKDIR.value, topology=_TOPOLOGY.value)
    jax.config.update("jax_platforms", "cpu")  # with libtpu there, JAX would look for TPUs first
    compile.compile_experiment(_CONFIG.value, str(_TOPOLOGY.value), str(_WORKDIR.value))


def _generate() -> None:
    from longrope_jax.commands import generate
    from longrope_jax.model.decode import Sampling
    from longrope_jax.runtime.mesh import MeshSettings

    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    _require(prompt_file=_PROMPT_FILES.value)
    if _PRETRAINED.value:
        writer = generate.from_path(_PRETRAINED.value, _FACTORS.value, MeshSettings(_MESH.value))
    else:
        _require(config=_CONFIG.value, workdir=_WORKDIR.value)
        writer = generate.from_experiment(_CONFIG.value, _WORKDIR.value, _FACTORS.value, _MODEL.value)
    prompts, count = _PROMPT_FILES.value, _MAX_NEW_TOKENS.value
    generate.write(writer, prompts, count, sampling=sampling, seed=_SEED.value, switch=_SWITCH.value)


def _require(**given) -> None:
    missing = [f"--{name}" for name, value in given.items() if not value]
    if missing:
        raise ValueError(f"--mode={_MODE.value} needs {' and '.join(missing)}")


def keep_programs(directory: str | None, workdir: epath.PathLike | None) -> None:
    """Turns JAX's persistent compilation cache on; call it after the processes have joined and before anything runs.

    Process 0 writes and all read, so the directory has to be one that all of them see. Programs that compile within a
    second are not kept (`JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`), and a cache that can't be used costs a warning,
    not the run.

    Args:
        directory: a path, gs:// among them; "" for no cache; None for what JAX is configured with
            (`JAX_COMPILATION_CACHE_DIR`), else `compilation_cache` in the work directory where there are accelerators.
            On CPUs programs compile in seconds, and run only on the kind of processor they were compiled for.
        workdir: the work directory, if there is one.
    """
    import jax

    if directory is None:
        configured = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds it at run time
        if configured or workdir is None or jax.default_backend() == "cpu":
            return
        directory = os.path.join(os.fspath(workdir), "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", directory or None)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags with absl. A fault in the config, or in a flag, ends in one line and exit status 2.

    Raises:
        absl.flags.Error: arguments that are no flags.
    """
    if {"--help", "-h"} & set(argv):
        module = flags.FLAGS.find_module_defining_flag("workdir")  # its name depends on the command that started it
        print(f"{__doc__}\n{flags.FLAGS.module_help(module)}")
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1 and _MODE.value != "compare":
            raise flags.Error(f"unexpected arguments: {' '.join(rest[1:])}")
        return rest
    except Exception as error:
        if message := _error_in_config(error, argv):
            _fail(message)
        if isinstance(error, KeyError | AttributeError):
            inner: Exception = error
            while inner.args and isinstance(inner.args[0], Exception):  # ml_collections wraps one in another
                inner = inner.args[0]
            _fail(f"no such field in the config: {inner.args[0] if inner.args else inner}")
        if isinstance(error, flags.Error | TypeError | ValueError | OSError | ImportError):
            _fail(error)
        raise


def _error_in_config(error: BaseException | None, argv: list[str]) -> str:
    """Place and message of an error that the code of a config file raised, "" if it was raised elsewhere."""
    words = [word for argument in argv[1:] for word in argument.split("=", 1)]
    files = {os.path.abspath(word.split(":")[0]) for word in words if ".py" in word}
    while error is not None:
        if isinstance(error, SyntaxError):
            return f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}"
        frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.abspath(f.filename) in files]
        if frames:
            return f"{frames[-1].filename}, line {frames[-1].lineno}: {type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__
    return ""


def _fail(error: Exception | str) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def cli() -> None:
    """The console command `longrope-jax`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding lacks characters that a model writes
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    cli()
