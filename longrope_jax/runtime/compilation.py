"""Compiled programs kept on disk, so that a run which goes on elsewhere does not spend minutes on compiling again."""

import os

import jax
from etils import epath


def keep_programs(directory: str | None, workdir: epath.PathLike | None) -> None:
    """Turns JAX's persistent compilation cache on; call it after the processes have joined and before anything runs.

    Process 0 writes and all read, so the directory has to be one that all of them see. Programs that compile within a
    second are not kept (`JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`), and a cache that can't be used costs a warning,
    not the run.

    Args:
        directory: a path, gs:// among them; "" for no cache; None for what JAX was told otherwise
            (`JAX_COMPILATION_CACHE_DIR`), else `compilation_cache` in the work directory where there are accelerators.
            On CPUs programs compile in seconds, and are good for one make of processor only.
        workdir: the work directory, if there is one.
    """
    if directory is None:
        told = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds it at run time
        if told or workdir is None or jax.default_backend() == "cpu":
            return
        directory = os.path.join(os.fspath(workdir), "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", directory or None)
