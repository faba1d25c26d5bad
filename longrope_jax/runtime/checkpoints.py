"""Checkpoints of a stage: named pytrees of arrays and a JSON record a step, checked against a manifest when opened."""

import hashlib
import itertools
from collections.abc import Iterable
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
from longrope_jax.runtime import processes, records

RECORD = "record"
MANIFESTS = "manifests"
DAMAGED = "damaged"

# Orbax writes these two at the top of a step in the moment it gives the step its name, after our manifest.
_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")

Manifest = dict[str, list[int | str]]


class Checkpoints:
    """The steps of one stage, the newest `keep` of them, in `directory`. Leaving its context waits for writes.

    A step appears under its name only when it is complete, so a process killed while saving leaves the step before it.
    `directory/manifests/<step>.json` has the SHA-256 of every file of a step. Opening compares the newest step with it;
    one that is damaged is moved to `directory/damaged` with a warning, and the step before is looked at.

    All processes make it and call its methods together. Process 0 alone checks, moves and writes manifests.

    Raises:
        OSError: from any method and from leaving the context, when a step could not be saved. It names the directory,
            the step and the last good one. On leaving with an exception it is only logged, the exception goes on.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        self.directory = epath.Path(directory)
        if not is_remote(directory):  # whose addresses it would take for relative paths
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
                lightweight_initialize=True,  # else a damaged file of an older, unused step would be an error here
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._describe_unnamed,
                    # Else a save that is refused at once could make its directory later, in the way of the next one.
                    create_directories_asynchronously=False,
                ),
            ),
        )
        self._sound = {self._manager.latest_step()}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _, exception: BaseException | None, __):
        try:
            try:
                self._finish_saving()
            finally:
                self._manager.close()
        except Exception as error:
            if exception is None:
                raise
            logging.error("%s", error)

    def latest(self) -> int | None:
        """The newest complete step, or None. Waits for one that is being saved."""
        self._finish_saving()
        return self._manager.latest_step()

    def save(self, step: int, arrays: dict[str, Any], record: dict[str, Any]) -> None:
        """Saves pytrees of arrays and what JSON can hold; writes to disk in the background.

        Args:
            step: must be above `latest()`.
            arrays: any pytrees, by names under which they can be restored one without the other; device arrays are
                copied before this returns.
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
            like: by the names of the pytrees to read, either a pytree of arrays or of `jax.ShapeDtypeStruct`, to whose
                structure and shardings to restore whatever the shardings that were saved (a struct without one stands
                for the first device), or None for numpy arrays in dicts and lists. Without it, None for all names.

        Raises:
            FileNotFoundError: there is no such step, or no such name in it.
            OSError: the step is damaged.
            ValueError: a pytree has another structure or other shapes than `like`.
        """
        self._finish_saving()
        path = self.directory / str(step)
        if step not in self._manager.all_steps():
            raise FileNotFoundError(f"{path}: there is no such step, only {sorted(self._manager.all_steps())}")
        if step not in self._sound and (damage := _damage(self.directory, step)):
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

    def _describe_unnamed(self) -> None:
        """Orbax calls this in its own thread when a step's files are written and before the step gets its name.

        So there never is a step without a manifest, wherever the process is killed.
        """
        step = self._saving
        assert step is not None  # or there would be nothing to describe
        named = self.directory / str(step)
        unnamed = ocp.path.atomicity_defaults.get_default_temporary_path_class(named).from_final(named).get()
        entries = describe(unnamed).items()
        manifest = {name: entry for name, entry in entries if name not in _WRITTEN_LAST}
        _write_manifest(self.directory, step, manifest)

    def _finish_saving(self) -> None:
        """Waits for the step that is being saved, if there is one, and brings the manifests up to date."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            if processes.is_first():
                _complete_manifest(self.directory, self._saving)
                _remove_manifests_of_others(self.directory, self._manager.all_steps())
        except Exception as error:  # a full disk is a ValueError or a RuntimeError of TensorStore
            raise self._not_saved(error) from error
        self._sound.add(self._saving)
        self._saving = None

    def _not_saved(self, error: Exception) -> OSError:
        step, self._saving = self._saving, None
        self._manager.reload()  # Orbax forgot the steps that it would have deleted after this one
        return OSError(
            f"{self.directory}: step {step} could not be saved; last good step: {self._manager.latest_step()}; "
            + " ".join(str(error).split())
        )


class _Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask for preemption: the processes agree by `preemption.requested`'s count, not steps."""

    def reached_preemption(self, step: int) -> bool:
        """Never."""
        return False


