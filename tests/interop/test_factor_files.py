"""Factors from and to every kind of file, by the functions and by the command line."""

import json

import numpy as np
import pytest
from interop.test_export import LONG, SHORT, TABLE, assert_same_table
from interop.test_pretrained import CONFIG, MODEL

import longrope_jax as lr
from longrope_jax.commands import export
from longrope_jax.interop.architectures import Rotation
from longrope_jax.interop.factor_files import factors_for, read_factors, write_factors
from longrope_jax.rope import save_factors, save_table

SNIPPET = '{"rope_type": "longrope", "long_factor": [1, 2], "original_max_position_embeddings": 8}'
TABLE_FILE = (
    '{"format": "longrope_jax.factor_table", "entries": [{"boundary": 8, "lam": [1, 2], "n_hat": 0, "mscale": 1}], '
    '"metadata": {%s}}'
)
ONE = lr.FactorTable.of({512: LONG})


def run(*arguments):
    export.main(["factors", *map(str, arguments)])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_from_ours_to_a_config_and_back(tmp_path):
    source, snippet, back = tmp_path / "table.json", tmp_path / "rope.json", tmp_path / "back.json"
    save_table(source, TABLE, model={"rope_theta": 5e5, "original_length": 64})
    run(source, snippet, "--to=huggingface")
    content = json.loads(snippet.read_text())
    assert content["rope_parameters"]["rope_theta"] == 5e5 and content["max_position_embeddings"] == 512
    # As it is meant to be used: put into a config.json.
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": None, **content}))
    for path in (tmp_path / "config.json", tmp_path):
        found = read_factors(path)
        assert_same_table(found.table, TABLE)
        assert (found.base, found.original_length) == (5e5, 64)
    (tmp_path / "alone.json").write_text(json.dumps(content["rope_parameters"]))
    assert_same_table(read_factors(tmp_path / "alone.json").table, TABLE)
    # Phi-3's way: the lengths stand beside the factors.
    beside = {"max_position_embeddings": 512, "original_max_position_embeddings": 64, "rope_theta": 5e5}
    scaling = {key: content["rope_parameters"][key] for key in ("short_factor", "long_factor", "attention_factor")}
    (tmp_path / "beside.json").write_text(json.dumps({**beside, "rope_scaling": {"type": "longrope", **scaling}}))
    assert_same_table(read_factors(tmp_path / "beside.json").table, TABLE)
    run(tmp_path / "alone.json", back)
    found = read_factors(back)
    assert_same_table(found.table, TABLE)
    assert (found.base, found.original_length) == (5e5, 64)


def test_a_csv_of_one_of_the_sets_and_back(tmp_path, caplog):
    plain = lr.FactorTable.of({64: SHORT.replace(mscale=np.float32(1)), 512: LONG.replace(mscale=np.float32(1))})
    save_table(tmp_path / "table.json", plain)
    run(tmp_path / "table.json", tmp_path / "long.csv")
    run(tmp_path / "table.json", tmp_path / "short.csv", "--length=64")
    assert "long.csv has only the factors for 512 tokens, of those for 64, 512" in caplog.text
    for name, wanted in (("long", LONG), ("short", SHORT)):
        found = read_factors(tmp_path / f"{name}.csv", target_length=512, head_dim=8)
        np.testing.assert_array_equal(found.table.select(512).lam, wanted.lam)
    run(
        tmp_path / "long.csv", tmp_path / "rope.json", "--to=huggingface", "--target_length=512", "--original_length=64"
    )
    content = json.loads((tmp_path / "rope.json").read_text())
    assert content["rope_parameters"]["factor"] == 8 and "rope_theta" not in content["rope_parameters"]
    np.testing.assert_array_equal(np.float32(content["rope_parameters"]["short_factor"]), LONG.lam)


def test_one_set_knows_its_length_from_what_was_written_with_it(tmp_path):
    save_factors(tmp_path / "one.json", LONG, target_length=512, original_length=64)
    assert_same_table(read_factors(tmp_path / "one.json").table, ONE)
    assert_same_table(factors_for(tmp_path / "one.json", MODEL), ONE)
    assert_same_table(read_factors(tmp_path / "one.json", target_length=256).table, lr.FactorTable.of({256: LONG}))


