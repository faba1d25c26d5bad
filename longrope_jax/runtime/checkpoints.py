"""Checkpoints of a stage: per step named pytrees of arrays and a JSON record, verified by a manifest when opened.

Orbax writes and restores them. It has no checksums of whole steps, so the SHA-256 manifests are ours.
"""

import hashlib
import itertools
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from longrope_jax import files, json_files
from longrope_jax.errors import beginning, shortened
from longrope_jax.files import is_remote
from longrope_jax.runtime import processes
from longrope_jax.runtime.preemption import Preempted

RECORD = "record"
MANIFESTS = "manifests"
DAMAGED = "damaged"

_CHUNK = 1 << 20  # bytes
# Orbax writes these two files when it renames a finished step to its number, which is after our manifest.
_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")

Manifest = dict[str, list[int | str]]
"""Path of a file relative to its step -> [size in bytes, SHA-256 in hex]."""


class Checkpoints:
    """The newest `keep` steps of one stage in `directory`; a context manager, which waits for writes at its end.

    A step gets its name only when it is complete, so a process killed while saving leaves the previous step.
    `directory/manifests/<step>.json` has the SHA-256 of every file of a step. Opening verifies the newest step; a
    damaged one is moved to `directory/damaged` with a warning, and the previous step is verified.

    All processes construct it and call its methods together. Only process 0 verifies, moves and writes manifests.

    Raises:
        OSError: from any method and at the end of the context, if a step could not be saved. It names the directory,
            the step and the last good step. If the context ends with another exception than `Preempted`, this one is
            only logged.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        self.directory = epath.Path(directory)
        if not is_remote(directory):  # `absolute` would take an address for a relative path
            self.directory = self.directory.absolute()
        try:
            if processes.is_first():
                _remove_unfinished(self.directory)
                _move_damaged_aside(self.directory)
        finally:
            processes.wait_for_all(f"checked {self.directory}")
        self._saving: int | None = None
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                lightweight_initialize=True,  # else a damaged file of an older, unused step raises here
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._write_manifest,
                    # Else a save that fails at once could make its directory later and block the next save.
                    create_directories_asynchronously=False,
                ),
            ),
        )
        self._verified = {self._manager.latest_step()}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _, exception: BaseException | None, __):
        try:
            try:
                self._wait_until_finished()
            finally:
                self._manager.close()
        except Exception as error:
            if exception is None or isinstance(exception, Preempted):  # which says that the step is saved
                raise
            logging.error("%s", error)

    def latest(self) -> int | None:
        """The newest complete step, or None. Waits for one that is being saved."""
        self._wait_until_finished()
        return self._manager.latest_step()

    def save(self, step: int, arrays: dict[str, Any], record: dict[str, Any]) -> None:
        """Saves pytrees of arrays and a JSON object; writes to disk in the background.

        Args:
            step: must be above `latest()`.
            arrays: pytrees by name, which can be restored separately; device arrays are copied before this returns.
            record: small things, such as a data iterator's state.

        Raises:
            ValueError: the step is not above the newest.
            OSError: an earlier step could not be saved.
        """
        newest = self.latest()
        if newest is not None and step <= newest:
            raise ValueError(f"{self.directory}: step {step} is not above the newest, {newest}")
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items, **{RECORD: ocp.args.JsonSave(record)}))
        except Exception as error:
            raise self._not_saved(error) from error

    def restore(self, step: int, like: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Pytrees of arrays and the record of a step.

        Args:
            like: for each name to read, a pytree of arrays or `jax.ShapeDtypeStruct` whose structure and shardings the
                result gets, whatever was saved (a struct without a sharding means the first device), or None for numpy
                arrays in dicts and lists. Without `like`: all names, as None.

        Raises:
            FileNotFoundError: there is no such step, or no such name in it.
            OSError: the step is damaged.
            ValueError: a pytree has another structure or other shapes than `like`.
        """
        self._wait_until_finished()
        path = self.directory / str(step)
        if step not in self._manager.all_steps():
            raise FileNotFoundError(f"{path}: there is no such step, only {sorted(self._manager.all_steps())}")
        if step not in self._verified and (damage := _damage(self.directory, step)):
            raise OSError(f"{path} is damaged: {damage}")
        if like is None:
            like = {item.name: None for item in path.iterdir() if item.is_dir() and item.name != RECORD}
        items = {name: ocp.args.StandardRestore(_template(path / name, tree)) for name, tree in like.items()}
        try:
            args = ocp.args.Composite(**items, **{RECORD: ocp.args.JsonRestore()})
            restored = self._manager.restore(step, args=args)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return {name: restored[name] for name in like}, restored[RECORD]

    def _write_manifest(self) -> None:
        """Orbax calls this in its own thread after a step's files are written and before the step gets its name.

        So no step exists without a manifest, whenever the process is killed.
        """
        assert self._saving is not None  # as a step is being saved
        final = self.directory / str(self._saving)
        temporary = ocp.path.atomicity_defaults.get_default_temporary_path_class(final).from_final(final).get()
        _write(self.directory, self._saving, describe(temporary, omitted=_WRITTEN_LAST))

    def _wait_until_finished(self) -> None:
        """Waits for the step that is being saved, if there is one, and updates the manifests."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            if processes.is_first():
                _complete_manifest(self.directory, self._saving)
                names = {_manifest_file(self.directory, step).name for step in self._manager.all_steps()}
                for file in (self.directory / MANIFESTS).iterdir():
                    if file.name not in names:
                        file.unlink()
        except Exception as error:  # a full disk is a ValueError or a RuntimeError of TensorStore
            raise self._not_saved(error) from error
        self._verified.add(self._saving)
        self._saving = None

    def _not_saved(self, error: Exception) -> OSError:
        step, self._saving = self._saving, None
        self._manager.reload()  # Orbax has forgotten the steps that it would have deleted after this save
        return OSError(
            f"{self.directory}: step {step} could not be saved; last good step: {self._manager.latest_step()}; "
            + " ".join(str(error).split())
        )


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its check for preemption, as `preemption.requested` synchronises the processes."""

    def reached_preemption(self, step: int) -> bool:
        """Never."""
        return False


