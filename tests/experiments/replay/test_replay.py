"""Replay: every recorded file to 1e-8, files never recorded before, and files that are wrong."""

import io
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from osculate.errors import ArgumentError
from osculate.experiments.replay.replay import TOLERANCE, Report, replay, replay_file
from reference import kbfgs, kfac, mbf, record, trajectories
from reference.network import BERNOULLI, CATEGORICAL, GAUSSIAN
from rich.console import Console

DATA = Path(__file__).parents[2] / "data"
FILES = sorted(DATA.glob("*.npz"))
INPUTS = {"data", "labels", "batches", "warm_batches", "warm_targets", "fisher_targets", "warm_fisher_targets"}

Arrays = dict[str, NDArray[Any]]

CONV = [
    {"type": "conv", "in": 2, "out": 3, "kernel": 3, "stride": 1, "padding": 1, "bias": True, "then": ["tanh"]},
    {"type": "conv", "in": 3, "out": 2, "kernel": 2, "stride": 2, "padding": 0, "bias": False, "then": ["flatten"]},
    {"type": "dense", "in": 8, "out": 4, "bias": True, "then": []},
]
NORMALISED = [
    {"type": "dense", "in": 5, "out": 6, "bias": False, "then": []},
    {"type": "batchnorm", "features": 6, "eps": 1e-5, "then": ["tanh"]},
    {"type": "dense", "in": 6, "out": 4, "bias": True, "then": []},
]


def read(name: str) -> tuple[dict[str, Any], Arrays]:
    return trajectories.load(DATA / f"{name}.npz")


def write(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Path:
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)
    return path


