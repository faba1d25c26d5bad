"""Checkpoints of a stage: arrays and a JSON record in one Orbax composite a step."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


class Checkpoints:
    """The steps of one stage, the newest `keep` of them, in `directory`. Leaving its context waits for writes.

    A step appears under its name only when it is complete, so a process killed while saving leaves the step before it.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        self.directory = epath.Path(directory)
        self._manager = ocp.CheckpointManager(
            self.directory.absolute(),
            item_names=("arrays", "record"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_):
        self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Saves a pytree of arrays and what JSON can hold; writes to disk in the background.

        Args:
            step: must be above `latest()`.
            arrays: any pytree; device arrays are copied before this returns.
            record: small things, such as a data iterator's state.
        """
        saved = self._manager.save(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
        )
        if not saved:
            raise ValueError(f"{self.directory}: step {step} is not above the newest, {self.latest()}")

    def restore(self, step: int, like: Any = None) -> tuple[Any, dict[str, Any]]:
        """The arrays and the record of a step.

        Args:
            like: a pytree of arrays or `jax.ShapeDtypeStruct`s to restore into, devices included; without it the
                arrays come as they were saved, in dicts.
        """
        abstract = None if like is None else jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        )
        return restored["arrays"], restored["record"]
