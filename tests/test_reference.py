"""The transcriptions reproduce every recorded array; the recorded files are the ones the manifest lists."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from reference import kbfgs, kfac, mbf, record, trajectories
from reference.network import evaluate, initial_parameters, layers_of, targets_of

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("*.npz"))
TOLERANCE = 1e-8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_transcription_reproduces_every_array(path: Path) -> None:
    errors = trajectories.errors(*trajectories.load(path))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.2e}"


def test_manifest_lists_every_file_with_its_digest() -> None:
    cases = json.loads((DATA / "manifest.json").read_text())["cases"]
    assert sorted(cases) == [path.name for path in FILES]
    for path in FILES:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == cases[path.name]["sha256"], path.name
        _, arrays = trajectories.load(path)
        assert {name: list(value.shape) for name, value in arrays.items()} == cases[path.name]["arrays"], path.name


@pytest.mark.parametrize("name", ["ref_kfac_mse", "ref_mbf_perinputavg_mse", "ref_kbfgsl_memory4_bce"])
def test_recording_is_deterministic(name: str) -> None:
    meta, arrays = record.record(name, record.CASES[name])
    stored_meta, stored = trajectories.load(DATA / f"{name}.npz")
    assert meta["stats"]["seed"] == stored_meta["stats"]["seed"]
    assert sorted(arrays) == sorted(stored)
    for key, value in stored.items():
        assert trajectories.relative_error(arrays[key], value) <= 1e-10, key


def test_data_are_exact_in_single_precision() -> None:
    for path in FILES:
        data = trajectories.load(path)[1]["data"]
        assert np.array_equal(data, data.astype(np.float32)), path.name


def test_the_comparison_sees_one_wrong_entry() -> None:
    meta, arrays = trajectories.load(DATA / "case3_kbfgs_mse.npz")
    arrays["H_g_2"] = arrays["H_g_2"].copy()
    arrays["H_g_2"][7, 1, 2] += 1e-6 * np.abs(arrays["H_g_2"]).max()
    errors = trajectories.errors(meta, arrays)
    assert max(errors, key=errors.__getitem__) == "H_g_2"
    assert errors["H_g_2"] == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("file", "setting", "value"),
    [
        ("case1_kbfgs_bce", "s_y_decay", 0.8),
        ("case1_kbfgs_bce", "powell_alpha", 0.3),
        ("ref_kbfgsl_memory4_bce", "memory", 5),
        ("ref_kbfgs_rejected_mse", "skip_threshold", 1e-5),
        ("ref_kfac_bce", "inverse_every", 21),
        ("mbf_m1_flatchunk_bce", "T1_statistics", 1),
        ("mbf_m4_cnn_flatchunk", "diag_beta2", 0.99),
    ],
)
def test_every_setting_shows_in_the_weights(file: str, setting: str, value: float) -> None:
    meta, arrays = trajectories.load(DATA / f"{file}.npz")
    meta["hyper"][setting] = value
    errors = trajectories.errors(meta, arrays) if setting not in ("T1_statistics",) else _weights_only(meta, arrays)
    assert max(error for name, error in errors.items() if name.startswith(("W_", "b_"))) > 1e-5


def _weights_only(meta: dict, arrays: dict) -> dict[str, float]:
    results = trajectories.RUNNERS[meta["algorithm"]](meta, arrays)
    return {name: trajectories.relative_error(results[name], arrays[name]) for name in ("W_0", "W_1", "b_0")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_layer_records_add_up_to_the_gradient(path: Path) -> None:
    """Sum over samples and positions of g h~^T, over B, is the gradient of the batch mean."""
    meta, arrays = trajectories.load(path)
    layers = layers_of(meta)
    rows = arrays["batches"][0]
    parameters = initial_parameters(arrays, len(layers))
    evaluation = evaluate(
        layers, parameters, meta["loss"], arrays["data"][rows], targets_of(meta["loss"], arrays, rows)
    )
    assert evaluation.loss == pytest.approx(float(arrays["loss"][0]), rel=1e-12)
    for layer, record_, gradient in zip(layers, evaluation.records, evaluation.gradients, strict=True):
        if layer.kind == "batchnorm":
            assert np.allclose((record_.g * record_.h).sum((0, 1)) / len(rows), gradient["W"], rtol=1e-10, atol=1e-14)
            continue
        summed = sum(g.T @ h for g, h in zip(record_.g, record_.homogeneous(), strict=True)) / len(rows)
        weight = summed[:, :-1] if layer.bias else summed
        assert np.allclose(weight.reshape(gradient["W"].shape), gradient["W"], rtol=1e-10, atol=1e-13)
        if layer.bias:
            assert np.allclose(summed[:, -1], gradient["b"], rtol=1e-10, atol=1e-13)


def test_a_long_memory_makes_kbfgs_l_the_same_as_kbfgs() -> None:
    meta, arrays = trajectories.load(DATA / "case1_kbfgs_bce.npz")
    dense = kbfgs.run(meta, arrays)
    limited = kbfgs.run({**meta, "algorithm": "K-BFGS(L)", "hyper": {**meta["hyper"], "memory": 100}}, arrays)
    assert not any(name.startswith("H_g") for name in limited)
    for name in ("W_0", "W_3", "y_1", "H_a_2"):
        assert trajectories.relative_error(limited[name], dense[name]) <= 1e-10, name


def test_the_transcriptions_refuse_what_they_do_not_cover() -> None:
    meta, arrays = trajectories.load(DATA / "mbf_m4_cnn_flatchunk.npz")
    with pytest.raises(ValueError, match="batch normalisation"):
        kfac.run({**meta, "algorithm": "KFAC"}, arrays)
    with pytest.raises(ValueError, match="unknown block rule 'rows'"):
        mbf.run({**meta, "hyper": {**meta["hyper"], "fc_blocks": "rows"}}, arrays)
