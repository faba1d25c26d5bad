import dataclasses
import re
from functools import cache, partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.sharding import make_mesh
from longrope_jax.rope import RopeFactors, linear, ntk, stack, unscaled, yarn
from longrope_jax.runtime.collectives import RING, traffic

HEAD_DIM, HALF = 8, 4
VOCABULARY = 61
# A small base makes even the slowest pair turn noticeably within a few tokens.
SMALL = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=HEAD_DIM,
    original_length=64,
    rope_theta=100.0,
)
FACTORS = RopeFactors(np.float32([1.0, 1.3, 2.7, 4.0]), np.int32(5), np.float32(1.2))
TOKENS, TARGETS = np.random.default_rng(5).integers(0, VOCABULARY, (2, 2, 20)).astype(np.int32)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def parameter_shapes(config):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Llama(config).init, jax.random.key(0), tokens, unscaled(config.head_dim))["params"]


@cache
def make_params(config):
    """Of initialisation's scale, but with norms that are not all 1: swapping two of them must not go unnoticed."""
    rng = np.random.default_rng(11)

    def fill(path, leaf):
        if path[-1].key == "scale":
            return np.asarray(1 + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
        fan_in = leaf.shape[-1] if path[-1].key == "embedding" else leaf.shape[-2]
        return np.asarray(rng.standard_normal(leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, parameter_shapes(config))


def packed(*lengths):
    """Positions and segment ids of one sequence [T]: positions restart in every segment."""
    return np.concatenate([np.arange(n) for n in lengths]), np.repeat(np.arange(len(lengths)), lengths)


def batch(*sequences):
    return tuple(np.stack(leaves).astype(np.int32) for leaves in zip(*sequences, strict=True))


@partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, factors, positions=None, segment_ids=None):
    return Llama(config).apply({"params": params}, tokens, factors, positions, segment_ids)


@partial(jax.jit, static_argnums=0)
def nll_of(config, params, tokens, targets, factors, positions=None, segment_ids=None):
    arguments = (tokens, targets, factors, positions, segment_ids)
    return Llama(config).apply({"params": params}, *arguments, method="token_nll")


def exact_logits(config, params, tokens, factors, positions=None, segment_ids=None):
    return reference.llama_logits(
        params,
        tokens,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        lam=factors.lam,
        n_hat=int(factors.n_hat),
        mscale=float(factors.mscale),
        positions=positions,
        segment_ids=segment_ids,
    )


def mean_nll(config, params, factors):
    return nll_of(config, params, TOKENS, TARGETS, factors).mean()


@cache
def gradient_program(config):
    """Compiled once for all tests: (params, factors) -> mean nll, gradients with respect to both."""
    gradient = jax.value_and_grad(partial(mean_nll, config), argnums=(0, 1), allow_int=True)
    return jax.jit(gradient).lower(parameter_shapes(config), FACTORS).compile()


def exact_mean_nll(config, params, factors):
    return reference.token_nll(exact_logits(config, params, TOKENS, factors), TARGETS).mean()


def assert_close(got, wanted, relative=1e-5):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=relative, atol=relative * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("num_kv_heads", "tie_embeddings", "attention"),
    [(4, False, "dense"), (4, True, "blockwise"), (2, False, "blockwise"), (2, True, "dense")],
)
def test_logits_of_packed_sequences_agree_with_the_float64_reference(num_kv_heads, tie_embeddings, attention):
    """More than one block of the blockwise attention, start tokens, a temperature, positions that restart."""
    config = small(num_kv_heads=num_kv_heads, tie_embeddings=tie_embeddings, attention=attention)
    params = make_params(config)
    where = batch(packed(130, 150), packed(30, 240, 10))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 280)).astype(np.int32)
    wanted = exact_logits(config, params, tokens, FACTORS, *where)
    assert 1 < np.abs(wanted).max() < 10
    logits = logits_of(config, params, tokens, FACTORS, *where)
    assert logits.dtype == jnp.float32
    assert_close(logits, wanted)


