"""Finding, checking and reading published files; no network."""

import gzip
import hashlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import requests
from osculate.errors import ArgumentError
from osculate.experiments.data import datafiles, datasets
from osculate.experiments.data.datafiles import (
    DATA_VARIABLE,
    DataError,
    RemoteFile,
    data_folder,
    download,
    published,
    verify,
)
from osculate.experiments.data.datasets import ImageSet, load_images, read_idx

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SHAPES = ((12, 28, 28), (12,), (5, 28, 28), (5,))


def packed(array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def sha(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 10, size=shape, dtype=np.uint8) for shape in SHAPES]


@pytest.fixture
def contents(arrays):
    """Both forms of the four files: name to bytes."""
    plain = {name: packed(array) for name, array in zip(NAMES, arrays, strict=True)}
    return plain | {f"{name}.gz": gzip.compress(raw, mtime=0) for name, raw in plain.items()}


@pytest.fixture
def tiny(contents):
    mirrors = ("http://mirror.invalid/a/", "http://mirror.invalid/b/")
    files = {
        name: RemoteFile(name, mirrors, f"sha256:{sha(content)}", len(content)) for name, content in contents.items()
    }
    return ImageSet("MNIST", "mnist", ("MNIST/raw", "."), files)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """An empty cache folder and no environment variable; asking the network fails."""

    class Unreachable:
        def __init__(self, **settings):
            pass

        def __call__(self, url, output_file, pooch):
            raise requests.ConnectionError(f"no route to {url}")

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(datafiles, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(datafiles.pooch, "HTTPDownloader", Unreachable)


def put(folder, contents, suffix):
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / (name + suffix)).write_bytes(contents[name + suffix])


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", ["mnist", "MNIST/raw", "."])
def test_every_layout_is_found(tmp_path, tiny, contents, arrays, below, suffix):
    put(tmp_path / "data" / below, contents, suffix)
    images = load_images(tiny, tmp_path / "data")
    found = (images.train_images, images.train_labels, images.test_images, images.test_labels)
    for expected, array in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_the_environment_variable_names_the_folder(tmp_path, monkeypatch, tiny, contents):
    put(tmp_path / "data", contents, ".gz")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    assert load_images(tiny).train_images.shape == SHAPES[0]


def test_a_missing_folder_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="existing folder"):
        data_folder(tmp_path / "nowhere")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ArgumentError, match=DATA_VARIABLE):
        data_folder(None)


def test_a_truncated_file_is_named_with_both_checksums(tmp_path, tiny, contents):
    put(tmp_path / "mnist", contents, ".gz")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    short = contents[path.name][:-40]
    path.write_bytes(short)
    with pytest.raises(DataError) as caught:
        load_images(tiny, tmp_path)
    for part in (str(path), "truncated", sha(short), sha(contents[path.name]), str(len(short))):
        assert part in str(caught.value)


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    verify(path, RemoteFile("file", (), f"sha256:{sha(b'abc')}", 3))
    with pytest.raises(DataError, match="damaged or another file"):
        verify(path, RemoteFile("file", (), f"sha256:{sha(b'abd')}", 3))


def test_a_missing_file_is_named_with_checksum_addresses_and_ways_out(tmp_path, tiny):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError) as caught:
        load_images(tiny, tmp_path / "data")
    message = str(caught.value)
    for part in (
        str(tmp_path / "data" / "mnist" / "train-images-idx3-ubyte.gz"),
        tiny.files["train-images-idx3-ubyte.gz"].checksum.removeprefix("sha256:"),
        *(f"http://mirror.invalid/{which}/train-images-idx3-ubyte.gz: ConnectionError" for which in "ab"),
        "--data-dir",
        DATA_VARIABLE,
        "curves-autoencoder",
    ):
        assert part in message


def test_the_next_mirror_serves_and_wrong_bytes_do_not_pass(tmp_path, monkeypatch):
    content = b"the published bytes"

    class SecondMirror:
        def __init__(self, **settings):
            pass

        def __call__(self, url, output_file, pooch):
            Path(output_file).write_bytes(content if "/b/" in url else b"an error page")

    monkeypatch.setattr(datafiles.pooch, "HTTPDownloader", SecondMirror)
    file = RemoteFile("file", ("http://mirror.invalid/a/", "http://mirror.invalid/b/"), f"sha256:{sha(content)}", 19)
    path = download(file, "set")
    assert path.read_bytes() == content
    assert path.is_relative_to(tmp_path / "cache" / "set")
    with pytest.raises(DataError, match=re.escape("http://mirror.invalid/a/other")):
        download(RemoteFile("other", file.mirrors[:1], file.checksum), "set")


def test_the_other_set_lying_loose_in_the_folder_is_passed_over(tmp_path, monkeypatch, tiny, contents):
    put(tmp_path, contents, ".gz")
    monkeypatch.setattr(datasets, "MNIST", tiny)
    other = ImageSet("Fashion-MNIST", "fashion-mnist", (".",), datasets.FASHION.files)
    with pytest.raises(DataError, match="is missing"):
        load_images(other, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00", "no IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "no IDX file"),
        (b"\x00\x00\x08\x03\x00\x00", "inside its header"),
        (packed(np.zeros((2, 3), dtype=np.uint8))[:-1], "truncated or damaged"),
        (packed(np.zeros((2, 3), dtype=np.uint8)) + b"x", "truncated or damaged"),
        (gzip.compress(packed(np.zeros((2, 3), dtype=np.uint8)), mtime=0)[:-9], "cannot be unpacked"),
    ],
)
def test_bad_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "some-idx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_the_published_checksums_are_all_different():
    folders = ("mnist", "fashion-mnist", "cifar10", "planetoid")
    files = [file for folder in folders for file in published(folder).values()]
    checksums = [file.checksum for file in files]
    assert len(set(checksums)) == len(checksums) == 2 * 8 + 6 + 16
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", checksum) for checksum in checksums)
    sizes = [datasets.MNIST.files[name].size for name in NAMES]
    assert sizes == [16 + 60000 * 784, 8 + 60000, 16 + 10000 * 784, 8 + 10000]
