"""A few hundred damaged files of every format; `make fuzz` reads very many more."""

import json
import random

import pytest
from fuzz import campaign, mutations
from fuzz.formats import FORMATS

INPUTS = 200


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_read_or_refused_by_name(name):
    counts, failures = campaign.run(name, range(INPUTS))
    assert not failures, "\n".join(f"{failure.number}: {failure.why}" for failure in failures[:10])
    assert sum(counts.values()) == INPUTS and counts["refused"] > INPUTS // 10, counts


def test_a_value_that_moves_into_itself_makes_no_endless_document():
    for seed in range(2000):
        tree = {"a": {"b": {"c": [{"d": 1}]}}}
        assert json.dumps(mutations.mutated_json(random.Random(seed), tree))


def test_the_same_number_is_the_same_input(tmp_path):
    made = []
    for _ in range(2):
        form, rng = FORMATS["config.json"], campaign.random.Random("config.json 3")
        made.append(form.mutate(rng, b'{"a": [1, 2, {"b": null}], "c": "text"}', ["../elsewhere"]))
    assert made[0] == made[1]
