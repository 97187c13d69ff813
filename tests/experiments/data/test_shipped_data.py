"""Data that need no download: what the package carries, and the texts of the language models."""

import gzip
import hashlib
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from osculate.experiments.data import shipped, texts
from osculate.experiments.data.datafiles import DataError, RemoteFile, published
from osculate.experiments.data.shipped import load_abalone, load_digits, shipped_file
from osculate.experiments.data.texts import CHARACTERS, Text, TextPlan, coded, normalised, read_text, sequences


@pytest.mark.parametrize("name", ["optdigits.tes", "abalone.data"])
def test_shipped_files_are_the_published_ones(name: str) -> None:
    content, expected = shipped_file(name), published("shipped")[name]
    assert len(content) == expected.size
    assert f"sha256:{hashlib.sha256(content).hexdigest()}" == expected.checksum


def test_the_licence_lies_beside_the_data() -> None:
    folder = resources.files("osculate.experiments.data") / "shipped"
    listed = {entry.name for entry in folder.iterdir()}
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert {f"{name}.gz" for name in published("shipped")} | {"README.md"} == listed
    for word in (
        "CC BY 4.0",
        "Alpaydin",
        "Kaynak",
        "Nash",
        "creativecommons.org/licenses/by/4.0",
        *published("shipped"),
    ):
        assert word in text
    assert sum(len((folder / name).read_bytes()) for name in listed) < 120_000


def test_a_damaged_or_missing_file_of_the_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="install osculate again"):
        shipped_file("optdigits.tes", tmp_path)
    path = tmp_path / "optdigits.tes.gz"
    path.write_bytes(gzip.compress(shipped_file("optdigits.tes")[:-2]))
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} is damaged.*264710 bytes, expected 264712"):
        shipped_file("optdigits.tes", tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read"):
        shipped_file("optdigits.tes", tmp_path)


def test_every_digit_is_in_one_part() -> None:
    digits = load_digits()
    assert digits.train_images.shape == (1500, 8, 8) and digits.test_images.shape == (297, 8, 8)
    assert digits.train_images.max() == shipped.DIGIT_LEVELS and digits.train_images.min() == 0
    counts = np.bincount(np.concatenate([digits.train_labels, digits.test_labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as published
    table = [line.split(b",") for line in shipped_file("optdigits.tes").split()]
    images = np.concatenate([digits.train_images, digits.test_images]).reshape(-1, 64)
    assert sorted(map(tuple, images.tolist())) == sorted(tuple(map(int, row[:-1])) for row in table)
    assert np.bincount(digits.test_labels).min() > 15


def test_the_split_is_the_same_everywhere() -> None:
    """The stream of a RandomState never changes, so losses compare between versions of numpy."""
    digits, (train, test) = load_digits(), load_abalone()
    assert digits.train_labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    assert train[:8, -1].tolist() == [13.0, 8.0, 11.0, 5.0, 12.0, 11.0, 7.0, 8.0]
    assert len(train) == 3300 and len(test) == 877


def test_shellfish_have_one_sex_and_plausible_measures() -> None:
    train, test = load_abalone()
    rows = np.concatenate([train, test])
    assert rows.shape == (4177, 11)
    assert rows[:, :3].sum(0).tolist() == [1528, 1307, 1342]  # as published
    assert (rows[:, :3].sum(1) == 1).all()
    assert rows[:, 3].min() == 0.075 and rows[:, 3].max() == 0.815
    assert rows[:, -1].min() == 1 and rows[:, -1].max() == 29


def test_texts_consist_of_ascii() -> None:
    assert normalised("a “b” – c… \t°\r\n") == 'a "b" - c...  ?\n'
    assert [CHARACTERS[code] for code in coded("Az ~\n!")] == list("Az ~\n!")
    assert len(CHARACTERS) == 96


def test_the_reference_of_python_is_named_with_its_checksum() -> None:
    text = read_text("python")
    assert set(text.characters) <= set(CHARACTERS)
    assert text.origin["text"].startswith("pydoc_data.topics of Python 3.")
    assert text.origin["text_sha256"] == hashlib.sha256(text.characters.encode()).hexdigest()
    assert len(text.characters) > 400_000
    assert text.characters.count("?") < 1e-3 * len(text.characters)


def test_a_python_without_its_reference_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(texts, "import_module", missing)
    with pytest.raises(DataError, match=r"pydoc_data.topics.*text=shakespeare"):
        read_text("python")


@pytest.mark.parametrize("place", ["shakespeare", "."])
def test_shakespeare_lies_in_the_data_folder(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"To be, or not to be:\nthat is the question."
    file = RemoteFile("input.txt", (), f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))
    monkeypatch.setattr(texts, "_FILE", file)
    (tmp_path / place).mkdir(exist_ok=True)
    path = tmp_path / place / "input.txt"
    path.write_bytes(content)
    assert read_text("shakespeare", tmp_path).characters == content.decode()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="truncated"):
        read_text("shakespeare", tmp_path)


LETTERS = Text("".join(chr(97 + k % 26) for k in range(1001)), {"text": "letters"})


def test_targets_are_one_character_later_and_parts_do_not_overlap() -> None:
    train, valid, test = sequences(LETTERS, 10, TextPlan(60, 10, 4))
    assert [part.shape for part in (train, valid, test)] == [(60, 11), (10, 11), (10, 11)]
    assert ((np.diff(np.concatenate([train, valid, test])) - 1) % 26 == 0).all()
    again = sequences(LETTERS, 10, TextPlan(60, 10, 4))
    assert all((a == b).all() for a, b in zip((train, valid, test), again, strict=True))
    numbered = Text("".join(map(chr, range(32, 127))), {"text": "numbered"})
    pieces = np.concatenate(sequences(numbered, 3, TextPlan(20, 4, 2)))[:, 0]
    assert len(set(pieces.tolist())) == 28


def test_a_text_in_its_order_ends_with_the_test_sequences() -> None:
    numbered = Text("".join(map(chr, range(32, 127))), {"text": "numbered"})
    train, valid, test = sequences(numbered, 2, TextPlan(20, 4, 0))
    assert train[:, 0].tolist() == list(range(1, 41, 2))
    assert valid[:, 0].tolist() == list(range(41, 49, 2))
    assert test[-1, -1] == 95 and len(test) == 4


def test_a_short_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"letters has 1001 characters, 100 sequences of 10, fewer than the 120"):
        sequences(LETTERS, 10, TextPlan(100, 10, 4))
