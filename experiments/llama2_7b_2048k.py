"""LLaMA2-7B from 4k to 2048k tokens: LongRoPE in full (arXiv 2402.13753, sec. 3.3 and 4.1).

    python -m longrope_jax.main --config=experiments/llama2_7b_2048k.py --coordinator=auto \\
        --workdir=gs://BUCKET/llama2-2048k --config.load.path=gs://BUCKET/Llama-2-7b-hf \\
        --config.data.folder=gs://BUCKET/redpajama --config.data_pg19.tfds_dir=gs://BUCKET/tfds \\
        --config.data_proofpile.folder=gs://BUCKET/proofpile --config.data_books.folder=gs://BUCKET/books

The stages: search factors for 128k and 256k on the pretrained model; tune 400 steps at 128k, then 600 steps with the
factors of 256k; search 2048k on the tuned model; search 4k and 8k with a smaller maximum of lambda, to recover short
inputs; a table of all factors; perplexity on Proof-pile and PG19 (sliding windows, stride 256) and on books of two
million tokens (stride 256k above that length); passkeys from 4k to 2048k; export.

Slice: v5p:4x4x4 (64 chips) or v5e:8x16 (128). This command checks any other slice, without the slice:

    python -m longrope_jax.main --config=experiments/llama2_7b_2048k.py --workdir=DIR \\
        --mode=compile --topology=v5p:4x4x4

Expected time on v5p:4x4x4, from that report, not from a run (docs/results): 94 hours, of which fine-tuning takes 39 (54
and 197 s a step), the searches 48 (45 at 2048k), and the evaluation 7.

Published figures to compare with; perplexity unless stated otherwise:

* Proof-pile at 64k, tuned (table 3): 2.36; with PI 2.44, with YaRN 2.42;
* books, 8k to 2048k: 6.81 6.66 6.31 6.27 6.21 6.17 6.17 6.35 7.08; with YaRN for the second interpolation (table 9;
  here without its temperature) 6.39, 6.79 and 8.27 at 512k, 1024k and 2048k;
* Proof-pile at 4k (table 10): 4.51 before the recovery of short inputs, 3.85 after it;
* passkeys: 90 % and more at every length.

Text: RedPajama's long documents for fine-tuning, which fill sequences of 128k and 256k; PG19, with the validation split
for searches up to 256k and the test split for evaluation; Proof-pile; and a folder like Books3, of books as long as
2048k tokens, a fifth of them for the search. Each can be text files, array_record files or a TFDS dataset with its own
splits (`DataSettings`).
"""

from ml_collections import ConfigDict

import longrope_jax as lr

K = 1024
PAPER = lr.EvolutionSettings.paper()
HALVED = lr.EvolutionSettings.paper(population=32, mutations=8, crossovers=8)  # LongRoPE sec. 4.1, above 512k


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.stages = (
        "load",
        "search_128k",
        "search_256k",
        "finetune_128k",
        "finetune_256k",
        "search_2048k",
        "search_4k",
        "search_8k",
        "table",
        "table_without_recovery",
        "table_yarn",
        "evaluate_proofpile",
        "evaluate_pg19",
        "evaluate_books",
        "retrieval",
        "export",
    )
    config.mesh = lr.section(lr.MeshSettings(axes="tensor:4,seq:-1"))
    config.profile = lr.section(lr.ProfileSettings())
    config.load = lr.section(lr.LoadSettings(path="gs://BUCKET/Llama-2-7b-hf", dtype="bfloat16", preset="llama2_7b"))
    config.data = lr.section(lr.DataSettings(folder="gs://BUCKET/redpajama", shares=(0.99, 0.01, 0.0, 0.0)))
    config.data_pg19 = lr.section(lr.DataSettings(tfds="pg19", tfds_dir="gs://BUCKET/tfds"))
    config.data_proofpile = lr.section(lr.DataSettings(folder="gs://BUCKET/proofpile", shares=(0.0, 0.0, 0.0, 1.0)))
    config.data_books = lr.section(lr.DataSettings(folder="gs://BUCKET/books", shares=(0.0, 0.2, 0.0, 0.8)))
    _extend(config)
    _evaluate(config)
    return config