def _remove_unfinished(directory: epath.Path) -> None:
    """Removes the steps that a killed process was writing.

    In an object store, Orbax's own clean-up would also remove the directories of manifests and damaged steps.
    """
    for path in directory.iterdir() if directory.exists() else ():
        if path.name.split(".")[0].isdigit() and not ocp.path.step.is_path_finalized(path):
            path.rmtree()


def _move_damaged_aside(directory: epath.Path) -> None:
    """Moves the newest step to `directory/damaged`, again and again until the newest step is sound."""
    steps = {found.step for found in ocp.path.step.standard_name_format().find_all(directory)}
    for step in sorted(steps, reverse=True):
        damage = _damage(directory, step)
        if damage is None:
            return
        names = itertools.chain([str(step)], (f"{step}-{k}" for k in itertools.count(1)))
        target = next(target for name in names if not (target := directory / DAMAGED / name).exists())
        files.move(directory / str(step), target)
        if _manifest_file(directory, step).exists():
            files.move(_manifest_file(directory, step), target.with_name(f"{target.name}.json"))
        logging.warning("%s: step %d is damaged and not used: %s; moved to %s", directory, step, damage, target)


def _damage(directory: epath.Path, step: int) -> str | None:
    """What is wrong with a step, or None."""
    file = _manifest_file(directory, step)
    try:
        expected = json_files.read_object(file)
    except FileNotFoundError:
        return f"{file} is missing"
    except ValueError as error:
        return f"{error}: no manifest"
    # A process killed right after a step got its name has not added the last two files to its manifest.
    return difference(expected, describe(directory / str(step), omitted={*_WRITTEN_LAST} - {*expected}))


def _manifest_file(directory: epath.Path, step: int) -> epath.Path:
    return directory / MANIFESTS / f"{step}.json"


def _write(directory: epath.Path, step: int, manifest: Manifest) -> None:
    file = _manifest_file(directory, step)
    file.parent.mkdir(exist_ok=True)
    processes.write_text(file, json_files.to_json(manifest))


def _complete_manifest(directory: epath.Path, step: int) -> None:
    """Adds the files that Orbax wrote when it gave the step its name."""
    manifest = json_files.read_object(_manifest_file(directory, step))
    _write(directory, step, manifest | {name: _entry(directory / str(step) / name) for name in _WRITTEN_LAST})


def _template(directory: epath.Path, like: Any) -> Any:
    """The structure that Orbax restores one item to, see `Checkpoints.restore`."""
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: nothing was saved under this name")
    if like is None:  # numpy arrays of the saved shapes, in the memory of one element
        saved = ocp.StandardCheckpointHandler().metadata(directory).tree
        return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), saved)

    def struct(leaf):
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            return leaf
        # Orbax would restore a struct without a sharding to the sharding that was saved.
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(struct, like)


def describe(directory: epath.Path, omitted: Collection[str] = ()) -> Manifest:
    """The manifest of all files below a directory but those in `omitted`."""
    found = {str(file.relative_to(directory)): file for file in sorted(files.files_below(directory))}
    names = [name for name in found if name not in omitted]
    with ThreadPoolExecutor() as pool:  # hashing and reading release the GIL
        return dict(zip(names, pool.map(_entry, (found[name] for name in names)), strict=True))


def _entry(file: epath.Path) -> list[int | str]:
    """[size in bytes, SHA-256 in hex]."""
    size, digest = 0, hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):  # hashlib.file_digest needs readinto, which object stores' files lack
            size += len(chunk)
            digest.update(chunk)
    return [size, digest.hexdigest()]


def difference(expected: Manifest, found: Manifest) -> str | None:
    """The first difference between two manifests in words; None if they are equal."""
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"{beginning(name)} is missing"
        if name not in expected:
            return f"{beginning(name)} is not in the manifest"
        if found[name] != expected[name]:
            return (
                f"{beginning(name)} has size and SHA-256 {found[name]}, the manifest says {shortened(expected[name])}"
            )
    return None
