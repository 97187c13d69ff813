"""Reading recorded trajectories and comparing arrays with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import kbfgs, kfac, mbf

RUNNERS = {"K-BFGS": kbfgs.run, "K-BFGS(L)": kbfgs.run, "KFAC": kfac.run, "MBF": mbf.run}
INPUTS = ("meta", "data", "labels", "batches", "warm_batches")


def load(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Metadata and arrays of a trajectory file."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "meta"}
        return json.loads(str(archive["meta"])), arrays


def relative_error(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """max|x - ref| / max|ref| of one array; max|x| where the reference is all zero."""
    if value.shape != reference.shape:
        raise ValueError(f"shape {value.shape} differs from the recorded {reference.shape}")
    if not reference.size:
        return 0.0
    value, reference = np.asarray(value, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    return float(np.abs(value - reference).max() / (np.abs(reference).max() or 1.0))


def errors(meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Run the transcription and compare every recorded array that is not an input."""
    results = RUNNERS[meta["algorithm"]](meta, arrays)
    outputs = {
        name: value
        for name, value in arrays.items()
        if name not in INPUTS and not name.startswith(("W_init", "b_init"))
    }
    missing = sorted(set(outputs) - set(results))
    if missing:
        raise ValueError(f"the transcription of {meta['algorithm']} does not produce {missing}")
    return {
        name: relative_error(_comparable(name, results[name]), _comparable(name, outputs[name])) for name in outputs
    }


def _comparable(name: str, value: NDArray[Any]) -> NDArray[Any]:
    """A status says applied (0) or skipped (not 0); the reasons for skipping have no common numbering."""
    return value != 0 if name.startswith("status_") else value
