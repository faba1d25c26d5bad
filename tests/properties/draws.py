"""What hypothesis draws: factors, tables, documents, search spaces and candidates of them."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from longrope_jax.data.corpus import Document
from longrope_jax.rope import FactorTable, RopeFactors

HALF = 8  # pairs of a head, where a program is compiled for it
LARGEST = 4096.0


HALVES = st.integers(1, 64)
MSCALES = st.floats(2**-10, 64, width=32)
N_HATS = st.integers(0, 2**31 - 1)


def lams(half=HALVES):
    """Factors that never fall: any float32 from 1 on, neighbours that are equal or differ by a last bit among them."""
    number = st.one_of(
        st.floats(1, LARGEST, width=32),
        st.sampled_from([1.0, float(np.nextafter(np.float32(1), np.float32(2))), 8.0, LARGEST]),
    )
    return half.flatmap(
        lambda count: st.lists(number, min_size=count, max_size=count).map(
            lambda numbers: np.sort(np.asarray(numbers, np.float32))
        )
    )


@st.composite
def factor_sets(draw, half=HALVES, mscale=MSCALES, n_hat=N_HATS):
    """One set of factors."""
    return RopeFactors(draw(lams(half)), np.int32(draw(n_hat)), np.float32(draw(mscale)))


@st.composite
def tables(draw, most=5, **of_sets):
    """Factors by length."""
    half = st.just(draw(st.integers(1, 16)))
    boundaries = draw(st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=most, unique=True))
    return FactorTable.of({boundary: draw(factor_sets(half=half, **of_sets)) for boundary in boundaries})


@st.composite
def document_lists(draw, most=8, longest=60):
    """Documents in which every token of every document is another number."""
    lengths = draw(st.lists(st.integers(0, longest), max_size=most))
    starts = np.cumsum([0, *lengths])
    return [
        Document(f"document {number}", np.arange(start, start + length, dtype=np.uint16), length)
        for number, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


seeds = st.integers(0, 2**31 - 1)
sizes = arrays.arrays(np.int64, st.integers(0, 60), elements=st.integers(1, 40))