def _steps(directory: epath.Path) -> list[int]:
    """The complete steps, newest first."""
    return sorted((found.step for found in ocp.path.step.standard_name_format().find_all(directory)), reverse=True)


def _remove_unfinished(directory: epath.Path) -> None:
    """Removes the steps that a killed process was writing.

    Orbax's own clean-up would, in an object store, take the directories of manifests and of damaged steps for such.
    """
    for path in directory.iterdir() if directory.exists() else ():
        if path.name.split(".")[0].isdigit() and not ocp.path.step.is_path_finalized(path):
            path.rmtree()


def _move_damaged_aside(directory: epath.Path) -> None:
    """Moves the newest step to `directory/damaged` as long as it is damaged."""
    for step in _steps(directory):
        damage = _damage(directory, step)
        if damage is None:
            return
        free = _free_name(directory / DAMAGED, str(step))
        files.move(directory / str(step), free)
        if _manifest_file(directory, step).exists():
            files.move(_manifest_file(directory, step), free.with_name(f"{free.name}.json"))
        logging.warning("%s: step %d is damaged and not used: %s; moved to %s", directory, step, damage, free)


def _free_name(directory: epath.Path, name: str) -> epath.Path:
    names = itertools.chain([name], (f"{name}-{k}" for k in itertools.count(1)))
    return next(directory / name for name in names if not (directory / name).exists())


def _damage(directory: epath.Path, step: int) -> str | None:
    """What is wrong with a step, or None."""
    file = _manifest_file(directory, step)
    try:
        expected = json_files.read_object(file)
    except FileNotFoundError:
        return f"{file} is missing"
    except ValueError as error:
        return f"{error}: no manifest"
    entries = describe(directory / str(step)).items()
    # After a kill right behind a step's completion the last two files are not in its manifest.
    found = {name: entry for name, entry in entries if name in expected or name not in _WRITTEN_LAST}
    return difference(expected, found)


def _manifest_file(directory: epath.Path, step: int) -> epath.Path:
    return directory / MANIFESTS / f"{step}.json"


def _write_manifest(directory: epath.Path, step: int, manifest: Manifest) -> None:
    file = _manifest_file(directory, step)
    file.parent.mkdir(exist_ok=True)
    records.write_whole(file, records.to_json(manifest))


def _complete_manifest(directory: epath.Path, step: int) -> None:
    """Adds the files that Orbax wrote while it gave the step its name."""
    manifest = json_files.read_object(_manifest_file(directory, step))
    last = {name: describe_file(directory / str(step) / name) for name in _WRITTEN_LAST}
    _write_manifest(directory, step, manifest | last)


def _remove_manifests_of_others(directory: epath.Path, steps: Iterable[int]) -> None:
    wanted = {_manifest_file(directory, step).name for step in steps}
    for file in (directory / MANIFESTS).iterdir():
        if file.name not in wanted:
            file.unlink()


def _template(directory: epath.Path, like: Any) -> Any:
    """What Orbax restores one item to: see `Checkpoints.restore`."""
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: nothing was saved under this name")
    if like is None:
        return jax.tree.map(_on_host, ocp.StandardCheckpointHandler().metadata(directory).tree)
    return jax.tree.map(_with_sharding, like)


def _with_sharding(leaf: Any) -> Any:
    """The leaf, or the struct of it where it is a JAX array; Orbax would give a bare struct the sharding saved."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _on_host(leaf: ocp.metadata.ArrayMetadata) -> np.ndarray:
    """A numpy array of a saved array's shape and dtype, in the memory of one element."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


_CHUNK = 1 << 20  # bytes


def describe(directory: epath.Path) -> Manifest:
    """`describe_file` of every file below the directory, by its path relative to the directory."""
    found = sorted(files.files_below(directory))
    with ThreadPoolExecutor() as pool:  # hashing and reading let go of the interpreter's lock
        entries = list(pool.map(describe_file, found))
    return {str(file.relative_to(directory)): entry for file, entry in zip(found, entries, strict=True)}


def describe_file(file: epath.Path) -> list[int | str]:
    """[size in bytes, SHA-256 in hex]."""
    size, digest = 0, hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):  # hashlib.file_digest needs readinto, which object stores' files lack
            size += len(chunk)
            digest.update(chunk)
    return [size, digest.hexdigest()]


def difference(expected: Manifest, found: Manifest) -> str | None:
    """The first thing wrong with the files found, None if they are those expected."""
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