@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
def test_nll_of_packed_sequences_agrees_with_the_float64_reference(tie_embeddings):
    config = small(tie_embeddings=tie_embeddings)
    params, where = make_params(config), batch(packed(8, 12), packed(5, 5, 10))
    nll = nll_of(config, params, TOKENS, TARGETS, FACTORS, *where)
    assert nll.dtype == jnp.float32
    assert_close(nll, reference.token_nll(exact_logits(config, params, TOKENS, FACTORS, *where), TARGETS))


def test_positions_default_to_the_order_of_the_tokens():
    params = make_params(SMALL)
    assert_close(logits_of(SMALL, params, TOKENS, FACTORS), exact_logits(SMALL, params, TOKENS, FACTORS))


def test_every_sequence_can_have_its_own_factors():
    params = make_params(SMALL)
    candidates = [FACTORS, RopeFactors(np.float32([1.0, 2.0, 2.0, 9.0]), np.int32(0), np.float32(0.9))]
    together = logits_of(SMALL, params, TOKENS, stack(candidates))
    for n, factors in enumerate(candidates):
        assert_close(together[n], logits_of(SMALL, params, TOKENS, factors)[n])
        assert_close(together[n], exact_logits(SMALL, params, TOKENS, factors)[n])


def test_a_token_changes_no_logits_before_it():
    params, where, changed = make_params(SMALL), batch(packed(20), packed(20)), 12
    other = TOKENS.copy()
    other[:, changed] = (other[:, changed] + 1) % VOCABULARY
    before, after = (logits_of(SMALL, params, tokens, FACTORS, *where) for tokens in (TOKENS, other))
    difference = np.abs(before - after).max(axis=-1)
    assert difference[:, :changed].max() == 0
    assert difference[:, changed:].min() > 1e-4


def test_a_token_changes_no_logits_in_another_segment():
    params, where = make_params(SMALL), batch(packed(8, 12), packed(8, 12))
    for changed in (slice(0, 8), slice(8, 20)):
        other = TOKENS.copy()
        other[:, changed] = (other[:, changed] + 1) % VOCABULARY
        before, after = (logits_of(SMALL, params, tokens, FACTORS, *where) for tokens in (TOKENS, other))
        difference = np.abs(before - after).max(axis=-1)
        assert np.delete(difference, np.arange(20)[changed], axis=1).max() == 0
        assert difference[:, changed].min() > 1e-4


def test_new_factors_and_positions_need_no_new_compilation():
    traced = []

    @jax.jit
    def run(params, tokens, factors, *where):
        traced.append(tokens.shape)
        return Llama(SMALL).apply({"params": params}, tokens, factors, *where)

    run_small = partial(run, make_params(SMALL), TOKENS)
    together, apart = batch(packed(20), packed(20)), batch(packed(8, 12), packed(5, 5, 10))
    scaled = [linear(HEAD_DIM, 4), ntk(HEAD_DIM, 4), yarn(HEAD_DIM, 4, 100.0, 64), jax.tree.map(jnp.asarray, FACTORS)]
    outs = [run_small(factors, *together) for factors in (unscaled(HEAD_DIM), *scaled)]
    outs.append(run_small(scaled[-1], *apart))
    assert (run._cache_size(), len(traced)) == (1, 1)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(outs, outs[1:], strict=False))

    run_small(FACTORS, *together)  # arrays of NumPy: another entry in the dispatcher's cache, the same program
    assert len(traced) == 1
    jax.eval_shape(run, make_params(SMALL), TOKENS[:, :10], FACTORS)  # a new shape
    assert len(traced) == 2


