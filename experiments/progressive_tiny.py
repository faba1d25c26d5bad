"""All of LongRoPE on two cores: extends 128 bytes of context to 8,192, on text in which the context matters.

    make progressive
    python -m longrope_jax.main --config=experiments/progressive_tiny.py:longrope_50 --workdir=runs/progressive

LongRoPE's recipe (sec. 3.3) on a byte-level model of 0.5M parameters with heads of 64, L = 128. Half of the documents
have key-value pairs that come back after up to 64L bytes (`data.pairs`). Pretrain at L; search factors for 8L;
fine-tune at 8L for some steps; search 64L on the tuned model, without further training; search L with a smaller maximum
of lambda, to recover short inputs; make a table of all factors by length; evaluate; export.

Every choice of LongRoPE has tuned YaRN as the alternative, so runs make a table of 2 x 2: `longrope_50` tunes for 50
steps with LongRoPE's factors, `yarn_50` with those of YaRN tuned on the same documents. Each is extended to 64L twice,
by a search and by tuned YaRN. `all` runs both, with 10, 50 and 200 steps; `progressive_table.py` compares them.
"""

from ml_collections import ConfigDict

import longrope_jax as lr

L = 128
LENGTHS = (L, 8 * L, 64 * L)
STEPS = (10, 50, 200)
CELLS = [f"{factors}_{steps}" for steps in STEPS for factors in ("longrope", "yarn")]
FACTORS = {"longrope": "search_8x", "yarn": "search_yarn_8x"}


def get_config(cell: str = "longrope_50") -> ConfigDict:
    """The experiment, for one of `CELLS` or "all"."""
    if cell not in (*CELLS, "all"):
        raise ValueError(f"experiments/progressive_tiny.py:{cell} must be all, {', '.join(CELLS)}")
    cells = CELLS if cell == "all" else [cell]
    pretrain = lr.PretrainSettings(
        steps=1200,
        batch=32,
        checkpoint_every=300,
        data="data_pretrain",
        optimizer=lr.OptimizerSettings(learning_rate=3e-3, warmup_steps=100),
    )
    stages = {"pretrain": pretrain, **searches("8x", "pretrain", target_length=8 * L)}
    methods = {"original": lr.Method("original", "pretrain")}
    for name in cells:
        factors, steps = name.split("_")
        tuned = f"finetune_{name}"
        stages[tuned] = finetune(8 * L, int(steps), FACTORS[factors])
        # Skipped positions decide which one of sixteen candidates is read at 64L.
        screening = lr.ScreeningSettings(share=1 / 16, reduction_factor=16)
        stages |= searches(f"64x_{name}", tuned, target_length=64 * L, documents=3, iterations=10, screening=screening)
        stages[f"search_1x_{name}"] = recovery(tuned)
        prefix = f"{name}_" if len(cells) > 1 else ""
        for extended, search in (("longrope", f"search_64x_{name}"), ("yarn_tuned", f"search_yarn_64x_{name}")):
            table = f"table_{name}_{extended}"
            sources = (f"search_1x_{name}", FACTORS[factors], search)
            stages[table] = lr.TableSettings(lengths=LENGTHS, factors=sources, model=tuned)
            methods[f"{prefix}{extended}"] = lr.Method(table, tuned)
    for steps in dict.fromkeys(name.split("_")[1] for name in cells):
        stages[f"finetune_original_{steps}"] = finetune(L, int(steps), "original")
        name = f"tuned_at_original_{steps}" if len(cells) > 1 else "tuned_at_original"
        methods[name] = lr.Method("original", f"finetune_original_{steps}")
    stages["evaluate"] = lr.EvaluationSettings(
        split="test",
        lengths=LENGTHS,
        documents=16,
        methods=methods,
        controls=tuple(name for name in methods if "original" in name),
    )
    stages["export"] = lr.ExportSettings(
        factors=f"table_{cells[0]}_longrope",
        model=f"finetune_{cells[0]}",
        allow_dropping_start_tokens=True,
        allow_dropping_lengths=True,
    )
    # A model learns to look pairs up from many that come back within its window.
    data = {"data": lr.DataSettings(pair_share=0.5, pair_density=0.7)}
    data["data_pretrain"] = lr.DataSettings(pair_share=0.9, pair_density=0.5, pair_distances=(16, 64))
    how = {"mesh": lr.MeshSettings(), "profile": lr.ProfileSettings()}
    sections = {"model": lr.LlamaConfig.preset("tiny", head_dim=64), **data, **how, **stages}
    config = ConfigDict({name: lr.section(settings) for name, settings in sections.items()})
    config.stages = tuple(stages)
    return config


def searches(name: str, model: str, iterations: int = 22, **changes) -> dict[str, lr.SearchSettings]:
    """Tuned YaRN, and LongRoPE's search, which starts from it and has the same documents."""
    same = dict(model=model, racing=0.9, **changes)
    search = lr.SearchSettings(
        ramps=128,
        seeds={"yarn_tuned": lr.SeedSettings(f"search_yarn_{name}")},
        evolution=lr.EvolutionSettings(iterations=iterations),
        **same,
    )
    return {f"search_yarn_{name}": lr.SearchSettings(method="yarn_grid", **same), f"search_{name}": search}


def recovery(model: str) -> lr.SearchSettings:
    """The search at L, for short inputs to the tuned model (sec. 3.3)."""
    evolution = lr.EvolutionSettings(iterations=4)
    return lr.SearchSettings(
        target_length=L, model=model, upper_bound=4.0, documents=20, documents_at_once=20, evolution=evolution
    )


def finetune(length: int, steps: int, factors: str) -> lr.FinetuneSettings:
    """As many tokens a step at every length."""
    return lr.FinetuneSettings(
        length=length,
        batch=32 * L // length,
        steps=steps,
        model="pretrain",
        factors=factors,
        checkpoint_every=100,
        remat="none",
        optimizer=lr.OptimizerSettings(learning_rate=1.5e-3, schedule="linear", warmup_steps=min(20, steps // 2)),
    )
