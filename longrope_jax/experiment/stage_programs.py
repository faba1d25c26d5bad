"""The programs of each kind of stage, for shapes alone: what is compiled ahead of time, and its FLOPs.

They are lowered from the functions that the stages call, with the same shapes.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding

from longrope_jax.data.sequences import Batch
from longrope_jax.evaluation.evaluate import EvaluationSettings, window_stride
from longrope_jax.evaluation.perplexity import window_nll, window_starts, windows_at_once
from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.cache import CACHE_AXES, Cache, empty_cache, slots_for
from longrope_jax.model.decode import GREEDY, advance, chunk_for
from longrope_jax.model.flops import FORWARD, TRAINING, Flops, count_flops
from longrope_jax.model.sharding import partition_spec
from longrope_jax.rope import FactorTable, RopeFactors, unscaled
from longrope_jax.runtime.ahead_of_time import Program, bytes_on_device
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.candidates import Genes
from longrope_jax.search.gradient import make_optimizer as make_refinement_optimizer
from longrope_jax.search.gradient import step as refinement_step
from longrope_jax.search.gradient import variables_of
from longrope_jax.search.objective import fitting_candidates, rows_nll
from longrope_jax.search.settings import SearchSettings
from longrope_jax.training.finetune import FinetuneSettings
from longrope_jax.training.loop import LoopSettings
from longrope_jax.training.pretrain import PretrainSettings
from longrope_jax.training.step import init_params, init_state, make_optimizer, train_step

_ATTENTION_BACKWARD = 3.5
"""FLOPs of the backward kernels, in forward passes: seven products instead of two, as the kernel for the gradients of
queries and the one for keys both compute scores and gradients of weights."""
_ANSWER_TOKENS = 8  # roughly the longest answer


def pretrain_programs(settings: PretrainSettings, config: LlamaConfig, layout: Layout) -> list[Program]:
    """One training step."""
    return [_step(settings, config, layout, (config.original_length,), False, config.remat)]


def finetune_programs(settings: FinetuneSettings, config: LlamaConfig, layout: Layout) -> list[Program]:
    """One training step, and the evaluation on held-out documents, during which the optimizer's state uses memory."""
    is_mixed = settings.long_share < 1
    lengths = (config.original_length, settings.length) if is_mixed else (settings.length,)
    step = _step(settings, config, layout, lengths, settings.packed or is_mixed, settings.remat)
    if not settings.evaluate_every:
        return [step]
    times = -(-settings.steps // settings.evaluate_every)
    held_out = _windows(config, layout, settings.length, settings.held_out_documents, "held-out evaluation", times)
    optimizer_bytes = bytes_on_device(_state(settings, config, layout).opt_state)
    return [step, dataclasses.replace(held_out, additional_bytes=optimizer_bytes)]


def search_programs(settings: SearchSettings, config: LlamaConfig, layout: Layout) -> list[Program]:
    """For each length of the objective, the score of a batch of candidates on a batch of documents, the same on skipped
    positions, and a step of their gradient refinement; and the evaluation of the best candidate on held-out documents.
    """
    together = fitting_candidates(layout, settings.candidates_at_once, settings.documents_at_once)
    rows = together * settings.documents_at_once
    counts: dict[int, int] = {}
    for term in settings.terms.values():
        length = term.window(settings.target_length)
        blocks = -(-(term.documents or settings.documents) // settings.documents_at_once)
        counts[length] = counts.get(length, 0) + blocks
    space = settings.search_space(config)
    steps = settings.gradient.rounds * -(-settings.gradient.starts // together) * settings.gradient.steps
    candidates = settings.candidates(len(space.n_hat))
    factors = layout.abstract_replicated(_factors(config, rows if together > 1 else 1))

    def score(name: str, length: int, blocks: int) -> Program:
        def lower():
            return rows_nll.lower(Llama(config), _params(config, layout), factors, *_text(layout, rows, length))

        flops = count_flops(config, rows, length)
        return Program(name, lower, -(-candidates // together) * blocks, rows * length, flops, flops)

    programs = []
    for length, blocks in counts.items():
        programs.append(score(f"score of candidates at {length}", length, blocks))
        if settings.screening.share:
            skipped = len(settings.screening.positions(length))
            programs.append(score(f"screening at {skipped} of {length} positions", skipped, blocks))
        if settings.method in ("gradient", "hybrid"):
            share = steps * blocks // sum(counts.values())
            programs.append(_refinement(settings, config, layout, together, length, share))
    if count := settings.held_out_documents:
        programs.append(_windows(config, layout, settings.target_length, count, "held-out documents", settings.steps))
    return programs


def evaluate_programs(settings: EvaluationSettings, config: LlamaConfig, layout: Layout) -> list[Program]:
    """For each length, the score of a batch of windows."""
    longest = max(settings.lengths)
    programs = []
    for length in sorted(settings.lengths):
        window = settings.window(length)
        starts = window_starts(max(longest, window), window, window_stride(settings, config.original_length, window))
        windows = settings.documents * len(starts)
        name, methods = f"windows of {window}", len(settings.methods)
        programs.append(_windows(config, layout, window, windows, name, methods, settings.tokens_at_once))
    return programs


def retrieval_programs(settings: RetrievalSettings, config: LlamaConfig, layout: Layout) -> list[Program]:
    """At the longest length, whose cache is the largest: prefill of the prompt's last chunk, and one decoding step."""
    length = max(settings.lengths)
    prompts = len(settings.methods) * len(settings.places) * -(-settings.tries // settings.prompts_at_once)
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

        whole = count_flops(config, rows, length)  # the last tokens attend to twice the average number of tokens
        flops = Flops(whole.matrices * tokens / length, 2 * whole.attention * tokens / length)
        return Program(name, lower, calls, rows * tokens, flops, flops)

    chunk = chunk_for(length, settings.tokens_at_once)
    return [
        program(f"prefill of the last {min(chunk, length)} of {length} tokens", chunk, prompts * -(-length // chunk)),
        program(f"decoding a token after {length}", 1, prompts * _ANSWER_TOKENS),
    ]


def _step(
    settings: LoopSettings,
    config: LlamaConfig,
    layout: Layout,
    lengths: tuple[int, ...],
    is_packed: bool,
    remat: str,
) -> Program:
    """A training step on sequences of the longest, the last, of the lengths that the batch mixes."""
    model, length = Llama(dataclasses.replace(config, remat=remat)), lengths[-1]
    rows = layout.abstract_rows(settings.batch, length)
    batch = Batch(rows, rows, rows, rows if is_packed else None, layout.abstract_rows(settings.batch))  # type: ignore[arg-type]  # shapes
    table = layout.abstract_replicated(FactorTable.of({window: unscaled(config.head_dim) for window in lengths}))

    def lower():
        return train_step.lower(model, settings.accumulate, _state(settings, config, layout), batch, table)

    once, needed = (count_flops(config, settings.batch, length, passes) for passes in (FORWARD, TRAINING))
    executed = _executed(once, needed.matrices, remat)
    return Program(f"step at {length}", lower, settings.steps, settings.batch * length, needed, executed)


def _refinement(
    settings: SearchSettings, config: LlamaConfig, layout: Layout, together: int, length: int, calls: int
) -> Program:
    """One step of gradient refinement: the parameters are used, but get no gradient."""
    remat, rows = settings.gradient.remat, together * settings.documents_at_once
    model, space = Llama(dataclasses.replace(config, remat=remat)), settings.search_space(config)
    genes = Genes(
        np.full((together, config.head_dim // 2), space.low, np.float32),
        np.zeros(together, np.int32),
        np.ones(together, np.float32),
        np.zeros(together, np.int32),
    )
    variables, optimizer = variables_of(genes, space), make_refinement_optimizer(settings.gradient)
    small = layout.abstract_replicated((variables, optimizer.init(variables), genes, np.float32(1)))

    def lower():
        shares, text = layout.abstract_rows(rows, dtype=np.float32), _text(layout, rows, length)
        options = model, space, optimizer, settings.documents_at_once
        return refinement_step.lower(*options, _params(config, layout), *small, shares, *text)

    once = count_flops(config, rows, length)
    needed = Flops(2 * once.matrices, once.attention * (1 + _ATTENTION_BACKWARD))  # no gradient of the parameters
    executed = _executed(once, needed.matrices, remat)
    return Program(f"step of gradient refinement at {length}", lower, calls, rows * length, needed, executed)


def _executed(forward: Flops, matrices: float, remat: str) -> Flops:
    """FLOPs of forward and backward pass with what the backward pass recomputes.

    Args:
        forward: of a forward pass.
        matrices: of products with parameters, forward and backward, without recomputation.
    """
    recomputed = 0 if remat in ("none", "everything_saveable") else 1
    attention = 0 if remat == "attention_saveable" else recomputed
    return Flops(matrices + recomputed * forward.matrices, forward.attention * (1 + attention + _ATTENTION_BACKWARD))


def _text(layout: Layout, rows: int, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Weights of targets, tokens, targets and positions."""
    tokens = layout.abstract_rows(rows, length)
    return layout.abstract_rows(rows, length, dtype=np.float32), tokens, tokens, tokens


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
    sharding = None if layout.mesh is None else NamedSharding(layout.mesh, partition_spec(*CACHE_AXES))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def _factors(config: LlamaConfig, rows: int) -> RopeFactors:
    """One set of factors for each row."""
    return jax.tree.map(lambda x: np.broadcast_to(x, (rows, *np.shape(x))), unscaled(config.head_dim))