def test_gradients_agree_with_finite_differences_of_the_float64_reference():
    """With respect to lam and mscale, and to all parameters along a random direction."""
    config, params = SMALL, make_params(SMALL)
    _, (by_params, by_factors) = gradient_program(config)(params, FACTORS)

    step = 1e-5

    def slope(move):
        return (exact_mean_nll(config, *move(step)) - exact_mean_nll(config, *move(-step))) / (2 * step)

    lam = np.asarray(FACTORS.lam, np.float64)
    wanted = [slope(lambda h, i=i: (params, FACTORS.replace(lam=lam + h * np.eye(HALF)[i]))) for i in range(HALF)]
    assert np.abs(wanted).min() > 1e-5
    np.testing.assert_allclose(by_factors.lam, wanted, rtol=1e-3)

    mscale = float(FACTORS.mscale)
    wanted = slope(lambda h: (params, FACTORS.replace(mscale=mscale + h)))
    assert float(by_factors.mscale) == pytest.approx(wanted, rel=1e-4)

    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
    wanted = slope(lambda h: (jax.tree.map(lambda x, d: np.float64(x) + h * d, params, direction), FACTORS))
    products = jax.tree.map(lambda g, d: np.sum(np.asarray(g, np.float64) * d), by_params, direction)
    assert sum(jax.tree.leaves(products)) == pytest.approx(wanted, rel=1e-4)


def test_a_vmapped_population_equals_a_loop_in_value_and_gradient():
    lams = np.sort(np.random.default_rng(2).uniform(1, 8, (3, HALF)).astype(np.float32), axis=-1)
    population = RopeFactors(lams, np.int32([0, 4, 30]), np.float32([1.0, 1.1, 1.3]))
    params = make_params(SMALL)
    score = jax.value_and_grad(lambda factors: mean_nll(SMALL, params, factors), allow_int=True)
    values, gradients = jax.jit(jax.vmap(score))(population)
    for n in range(3):
        value, (_, alone) = gradient_program(SMALL)(params, jax.tree.map(lambda leaf, n=n: leaf[n], population))
        assert_close(values[n], value, 1e-6)
        assert_close(gradients.lam[n], alone.lam, 1e-4)
        assert_close(gradients.mscale[n], alone.mscale, 1e-4)


