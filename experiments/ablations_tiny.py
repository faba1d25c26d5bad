"""LongRoPE's ablations on the quickstart's model: one report with a table for each table of the paper.

    make ablations
    python -m longrope_jax.main --config=experiments/ablations_tiny.py --workdir=runs/ablations

The model is byte-level with 0.57M parameters and L = 128; the text is the embedded corpus. Searches see only search
documents. Every table uses evaluation documents that training and search have not seen, and the same tokens at all
lengths:

    evaluate_table1_methods            search against the published methods, not fine-tuned, at 2L, 4L and 8L
    evaluate_table11_forms             lambda alone, and lambda with start tokens, against PI, at 4L and 8L
    evaluate_temperature               candidates scored with the temperature of the released code, at 8L
    evaluate_table10_recovery          a model fine-tuned at 8L, on short inputs, with and without recovery
    evaluate_table9_second_extension   the same model extended to 16L, 32L and 64L without more tuning

Table 2, PI and NTK with and without their best start tokens, is a search over seeds alone, on the same model:

    python experiments/ablations_tiny.py runs/ablations

It takes half an hour on two busy cores, half of it for pretraining. Every method has its own factors at every length
and the original rotation up to L, so the column of L is the control.
"""

import sys
from functools import partial

import numpy as np
from ml_collections import ConfigDict

import longrope_jax as lr

L = 128
METHODS = ("linear", "ntk", "yarn")
DOCUMENTS, LONG_DOCUMENTS = 64, 8
# The tables use the paper's algorithm, in the wider of two readings.
_as_published = partial(lr.EvolutionSettings.paper, reach=4)


def get_config() -> ConfigDict:
    """The experiment."""
    stages = {
        "pretrain": lr.PretrainSettings(
            steps=1300,
            batch=16,
            checkpoint_every=260,
            optimizer=lr.OptimizerSettings(learning_rate=5e-3, warmup_steps=50),
        ),
        **_first_searches(),
        **_first_tables(),
        **_first_evaluations(),
        "finetune_8x": lr.FinetuneSettings(
            length=8 * L,
            batch=4,
            steps=100,
            model="pretrain",
            factors="search_8x",
            checkpoint_every=50,
            evaluate_every=50,
            remat="none",
            optimizer=lr.OptimizerSettings(learning_rate=1.5e-3, schedule="linear", warmup_steps=20),
        ),
        **_recovery(),
        **_second_extension(),
    }
    config = ConfigDict()
    config.stages = tuple(stages)
    config.model = lr.section(lr.LlamaConfig.preset("tiny"))
    config.data = lr.section(lr.DataSettings())
    config.mesh = lr.section(lr.MeshSettings())
    config.profile = lr.section(lr.ProfileSettings())
    for name, settings in stages.items():
        config[name] = lr.section(settings)
    return config


def _first_searches() -> dict[str, lr.SearchSettings]:
    """The searches on the pretrained model."""
    common = dict(model="pretrain", documents=5, racing=0.99, held_out_documents=16)
    iterations = {2: 6, 4: 8, 8: 10}
    searches = {
        f"search_{scale}x": lr.SearchSettings(
            target_length=scale * L, evolution=_as_published(iterations=iterations[scale]), **common
        )
        for scale in (2, 4, 8)
    }
    for scale in (4, 8):
        searches[f"search_lambda_{scale}x"] = lr.SearchSettings(
            target_length=scale * L, n_hat=(0,), evolution=_as_published(iterations=iterations[scale]), **common
        )
    for scale in (2, 4, 8):
        searches[f"search_yarn_{scale}x"] = lr.SearchSettings(target_length=scale * L, method="yarn_grid", **common)
    temperature = lr.rope.longrope_mscale(8, L)
    searches["search_temperature_8x"] = lr.SearchSettings(
        target_length=8 * L,
        mscale=(temperature, temperature),
        evolution=_as_published(iterations=iterations[8]),
        **common,
    )
    return searches


def _first_tables() -> dict[str, lr.TableSettings]:
    """A factor table per method: its factors for every length, and the original rotation up to L."""
    tables = {method: _from_original((2, 4, 8), [method] * 3) for method in METHODS}
    tables["searched"] = _from_original((2, 4, 8), ["search_2x", "search_4x", "search_8x"])
    tables["yarn_tuned"] = _from_original((2, 4, 8), ["search_yarn_2x", "search_yarn_4x", "search_yarn_8x"])
    tables["temperature"] = _from_original((8,), ["search_temperature_8x"])
    tables["lambda"] = _from_original((4, 8), ["search_lambda_4x", "search_lambda_8x"])
    return {f"table_{name}": table for name, table in tables.items()}


def _from_original(scales, factors) -> lr.TableSettings:
    lengths = tuple(scale * L for scale in (1, *scales))
    return lr.TableSettings(lengths=lengths, factors=("original", *factors), model="pretrain")


