"""Generated curves, and patches cut from photographs."""

import numpy as np
import pytest
import scipy.io
import torch
from osculate.errors import ArgumentError
from osculate.experiments.data import curves, datafiles, faces
from osculate.experiments.data.curves import generate_curves, load_curves
from osculate.experiments.data.datafiles import DATA_VARIABLE, DataError
from osculate.experiments.data.faces import augment, load_face_patches, read_olivetti


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    for module in (curves, datafiles):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")


def test_curves_are_thin_bright_strokes():
    images = generate_curves(200, (0, 0))
    assert images.shape == (200, 28, 28)
    assert images.dtype == np.uint8
    assert (images.reshape(200, -1).max(axis=1) == 255).all()
    assert 0.03 < images.mean() / 255 < 0.1
    assert (images == 0).mean() > 0.75
    assert ((images > 0) & (images < 255)).mean() > 0.08  # anti-aliased


def test_a_stroke_passes_through_its_points():
    points = np.array([[[5.0, 6.0], [12.0, 20.0], [21.0, 8.0]]])
    image = curves._draw(points)[0]
    assert all(image[int(row), int(column)] > 150 for row, column in points[0])  # ends are rounded off
    assert image[2, 25] == 0


def test_curves_depend_on_the_seed_alone():
    images = generate_curves(1100, (3, 0))
    np.testing.assert_array_equal(generate_curves(40, (3, 0)), images[:40])
    assert (generate_curves(40, (4, 0)) != images[:40]).any()
    state = np.random.get_state()[1].copy()
    generate_curves(5, (3, 0))
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_training_and_test_curves_are_different_images():
    train, test = load_curves(30, 20, seed=1)
    assert (train[:20] != test).any(axis=(1, 2)).all()


def test_cached_curves_are_the_same(tmp_path):
    fresh = load_curves(30, 20)
    files = list((tmp_path / "cache" / "curves").iterdir())
    assert len(files) == 1
    again = load_curves(30, 20)
    np.testing.assert_array_equal(fresh[0], again[0])
    np.testing.assert_array_equal(fresh[1], again[1])
    files[0].write_bytes(files[0].read_bytes()[:500])
    np.testing.assert_array_equal(load_curves(30, 20)[0], fresh[0])


def test_curves_need_no_cache(tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    assert load_curves(3, 2)[0].shape == (3, 28, 28)


def test_a_number_of_curves_out_of_range_is_refused():
    with pytest.raises(ArgumentError, match="number of curves"):
        generate_curves(0, (0,))


def save_faces(path, matrix):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"faces": matrix})
    return path


@pytest.fixture
def matrix():
    return np.random.default_rng(0).integers(0, 243, size=(4096, 400), dtype=np.uint8)


def test_photographs_are_stored_column_by_column(tmp_path, matrix):
    images = read_olivetti(save_faces(tmp_path / "olivettifaces.mat", matrix.astype(np.float64)))
    assert images.shape == (400, 64, 64)
    np.testing.assert_array_equal(images[7].T.reshape(-1), matrix[:, 7])


@pytest.mark.parametrize("below", ["olivetti", "."])
def test_patches_are_standardised_split_by_person_and_repeatable(tmp_path, matrix, below):
    save_faces(tmp_path / below / "olivettifaces.mat", matrix)
    train, test = load_face_patches(2, seed=5, data_dir=tmp_path)
    assert train.shape == (600, 625)
    assert test.shape == (200, 625)
    assert train.dtype == torch.float32
    torch.testing.assert_close(train.mean(dim=0), torch.zeros(625), atol=1e-4, rtol=0)
    assert abs(float(train.var(dim=0, correction=0).mean()) - 1) < 1e-4
    assert torch.equal(load_face_patches(2, seed=5, data_dir=tmp_path)[1], test)
    assert not torch.equal(load_face_patches(2, seed=6, data_dir=tmp_path)[1], test)


def test_a_person_only_shows_in_its_own_patches():
    faces_of = torch.zeros(3, 64, 64)
    faces_of[1] = 1.0
    patches = augment(faces_of, 4, np.random.default_rng(0))
    assert torch.equal(patches.mean(dim=1), torch.tensor([0.0] * 4 + [1.0] * 4 + [0.0] * 4))


def test_patches_rotate_about_the_middle():
    disc = torch.linspace(-1, 1, 64).square()
    face = torch.exp(-4 * (disc[:, None] + disc[None, :]))
    patches = augment(face[None], 50, np.random.default_rng(0)).reshape(50, 25, 25)
    assert patches.mean(dim=0).argmax() == 12 * 25 + 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[:, :399], "shape"),
        (lambda m: m / 255, "fractions"),
        (lambda m: np.zeros_like(m), "values in"),
        (lambda m: np.concatenate([m[:, :1], m[:, :399]], axis=1), "399 different"),
    ],
)
def test_other_content_is_refused(tmp_path, matrix, change, message):
    path = save_faces(tmp_path / "olivettifaces.mat", change(matrix))
    with pytest.raises(DataError, match=message) as caught:
        read_olivetti(path)
    assert str(path) in str(caught.value)


def test_a_truncated_photograph_file_is_refused(tmp_path, matrix):
    path = save_faces(tmp_path / "olivettifaces.mat", matrix)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot be read"):
        read_olivetti(path)


def test_missing_photographs_name_the_ways_out(tmp_path, monkeypatch):
    def unreachable(url, *rest, **more):
        raise OSError("no route")

    monkeypatch.setattr(datafiles.pooch, "retrieve", unreachable)
    with pytest.raises(DataError, match=r"(?s)olivettifaces\.mat.*sha256 unknown.*--data-dir"):
        load_face_patches(1, data_dir=tmp_path)
    assert faces.OLIVETTI.checksum is None