def test_training_memory_is_linear_in_length():
    config = small(remat="nothing_saveable")

    def compile_gradient(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        gradient = jax.value_and_grad(lambda *arguments: nll_of(config, *arguments).mean())
        return hlo.compile_only(gradient, parameter_shapes(config), tokens, tokens, FACTORS)

    short, long = 16_384, 32_768
    programs = {length: compile_gradient(length) for length in (short, long)}
    assert hlo.temporary_bytes(programs[long]) <= 2.05 * hlo.temporary_bytes(programs[short])
    for length, program in programs.items():
        assert hlo.largest_array(program) < length**2 // 10


@pytest.mark.parametrize("remat", ["nothing_saveable", "attention_saveable", "dots_with_no_batch_dims_saveable"])
def test_remat_saves_memory_and_leaves_loss_and_gradients_alone(remat):
    plain, saving = gradient_program(SMALL), gradient_program(small(remat=remat))
    wanted_nll, wanted = plain(make_params(SMALL), FACTORS)
    nll, got = saving(make_params(SMALL), FACTORS)
    assert_close(nll, wanted_nll, 1e-6)
    jax.tree.map(assert_close, (got[0], got[1].lam, got[1].mscale), (wanted[0], wanted[1].lam, wanted[1].mscale))
    assert hlo.temporary_bytes(saving) < 0.75 * hlo.temporary_bytes(plain)


def test_attention_that_is_kept_is_not_sent_around_again():
    """A third of what the ring does is then left out: 3 rounds of keys, values and positions a layer."""
    tokens, shapes = np.zeros((1, 256), np.int32), parameter_shapes(SMALL)

    def sent(remat):
        config = small(remat=remat)

        @jax.jit
        def gradient(params):
            nll = lambda p: Llama(config).apply({"params": p}, tokens, tokens, FACTORS, method="token_nll").mean()  # noqa: E731
            return jax.grad(nll)(params)

        return traffic(gradient.lower(shapes).compile().as_text())[RING]

    with jax.set_mesh(make_mesh(seq=4)):
        kept, again, all_kept = (sent(remat) for remat in ("attention_saveable", "nothing_saveable", "none"))
    shard = (2 * 2 * HEAD_DIM + 1) * 64 * 4  # two heads of keys and values, and positions; float32
    assert again.bytes - kept.bytes == SMALL.num_layers * 3 * shard and again.count - kept.count == 2 * 3 * 3
    assert kept == all_kept


def test_program_does_not_grow_with_the_number_of_layers():
    def program_size(layers):
        config = small(num_layers=layers, remat="nothing_saveable")
        gradient = jax.jit(jax.grad(lambda params: mean_nll(config, params, FACTORS)))
        return len(gradient.lower(parameter_shapes(config)).as_text())

    assert program_size(8) == pytest.approx(program_size(2), rel=0.02)


@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
def test_parameters_are_stacked_over_layers(tie_embeddings):
    config = small(num_layers=3, tie_embeddings=tie_embeddings)
    heads, kv_heads = 4 * HEAD_DIM, 2 * HEAD_DIM
    attention = {
        "query": (3, 32, heads),
        "key": (3, 32, kv_heads),
        "value": (3, 32, kv_heads),
        "output": (3, heads, 32),
    }
    mlp = {"gate": (3, 32, 48), "up": (3, 32, 48), "down": (3, 48, 32)}
    wanted = {
        "embed": {"embedding": (VOCABULARY, 32)},
        "layers": {
            "attention_norm": {"scale": (3, 32)},
            "attention": {name: {"kernel": shape} for name, shape in attention.items()},
            "mlp_norm": {"scale": (3, 32)},
            "mlp": {name: {"kernel": shape} for name, shape in mlp.items()},
        },
        "final_norm": {"scale": (32,)},
    }
    if not tie_embeddings:
        wanted["lm_head"] = (32, VOCABULARY)
    assert jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(config)) == wanted


def test_initial_layers_differ_and_initial_predictions_are_nearly_uniform():
    params = jax.jit(Llama(SMALL).init)(jax.random.key(0, impl="rbg"), TOKENS[:, :1], unscaled(HEAD_DIM))["params"]
    for leaf in jax.tree.leaves(params["layers"]["attention"]):
        assert np.abs(leaf[0] - leaf[1]).mean() > 0.5 * np.abs(leaf).mean()
    nll = reference.token_nll(exact_logits(SMALL, params, TOKENS, FACTORS), TARGETS).mean()
    assert abs(nll - np.log(VOCABULARY)) < 1


def test_bfloat16_compute_with_float32_parameters_gives_float32_logits_nearby():
    config = small(dtype="bfloat16")
    params = make_params(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameter_shapes(config))} == {jnp.dtype("float32")}
    low = logits_of(config, params, TOKENS, FACTORS)
    assert low.dtype == jnp.float32
    difference = np.abs(low - exact_logits(config, params, TOKENS, FACTORS))
    assert 1e-4 < difference.max() < 0.2  # so something was computed in bfloat16


@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
def test_with_bfloat16_compute_every_matrix_product_has_bfloat16_operands(tie_embeddings):
    config = small(dtype="bfloat16", tie_embeddings=tie_embeddings)
    program = logits_of.lower(config, parameter_shapes(config), TOKENS, FACTORS).as_text()
    operands = re.findall(r"dot_general.* : \((.*)\) ->", program)
    assert len(operands) == 10  # 4 projections, 2 in attention, 3 in the mlp, the head
    assert all(left_and_right.count("xbf16>") == 2 for left_and_right in operands)


def test_parameters_can_be_bfloat16():
    config = small(param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(parameter_shapes(config))} == {jnp.dtype("bfloat16")}
