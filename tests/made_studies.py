"""Studies written to disk by hand: exponential courses with known rates, no training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class MadeStudy:
    """Builds ``folder`` piece by piece.

    Every run has the course loss = 1 + 9 exp(-rate epoch), 10 iterations and ``seconds`` seconds per epoch.
    """

    folder: Path
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)
    seeds: Sequence[int] = (0, 1, 2)
    base: str | None = None

    def problem(self, name: str, target: float | None = 2.0, tuning: str = "valid_loss") -> None:
        entry = {"metric": "train_loss", "value": target} if target is not None else None
        self.problems.append({"name": name, "options": {}, "target": entry, "tuning": tuning})

    def arm(self, label: str, varied: tuple[str, str] | None = None, trials: int = 0) -> None:
        change = {"part": varied[0], "value": varied[1]} if varied else None
        space = {"lr": [1e-3, 1e-1]} if trials else {}
        self.arms[label] = {"method": "sgdm", "options": {}, "space": space, "varied": change, "trials": trials}

    def write(self) -> Path:
        whole = {
            "name": "made",
            "title": "A made study",
            "notes": ["scaled down: nothing was trained"],
            "base": self.base,
            "arms": self.arms,
            "problems": self.problems,
            "seeds": list(self.seeds),
            "budget": {"epochs": 10},
            "protocol": "made by hand",
            "environment": {"device": "none"},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "study.json").write_text(json.dumps(whole))
        return self.folder

    def run(
        self,
        problem: str,
        arm: str,
        seed: int,
        rate: float,
        *,
        seconds: float = 0.5,
        epochs: int = 10,
        status: str = "finished",
        phase: str = "final",
        layers: Mapping[str, float] | None = None,
    ) -> Path:
        path = self.folder / "runs" / problem / arm / (f"tune-{seed}" if phase == "tune" else f"final-{seed}")
        path.mkdir(parents=True, exist_ok=True)
        lines = [course_line(epoch, rate, seconds, layers) for epoch in range(epochs + 1)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (path / "config.json").write_text(json.dumps({"problem": problem, "method": arm, "seed": seed, "lr": rate}))
        (path / "environment.json").write_text("{}")
        (path / "status.json").write_text(json.dumps({"status": status, "reason": "" if status == "finished" else "x"}))
        value = lines[-1]["valid_loss"] if status == "finished" else None
        trial = {"problem": problem, "arm": arm, "phase": phase, "seed": seed, "settings": {"lr": rate}, "value": value}
        (path / "trial.json").write_text(json.dumps(trial | {"trial": seed if phase == "tune" else None}))
        return path


def course_line(epoch: int, rate: float, seconds: float, layers: Mapping[str, float] | None) -> dict[str, Any]:
    loss = 1 + 9 * math.exp(-rate * epoch)
    line = {
        "epoch": epoch,
        "train_loss": loss,
        "valid_loss": loss + 0.1,
        "test_loss": loss + 0.2,
        "test_accuracy": 1 - loss / 20,
        "seconds": 1.0 + seconds * epoch,
        "warm_start_seconds": 1.0,
        "iterations": 10 * epoch,
        "gradient_evaluations": 20 * epoch,
        "penalty": 0.0,
    }
    return line | ({"layer_steps": {name: size / (epoch + 1) for name, size in layers.items()}} if layers else {})


def whole_study(folder: Path) -> MadeStudy:
    """Two problems, a base with three replaced parts, one of which breaks down, and tuning trials with misses."""
    study = MadeStudy(folder, base="joint_kfac & co")
    study.problem("autoencoder_1")
    study.problem("cnn-2", target=1.5)
    study.arm("joint_kfac & co", trials=6)
    study.arm("Split", ("damping", "Split"))
    study.arm("T2 100%", ("schedule", "T2=100"))
    study.arm("no guard", ("guard", "NoGuard()"))
    rates = {"joint_kfac & co": 0.6, "Split": 0.9, "T2 100%": 0.42}
    for scale, problem in ((1.0, "autoencoder_1"), (0.8, "cnn-2")):
        for seed in study.seeds:
            for arm, rate in rates.items():
                layers = {"encoder.0": 0.3, "encoder.2": 0.1, "decoder": 0.02} if arm == "joint_kfac & co" else None
                study.run(problem, arm, seed, scale * rate * (1 + 0.1 * seed), layers=layers)
            stopped = "broken down" if seed else "finished"
            study.run(problem, "no guard", seed, 0.5 * scale, epochs=3 if seed else 10, status=stopped)
        for trial in range(6):
            status = "broken down" if trial == 5 else "finished"
            study.run(problem, "joint_kfac & co", trial, 0.1 * (trial + 1), status=status, phase="tune")
    study.write()
    return study


def small_study(folder: Path) -> MadeStudy:
    """One problem, two arms, two seeds, two trials."""
    study = MadeStudy(folder, seeds=(0, 1))
    study.problem("p_1")
    for arm, rate in (("fast", 0.9), ("slow & sure", 0.5)):
        study.arm(arm, trials=2)
        for seed in study.seeds:
            study.run("p_1", arm, seed, rate + 0.05 * seed)
            study.run("p_1", arm, seed, rate + 0.1 * seed, phase="tune")
    study.write()
    return study
