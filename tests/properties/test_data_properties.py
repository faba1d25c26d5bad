"""Windows, pieces, bins and records, of any documents."""

import hypothesis.strategies as st
import numpy as np
import pytest
from etils import epath
from hypothesis import assume, given, settings
from properties.draws import document_lists, seeds, sizes

from longrope_jax import json_files
from longrope_jax.data.sequences import cut, pack, segments
from longrope_jax.data.windows import fixed_windows
from longrope_jax.runtime import json_lines


@settings(max_examples=150)
@given(document_lists(), st.integers(1, 20), st.integers(1, 60), seeds)
def test_windows_are_disjoint_stretches_taken_in_turns(documents, length, count, seed):
    fitting = {document.name: max(len(document.tokens) - 1, 0) // length for document in documents}
    if not sum(fitting.values()):
        with pytest.raises(ValueError, match="none of"):
            fixed_windows(documents, length, count, seed)
        return
    windows = fixed_windows(documents, length, count, seed)
    assert windows.tokens.shape == (min(count, sum(fitting.values())), length + 1)
    of = {document.name: document for document in documents}
    given_away = dict.fromkeys(fitting, 0)
    for row, name, start in zip(windows.tokens, windows.names, windows.starts, strict=True):
        np.testing.assert_array_equal(row, of[name].tokens[start : start + length + 1])
        # Nobody gives another window before all who can have given as many.
        assert all(given_away[name] <= others or others == fitting[who] for who, others in given_away.items())
        given_away[name] += 1
    targets = np.sort(windows.tokens[:, 1:].ravel())
    assert (np.diff(targets) > 0).all()  # every token is predicted once at most: all are different numbers
    fewer = fixed_windows(documents, length, max(1, count // 2), seed)
    np.testing.assert_array_equal(fewer.tokens, windows.tokens[: len(fewer.tokens)])


@settings(max_examples=150)
@given(sizes, st.integers(1, 80), seeds)
def test_every_piece_is_in_one_bin_and_no_two_bins_would_fit_into_one(pieces, room, seed):
    if len(pieces) and pieces.max() > room:
        with pytest.raises(ValueError, match="the largest piece has"):
            pack(pieces, room, seed)
        return
    bins = pack(pieces, room, seed)
    assert sorted(piece for members in bins for piece in members) == list(range(len(pieces)))
    filled = [int(pieces[members].sum()) for members in bins]
    assert all(0 < size <= room for size in filled)
    # Best fit opens a bin only for what fits nowhere, so all but one are more than half full.
    assert sum(2 * size <= room for size in filled) <= 1
    assert len(bins) <= max(1, 2 * -(-int(pieces.sum()) // room))
    assert bins == pack(pieces, room, seed)


@settings(max_examples=150)
@given(document_lists(), st.integers(2, 20))
def test_pieces_are_all_text_in_order_and_once(documents, length):
    pieces = cut(documents, length)
    assert ((pieces.sizes >= 2) & (pieces.sizes <= length)).all()
    found = [documents[d].tokens[start:stop] for d, start, stop in zip(*pieces, strict=True)]
    text = [document.tokens[1:-1] for document in documents]  # BOS and EOS are none
    np.testing.assert_array_equal(np.concatenate([[], *found]), np.concatenate([[], *text]))
    whole = segments(documents, length)
    assert (whole.sizes == length).all() and len(whole.starts) == (pieces.sizes == length).sum()


contents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
some_records = st.lists(
    st.dictionaries(st.text(max_size=5), contents, max_size=4).map(lambda record: {**record, "stage": "s"}), max_size=6
)


@settings(max_examples=80)
@given(some_records, some_records, st.data())
def test_records_come_back_wherever_a_kill_cuts_the_file(tmp_path_factory, first, second, data):
    path = epath.Path(tmp_path_factory.mktemp("records")) / "some.jsonl"
    json_lines.append(path, first)
    json_lines.append(path, second)
    written = [json_files.finite(record) for record in first + second]
    assert json_lines.read(path) == written
    content = path.read_bytes()
    assume(content)
    left = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(left)
    complete = written[: left.count(b"\n")]
    assert json_lines.read(path) == complete
    json_lines.keep(path, lambda record: True)
    json_lines.append(path, second)
    assert json_lines.read(path) == complete + written[len(first) :]
