"""CIFAR and SVHN: tiny files in the published formats, whole, packed, archived, partial and damaged."""

import io
import lzma
import tarfile
from dataclasses import replace
from hashlib import md5, sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from osculate.experiments.data import colour_images
from osculate.experiments.data.colour_images import CIFAR10, CIFAR100, load_cifar, load_svhn
from osculate.experiments.data.datafiles import DataError, RemoteFile
from osculate.experiments.problems import get_problem, natural_images
from scipy.io import savemat
from torch import nn

COUNT = 6


def records(seed: int, label_bytes: int = 1, classes: int = 10) -> bytes:
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 256, (COUNT, label_bytes + 3072), dtype=np.uint8)
    table[:, :label_bytes] = rng.integers(0, classes, (COUNT, label_bytes))
    return table.tobytes()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    def refused(file, subfolder, searched=()):
        raise DataError(f"no network for {file.identity}")

    monkeypatch.setattr(colour_images, "download", refused)
    monkeypatch.setattr("osculate.experiments.data.datafiles.download", refused)
    monkeypatch.delenv("OSCULATE_DATA", raising=False)


@pytest.fixture
def contents() -> dict[str, bytes]:
    names = (*CIFAR10.train, CIFAR10.test, "test_batch_first1000.bin")
    return {name: records(seed) for seed, name in enumerate(names)}


@pytest.fixture
def tiny(contents):
    """CIFAR-10 with the checksums of the tiny files."""
    known = {name: RemoteFile(name, (), f"sha256:{sha256(raw).hexdigest()}") for name, raw in contents.items()}
    return replace(CIFAR10, known=known)


def write(folder: Path, contents: dict[str, bytes], names: list[str], pack: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        packed = lzma.compress(contents[name]) if pack else contents[name]
        (folder / (name + ".xz" if pack else name)).write_bytes(packed)
    return folder


def archive(path: Path, inside: str, contents: dict[str, bytes]) -> RemoteFile:
    with tarfile.open(path, "w:gz") as stream:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"{inside}/{name}")
            entry.size = len(content)
            stream.addfile(entry, io.BytesIO(content))
    return RemoteFile(path.name, ("http://mirror.invalid/",), f"md5:{md5(path.read_bytes()).hexdigest()}")


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("below", ["cifar10", "cifar-10-batches-bin", "."])
def test_records_are_a_label_and_three_planes(tmp_path, contents, tiny, pack, below):
    write(tmp_path / below, contents, [*tiny.train, tiny.test], pack)
    images = load_cifar(tiny, tmp_path)
    assert images.train_images.shape == (5 * COUNT, 3, 32, 32)
    assert images.test_set == "test set"
    second = contents["data_batch_2.bin"][3073:]  # record 1 of the second file is image 7
    assert images.train_labels[COUNT + 1] == second[0]
    assert images.train_images[COUNT + 1, 2, 4, 5] == second[1 + 2048 + 4 * 32 + 5]
    assert images.test_labels[0] == contents["test_batch.bin"][0]


def test_a_partial_test_file_is_called_what_it_is(tmp_path, contents, tiny):
    write(tmp_path / "cifar10", contents, [*tiny.train, "test_batch_first1000.bin"], pack=True)
    assert load_cifar(tiny, tmp_path).test_set == "first 1,000 test images"
    write(tmp_path / "cifar10", contents, ["test_batch.bin"])
    assert load_cifar(tiny, tmp_path).test_set == "test set"


def test_only_the_files_that_are_needed_are_read(tmp_path, contents, tiny):
    write(tmp_path / "cifar10", contents, ["data_batch_1.bin", "test_batch.bin"])
    assert len(load_cifar(tiny, tmp_path, train=4).train_images) == 4
    with pytest.raises(DataError, match="no network"):
        load_cifar(tiny, tmp_path, train=COUNT + 1)


def test_the_published_archive_is_read_where_it_lies(tmp_path, contents, tiny):
    published = {name: contents[name] for name in (*tiny.train, tiny.test)}
    remote = archive(tmp_path / tiny.archive.name, tiny.inside, published)
    plain = write(tmp_path / "plain", contents, [*tiny.train, tiny.test])
    packed = load_cifar(replace(tiny, archive=remote), tmp_path)
    assert np.array_equal(packed.train_images, load_cifar(tiny, plain).train_images)
    with pytest.raises(DataError, match="md5"):
        load_cifar(tiny, tmp_path)


