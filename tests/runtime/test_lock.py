"""One run at a time in a work directory, however the one before it ended."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import fast_compilation
import pytest
from etils import epath
from ml_collections import ConfigDict
from runtime.test_processes import free_address

from experiments import quickstart
from longrope_jax import experiment
from longrope_jax.runtime import lock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from longrope_jax.runtime import lock, processes

workdir, coordinator, count, index = sys.argv[1:]
if coordinator != "none":
    processes.join(coordinator, int(count), int(index))
with lock.hold(workdir):
    print("held", flush=True)
    sys.stdin.readline()
    processes.wait_for_all("end")
"""


def start(workdir, coordinator="none", count=1, index=0):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir), coordinator, str(count), str(index)],
        env=fast_compilation.environment(1),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_held(holder):
    """Reads on to where the program says so; processes that work together say other things before."""
    while line := holder.stdout.readline():
        if line == "held\n":
            return
    raise AssertionError(holder.communicate()[1])


def can_be_held(workdir):
    try:
        with lock.hold(workdir):
            return True
    except OSError:
        return False


def test_a_second_run_gets_the_holder_and_what_to_do(tmp_path):
    with lock.hold(tmp_path):
        message = (
            rf"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}, since 20.* UTC; wait for it"
        )
        with pytest.raises(OSError, match=message), lock.hold(tmp_path):
            pass
        assert not can_be_held(tmp_path)  # the one that was refused did not take it away
    assert can_be_held(tmp_path)


def test_nothing_is_left_behind(tmp_path):
    with pytest.raises(KeyError), lock.hold(tmp_path / "new" / "run"):
        raise KeyError
    assert list((tmp_path / "new").iterdir()) == []
    with lock.hold(tmp_path / "kept"):
        (tmp_path / "kept" / "result").touch()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["result"]


def test_a_killed_process_has_it_no_more(tmp_path):
    holder = start(tmp_path)
    wait_until_held(holder)
    with pytest.raises(OSError, match=f"process {holder.pid} on "), lock.hold(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / lock.NAME).exists()
    assert can_be_held(tmp_path)


def test_processes_of_one_run_share_it(tmp_path):
    coordinator = free_address()
    holders = [start(tmp_path, coordinator, 2, index) for index in range(2)]
    for holder in holders:
        wait_until_held(holder)
    with pytest.raises(OSError, match=f"process {holders[0].pid} on "), lock.hold(tmp_path):
        pass
    coordinator = free_address()
    others = [start(tmp_path, coordinator, 2, index) for index in range(2)]
    errors = [other.communicate(timeout=100)[1] for other in others]
    assert [other.returncode for other in others] == [1, 1]
    assert "is in use by process" in errors[0] and "the first process did not get its lock" in errors[1]
    for holder in holders:
        holder.stdin.write("\n")
        holder.stdin.close()
    assert [holder.wait(timeout=100) for holder in holders] == [0, 0]
    assert can_be_held(tmp_path)


def test_it_is_one_alone_however_often_it_changes_hands(tmp_path):
    """Whoever lets go removes the file, which another may just have opened."""
    inside, most, taken = [], [], []

    def take_turns():
        while len(taken) < 400:
            with contextlib.suppress(OSError), lock.hold(tmp_path):
                inside.append(1)
                most.append(len(inside))
                taken.append(1)
                inside.pop()

    threads = [threading.Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) >= 400 and max(most) == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1, 2]", b'{"pid": 1}', b"[" * 5000])
def test_a_holder_that_tells_nothing_is_another_process(tmp_path, content):
    with lock.hold(tmp_path):
        (tmp_path / lock.NAME).write_bytes(content)
        with pytest.raises(OSError, match="in use by another process"), lock.hold(tmp_path):
            pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", unsupported)
    assert can_be_held(tmp_path)
    assert "its file system has no locks" in caplog.text


def test_an_object_store_has_none(bucket):
    with lock.hold(bucket), lock.hold(bucket):
        assert not (epath.Path(bucket) / ".lock").exists()


def test_a_place_that_is_no_directory_is_reported(tmp_path):
    (tmp_path / "file").touch()
    message = f"work directory {tmp_path / 'file' / 'run'} can't be made"
    with pytest.raises(OSError, match=message), lock.hold(tmp_path / "file" / "run"):
        pass


def test_the_command_ends_with_one_line_where_another_run_is(tmp_path):
    command = [sys.executable, "-m", "longrope_jax.main", "--config=experiments/quickstart.py", f"--workdir={tmp_path}"]
    with lock.hold(tmp_path):
        done = subprocess.run(command, cwd=ROOT, env=fast_compilation.environment(1), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"error: work directory {tmp_path} is in use by process {os.getpid()}"
    )
    assert list(tmp_path.iterdir()) == []


def test_looking_at_a_work_directory_needs_no_lock(tmp_path):
    with lock.hold(tmp_path), pytest.raises(ValueError, match="has no finished stage"):
        experiment.reopen(quickstart.get_config(), tmp_path)


def test_a_bad_config_makes_no_work_directory(tmp_path):
    with pytest.raises(ValueError, match="must name the stages"):
        experiment.run(ConfigDict(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
