"""Scalars over the course of a stage: one JSON object a line in metrics.jsonl, and the same for TensorBoard."""

import tensorboardX
from etils import epath

from longrope_jax.runtime import processes, records


class Metrics:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard/<stage>`, in process 0. A context manager.

    Args:
        start: the step to go on from; what a killed run wrote of this stage beyond it is forgotten.
    """

    def __init__(self, workdir: epath.Path, stage: str, start: int = 0):
        self._stage, self._path = stage, workdir / "metrics.jsonl"
        records.keep(self._path, lambda record: record["stage"] != stage or record["step"] <= start, {"step": int})
        # TensorBoard hides what was written beyond the purge step.
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard" / stage), purge_step=start + 1, write_to_disk=processes.is_first()
        )

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_):
        self._board.close()

    def write(self, step: int, **scalars: float) -> None:
        """One line: the stage, the step and the scalars."""
        scalars = {name: float(value) for name, value in scalars.items()}
        records.append(self._path, [{"stage": self._stage, "step": step, **scalars}])
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
