"""LongRoPE for JAX and TPUs: extend a language model's context window by searched rotary rescale factors.

`import longrope_jax as lr` gives every name that a config or a notebook needs. A name is imported when it is first
used, so the import itself is quick.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "data.corpus": ("DataSettings", "Document"),
    "data.sources": ("read_documents",),
    "data.tokenizer": ("ByteTokenizer",),
    "data.windows": ("fixed_windows",),
    "evaluation.evaluate": ("EvaluationSettings", "Method", "published_methods"),
    "evaluation.factor_switching": ("nll_after_switch", "replacement_cost"),
    "evaluation.perplexity": ("compare", "nll_by_length", "perplexity"),
    "evaluation.retrieval": ("RetrievalSettings", "find_numbers"),
    "experiment": ("run",),
    "experiment.stages": ("ExportSettings", "LoadSettings", "TableSettings"),
    "interop": ("load_pretrained",),
    "interop.export": ("export_checkpoint", "fit_to_format"),
    "interop.factor_files": ("read_factors", "write_factors"),
    "model": ("Llama", "LlamaConfig"),
    "model.decode": ("complete",),
    "report.model_card": ("Card", "model_card"),
    "report.retrieval": ("retrieval_figure", "summarize_retrieval"),
    "report.tables": ("markdown_table",),
    "rope": ("FactorTable", "RopeFactors"),
    "runtime.mesh": ("Layout", "MeshSettings"),
    "runtime.profiling": ("ProfileSettings",),
    "search.find": ("find_factors",),
    "search.objective": ("ScreeningSettings", "TermSettings"),
    "search.settings": ("CmaEsSettings", "EvolutionSettings", "GradientSettings", "SearchSettings", "SeedSettings"),
    "search.space": ("N_HAT",),
    "settings": ("section",),
    "training.finetune": ("FinetuneSettings",),
    "training.pretrain": ("PretrainSettings", "train_from_scratch"),
    "training.step": ("OptimizerSettings",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = {"rope": "rope", "plots": "report.plots"}

__all__ = sorted([*_MODULE_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(f"longrope_jax.{_MODULES[name]}")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"longrope_jax.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'longrope_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
