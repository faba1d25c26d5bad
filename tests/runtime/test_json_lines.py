import pytest
from etils import epath

from longrope_jax.runtime import json_lines, processes

SOME = [
    {"stage": "pretrain", "step": 1, "loss": 0.1 + 0.2},
    {"stage": "pretrain", "step": 2, "loss": 1e-300, "nested": {"list": [1, 2.5, None, True, "x"]}},
    {"stage": "search", "step": 1, "text": 'lines\nand "quotes", ünï 日本語\u2028end'},
]


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "some.jsonl"


def cut_off(path, text='{"stage": "search", "st'):
    with path.open("a") as file:
        file.write(text)


def test_no_file_is_no_records(path):
    assert json_lines.read(path) == []


def test_records_come_back_as_they_were_in_order(path):
    json_lines.append(path, SOME)
    assert json_lines.read(path) == SOME


def test_append_adds_at_the_end(path):
    for record in SOME:
        json_lines.append(path, [record])
    json_lines.append(path, [])
    assert json_lines.read(path) == SOME


def test_one_line_a_record(path):
    json_lines.append(path, iter(SOME))
    assert path.read_text().count("\n") == len(SOME)
    assert path.read_text().endswith("}\n")


def test_keep_forgets_the_others(path):
    json_lines.append(path, SOME)
    json_lines.keep(path, lambda record: record["stage"] == "search" or record["step"] <= 1)
    assert json_lines.read(path) == [SOME[0], SOME[2]]


def test_keep_may_forget_everything(path):
    json_lines.append(path, SOME)
    json_lines.keep(path, lambda record: False)
    assert json_lines.read(path) == []
    json_lines.append(path, SOME[:1])
    assert json_lines.read(path) == SOME[:1]


def test_keep_without_a_file_makes_none(path):
    json_lines.keep(path, lambda record: True)
    assert not path.exists()


@pytest.mark.parametrize("text", ["{", '{"stage": "search", "st', '{"stage": "search", "step": 3}'])
def test_a_last_line_cut_off_is_ignored(path, text):
    json_lines.append(path, SOME)
    cut_off(path, text)
    assert json_lines.read(path) == SOME


@pytest.mark.parametrize("text", ["{", '{"stage": "search", "st', '{"stage": "search", "step": 3}'])
def test_keep_removes_a_last_line_cut_off_so_that_appending_works_again(path, text):
    json_lines.append(path, SOME[:2])
    complete = path.read_text()
    cut_off(path, text)
    json_lines.keep(path, lambda record: True)
    assert path.read_text() == complete
    json_lines.append(path, SOME[2:])
    assert json_lines.read(path) == SOME


def test_a_file_of_nothing_but_a_cut_off_line(path):
    cut_off(path)
    assert json_lines.read(path) == []
    json_lines.keep(path, lambda record: True)
    assert path.read_text() == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"stage": "search"', "Expecting"),
        (b"[1]", "must hold a JSON object, not"),
        (b'{"step": 3}', "'stage' is missing"),
        (b'{"stage": "search", "step": "3"}', "step = '3' must be a whole number"),
        (b'{"stage": "search", "step": true}', "step = True must be a whole number"),
        (b"\xff\xfe", "decode"),
        (b"[" * 100_000, "recursion"),
        (b"", "Expecting value"),
    ],
)
def test_a_damaged_line_is_named(path, line, message):
    json_lines.append(path, SOME)
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    for read in (lambda: json_lines.read(path, {"step": int}), lambda: json_lines.keep(path, bool, {"step": int})):
        with pytest.raises(OSError, match=rf"{path} is damaged: line 4: .*{message}.*; without that line"):
            read()


def test_other_processes_read_and_do_not_write(path, monkeypatch):
    json_lines.append(path, SOME)
    complete = path.read_text()
    monkeypatch.setattr("jax.process_index", lambda: 1)
    json_lines.append(path, SOME)
    json_lines.keep(path, lambda record: False)
    processes.write_text(path, "")
    assert path.read_text() == complete
    assert json_lines.read(path) == SOME
