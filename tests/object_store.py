"""An object store in memory that etils takes for gs://, as unhelpful as a real one: what is opened for appending begins
anew, and a directory is there only as long as something is in it.
"""

import pytest
import tensorboardX.record_writer
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


class _Store(MemoryFileSystem):
    protocol = ("gcs", "gs")
    store, pseudo_dirs, cachable = {}, [""], False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gs://", "memory://"))

    def _open(self, path, mode="rb", **options):
        return super()._open(path, mode.replace("a", "w"), **options)

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass


class _Events:
    """Where tensorboardX writes to."""

    def __init__(self, path):
        self._path, self._content = path, b""

    def write(self, content):
        self._content += content

    def flush(self):
        epath.Path(self._path).write_bytes(self._content)

    close = flush


class _EventsFactory:
    open = _Events

    def directory_check(self, path):
        pass


@pytest.fixture
def bucket(monkeypatch):
    """An empty one."""
    store = _Store()
    store.store.clear()
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: store)
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)  # it would take its place
    monkeypatch.setitem(tensorboardX.record_writer.REGISTERED_FACTORIES, "gs", _EventsFactory())
    return epath.Path("gs://bucket/run")
