"""Float64 NumPy reference for the tests, written from the equations; it shares no code with the package.

Symbols: T tokens, B sequences, D head dimension, H query heads, K key/value heads, V vocabulary, N layers, E hidden,
M mlp. Pair i = 0..D/2-1 has the original frequency base^(-2i/D); lam [D/2] divides it; s = L'/L is the extension ratio.
Sources: LongRoPE (arXiv 2402.13753), LongRoPE2 (2502.20082), YaRN (2309.00071), the formulas of Transformers.
"""

import math

import numpy as np


def _f64(x):
    """Any array (float32, bfloat16, ...) as float64 of the same shape, an exact conversion."""
    return np.asarray(x).astype(np.float64)


# --- rotary angles -----------------------------------------------------------------------------------------------


def _long_angles(positions, lam, n_hat, base):
    """Unreduced angles [..., T, D/2] in long double: n * freq for n < n_hat, else n * freq / lam (LongRoPE eq. 3)."""
    n = np.asarray(positions).astype(np.longdouble)[..., None]
    lam = _f64(lam).astype(np.longdouble)
    half = lam.shape[-1]
    freq = np.power(np.longdouble(base), -np.arange(half).astype(np.longdouble) / np.longdouble(half))
    return np.where(n < n_hat, n * freq, n * (freq / lam))


def angles(positions, lam, n_hat=0, base=10000.0):
    """LongRoPE eq. 3 angles in radians, not reduced: positions [T], lam [D/2] -> float64 [T, D/2].

    A float64 near 2^21 is spaced 4.7e-10, so an unreduced angle is only that good; use cos_sin for the rotation.
    """
    return _long_angles(positions, lam, n_hat, base).astype(np.float64)


def cos_sin(positions, lam, n_hat=0, mscale=1.0, base=10000.0):
    """mscale * cos, mscale * sin of eq. 3: positions [T], lam [D/2] -> two float64 [T, D/2].

    The angle is formed and reduced mod 2 pi in long double and only the remainder is rounded to float64. With the
    80-bit x87 type (64-bit mantissa) the error at n = 2^21 is below 1e-12; where long double is plain float64 it is
    about 1e-9, still far below float32 resolution.
    """
    two_pi = 8 * np.arctan(np.longdouble(1))
    angle = _long_angles(positions, lam, n_hat, base)
    angle = (angle - two_pi * np.rint(angle / two_pi)).astype(np.float64)
    return mscale * np.cos(angle), mscale * np.sin(angle)


# --- rescale factors of the published methods: new inverse frequencies first, then lam = original / new -----------


def inv_freq(dim, base):
    """Inverse frequencies base^(-2i/D) -> [D/2]."""
    return 1.0 / (float(base) ** (np.arange(0, dim, 2, dtype=np.float64) / dim))


def lam_linear(dim, base, s):
    """Position interpolation, n -> n / s -> [D/2]."""
    return inv_freq(dim, base) / (inv_freq(dim, base) / s)


def lam_ntk(dim, base, s):
    """NTK-aware (bloc97): base becomes base * s^(D/(D-2)) -> [D/2]."""
    return inv_freq(dim, base) / inv_freq(dim, base * s ** (dim / (dim - 2)))


def lam_dynamic_ntk(dim, base, factor, length, original):
    """Dynamic NTK (Transformers): base * (f len / L - (f - 1))^(D/(D-2)), len = max(length, L) -> [D/2]."""
    length = max(length, original)
    grown = (factor * length / original) - (factor - 1)
    return inv_freq(dim, base) / inv_freq(dim, base * grown ** (dim / (dim - 2)))


def critical_dim(dim, base, original):
    """Theoretical critical dimension ceil((D/2) log_base(L / 2 pi)) (LongRoPE2) -> int."""
    return math.ceil(dim / 2 * math.log(original / (2 * math.pi)) / math.log(base))


def lam_ntk_critical(dim, base, s, original):
    """NTK with the base for which pair d_tcd is slowed by exactly s: base * s^(D/(2 d_tcd)) -> [D/2]."""
    new_base = base * s ** (dim / (2 * critical_dim(dim, base, original)))
    return inv_freq(dim, base) / inv_freq(dim, new_base)


