"""Several processes of one run: `jax.distributed`, from flags or from the cluster's environment.

Process 0 alone writes files, and it decides where processes could see different things.
"""

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from longrope_jax import files
from longrope_jax.json_files import to_json


def join(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Connects this process with the others that run the experiment; call it before anything else uses JAX.

    Args:
        coordinator: "host:port" of process 0, or "auto": coordinator, count and index come from the environment (Cloud
            TPU, GKE, Slurm, Open MPI). None: a single process.
        count: how many processes.
        index: which of them this is, from 0.

    Raises:
        ValueError: the arguments contradict each other, or the environment has no cluster.
        RuntimeError: the other processes did not connect.
    """
    given = {"num_processes": count, "process_id": index}
    if coordinator is None or coordinator == "auto":
        if any(value is not None for value in given.values()):
            raise ValueError("num_processes and process_id need the coordinator's address, host:port")
        if coordinator == "auto":
            try:
                jax.distributed.initialize()
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    "coordinator = 'auto': no cluster found (Cloud TPU, GKE, Slurm, Open MPI); give host:port, "
                    f"num_processes and process_id: {error}"
                ) from None
        return
    if count is None or index is None:
        missing = [name for name, value in given.items() if value is None]
        raise ValueError(f"coordinator = {coordinator!r} needs {' and '.join(missing)} too")
    if not 0 <= index < count:
        raise ValueError(f"process_id = {index} must lie between 0 and num_processes - 1 = {count - 1}")
    if ":" not in coordinator:
        raise ValueError(f"coordinator = {coordinator!r} must be host:port")
    jax.distributed.initialize(coordinator, count, index)


def is_first() -> bool:
    """Whether this is process 0."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """A barrier for all processes, for example before they read files that one of them writes.

    Args:
        what: its name, the same in all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_of(condition: bool) -> bool:
    """Whether `condition` is true in any process; all processes must call it."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.asarray(condition)).any())


def share() -> tuple[int, int]:
    """(index, count) of this process, to divide work by."""
    return jax.process_index(), jax.process_count()


def progress_bar(*arguments: Any, disable: bool = False, **options: Any) -> tqdm:
    """The bar of tqdm that has these arguments, shown by process 0."""
    return tqdm(*arguments, dynamic_ncols=True, disable=disable or not is_first(), **options)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file from process 0; after a kill it has either its old content or all of the new.

    Raises:
        OSError: it can't be written, the disk may be full; it has its old content.
    """
    if is_first():
        files.write_whole(path, text.encode())


def write_json(path: epath.Path, content: Any) -> None:
    """The same for JSON, indented."""
    write_text(path, to_json(content, indent=1) + "\n")
