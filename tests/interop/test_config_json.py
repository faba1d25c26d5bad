"""config.json: what it says of the architecture and the rotation, and everything that is wrong with it at once."""

import numpy as np
import pytest
from interop.test_pretrained import CONFIG, MODEL

from longrope_jax.interop.architectures import parse_config, parse_rotation

ONES, LONG = [1.0] * 4, [1.0, 2.0, 3.0, 4.0]
ORIGINAL = "original_max_position_embeddings"
SU = {"type": "su", "short_factor": ONES, "long_factor": LONG}
SPELLINGS = {
    "old": dict(rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 4.0}),
    "new": dict(rope_theta=None, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}),
    "the old one counts": dict(
        rope_theta=5000.0,
        rope_scaling={"type": "linear", "factor": 4.0},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "what is inside counts": dict(
        rope_theta=10000.0, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    ),
    "nothing is nothing": dict(
        rope_theta=5000.0, rope_scaling={"rope_type": None, "type": "linear", "factor": 4.0, "rope_theta": None}
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_of_the_rotation_mean_the_same(spelling):
    config, table = parse_config({**CONFIG, **SPELLINGS[spelling]})
    assert config.rope_theta == 5000.0 and config.original_length == 64
    np.testing.assert_array_equal(table.select(64).lam, [4.0] * 4)


LONGROPE = {
    "beside": {"rope_scaling": SU, ORIGINAL: 16},
    "inside": {"rope_scaling": {**SU, ORIGINAL: 16}},
    "beside counts": {"rope_scaling": {**SU, ORIGINAL: 32}, ORIGINAL: 16},
    "as Phi-3 once called it": {"rope_scaling": {**SU, "type": "yarn"}, ORIGINAL: 16},
}


@pytest.mark.parametrize("spelling", LONGROPE)
def test_longrope_switches_strictly_above_the_original_length(spelling):
    config, table = parse_config({**CONFIG, **LONGROPE[spelling]})
    assert config.original_length == 16
    np.testing.assert_array_equal(table.boundaries, [16, 64])
    np.testing.assert_array_equal(table.select(16).lam, ONES)
    np.testing.assert_array_equal(table.select(17).lam, LONG)
    np.testing.assert_allclose(table.factors.mscale, np.sqrt(1 + np.log(4) / np.log(16)), rtol=1e-6)


def test_what_a_config_need_not_say():
    without = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta", "hidden_act")
    config, _ = parse_config({name: value for name, value in CONFIG.items() if name not in without})
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings, config.rope_theta) == (4, 4, False, 10000.0)


def test_the_rotation_alone_needs_no_known_architecture():
    config = {name: CONFIG[name] for name in ("hidden_size", "num_attention_heads", "max_position_embeddings")}
    config |= {"architectures": ["PhiMoEForCausalLM"], "head_dim": 8, "rope_scaling": SU, ORIGINAL: 16}
    rotation = parse_rotation({**config, "rope_theta": 5000})
    assert (rotation.base, rotation.original_length) == (5000.0, 16)
    np.testing.assert_array_equal(rotation.table.factors.lam, [ONES, LONG])
    with pytest.raises(ValueError, match="partial_rotary_factor = 0.5 is not supported"):
        parse_rotation({**config, "partial_rotary_factor": 0.5})


WRONG = [
    (
        dict(architectures=["GemmaForCausalLM"]),
        r"architectures = \['GemmaForCausalLM'\] is not supported; known are Ll",
    ),
    (dict(architectures=[]), r"architectures = \[\] is not supported"),
    (dict(architectures="LlamaForCausalLM"), "architectures = 'LlamaForCausalLM' is not supported"),
    (dict(hidden_act="gelu"), "hidden_act = 'gelu' is not supported, only 'silu' is"),
    (dict(attention_bias=True), "attention_bias = True is not supported, only False is"),
    (dict(mlp_bias=True), "mlp_bias = True is not supported"),
    (dict(partial_rotary_factor=0.75), "partial_rotary_factor = 0.75 is not supported, only 1.0 is"),
    (dict(rope_parameters={"partial_rotary_factor": 0.75}), "partial_rotary_factor = 0.75 is not supported"),
    (dict(quantization_config={"bits": 4}), "not supported: quantised weights"),
    *[
        ({name: wrong}, f"^{name} = {wrong!r} must be a positive whole number$")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            ORIGINAL,
        )
        for wrong in ("24", 0, 2.5, True, 2**31)
    ],
    (
        dict(num_attention_heads=None, num_key_value_heads=None, head_dim=None),
        "^num_attention_heads = None must be [^;]*$",
    ),
    (dict(hidden_size=3, head_dim=None), "^head_dim = 0 must be"),
    *[(dict(head_dim=wrong), f"^head_dim = {wrong!r} must be a positive even number") for wrong in ("24", 0, 7, True)],
    (dict(head_dim=2**30), "^head_dim = 1073741824 must be .* at most 65536"),  # nobody has the memory
    (dict(num_key_value_heads=3), "num_heads = 4 is not a multiple of num_kv_heads = 3"),
    (dict(rms_norm_eps=None), "rms_norm_eps = None must be a positive number"),
    (dict(rms_norm_eps="1e-5"), "rms_norm_eps = '1e-5' must be a positive number"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps = nan must be a positive number"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings = 'false' must be true or false"),
    (dict(rope_theta="1e4"), "rope_theta = '1e4' must be a number above 1"),
    (dict(rope_theta=1), "rope_theta = 1 must be a number above 1"),
    (dict(rope_parameters=[1]), r"rope_parameters = \[1\] must be an object"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "one object for all layers"),
    (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type = 'dynamic' is not supported"),
    (dict(rope_scaling={"type": ["linear"]}), r"rope_type = \['linear'\] is not supported"),
    (dict(rope_scaling={"type": "linear"}), "factor = None must be a positive number"),
    (dict(rope_scaling={"type": "llama3", "factor": 2.0}), f"{ORIGINAL} = None must be a positive whole number"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        parse_config({**CONFIG, **change})


def test_all_that_is_wrong_is_reported_at_once_and_nothing_twice():
    wrong = dict(
        architectures=["GemmaForCausalLM"],
        hidden_act="gelu",
        attention_bias=True,
        num_hidden_layers=None,
        hidden_size=0,
        rms_norm_eps=-1,
        rope_scaling={"type": "linear", "partial_rotary_factor": 0.5},
        partial_rotary_factor=0.5,
        rope_theta=0,
    )
    with pytest.raises(ValueError) as error:
        parse_config({**CONFIG, **wrong})
    starts = ["architectures", "known are", "hidden_act", "attention_bias", "hidden_size", "num_hidden_layers"]
    starts += ["rms_norm_eps", "partial_rotary_factor", "rope_theta"]
    problems = str(error.value).split("; ")
    assert len(problems) == len(starts)
    for start, problem in zip(starts, problems, strict=True):
        assert problem.startswith(start)


def test_the_factors_are_checked_once_the_rest_is_right():
    wrong = dict(rope_scaling={**SU, "long_factor": [1.0]}, hidden_size=0)
    with pytest.raises(ValueError, match="^hidden_size = 0 [^;]*$"):
        parse_rotation({**CONFIG, **wrong, ORIGINAL: 16})
    with pytest.raises(ValueError, match="^long_factor = .* must be a list of 4 numbers"):
        parse_rotation({**CONFIG, **wrong, "hidden_size": 16, ORIGINAL: 16})


def test_a_sliding_window_that_never_matters_is_no_news(caplog):
    for window in (None, 64, 4096):
        assert parse_config({**CONFIG, "sliding_window": window})[0] == MODEL
    assert not caplog.records
    parse_config({**CONFIG, "sliding_window": 32})
    assert "sliding_window = 32 of 64" in caplog.text