def test_cifar100_has_two_labels_and_the_fine_one_counts(tmp_path):
    contents = {"train.bin": records(1, 2, 100), "test.bin": records(2, 2, 100)}
    write(tmp_path / "cifar100", contents, list(contents))
    images = load_cifar(CIFAR100, tmp_path)
    assert images.train_labels.tolist() == [contents["train.bin"][row * 3074 + 1] for row in range(COUNT)]
    assert images.train_images[1, 0, 0, 0] == contents["train.bin"][3074 + 2]


def test_damaged_files_are_refused(tmp_path, contents, tiny):
    folder = write(tmp_path / "cifar10", contents, [*tiny.train, tiny.test])
    (folder / "data_batch_1.bin").write_bytes(contents["data_batch_2.bin"])
    with pytest.raises(DataError, match=r"data_batch_1\.bin is damaged"):
        load_cifar(tiny, tmp_path)
    unknown = replace(tiny, known={})
    (folder / "data_batch_1.bin").write_bytes(contents["data_batch_1.bin"][:-5])
    with pytest.raises(DataError, match="no multiple of the 3073"):
        load_cifar(unknown, tmp_path)
    (folder / "data_batch_1.bin").write_bytes(bytes([10]) + contents["data_batch_1.bin"][1:])
    with pytest.raises(DataError, match="class 10"):
        load_cifar(unknown, tmp_path)
    (folder / "data_batch_1.bin").unlink()
    (folder / "data_batch_1.bin.xz").write_bytes(b"nothing packed")
    with pytest.raises(DataError, match="no xz file"):
        load_cifar(unknown, tmp_path)


def digits(path: Path, labels: list[int], seed: int) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
    savemat(path, {"X": images, "y": np.array(labels, dtype=np.uint8)[:, None]})
    return images


def test_house_numbers_are_read_from_matlab_files(tmp_path):
    (tmp_path / "svhn").mkdir()
    names = ("train_32x32.mat", "test_32x32.mat")
    written = [digits(tmp_path / "svhn" / name, [10, 3, 9, 1], seed) for seed, name in enumerate(names)]
    checksums = [md5((tmp_path / "svhn" / name).read_bytes()).hexdigest() for name in names]
    files = tuple(RemoteFile(name, (), f"md5:{checksum}") for name, checksum in zip(names, checksums, strict=True))
    found = load_svhn(tmp_path, files)
    assert found.train_labels.tolist() == [0, 3, 9, 1]
    assert found.test_images[2, 1, 4, 5] == written[1][4, 5, 1, 2]
    with pytest.raises(DataError, match="md5"):
        load_svhn(tmp_path)
    digits(tmp_path / "svhn" / names[0], [11, 1], 0)
    with pytest.raises(DataError, match=r"not .* 1 \.\.\. 10"):
        load_svhn(tmp_path, tuple(RemoteFile(name, ()) for name in names))


def test_the_problem_holds_out_the_last_training_images(tmp_path, contents, tiny, monkeypatch):
    monkeypatch.setattr(natural_images, "CIFAR10_FILES", tiny)
    write(tmp_path / "cifar10", contents, [*tiny.train, "test_batch_first1000.bin"])
    whole = get_problem("cifar10-resnet32").load(tmp_path)
    part = get_problem("cifar10-resnet32", validation=4).load(tmp_path)
    assert part.test_set == "first 1,000 test images"
    assert part.valid_inputs is not None
    assert torch.equal(torch.cat([part.train_inputs, part.valid_inputs]), whole.train_inputs)
    assert len(part.valid_inputs) == 4


@pytest.mark.parametrize(
    ("name", "parameters", "convolutions"),
    [("cifar10-resnet32", 464154, 31), ("cifar100-vgg16", 34015396, 13), ("svhn-vgg11", 28144010, 8)],
)
def test_the_networks_are_the_papers(name, parameters, convolutions):
    """464 154: table 6 of arXiv:1512.03385v1 says 0.46 million; the others follow from the widths in PAPERS 4.1."""
    model = get_problem(name).build_model(0)
    assert sum(value.numel() for value in model.parameters()) == parameters
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(found) == convolutions
    assert abs(float(found[-1].weight.detach().std()) / (2 / (9 * found[-1].out_channels)) ** 0.5 - 1) < 0.05