def test_start_tokens_reach_a_csv_and_no_config_in_silence(tmp_path, capsys, caplog):
    save_factors(tmp_path / "one.json", LONG.replace(n_hat=np.int32(4), mscale=np.float32(1)), target_length=512)
    run(tmp_path / "one.json", tmp_path / "one.csv")
    assert int(read_factors(tmp_path / "one.csv", 512).table.factors.n_hat[0]) == 4
    to_config = (tmp_path / "one.json", tmp_path / "rope.json", "--to=huggingface", "--original_length=64")
    assert "start tokens (n_hat = 4)" in fails(capsys, *to_config)
    assert not (tmp_path / "rope.json").exists()
    run(*to_config, "--allow_dropping_start_tokens")
    assert "dropped start tokens (n_hat = 4)" in caplog.text
    assert_same_table(read_factors(tmp_path / "rope.json").table, lr.FactorTable.of({
        64: LONG.replace(mscale=np.float32(1)), 512: LONG.replace(mscale=np.float32(1))
    }))  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold a JSON object"),
        ("{", "Expecting property name"),
        ('{"rope_type": "yarn", "factor": 2}', "rope_type = 'yarn' needs .* its whole config.json"),
        ('{"rope_type": "longrope", "long_factor": [1, 2]}', "original_max_position_embeddings = None"),
        (SNIPPET, "factor = None must be 1 or more"),
        (SNIPPET.replace("8}", '8, "factor": 0.5}'), "factor = 0.5 must be 1 or more"),
        (SNIPPET.replace("8}", '8, "factor": "2"}'), "factor = '2' must be 1 or more"),
        (SNIPPET.replace("8}", '8, "factor": 2}'), "short_factor = None must be a list of 2 numbers"),
        ('{"rope_parameters": [1, 2]}', r"rope_parameters = \[1, 2\] must be an object"),
        (TABLE_FILE % '"original_length": "x"', "original_length = 'x' must be a positive whole number"),
        (TABLE_FILE % '"rope_theta": -1', "rope_theta = -1 must be a number above 1"),
        (TABLE_FILE % '"rope_theta": "abc"', "rope_theta = 'abc' must be a number above 1"),
        ('{"format": "longrope_jax.factors", "lam": [1, 2], "n_hat": 0, "mscale": 1}', "Give a target_length"),
        ('{"format": "longrope_jax.factor_table", "entries": [{"boundary": "x"}]}', "boundary = 'x'"),
        ('{"vocab_size": 3}', "rope_type = 'default' needs head dimension"),
        ('{"head_dim": 8}', "max_position_embeddings = None"),
    ],
)
def test_what_is_no_file_of_factors_is_reported_with_its_name(tmp_path, content, message):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(ValueError, match=rf"f\.json.*{message}"):
        read_factors(tmp_path / "f.json")


@pytest.mark.parametrize(
    "rope",
    [
        {"attention_factor": [2**31] * 2000},
        {"factor": [2**31] * 2000},
        {"original_max_position_embeddings": [2**31] * 2000},
        {"rope_type": [2**31] * 2000},
        [2**31] * 2000,
    ],
)
@pytest.mark.parametrize("around", [{}, CONFIG])
def test_a_long_value_is_reported_by_its_beginning(tmp_path, rope, around):
    if isinstance(rope, dict):
        rope = {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 64,
                "long_factor": [1.0] * 4, "short_factor": [1.0] * 4} | rope  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**around, "rope_scaling": rope}))
    with pytest.raises(ValueError, match="2147483648") as caught:
        read_factors(tmp_path / "config.json")
    assert len(str(caught.value)) < 1000


def test_a_long_target_length_is_reported_by_its_beginning(tmp_path):
    save_factors(tmp_path / "one.json", LONG, target_length=[2**31] * 2000)
    with pytest.raises(ValueError, match=r"target_length = \[2147483648.* must be a positive whole number") as caught:
        read_factors(tmp_path / "one.json")
    assert len(str(caught.value)) < 1000


def test_factors_of_another_model_are_refused(tmp_path, caplog):
    save_table(tmp_path / "other.json", TABLE, original_length=32)
    assert_same_table(factors_for(tmp_path / "other.json", MODEL), TABLE)
    assert "factors for a model of 32 tokens; this one was pretrained for 64" in caplog.text
    save_table(tmp_path / "table.json", TABLE, rope_theta=5e5)
    with pytest.raises(ValueError, match="factors for rope_theta = 500000; the model has 10000"):
        factors_for(tmp_path / "table.json", MODEL)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "head_dim": 16}))
    with pytest.raises(ValueError, match="lam has 8 factors; a head dimension of 8 needs 4"):
        factors_for(tmp_path / "config.json", MODEL)
    with pytest.raises(ValueError, match="'.*nowhere' do not exist"):
        factors_for(tmp_path / "nowhere", MODEL)


def test_what_a_destination_needs_to_know_is_asked_for(tmp_path, capsys):
    save_factors(tmp_path / "one.json", LONG, target_length=512)
    assert "Give an original_length" in fails(capsys, tmp_path / "one.json", tmp_path / "r.json", "--to=huggingface")
    assert "mscale of 1.125; write a .json" in fails(capsys, tmp_path / "one.json", tmp_path / "one.csv")
    assert "one.json exists; choose a new name" in fails(capsys, tmp_path / "one.json", tmp_path / "one.json")
    assert "stored in a .json file" in fails(capsys, tmp_path / "one.json", tmp_path / "a.txt")
    assert "stored in a .csv file" in fails(capsys, tmp_path / "one.json", tmp_path / "a.json", "--to=csv")
    assert "length = 64 chooses one set" in fails(capsys, tmp_path / "one.json", tmp_path / "a.json", "--length=64")
    assert "'-3' must be a positive whole" in fails(capsys, tmp_path / "one.json", tmp_path / "a.csv", "--length=-3")
    assert "rope_theta = -1" in fails(capsys, tmp_path / "one.json", tmp_path / "a.json", "--rope_theta=-1")
    save_table(tmp_path / "table.json", TABLE)
    assert "this file has its own" in fails(capsys, tmp_path / "table.json", tmp_path / "a.json", "--target_length=64")
    with pytest.raises(ValueError, match="kind = 'xml' must be one of longrope_jax, huggingface, csv"):
        write_factors(tmp_path / "x", Rotation(TABLE, None, None), "xml")
