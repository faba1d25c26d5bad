import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longrope_jax.rope import FactorTable, RopeFactors, linear, ntk, stack


def make_factors(lam=(1.0, 2.0, 3.0), n_hat=4, mscale=1.5):
    return RopeFactors(np.asarray(lam, np.float32), np.int32(n_hat), np.float32(mscale))


def make_population(**replaced):
    return stack([make_factors(), make_factors((1.0, 1.0, 5.0), 0, 1.0)]).replace(**replaced)


VIOLATIONS = {
    "lam nan": (make_factors((1, np.nan, 3)), "lam[1] = nan is not finite"),
    "lam infinite": (make_factors((1, 2, np.inf)), "lam[2] = inf is not finite"),
    "lam below 1": (make_factors((0.5, 2, 3)), "lam[0] = 0.5 is below 1"),
    "lam zero": (make_factors((0, 2, 3)), "lam[0] = 0.0 is below 1"),
    "lam falls": (make_factors((1, 3, 2)), "lam[2] = 2.0 is smaller than its predecessor"),
    "n_hat negative": (make_factors(n_hat=-3), "n_hat = -3 is not a number of tokens"),
    "mscale zero": (make_factors(mscale=0), "mscale = 0.0 is not a positive number"),
    "mscale negative": (make_factors(mscale=-1.5), "mscale = -1.5 is not a positive number"),
    "mscale nan": (make_factors(mscale=np.nan), "mscale = nan is not a positive number"),
    "mscale infinite": (make_factors(mscale=np.inf), "mscale = inf is not a positive number"),
    "no pairs": (make_factors(()), "lam has shape (0,)"),
    "lam a scalar": (make_factors(2.0), "lam has shape ()"),
    "n_hat batched alone": (make_factors(n_hat=[4, 4]), "n_hat has shape (2,); with lam (3,) it must be ()"),
    "mscale batched alone": (make_factors(mscale=[1, 1]), "mscale has shape (2,); with lam (3,) it must be ()"),
}

BATCHED_VIOLATIONS = {
    "lam nan": (make_population(lam=[[1, 2, 3], [1, np.nan, 3]]), "lam[1, 1] = nan is not finite"),
    "lam below 1": (make_population(lam=[[1, 2, 3], [1, 1, 0.75]]), "lam[1, 2] = 0.75 is below 1"),
    "lam falls": (make_population(lam=[[1, 2, 3], [5, 4, 6.0]]), "lam[1, 1] = 4.0 is smaller than its predecessor"),
    "n_hat negative": (make_population(n_hat=[4, -1]), "n_hat[1] = -1 is not a number of tokens"),
    "mscale zero": (make_population(mscale=[1.5, 0.0]), "mscale[1] = 0.0 is not a positive number"),
    "n_hat not batched": (make_population(n_hat=4), "n_hat has shape (); with lam (2, 3) it must be (2,)"),
    "mscale not batched": (make_population(mscale=1.0), "mscale has shape (); with lam (2, 3) it must be (2,)"),
}