def yarn_range(dim, base, original, beta_fast=32.0, beta_slow=1.0):
    """First and last pair of the YaRN ramp, as in Transformers: max(floor, 0), min(ceil, D - 1) -> two ints."""

    def pair_of(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    return max(math.floor(pair_of(beta_fast)), 0), min(math.ceil(pair_of(beta_slow)), dim - 1)


def lam_yarn(dim, base, s, original, beta_fast=32.0, beta_slow=1.0):
    """YaRN "NTK-by-parts": frequencies blended between freq (r = 1) and freq / s (r = 0) -> [D/2]."""
    low, high = yarn_range(dim, base, original, beta_fast, beta_slow)
    if low == high:
        high += 0.001
    r = 1.0 - np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    freq = inv_freq(dim, base)
    return freq / (freq / s * (1.0 - r) + freq * r)


def lam_llama3(dim, base, factor, original, low_freq_factor=1.0, high_freq_factor=4.0):
    """LLaMA-3.1 ("llama3" in Transformers): long waves / factor, short ones kept, a ramp between -> [D/2]."""
    freq = inv_freq(dim, base)
    new = np.empty_like(freq)
    for i, f in enumerate(freq):
        wavelength = 2 * math.pi / f
        if wavelength > original / low_freq_factor:
            new[i] = f / factor
        elif wavelength < original / high_freq_factor:
            new[i] = f
        else:
            smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            new[i] = (1 - smooth) * f / factor + smooth * f
    return freq / new


def mscale_yarn(s):
    """YaRN attention temperature 0.1 ln s + 1, and 1 for s <= 1 -> float."""
    return 0.1 * math.log(s) + 1.0 if s > 1 else 1.0


def mscale_su(s, original):
    """LongRoPE's released ("su") value sqrt(1 + ln s / ln L), and 1 for s <= 1 -> float."""
    return math.sqrt(1.0 + math.log(s) / math.log(original)) if s > 1 else 1.0


# --- the model ---------------------------------------------------------------------------------------------------


def rotate(x, cos, sin):
    """Half-split rotary: pair i is (x[i], x[i + D/2]); x [B, T, H, D], cos and sin [B, T, D/2] -> [B, T, H, D]."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q, k, v, positions, segment_ids=None):
    """Causal grouped-query attention, one segment at a time: q [B,T,H,D], k and v [B,T,K,D] -> [B,T,H,D]."""
    q, k, v, positions = _f64(q), _f64(k), _f64(v), np.asarray(positions)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    visible = positions[:, None, :] <= positions[:, :, None]  # [B, query, key]
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)
        visible = visible & (segment_ids[:, None, :] == segment_ids[:, :, None])
    out = np.empty_like(q)
    for h in range(heads):
        scores = np.einsum("btd,bsd->bts", q[:, :, h], k[:, :, h // group]) / math.sqrt(q.shape[-1])
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, :, h] = np.einsum("bts,bsd->btd", weights, v[:, :, h // group])
    return out


def rms_norm(x, scale, eps):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis: x [..., E], scale [E] -> [..., E]."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * _f64(scale)


def llama_logits(
    params,
    tokens,
    *,
    num_heads,
    num_kv_heads,
    head_dim,
    norm_eps,
    rope_theta,
    lam,
    n_hat=0,
    mscale=1.0,
    positions=None,
    segment_ids=None,
):
    """Pre-norm LLaMA with layers stacked on axis 0: tokens, positions, segment_ids [B, T] -> logits [B, T, V]."""
    tokens = np.asarray(tokens)
    b, t = tokens.shape
    positions = np.broadcast_to(np.arange(t), (b, t)) if positions is None else np.asarray(positions)
    cos, sin = cos_sin(positions, lam, n_hat, mscale, rope_theta)
    assert cos.shape == (b, t, head_dim // 2), cos.shape
    embedding, layers = _f64(params["embed"]["embedding"]), params["layers"]
    x = embedding[tokens]
    for n in range(np.shape(layers["attention_norm"]["scale"])[0]):
        att = {name: _f64(leaf["kernel"])[n] for name, leaf in layers["attention"].items()}
        mlp = {name: _f64(leaf["kernel"])[n] for name, leaf in layers["mlp"].items()}
        y = rms_norm(x, _f64(layers["attention_norm"]["scale"])[n], norm_eps)
        q = rotate((y @ att["query"]).reshape(b, t, num_heads, head_dim), cos, sin)
        k = rotate((y @ att["key"]).reshape(b, t, num_kv_heads, head_dim), cos, sin)
        v = (y @ att["value"]).reshape(b, t, num_kv_heads, head_dim)
        x = x + attention(q, k, v, positions, segment_ids).reshape(b, t, num_heads * head_dim) @ att["output"]
        y = rms_norm(x, _f64(layers["mlp_norm"]["scale"])[n], norm_eps)
        gate = y @ mlp["gate"]
        silu = gate * 0.5 * (1.0 + np.tanh(0.5 * gate))  # gate * sigmoid(gate), without overflow
        x = x + (silu * (y @ mlp["up"])) @ mlp["down"]
    x = rms_norm(x, params["final_norm"]["scale"], norm_eps)
    return x @ (_f64(params["lm_head"]) if "lm_head" in params else embedding.T)


def token_nll(logits, targets):
    """-log softmax(logits)[target], nothing shifted: logits [..., V], targets [...] -> [...]."""
    logits = _f64(logits)
    top = logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    return log_sum - np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
