import jax
import jax.numpy as jnp
import pytest
from etils import epath

from longrope_jax.runtime import profiling
from longrope_jax.runtime.profiling import ProfileSettings


@pytest.fixture
def calls(monkeypatch):
    """When traces begin and end, among the steps; a trace leaves one file."""
    events, folders = [], []

    def start(folder):
        folders.append(folder)
        events.append("start")

    def stop():
        events.append("stop")
        (epath.Path(folders[-1]) / "plugins").mkdir()
        (epath.Path(folders[-1]) / "plugins" / "trace.pb").write_text("trace")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    return events


def steps(events, numbers):
    for number in numbers:
        assert profiling.step("train", number, lambda number=number: events.append(number) or number) == number


def test_exactly_the_wanted_steps_are_traced(calls, tmp_path):
    with profiling.of_stage(ProfileSettings((3, 5)), "pretrain", epath.Path(tmp_path)):
        steps(calls, range(1, 8))
    assert calls == [1, 2, "start", 3, 4, "stop", 5, 6, 7]
    assert (tmp_path / "profile/pretrain/plugins/trace.pb").read_text() == "trace"


def test_a_run_that_goes_on_in_their_midst_traces_the_rest(calls, tmp_path):
    with profiling.of_stage(ProfileSettings((3, 6)), "pretrain", epath.Path(tmp_path)):
        steps(calls, range(5, 8))
    assert calls == ["start", 5, "stop", 6, 7]


def test_a_stage_that_ends_or_fails_before_the_last_keeps_what_there_is(calls, tmp_path):
    with pytest.raises(KeyError), profiling.of_stage(ProfileSettings((2, 9)), "search", epath.Path(tmp_path)):
        steps(calls, [1, 2])
        raise KeyError
    assert calls == [1, "start", 2, "stop"]
    assert (tmp_path / "profile/search/plugins/trace.pb").exists()
    steps(calls, [3])
    assert calls[-1] == 3  # and nothing is traced outside


@pytest.mark.parametrize("settings", [ProfileSettings(), ProfileSettings((1, 3), "search")])
def test_other_stages_are_left_alone(calls, tmp_path, settings):
    with profiling.of_stage(settings, "pretrain", epath.Path(tmp_path)):
        steps(calls, [1, 2, 3])
    assert calls == [1, 2, 3] and not list(tmp_path.iterdir())


def test_a_real_trace_is_there(tmp_path):
    square = jax.jit(lambda x: x @ x)
    with profiling.of_stage(ProfileSettings((1, 2)), "pretrain", epath.Path(tmp_path)):
        profiling.step("train", 1, lambda: square(jnp.ones((8, 8))))
    assert list((tmp_path / "profile/pretrain").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(steps=(3,)), r"steps = \(3,\) must be \(first, one after the last\)"),
        (dict(steps=(3, 3)), "must be"),
        (dict(steps=(0, 3)), "must be"),
        (dict(stage="search"), "stage = 'search' needs steps"),
    ],
)
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        ProfileSettings(**fields)


def test_a_stage_that_is_not_there():
    with pytest.raises(ValueError, match="stage = 'serach' must be one of config.stages"):
        ProfileSettings((1, 2), "serach").check_stages(("pretrain", "search"))
