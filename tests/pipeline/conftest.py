"""Stores of both kinds: a directory, and a bucket."""

import fsspec
import pytest

from lilpipe.store import Store


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    """An empty store: a local one, and one in object storage."""
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    return Store(f"{request.getfixturevalue('s3_bucket')}/store", local=str(tmp_path / "local"))


class Files:
    """The files of a store, wherever it is."""

    def __init__(self, store):
        self.fs, self.root = store.fs or fsspec.filesystem("file"), store.root

    def under(self, folder):
        return sorted(path.split(f"/{folder}/", 1)[1] for path in self.fs.find(f"{self.root}/{folder}"))

    def read(self, place):
        return self.fs.cat_file(place)

    def write(self, place, content):
        self.fs.pipe_file(place, content if isinstance(content, bytes) else content.encode())

    def flip(self, place):
        """Another value of one bit in the middle; the size stays."""
        content = bytearray(self.read(place))
        content[len(content) // 2] ^= 1
        self.write(place, bytes(content))

    def delete(self, place):
        self.fs.rm(place, recursive=True)


@pytest.fixture
def files(store):
    return Files(store)
