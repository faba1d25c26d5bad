"""LongRoPE for JAX and TPUs: extend a language model's context window by searched rotary rescale factors.

`import longrope_jax as lr` gives every name that a config or a notebook needs. A name is imported when it is first
used, so the import itself is quick.
"""

import sys

from etils import epy

__version__ = "0.1.0"

with epy.lazy_api_imports(globals()):
    from longrope_jax import rope
    from longrope_jax.data.corpus import DataSettings, Document
    from longrope_jax.data.sources import read_documents
    from longrope_jax.data.tokenizer import ByteTokenizer
    from longrope_jax.data.windows import fixed_windows
    from longrope_jax.evaluation.evaluate import EvaluationSettings, Method, published_methods
    from longrope_jax.evaluation.factor_switching import nll_after_switch, replacement_cost
    from longrope_jax.evaluation.perplexity import compare, nll_by_length, perplexity
    from longrope_jax.evaluation.retrieval import RetrievalSettings, find_numbers
    from longrope_jax.experiment import run
    from longrope_jax.experiment.stages import ExportSettings, LoadSettings, TableSettings
    from longrope_jax.interop import load_pretrained
    from longrope_jax.interop.export import export_checkpoint, fit_to_format
    from longrope_jax.interop.factor_files import read_factors, write_factors
    from longrope_jax.model import Llama, LlamaConfig
    from longrope_jax.model.decode import complete
    from longrope_jax.report import plots
    from longrope_jax.report.model_card import Card, model_card
    from longrope_jax.report.retrieval import retrieval_figure, summarize_retrieval
    from longrope_jax.report.tables import markdown_table
    from longrope_jax.rope import FactorTable, RopeFactors
    from longrope_jax.runtime.mesh import Layout, MeshSettings
    from longrope_jax.runtime.profiling import ProfileSettings
    from longrope_jax.search.find import find_factors
    from longrope_jax.search.objective import ScreeningSettings, TermSettings
    from longrope_jax.search.settings import (
        CmaEsSettings,
        EvolutionSettings,
        GradientSettings,
        SearchSettings,
        SeedSettings,
    )
    from longrope_jax.search.space import N_HAT
    from longrope_jax.settings import section
    from longrope_jax.training.finetune import FinetuneSettings
    from longrope_jax.training.pretrain import PretrainSettings, train_from_scratch
    from longrope_jax.training.step import OptimizerSettings

__all__ = sorted({*dir(sys.modules[__name__])} - {*globals()})