def _first_evaluations() -> dict[str, lr.EvaluationSettings]:
    linear, ntk, yarn = (lr.Method(f"table_{method}", "pretrain") for method in METHODS)
    searched, unscaled = lr.Method("table_searched", "pretrain"), lr.Method("original", "pretrain")
    return {
        "evaluate_table1_methods": lr.EvaluationSettings(
            split="test",
            lengths=(L, 2 * L, 4 * L, 8 * L),
            documents=DOCUMENTS,
            methods={
                "unscaled": unscaled,
                "dynamic_ntk": lr.Method("dynamic_ntk", "pretrain"),
                "linear": linear,
                "ntk": ntk,
                "yarn": yarn,
                "yarn_tuned": lr.Method("table_yarn_tuned", "pretrain"),
                "longrope": searched,
            },
            compared=(("longrope", "yarn_tuned"), ("longrope", "yarn"), ("longrope", "ntk")),
        ),
        "evaluate_table11_forms": lr.EvaluationSettings(
            split="test",
            lengths=(L, 4 * L, 8 * L),
            documents=DOCUMENTS,
            methods={
                "linear": linear,
                "lambda_only": lr.Method("table_lambda", "pretrain"),
                "longrope": searched,
                "unscaled": unscaled,
            },
            compared=(("lambda_only", "linear"), ("longrope", "linear"), ("longrope", "lambda_only")),
        ),
        "evaluate_temperature": lr.EvaluationSettings(
            split="test",
            lengths=(L, 8 * L),
            documents=DOCUMENTS,
            methods={
                "longrope": searched,
                "with_temperature": lr.Method("table_temperature", "pretrain"),
                "unscaled": unscaled,
            },
            compared=(("with_temperature", "longrope"),),
        ),
    }


def _recovery() -> dict[str, lr.SearchSettings | lr.TableSettings | lr.EvaluationSettings]:
    """Short inputs of the fine-tuned model."""
    short = dict(model="finetune_8x", documents=20, documents_at_once=20, upper_bound=4.0)
    few = _as_published(iterations=6)
    return {
        "search_recovery_1x": lr.SearchSettings(target_length=L, evolution=few, **short),
        "search_recovery_2x": lr.SearchSettings(target_length=2 * L, evolution=few, **short),
        "table_recovered": lr.TableSettings(
            lengths=(L, 2 * L), factors=("search_recovery_1x", "search_recovery_2x"), model="finetune_8x"
        ),
        "table_tuned": lr.TableSettings(lengths=(8 * L,), factors=("search_8x",), model="finetune_8x"),
        "evaluate_table10_recovery": lr.EvaluationSettings(
            split="test",
            lengths=(L, 2 * L),
            documents=4 * DOCUMENTS,
            methods={
                "original": lr.Method("original", "pretrain"),
                "tuned_factors": lr.Method("table_tuned", "finetune_8x"),
                "short_factors": lr.Method("table_recovered", "finetune_8x"),
            },
            controls=("original",),
            compared=(("short_factors", "tuned_factors"), ("short_factors", "original"), ("tuned_factors", "original")),
        ),
    }


def _second_extension() -> dict[str, lr.SearchSettings | lr.TableSettings | lr.EvaluationSettings]:
    """The fine-tuned model at lengths beyond its fine-tuning."""
    # Fewer candidates and documents than a search should have, to save time.
    small = _as_published(population=24, mutations=8, crossovers=8, iterations=7)
    smallest = _as_published(population=16, mutations=6, crossovers=6, iterations=6)
    stages, lengths = {}, tuple(scale * L for scale in (8, 16, 32, 64))
    for scale, documents, evolution in ((16, 3, small), (32, 2, smallest), (64, 2, smallest)):
        stages[f"search_{scale}x"] = lr.SearchSettings(
            target_length=scale * L, model="finetune_8x", documents=documents, racing=0.99, evolution=evolution
        )
    others = ("linear", "yarn", "yarn_without_temperature")
    sources = {method: (method,) * 4 for method in others}
    sources["searched"] = ("search_8x", "search_16x", "search_32x", "search_64x")
    for name, factors in sources.items():
        stages[f"table_second_{name}"] = lr.TableSettings(lengths=lengths, factors=factors, model="finetune_8x")
    stages["evaluate_table9_second_extension"] = lr.EvaluationSettings(
        split="test",
        lengths=lengths,
        documents=LONG_DOCUMENTS,
        methods={
            **{method: lr.Method(f"table_second_{method}", "finetune_8x") for method in others},
            "longrope": lr.Method("table_second_searched", "finetune_8x"),
        },
        controls=(),
        compared=tuple(("longrope", method) for method in others),
    )
    return stages


def start_tokens(workdir: str) -> None:
    """Table 2: PI and NTK with the best n_hat on search documents, on evaluation documents."""
    from finished_quickstart import Quickstart  # beside this file, which a config need not find

    quickstart = Quickstart(workdir)
    print("| method | length | n_hat | without | with |\n| --- | --- | --- | --- | --- |")
    for method, make in (("linear", lr.rope.linear), ("ntk", lr.rope.ntk)):
        for scale in (2, 4):
            factors = make(quickstart.config.head_dim, scale)
            seeds = {f"n_hat_{n}": factors.replace(n_hat=np.int32(n)) for n in lr.N_HAT if n <= L}
            only_seeds = lr.EvolutionSettings(population=len(seeds), iterations=0)
            settings = lr.SearchSettings(
                target_length=scale * L, documents=20, documents_at_once=20, published=(method,), evolution=only_seeds
            )
            best = quickstart.search(settings, seeds).best()
            without, found = (quickstart.evaluate(which, scale * L, DOCUMENTS).ppl for which in (factors, best))
            print(f"| {method} | {scale * L} | {int(best.n_hat)} | {without:.2f} | {found:.2f} |", flush=True)


if __name__ == "__main__":
    start_tokens(sys.argv[1])
