import json
import subprocess
import sys

import fast_compilation
import jax
import pytest

from longrope_jax.main import keep_programs

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from longrope_jax.main import keep_programs

counted = {}
def count(event, **_):
    counted[event.rsplit("/", 1)[-1]] = counted.get(event.rsplit("/", 1)[-1], 0) + 1
jax.monitoring.register_event_listener(count)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
keep_programs(sys.argv[1], None)
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).sum())
import json
print(json.dumps(counted))
"""


def counts(directory):
    """Hits and misses of a new process."""
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    done = subprocess.run(command, env=fast_compilation.environment(1), capture_output=True, text=True, check=True)
    counted = json.loads(done.stdout.splitlines()[-1])
    return counted.get("cache_hits", 0), counted.get("cache_misses", 0)


def test_a_second_process_compiles_nothing_anew(tmp_path):
    hits, misses = counts(tmp_path / "programs")
    assert hits == 0 and misses > 0
    assert counts(tmp_path / "programs") == (misses, 0)


@pytest.fixture
def configured():
    """What JAX is told while the test lasts."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    "backend, environment, flag, expected",
    [
        ("tpu", None, None, "gs://bucket/run/compilation_cache"),
        ("gpu", None, None, "gs://bucket/run/compilation_cache"),
        ("cpu", None, None, None),
        ("cpu", None, "somewhere", "somewhere"),
        ("tpu", None, "gs://bucket/all", "gs://bucket/all"),
        ("tpu", "of the environment", None, "of the environment"),
        ("tpu", "of the environment", "", None),
    ],
)
def test_where_programs_are_kept(configured, monkeypatch, backend, environment, flag, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jax.config.update("jax_compilation_cache_dir", environment)
    keep_programs(flag, "gs://bucket/run")
    assert configured() == expected


def test_without_a_work_directory_nothing_is_kept_unasked(configured, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    keep_programs(None, None)
    assert configured() is None
