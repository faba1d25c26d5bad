"""LongRoPE in minutes on two cores: pretrains a byte-level LLaMA at 128 bytes and extends it to 1024.

    make quickstart
    python -m longrope_jax.main --config=experiments/quickstart.py --workdir=runs/quickstart

Builds the embedded corpus (the standard library's sources), pretrains 0.57M parameters, searches factors for 8L and
evaluates every method from L/2 to 8L on documents that training and search have not seen. It exports the extended model
for Transformers to `export/` in the work directory. Four minutes on two cores. Expect a perplexity of about 4.0 at L.
At 8L without fine-tuning, LongRoPE is 3 to 17 % below YaRN tuned on the same documents; NTK and PI are above 12 (six
models, docs/results/quickstart.md).
"""

from ml_collections import ConfigDict

import longrope_jax as lr


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.stages = ("pretrain", "search_yarn", "search", "evaluate", "table", "export")
    config.model = lr.section(lr.LlamaConfig.preset("tiny"))
    config.data = lr.section(lr.DataSettings())
    config.pretrain = lr.section(
        lr.PretrainSettings(
            steps=1300,
            batch=16,
            checkpoint_every=260,
            optimizer=lr.OptimizerSettings(learning_rate=5e-3, warmup_steps=50),
        )
    )
    # YaRN with the ramp and the scale that are best on the same documents: the baseline, and a seed of the search.
    config.search_yarn = lr.section(lr.SearchSettings(target_length=1024, documents=5, racing=0.9, method="yarn_grid"))
    config.search = lr.section(
        lr.SearchSettings(
            target_length=1024,
            documents=5,
            racing=0.9,
            ramps=128,
            seeds={"yarn_tuned": lr.SeedSettings("search_yarn")},
            evolution=lr.EvolutionSettings(iterations=22),
        )
    )
    searched = {"yarn_tuned": lr.Method("search_yarn"), "longrope": lr.Method("search")}
    config.evaluate = lr.section(
        lr.EvaluationSettings(
            lengths=(64, 128, 256, 512, 1024), methods=lr.published_methods() | searched, split="test"
        )
    )
    # The original rotation up to L, the searched factors beyond: the two sets that a Hugging Face folder can store.
    config.table = lr.section(lr.TableSettings(lengths=(128, 1024), factors=("original", "search")))
    config.export = lr.section(lr.ExportSettings(factors="table", allow_dropping_start_tokens=True))
    config.mesh = lr.section(lr.MeshSettings())
    config.profile = lr.section(lr.ProfileSettings())
    return config
