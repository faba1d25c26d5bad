"""Small checkpoints to save, and a look at what is there."""

import jax.numpy as jnp

from longrope_jax.runtime.checkpoints import Checkpoints


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def save(directory, *steps, keep=2):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"params": {"x": jnp.full(2, step)}, "rest": {"y": jnp.ones(3)}}, {"step": step})


def saved_step(directory, step):
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest() == step
        arrays, record = checkpoints.restore(step)
    assert arrays["params"]["x"].tolist() == [step, step]
    return record == {"step": step}
