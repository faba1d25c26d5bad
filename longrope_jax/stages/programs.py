"""The programs that stages run, for shapes alone: what is compiled ahead of time, and what it has to compute.

They are lowered from the same functions, with the same shapes, that the stages call.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding

from longrope_jax.data.sequences import Batch
from longrope_jax.evaluation.perplexity import window_nll, window_starts, windows_at_once
from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.evaluation.run import EvaluationSettings, window_stride
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.arithmetic import FORWARD, TRAINING, Flops, count_flops
from longrope_jax.model.cache import CACHE_AXES, Cache, empty_cache, slots_for
from longrope_jax.model.decode import GREEDY, advance, chunk_for
from longrope_jax.model.sharding import partition_spec
from longrope_jax.rope import FactorTable, RopeFactors, unscaled
from longrope_jax.runtime.ahead_of_time import Program, bytes_on_device
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.objective import fitting_candidates, rows_nll
from longrope_jax.search.run import SearchSettings
from longrope_jax.training.finetune import FinetuneSettings
from longrope_jax.training.loop import LoopSettings
from longrope_jax.training.pretrain import PretrainSettings
from longrope_jax.training.step import init_params, init_state, make_optimizer, train_step

Programs = list[Program]

_ATTENTION_BACKWARD = 3.5
"""Forward passes worth of products in the backward kernels: seven instead of two, as those for the gradients of queries
and of keys both compute scores and gradients of weights."""
_ANSWER_TOKENS = 8  # about as many as an answer may take


def pretrain_programs(settings: PretrainSettings, config: LlamaConfig, layout: Layout) -> Programs:
    """A step."""
    return [_step(settings, config, layout, config.original_length, (config.original_length,), False, config.remat)]


def finetune_programs(settings: FinetuneSettings, config: LlamaConfig, layout: Layout) -> Programs:
    """A step, and the evaluation on held-out documents while the optimizer's state stays in memory."""
    is_mixed = settings.long_share < 1
    lengths = (config.original_length, settings.length) if is_mixed else (settings.length,)
    step = _step(settings, config, layout, settings.length, lengths, settings.packed or is_mixed, settings.remat)
    if not settings.evaluate_every:
        return [step]
    times = -(-settings.steps // settings.evaluate_every)
    held_out = _windows(config, layout, settings.length, settings.held_out_documents, "held-out evaluation", times)
    return [step, dataclasses.replace(held_out, beside=bytes_on_device(_state(settings, config, layout).opt_state))]


def search_programs(settings: SearchSettings, config: LlamaConfig, layout: Layout) -> Programs:
    """The score of the candidates that are taken at once, on the documents that are."""
    together = fitting_candidates(layout, settings.candidates_at_once, settings.documents_at_once)
    rows, length = together * settings.documents_at_once, settings.target_length
    batches = -(-settings.evolution.evaluations // together) * -(-settings.documents // settings.documents_at_once)
    factors = layout.abstract_replicated(_factors(config, rows if together > 1 else 1))
    tokens = layout.abstract_rows(rows, length)

    def lower():
        return rows_nll.lower(Llama(config), _params(config, layout), factors, tokens, tokens, tokens)

    flops = count_flops(config, rows, length)
    return [Program(f"score of candidates at {length}", lower, batches, rows * length, flops, flops)]


def evaluate_programs(settings: EvaluationSettings, config: LlamaConfig, layout: Layout) -> Programs:
    """A batch of windows of every length."""
    longest = max(settings.lengths)
    programs = []
    for length in sorted(settings.lengths):
        starts = window_starts(longest, length, window_stride(settings, config.original_length, length))
        windows = settings.documents * len(starts)
        name, arms = f"windows of {length}", len(settings.arms)
        programs.append(_windows(config, layout, length, windows, name, arms, settings.tokens_at_once))
    return programs


def retrieval_programs(settings: RetrievalSettings, config: LlamaConfig, layout: Layout) -> Programs:
    """At the longest length, whose cache is the largest: reading the end of the prompt, and writing a token."""
    length = max(settings.lengths)
    prompts = len(settings.arms) * len(settings.places) * -(-settings.tries // settings.prompts_at_once)
    rows = -(-settings.prompts_at_once // layout.row_shards) * layout.row_shards
    factors = layout.abstract_replicated(_factors(config, rows))
    integers, seed = partial(jax.ShapeDtypeStruct, dtype=np.int32), jax.ShapeDtypeStruct((), np.uint32)

    def program(name: str, tokens: int, calls: int) -> Program:
        def lower():
            arguments = (
                factors,
                _cache(config, layout, rows, length),
                *map(integers, [(rows, tokens), (rows,), (rows,)]),
            )
            return advance.lower(Llama(config), GREEDY, _params(config, layout), seed, *arguments)

        whole = count_flops(config, rows, length)  # the last tokens attend to twice as many as one does on average
        flops = Flops(whole.matrices * tokens / length, 2 * whole.attention * tokens / length)
        return Program(name, lower, calls, rows * tokens, flops, flops)

    chunk = chunk_for(length, settings.tokens_at_once)
    return [
        program(f"reading the last {min(chunk, length)} of {length} tokens", chunk, prompts * -(-length // chunk)),
        program(f"writing a token after {length}", 1, prompts * _ANSWER_TOKENS),
    ]


def _step(
    settings: LoopSettings,
    config: LlamaConfig,
    layout: Layout,
    length: int,
    lengths: tuple[int, ...],
    is_packed: bool,
    remat: str,
) -> Program:
    model = Llama(dataclasses.replace(config, remat=remat))
    rows = layout.abstract_rows(settings.batch, length)
    batch = Batch(rows, rows, rows, rows if is_packed else None, layout.abstract_rows(settings.batch))
    table = layout.abstract_replicated(FactorTable.of({window: unscaled(config.head_dim) for window in lengths}))

    def lower():
        optimizer = make_optimizer(settings.optimizer, settings.steps)
        return train_step.lower(model, optimizer, settings.accumulate, _state(settings, config, layout), batch, table)

    once, needed = (count_flops(config, settings.batch, length, passes) for passes in (FORWARD, TRAINING))
    everything_again = 0 if remat in ("none", "everything_saveable") else 1
    attention_again = 0 if remat == "attention_saveable" else everything_again
    executed = Flops(
        needed.matrices + everything_again * once.matrices,
        once.attention * (1 + attention_again + _ATTENTION_BACKWARD),
    )
    return Program(f"step at {length}", lower, settings.steps, settings.batch * length, needed, executed)


def _windows(
    config: LlamaConfig, layout: Layout, length: int, count: int, name: str, times: int, tokens_at_once: int = 8192
) -> Program:
    rows = windows_at_once(layout, length, count, tokens_at_once)
    tokens, factors = layout.abstract_rows(rows, length), layout.abstract_replicated(unscaled(config.head_dim))

    def lower():
        return window_nll.lower(Llama(config), _params(config, layout), factors, tokens, tokens, tokens)

    flops = count_flops(config, rows, length)
    return Program(name, lower, times * -(-count // rows), rows * length, flops, flops)


def _params(config: LlamaConfig, layout: Layout) -> dict:
    with layout.active():
        return layout.abstract(jax.eval_shape(partial(init_params, Llama(config), 0)))


def _state(settings: LoopSettings, config: LlamaConfig, layout: Layout):
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    with layout.active():
        return layout.abstract(jax.eval_shape(lambda: init_state(init_params(Llama(config), 0), optimizer)))


def _cache(config: LlamaConfig, layout: Layout, rows: int, length: int) -> Cache:
    with layout.active():
        shapes = jax.eval_shape(partial(empty_cache, config, rows, slots_for(length)))
    where = None if layout.mesh is None else NamedSharding(layout.mesh, partition_spec(*CACHE_AXES))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)


def _factors(config: LlamaConfig, rows: int) -> RopeFactors:
    """Those of so many rows, each its own."""
    return jax.tree.map(lambda x: np.broadcast_to(x, (rows, *np.shape(x))), unscaled(config.head_dim))
