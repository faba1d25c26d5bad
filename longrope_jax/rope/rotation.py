"""Positions and factors -> cos and sin, exact to the last bits of float32 over millions of tokens; applying them.

Why not `cos(n * theta / lam)` in float32: at n = 2^21 the product is rounded to 1/8 rad. Here the *frequency* is
turned into a fixed-point number of turns per token, n times which wraps around mod 1 for free in uint32 arithmetic,
so no digit that matters is ever rounded away, and R(m)^T R(n) depends on n - m alone. The division by lam is done in
integers as well: float tricks (double-float arithmetic) are at the mercy of what a compiler contracts or reorders,
integers are the same on every platform, on the host and under a trace.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from longrope_jax.rope.factors import RopeFactors
from longrope_jax.rope.methods import frequencies

_DIGITS = 8  # base-256 digits of a numerator
_NUMERATOR_BITS = 65  # its unit is 2^-65 turns: the largest frequency, 1/(2 pi), then fills 63 bits


def rotary_embedding(
    positions: Int[Array, "*batch T"], factors: RopeFactors, base: float = 10000.0
) -> tuple[Float[Array, "*batch T half"], Float[Array, "*batch T half"]]:
    """cos and sin of LongRoPE's angles (eq. 3), times mscale, in float32.

    Leading axes of positions and factors broadcast: positions [T] with a population's lam [P, D/2] give [P, T, D/2],
    positions [B, T] with one lam per sequence give [B, T, D/2]. Everything but `base` may be traced; the derivative
    with respect to lam and mscale is exact.

    Positions are tokens, below 2^31; factors at least 1/2. Error against float64 below 5e-7 (tests: 1e-6) at any
    position up to 2^21. Cost: O(T D/2), once a forward pass for all layers.
    """
    lam = jnp.asarray(factors.lam, jnp.float32)
    n_hat = jnp.asarray(factors.n_hat, jnp.int32)[..., None, None]
    mscale = jnp.asarray(factors.mscale, jnp.float32)[..., None, None]
    cos, sin = _rotation(base, lam[..., None, :], n_hat, positions[..., :, None])
    return cos * mscale, sin * mscale


def apply_rotary(
    x: Float[Array, "*batch T heads D"], cos: Float[Array, "*batch T half"], sin: Float[Array, "*batch T half"]
) -> Float[Array, "*batch T heads D"]:
    """Rotates the pairs (x_i, x_{i + D/2}) of every head, the half-split ("rotate half") layout of Hugging Face.

    RoFormer, arXiv 2104.09864, eq. 34, whose pairs are neighbours instead.

    Computed in float32, returned in the dtype of x.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rotation(base: float, lam: Array, n_hat: Array, positions: Array) -> tuple[Array, Array]:
    """cos, sin f32[..., T, D/2] from lam [..., 1, D/2], n_hat [..., 1, 1], positions [..., T, 1]."""
    head_dim = 2 * lam.shape[-1]
    original_high, original_low = _turns_per_token(jnp.ones_like(lam), head_dim, base)
    rescaled_high, rescaled_low = _turns_per_token(lam, head_dim, base)
    is_start = positions < n_hat
    high = jnp.where(is_start, original_high, rescaled_high)
    low = jnp.where(is_start, original_low, rescaled_low)
    phase = positions.astype(jnp.uint32) * high  # wraps: exactly the fraction of a turn, unit 2^-32 turns
    # As a signed number it lies in [-1/2, 1/2) turns, where float32 resolves it best. `low` adds at most n * 2^-32
    # turns.
    turns = jax.lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * 2.0**-32
    angle = (turns + positions.astype(jnp.float32) * low) * (2 * np.pi)
    return jnp.cos(angle), jnp.sin(angle)


@_rotation.defjvp
def _rotation_jvp(base, primals, tangents):
    """d angle / d lam = -n theta / lam^2 for the rescaled positions; integers above have no derivative of their own."""
    lam, n_hat, positions = primals
    theta = jnp.asarray(frequencies(2 * lam.shape[-1], base), jnp.float32)
    cos, sin = _rotation(base, *primals)
    slope = jnp.where(positions < n_hat, 0.0, -positions.astype(jnp.float32) * theta / (lam * lam))
    d_angle = slope * tangents[0]
    return (cos, sin), (-sin * d_angle, cos * d_angle)


def _turns_per_token(
    lam: Float[Array, "*batch half"], head_dim: int, base: float
) -> tuple[UInt[Array, "*batch half"], Float[Array, "*batch half"]]:
    """theta_i / (2 pi lam_i) in turns: a uint32 in units of 2^-32 turns, and the rest, a float32 in turns below 2^-32.

    With lam = m * 2^(e-23), m its 24-bit mantissa, the numerator theta / 2 pi, a constant of 64 bits known here, is
    divided by m digit by digit in base 256: every remainder is below 2^24, so remainder * 256 + digit fits in uint32.
    """
    turns = frequencies(head_dim, base) / (2 * np.pi)
    numerators = [int(t * 2.0**_NUMERATOR_BITS) for t in turns]
    digits = np.array([[n >> (8 * (_DIGITS - 1 - k)) & 0xFF for n in numerators] for k in range(_DIGITS)], np.uint32)

    bits = jax.lax.bitcast_convert_type(lam, jnp.uint32)
    mantissa = bits & 0x7FFFFF | 0x800000
    exponent = (bits >> 23).astype(jnp.int32) - 127

    remainder = jnp.zeros_like(mantissa)
    quotient = []
    # Three zero digits more make floor(numerator * 2^24 / m); its first three digits are 0 as the numerator is below
    # 2^63.
    for digit in [*digits, 0, 0, 0]:
        remainder = remainder << 8 | digit
        quotient.append(remainder // mantissa)
        remainder = remainder % mantissa
    high, low = (q[0] << 24 | q[1] << 16 | q[2] << 8 | q[3] for q in (quotient[3:7], quotient[7:11]))

    # The quotient counts 2^-(66 + e) turns; shifted right by 2 + e it counts 2^-64 turns. lam >= 1/2 makes the shift
    # >= 1.
    shift = jnp.clip(exponent + _NUMERATOR_BITS + 1 - 64, 1, 31).astype(jnp.uint32)
    low = low >> shift | high << (32 - shift)
    return high >> shift, low.astype(jnp.float32) * 2.0**-64
