import os
import signal
import threading

import jax.numpy as jnp
import pytest

from longrope_jax.runtime import preemption
from longrope_jax.runtime.checkpoints import Checkpoints


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def handler():
    """A handler of somebody else, who counts."""
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    yield received
    signal.signal(signal.SIGTERM, previous)


def test_sigterm_is_a_request(handler):
    with preemption.watch():
        assert not preemption.requested()
        terminate()
        assert preemption.requested()
        terminate()
        assert preemption.requested()
    assert not handler


def test_the_handler_before_is_restored_and_a_request_does_not_last(handler):
    with pytest.raises(KeyError), preemption.watch():
        terminate()
        raise KeyError
    terminate()
    assert handler == [1]
    with preemption.watch():
        assert not preemption.requested()


def test_outside_the_main_thread_it_changes_nothing(handler):
    def work():
        with preemption.watch():
            terminate()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handler == [1]
    assert not preemption.requested()


def test_a_second_sigterm_does_not_cut_a_save_short(tmp_path, handler):
    with preemption.watch(), Checkpoints(tmp_path / "stage") as checkpoints:
        terminate()
        checkpoints.save(1, {"params": {"x": jnp.ones(2)}}, {})
        terminate()
    with Checkpoints(tmp_path / "stage") as checkpoints:
        assert checkpoints.latest() == 1


def test_saving_does_not_disturb_the_count_by_which_processes_agree(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", asked.append)
    with preemption.watch(), Checkpoints(tmp_path / "stage") as checkpoints:
        preemption.requested()
        checkpoints.save(5000, {"params": {"x": jnp.ones(2)}}, {})
        checkpoints.latest()
        preemption.requested()
    assert asked == [asked[0], asked[0] + 1]


def test_the_message_says_what_is_saved():
    message = str(preemption.Preempted("pretrain", "step 120 is saved"))
    assert "pretrain" in message
    assert "step 120 is saved" in message
    assert "\n" not in message
