"""What is wrong with a directory, by its manifest, in words."""

from longrope_jax.runtime.checkpoints import describe, difference


def test_the_first_thing_that_is_wrong_is_reported(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    found = describe(tmp_path)
    assert difference(found, found) is None
    assert difference(found, {"a": found["a"]}) == "b is missing"
    assert difference({"a": found["a"]}, found) == "b is not in the manifest"
    message = difference(found | {"a": [2, "x"]}, found)
    assert (
        message is not None
        and message.startswith("a has size and SHA-256 [1, 'ca978112")
        and "says [2, 'x']" in message
    )


def test_what_a_damaged_manifest_says_is_reported_by_its_beginning(tmp_path):
    (tmp_path / "a").write_text("a")
    message = difference({"a": [2**60] * 2000}, describe(tmp_path))
    assert message is not None and "says [1152921504606846976, " in message and len(message) < 500
    message = difference({"a" * 5000: [1, "x"]}, {})
    assert message is not None and len(message) < 2000