def shown(files: list[Path]) -> tuple[int, str]:
    """Exit status and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    status = replay(files, console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recorded_array_is_reproduced(path: Path) -> None:
    report = replay_file(path)
    assert report.worst.error <= TOLERANCE, report.worst
    assert report.notes == []  # nothing left out, no setting ignored, the guard never shortened a step
    outputs = {name for name in trajectories.load(path)[1] if not name.startswith(("W_init", "b_init"))} - INPUTS
    assert {entry.name for entry in report.comparisons} == outputs


def network_inputs(
    layers: list[dict[str, Any]], loss: str, seed: int, batch: int = 6, samples: int = 14, steps: int = 8
) -> Arrays:
    """Data, batches and initial weights for a network given as a list of layers."""
    generator = np.random.default_rng(seed)
    shape = (samples, 2, 4, 4) if layers[0]["type"] == "conv" else (samples, layers[0]["in"])
    arrays: Arrays = {"data": generator.random(shape)}
    if loss == CATEGORICAL:
        arrays["labels"] = generator.integers(0, layers[-1]["out"], samples)
    arrays["batches"] = np.array([generator.permutation(samples)[:batch] for _ in range(steps)])
    if batch < samples:
        arrays["warm_batches"] = np.arange(samples // batch * batch).reshape(-1, batch)
    for l, entry in enumerate(layers):
        if entry["type"] == "batchnorm":
            arrays[f"W_init_{l}"] = generator.uniform(0.5, 1.5, entry["features"])
            arrays[f"b_init_{l}"] = generator.uniform(-0.5, 0.5, entry["features"])
            continue
        kernel = (entry["kernel"],) * 2 if entry["type"] == "conv" else ()
        arrays[f"W_init_{l}"] = 0.5 * generator.standard_normal((entry["out"], entry["in"], *kernel))
        if entry["bias"]:
            arrays[f"b_init_{l}"] = 0.1 * generator.standard_normal(entry["out"])
    return arrays


def recorded(
    tmp_path: Path, algorithm: str, loss: str, layers: list[dict[str, Any]], hyper: Mapping[str, Any], **numbers: int
) -> Path:
    """A file made by the transcription of an algorithm."""
    numbers.setdefault("seed", 3)
    arrays = network_inputs(layers, loss, **numbers)
    meta = {"algorithm": algorithm, "loss": loss, "layers": layers, "hyper": dict(hyper)}
    if algorithm == "MBF":
        results = mbf.run(meta, arrays, kfac.drawing(loss, 1))
    elif algorithm == "KFAC":
        results = kfac.run(meta, arrays, kfac.drawing(loss, 1))
    else:
        results = kbfgs.run(meta, arrays)
    return write(
        tmp_path / "made.npz", meta, arrays | {k: v for k, v in results.items() if not k.startswith("margin_")}
    )


def dense(*sizes: int) -> list[dict[str, Any]]:
    hidden = len(sizes) - 2
    return [
        {"type": "dense", "in": i, "out": o, "bias": True, "then": ["tanh"] if l < hidden else []}
        for l, (i, o) in enumerate(itertools.pairwise(sizes))
    ]


CLASSES = dense(5, 6, 4)
LIMITED = record.KBFGS_HYPER | {"memory": 3}
MBF = record.MBF_HYPER | {"diag_beta1": 0.9, "diag_beta2": 0.99, "diag_epsilon": 1e-4}

UNSEEN: dict[str, tuple[str, str, list[dict[str, Any]], Mapping[str, Any], dict[str, int]]] = {
    "kbfgs-conv": ("K-BFGS", CATEGORICAL, CONV, record.KBFGS_HYPER, {}),
    "kbfgs-conv-full-batch": ("K-BFGS", CATEGORICAL, CONV, record.KBFGS_HYPER, {"batch": 14}),
    "kbfgs-classes": ("K-BFGS", CATEGORICAL, CLASSES, record.KBFGS_HYPER, {}),
    "kbfgs-other-settings": (
        "K-BFGS",
        GAUSSIAN,
        dense(5, 3, 5),
        {"lr": 0.1, "lambda_damping": 0.5, "momentum_rho": 0.8, "weight_decay_tau": 0.01}
        | {"A_decay": 0.7, "powell_alpha": 0.4, "s_y_decay": 0.6, "skip_threshold": 1e-4},
        {},
    ),
    "kbfgs-powell-then-lm": (
        "K-BFGS",
        BERNOULLI,
        dense(5, 3, 5),
        record.KBFGS_HYPER | {"pair_damping": "powell-then-lm"},
        {},
    ),
    "kbfgsl-full-batch": ("K-BFGS(L)", GAUSSIAN, dense(5, 3, 5), LIMITED, {"batch": 14}),
    "kbfgsl-conv": ("K-BFGS(L)", CATEGORICAL, CONV, LIMITED, {}),
    "kfac-conv": ("KFAC", CATEGORICAL, CONV, record.KFAC_HYPER, {}),
    "kfac-full-batch": ("KFAC", GAUSSIAN, dense(5, 3, 5), record.KFAC_HYPER, {"batch": 14}),
    "kfac-rare-inverses": (
        "KFAC",
        BERNOULLI,
        dense(5, 3, 5),
        record.KFAC_HYPER | {"inverse_every": 3, "inverse_always_until": 1},
        {},
    ),
    **{
        f"mbf-{rule}-conv": ("MBF", CATEGORICAL, CONV, MBF | {"fc_blocks": rule, "T2_inverse": 3}, {})
        for rule in ("per_output", "per_output_avg", "per_input_avg", "flat_chunk_avg")
    },
    "mbf-normalised": ("MBF", CATEGORICAL, NORMALISED, MBF | {"fc_blocks": "per_output"}, {}),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_files_never_recorded_before(name: str, tmp_path: Path) -> None:
    algorithm, loss, layers, hyper, numbers = UNSEEN[name]
    report = replay_file(recorded(tmp_path, algorithm, loss, layers, hyper, **numbers))
    assert report.worst.error <= TOLERANCE, report.worst
    assert not [note for note in report.notes if "not compared" in note], report.notes


def made_from(name: str, tmp_path: Path, **hyper: Any) -> Report:
    """A recorded file with renamed settings; ``None`` drops one."""
    meta, arrays = read(name)
    meta["hyper"] = {key: value for key, value in (meta["hyper"] | hyper).items() if value is not None}
    return replay_file(write(tmp_path / "renamed.npz", meta, arrays))


def test_settings_may_have_other_names_or_their_usual_values(tmp_path: Path) -> None:
    assert made_from("ref_kbfgsl_memory4_bce", tmp_path, memory=None, lbfgs_memory=4, lr=None, alpha=0.3).passed
    assert made_from("ref_kbfgsl_memory4_bce", tmp_path, momentum_rho=None, s_y_decay=None, A_decay=None).passed
    assert made_from("ref_kfac_bce", tmp_path, inverse_every=None, inverse_always_until=None).passed
    assert made_from("ref_mbf_perinputavg_mse", tmp_path, T1_statistics=None, statistics_every=2).passed
    report = made_from("ref_kfac_mse", tmp_path, cat=1)
    assert report.passed
    assert report.notes == ["settings that the replay does not use: cat"]


@pytest.mark.parametrize(
    ("file", "setting", "value"),
    [
        ("case1_kbfgs_bce", "s_y_decay", 0.8),
        ("case1_kbfgs_bce", "powell_alpha", 0.3),
        ("case3_kbfgs_mse", "A_decay", 0.8),
        ("case3_kbfgs_mse", "weight_decay_tau", 1e-4),
        ("ref_kbfgsl_memory4_bce", "memory", 5),
        ("ref_kfac_bce", "inverse_every", 21),
        ("ref_kfac_bce", "statistics_decay", 0.95),
        ("mbf_m1_flatchunk_bce", "T1_statistics", 1),
        ("mbf_m1_flatchunk_bce", "fc_blocks", "per_input_avg"),
        ("mbf_m4_cnn_flatchunk", "diag_beta2", 0.99),
        ("mbf_m4_cnn_flatchunk", "weight_decay", 9.0),
    ],
)
def test_a_wrong_setting_fails(file: str, setting: str, value: Any, tmp_path: Path) -> None:
    report = made_from(file, tmp_path, **{setting: value})
    assert not report.passed
    assert any(entry.error > 1e-5 for entry in report.comparisons if entry.name.startswith(("W_", "b_")))


def test_one_wrong_entry_fails_and_is_named(tmp_path: Path) -> None:
    meta, arrays = read("case3_kbfgs_mse")
    arrays["H_g_2"][7, 1, 2] += 1e-6 * np.abs(arrays["H_g_2"]).max()
    status, text = shown([write(tmp_path / "wrong.npz", meta, arrays), FILES[0]])
    assert status == 1
    assert "H_g_2 at 7" in text
    assert "wrong.npz: H_g_2 differs by 1.0e-06 at iteration 7" in text
    assert "1 of 2 files agree" in text


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("W_0", lambda value: value[:-1], "W_0 has shape (24, 8, 12) in the file, the replay makes (25, 8, 12)"),
        ("loss", lambda value: np.where(np.arange(25) == 4, np.nan, value), "loss differs by inf at iteration 4"),
    ],
)
def test_values_that_cannot_be_subtracted_fail(name: str, change: Any, message: str, tmp_path: Path) -> None:
    meta, arrays = read("case1_kbfgs_bce")
    arrays[name] = change(arrays[name])
    status, text = shown([write(tmp_path / "odd.npz", meta, arrays)])
    assert status == 1
    assert message in text


def test_an_unknown_array_is_reported(tmp_path: Path) -> None:
    meta, arrays = read("ref_kfac_mse")
    arrays["trace_0"] = np.ones(12)
    status, text = shown([write(tmp_path / "more.npz", meta, arrays)])
    assert status == 0
    assert "not compared, because the replay has no such array: trace_0" in text


def test_without_a_warm_start_the_recorded_one_is_the_start(tmp_path: Path) -> None:
    for name in ("case1_kbfgs_bce", "mbf_m4_cnn_flatchunk", "ref_kfac_bce"):
        meta, arrays = read(name)
        for key in ("warm_batches", "warm_targets", "warm_fisher_targets"):
            arrays.pop(key, None)
        report = replay_file(write(tmp_path / "cold.npz", meta, arrays))
        assert report.passed, report.worst
        assert "started from its arrays" in report.notes[0]


def test_without_any_warm_start_averages_begin_at_zero(tmp_path: Path) -> None:
    layers = dense(5, 3, 5)
    path = recorded(tmp_path, "K-BFGS", GAUSSIAN, layers, record.KBFGS_HYPER, batch=14)
    meta, arrays = trajectories.load(path)
    for name in [name for name in arrays if name.startswith("A_init")]:
        del arrays[name]
    assert replay_file(write(path, meta, arrays)).passed


def test_a_step_that_the_guard_would_shorten_is_replayed_as_recorded(tmp_path: Path) -> None:
    path = recorded(tmp_path, "K-BFGS", GAUSSIAN, dense(5, 3, 5), record.KBFGS_HYPER | {"lr": 5.0})
    report = replay_file(path)
    assert report.passed, report.worst
    assert "the method's guard would shorten the step of iteration" in report.notes[0]


def broken(name: str, tmp_path: Path) -> Path:
    """A file that cannot be replayed."""
    path = tmp_path / f"{name}.npz"
    meta, arrays = read("case1_kbfgs_bce")
    if name == "truncated":
        path.write_bytes(FILES[0].read_bytes()[:-5000])
    elif name == "damaged":
        content = bytearray(FILES[0].read_bytes())
        content[5000:5100] = bytes(100)
        path.write_bytes(content)
    elif name == "text":
        path.write_text("not an archive\n")
    elif name == "array":
        with path.open("wb") as stream:
            np.save(stream, np.ones(3))
    elif name == "nameless":
        np.savez(path, **arrays)
    elif name == "folder":
        path.mkdir()
    elif name == "pickled":
        np.savez(path, meta=np.array(json.dumps(meta)), data=np.array([{}], dtype=object))
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no file"),
        ("truncated", "cannot be read as .npz"),
        ("damaged", "cannot be read as .npz"),
        ("text", "cannot be read as .npz"),
        ("array", "cannot be read as .npz"),
        ("pickled", "cannot be read as .npz"),
        ("nameless", "has no array 'meta'"),
        ("folder", "is a folder; name the files in it"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_the_others_run(name: str, message: str, tmp_path: Path) -> None:
    status, text = shown([broken(name, tmp_path), DATA / "ref_kfac_mse.npz"])
    assert status == 1
    assert f"{name}.npz: " in text
    assert message in text
    assert "ref_kfac_mse" in text
    assert "1 of 2 files agree" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "Shampoo"}, "unknown algorithm 'Shampoo'"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"loss": CATEGORICAL}, "'labels'"),
        ({"hyper": {"lr": 0.3}}, "setting 'damping' must be a number, got None"),
        ({"hyper": {"lambda_damping": 0.3}}, "setting 'lr' must be a number"),
        ({"hyper": {"lr": 0.3, "lambda_damping": 0.3, "skip_threshold": 1e-3}}, "'skip_threshold' must be 0.0001"),
        ({"hyper": {"lr": 0.3, "lambda_damping": 0.3, "A_damping_epsilon": 0.3}}, "root of the damping 0.3"),
        ({"hyper": {"lr": 0.3, "lambda_damping": 0.3, "damping": 0.2}}, "contradict"),
        ({"hyper": {"lr": 0.3, "lambda_damping": 0.3, "H_g_initial": 2}}, "'H_g_initial' must be 1"),
        ({"hyper": {"lr": 0.3, "lambda_damping": 0.3, "pairs": "triple"}}, "unknown pair damping 'triple'"),
        ({"hyper": 3}, "must be a table of settings"),
        ({"activations": ["relu", "swish", "relu", "linear"]}, "unknown operation 'swish'"),
        ({"activations": ["relu"]}, "need as many activations"),
        ({"layer_sizes": [12, 8, 6, 8, 12]}, "'W_init_1' has shape (5, 8), layer 1 needs (6, 8)"),
        ({"layers": [{"type": "pool", "then": []}]}, "unknown type of layer 'pool'"),
        ({"layers": [{"type": "dense", "in": 2, "then": []}]}, "lacks 'out'"),
        ({"activations": None, "layer_sizes": None}, "meta describes no network"),
    ],
)
def test_what_the_library_has_no_counterpart_of_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    meta, arrays = read("case1_kbfgs_bce")
    with pytest.raises(ArgumentError) as caught:
        replay_file(write(tmp_path / "other.npz", meta | change, arrays))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("file", "missing", "message"),
    [
        ("case1_kbfgs_bce", "data", "no array 'data'"),
        ("case1_kbfgs_bce", "batches", "no array 'batches'"),
        ("case1_kbfgs_bce", "W_init_2", "no array 'W_init_2'"),
        ("case1_kbfgs_bce", "b_2", "no array 'b_2'"),
        ("ref_kfac_mse", "fisher_targets", "samples labels"),
    ],
)
def test_a_missing_array_is_named(file: str, missing: str, message: str, tmp_path: Path) -> None:
    meta, arrays = read(file)
    del arrays[missing]
    with pytest.raises(ArgumentError) as caught:
        replay_file(write(tmp_path / "less.npz", meta, arrays))
    assert message in str(caught.value)


def test_targets_that_do_not_match_their_batches_are_refused(tmp_path: Path) -> None:
    meta, arrays = read("ref_kfac_mse")
    arrays["fisher_targets"] = arrays["fisher_targets"][:5]
    with pytest.raises(ArgumentError, match=r"'fisher_targets' of shape .* does not match the rows of 'batches'"):
        replay_file(write(tmp_path / "rows.npz", meta, arrays))


def test_data_of_another_width_are_one_line(tmp_path: Path) -> None:
    meta, arrays = read("ref_kfac_mse")
    arrays["data"] = arrays["data"][:, 1:]
    status, text = shown([write(tmp_path / "narrow.npz", meta, arrays)])
    assert status == 1
    assert "narrow.npz: RuntimeError: " in text


def test_rows_outside_the_data_are_refused(tmp_path: Path) -> None:
    meta, arrays = read("case1_kbfgs_bce")
    arrays["batches"] = arrays["batches"] + 1
    with pytest.raises(ArgumentError, match="'batches' must be a table of row numbers of the 60 samples"):
        replay_file(write(tmp_path / "rows.npz", meta, arrays))


def test_no_files_is_no_success() -> None:
    with pytest.raises(ArgumentError, match="no files to replay"):
        replay([])