def _extend(config: ConfigDict) -> None:
    """LongRoPE sec. 3.3."""
    for length in (128, 256):
        config[f"search_{length}k"] = lr.section(
            lr.SearchSettings(target_length=length * K, model="load", documents=5, data="data_pg19", evolution=PAPER)
        )
    tuning = dict(
        batch=32,
        accumulate=32,
        checkpoint_every=50,
        log_every=5,
        evaluate_every=100,
        remat="attention_saveable",
        optimizer=lr.OptimizerSettings(learning_rate=2e-5, schedule="linear", warmup_steps=20, weight_decay=0.0),
    )
    config.finetune_128k = lr.section(
        lr.FinetuneSettings(length=128 * K, steps=400, model="load", factors="search_128k", **tuning)
    )
    config.finetune_256k = lr.section(
        lr.FinetuneSettings(length=256 * K, steps=600, model="finetune_128k", factors="search_256k", **tuning)
    )
    config.search_2048k = lr.section(
        lr.SearchSettings(
            target_length=2048 * K, model="finetune_256k", documents=3, data="data_books", evolution=HALVED
        )
    )
    for length in (4, 8):
        config[f"search_{length}k"] = lr.section(
            lr.SearchSettings(
                target_length=length * K,
                model="finetune_256k",
                upper_bound=4.0,  # the model was tuned with 80 times as much
                documents=20,
                documents_at_once=20,
                evolution=PAPER,
                data="data_pg19",
            )
        )
    lengths, searches = (4 * K, 8 * K, 256 * K, 2048 * K), ("search_4k", "search_8k", "search_256k", "search_2048k")
    config.table = lr.section(lr.TableSettings(lengths=lengths, factors=searches, model="finetune_256k"))
    config.table_without_recovery = lr.section(
        lr.TableSettings(lengths=lengths[2:], factors=searches[2:], model="finetune_256k")
    )
    config.table_yarn = lr.section(
        lr.TableSettings(
            lengths=lengths[2:], factors=("search_256k", "yarn_without_temperature"), model="finetune_256k"
        )
    )


def _evaluate(config: ConfigDict) -> None:
    tuned = {"longrope": lr.Method("table"), "without_short_recovery": lr.Method("table_without_recovery")}
    original = {"original": lr.Method("original", "load")}
    sliding = dict(stride=256, tokens_at_once=256 * K, methods=tuned | original, controls=("original",))
    lengths = tuple(length * K for length in (4, 8, 16, 32, 64, 128, 256))
    config.evaluate_proofpile = lr.section(
        lr.EvaluationSettings(lengths=lengths, split="test", documents=10, data="data_proofpile", **sliding)
    )
    config.evaluate_pg19 = lr.section(
        lr.EvaluationSettings(lengths=lengths[1:6], split="test", data="data_pg19", documents=10, **sliding)
    )
    config.evaluate_books = lr.section(
        lr.EvaluationSettings(
            split="test",
            lengths=tuple(length * K for length in (8, 16, 32, 64, 128, 256, 512, 1024, 2048)),
            stride=256 * K,
            tokens_at_once=256 * K,
            methods={"longrope": lr.Method("table"), "second_interpolation_yarn": lr.Method("table_yarn")},
            controls=("longrope",),
            documents=20,
            data="data_books",
        )
    )
    config.retrieval = lr.section(
        lr.RetrievalSettings(
            lengths=tuple(length * K for length in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)),
            methods={"longrope": lr.Method("table")},
            prompts_at_once=1,
            tokens_at_once=8 * K,
        )
    )
    config.export = lr.section(
        lr.ExportSettings(
            factors="table",
            model="finetune_256k",
            dtype="bfloat16",
            allow_dropping_start_tokens=True,
            allow_dropping_lengths=True,
            cost_lengths=(8 * K, 128 * K),
            data="data_pg19",
        )
    )