@pytest.mark.parametrize(("factors", "message"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_check_names_leaf_index_and_value(factors, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        factors.check()


@pytest.mark.parametrize(("factors", "message"), BATCHED_VIOLATIONS.values(), ids=BATCHED_VIOLATIONS)
def test_check_names_the_candidate_too(factors, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        factors.check()


@pytest.mark.parametrize("factors", [make_factors(), make_factors((1, 1, 1), 0, 1), make_population()])
def test_check_returns_sensible_factors_without_a_warning(factors):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert factors.check(head_dim=6) is factors
        assert factors.check(monotone="warn") is factors


@pytest.mark.parametrize("falling", [make_factors((1, 3, 2)), make_population(lam=[[1, 2, 3], [1, 4, 3.5]])])
def test_check_can_warn_about_a_fall_instead(falling):
    where = re.escape("[1, 2] = 3.5" if np.ndim(falling.lam) == 2 else "[2] = 2.0")
    with pytest.warns(UserWarning, match=f"^lam{where} is smaller than its predecessor"):
        assert falling.check(monotone="warn") is falling


def test_only_falls_can_be_turned_into_warnings():
    with pytest.raises(ValueError, match="is below 1"):
        make_factors((1, 0.5, 2)).check(monotone="warn")


@pytest.mark.parametrize("factors", [make_factors(), make_population()])
@pytest.mark.parametrize("head_dim", [2, 4, 8, 128])
def test_check_knows_the_model(factors, head_dim):
    message = f"lam has 3 factors; a head dimension of {head_dim} needs {head_dim // 2}"
    with pytest.raises(ValueError, match=message):
        factors.check(head_dim)


def test_check_refuses_an_odd_head_dim():
    with pytest.raises(ValueError):
        make_factors().check(head_dim=7)


def test_check_refuses_part_of_a_token():
    with pytest.raises(ValueError):
        make_factors().replace(n_hat=1.5).check()


def test_leaves_are_lam_n_hat_mscale():
    factors = make_factors()
    lam, n_hat, mscale = jax.tree.leaves(factors)
    assert lam is factors.lam and n_hat is factors.n_hat and mscale is factors.mscale


def test_tree_map_gives_factors():
    doubled = jax.tree.map(lambda leaf: leaf * 2, make_factors())
    assert isinstance(doubled, RopeFactors)
    np.testing.assert_array_equal(doubled.lam, [2, 4, 6])
    assert (doubled.n_hat, doubled.mscale) == (8, 3)


def test_jit_takes_and_returns_factors():
    out = jax.jit(lambda factors: factors.replace(lam=factors.lam + 1))(make_factors())
    assert isinstance(out, RopeFactors)
    np.testing.assert_array_equal(out.lam, [2, 3, 4])
    assert (out.n_hat, out.mscale) == (4, 1.5)


def test_vmap_hands_out_single_candidates():
    shapes = []

    def widest(factors):
        shapes.append([leaf.shape for leaf in jax.tree.leaves(factors)])
        return jnp.max(factors.lam) * factors.mscale + factors.n_hat

    np.testing.assert_allclose(jax.vmap(widest)(make_population()), [3 * 1.5 + 4, 5])
    assert shapes == [[(3,), (), ()]]


def test_replace_leaves_the_original_alone():
    factors = make_factors()
    other = factors.replace(n_hat=np.int32(7))
    assert (factors.n_hat, other.n_hat) == (4, 7)
    assert other.lam is factors.lam and other.mscale is factors.mscale


def test_factors_are_frozen():
    with pytest.raises(AttributeError):
        make_factors().n_hat = 3


def test_stack_puts_candidates_along_a_leading_axis():
    candidates = [make_factors(), make_factors((1, 1, 5), 0, 1), make_factors((2, 2, 2), 1, 0.5)]
    population = stack(candidates).check(head_dim=6)
    assert [leaf.shape for leaf in jax.tree.leaves(population)] == [(3, 3), (3,), (3,)]
    assert [leaf.dtype for leaf in jax.tree.leaves(population)] == [np.float32, np.int32, np.float32]
    for i, candidate in enumerate(candidates):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], population)
        jax.tree.map(np.testing.assert_array_equal, one, candidate)


def test_stack_takes_what_methods_return():
    population = stack([linear(8, 4), ntk(8, 4)]).check(head_dim=8)
    np.testing.assert_array_equal(population.lam, [linear(8, 4).lam, ntk(8, 4).lam])
    np.testing.assert_array_equal(population.n_hat, [0, 0])


def test_repr_is_a_small_table():
    lines = repr(make_factors()).splitlines()
    assert [line.split() for line in lines] == [
        ["RopeFactors,", "lam", "[3]"],
        ["n_hat", "mscale", "lam", "first", "middle", "last"],
        ["4", "1.5", "1", "2", "3"],
    ]
    assert repr(stack([make_factors()] * 12)).splitlines()[-1].strip() == "(2 more)"
    table = FactorTable.of({128: make_factors(), 2097152: make_factors(n_hat=0)})
    assert [line.split()[:2] for line in repr(table).splitlines()[2:]] == [["128", "4"], ["2097152", "0"]]


def test_repr_has_no_need_of_values():
    described = []
    jax.jit(jax.vmap(lambda factors: described.append(repr(factors))))(make_population())
    assert "lam=" in described[0] and "float32[3]" in described[0]
    assert "float32" in repr(jax.eval_shape(lambda: make_factors()))
    assert repr(RopeFactors(None, 0, None)) == "RopeFactors(lam=None, n_hat=0, mscale=None)"
