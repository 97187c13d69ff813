"""Problems of residuals at the front doors: comparisons, studies with a target on the relative error, reports."""

import json
from pathlib import Path

import pandas as pd
import pytest
from osculate.errors import ArgumentError
from osculate.experiments.commands.cli import execute
from osculate.experiments.problems import Target
from osculate.experiments.study.checking import checked
from osculate.experiments.study.definition import METRICS
from osculate.experiments.study.reading import find_study, read_study

STUDY = """
seeds = [1, 2]
[[problems]]
name = "poisson-2d"
options = { size = "small" }
target = { metric = "relative_l2", value = 0.1 }
[budget]
epochs = 40
[arms.lm]
method = "lm"
[arms.kept]
method = "lm"
geodesic = false
damping = 1e-2
[arms.joint]
method = "joint-kfac"
[arms.adam]
method = "adam"
space = { lr = { grid = [1e-2, 1e-3] } }
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(text: str) -> Path:
    file = Path("pinns.toml")
    file.write_text(text)
    return file


def test_a_race_has_methods_of_every_kind_and_the_relative_error(capsys: pytest.CaptureFixture[str]) -> None:
    race = "compare --problem heat-1d --problem-option size=small --seconds 30 --epochs 20 --out race --methods"
    assert execute([*race.split(), "lm", "ssbroyden", "kfac", "adam"]) == 0
    printed = capsys.readouterr().out
    assert "relative L2" in printed and "broke down" not in printed
    table = pd.read_csv("race/comparison.csv").set_index("method")
    assert table["relative L2"].idxmin() in ("lm", "ssbroyden") and table["epochs"].eq(20).all()
    starts = {
        curve["points"][0]["train_loss"] for curve in json.loads(Path("race/comparison.json").read_text())["curves"]
    }
    assert len(starts) == 1
    assert Path("race/comparison.png").exists()
    assert execute([*race.split(), "lm", "kbfgs", "--option", "kbfgs.backend=hooks"]) == 2
    assert "the curvature of 'kbfgs' would be wrong" in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_a_race_on_other_problems_has_the_columns_it_had() -> None:
    words = (
        "compare --problem quadratic --problem-option size=small --methods lm adam --seconds 5 --epochs 3 --out race"
    )
    assert execute(words.split()) == 0
    table = pd.read_csv("race/comparison.csv")
    assert "relative L2" not in table and table.method[0] == "lm"


def test_a_study_has_a_target_on_the_relative_error(capsys: pytest.CaptureFixture[str]) -> None:
    file = written(STUDY)
    assert execute(["study", str(file), "--out", "out"]) == 0
    assert execute(["report", "out"]) == 0
    scores = pd.read_csv("out/report/tables/scores.csv")
    steps = scores[scores.measure == "steps to target"].set_index("arm")["median"]
    assert steps["lm"] <= 40 < steps["adam"]  # which misses it
    errors = scores[scores.measure == "relative_l2"].set_index("arm")["median"]
    assert errors["lm"] < 0.1 < errors["adam"]
    options = [json.loads(path.read_text())["method_options"] for path in Path("out/runs").rglob("config.json")]
    assert {"system": None, "geodesic": False} in options


@pytest.mark.parametrize(
    ("exchanged", "message"),
    [
        (("geodesic = false", "geodesik = false"), "unknown setting of 'lm': 'geodesik'.*'geodesic'"),
        (("damping = 1e-2", "damping = -1.0"), "arm 'kept' on 'poisson-2d'.*damping"),
        (("geodesic = false", 'momentum = "NoMomentum"'), "kept.*momentum"),
        (("geodesic = false", "lr = 0.1"), "kept.*takes no lr"),
        (('"poisson-2d"', '"digits-classifier"'), "'lm' solves for residuals"),
        (('"poisson-2d"', '"quadratic"'), "it has no relative_l2; it has train_loss"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_run(exchanged: tuple[str, str], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        text = STUDY.replace(*exchanged)
        if "quadratic" in text:
            text = text.replace('method = "joint-kfac"', 'method = "sgdm"')
        checked(read_study(written(text)), None)


def test_the_shipped_study_has_the_arms_and_the_targets() -> None:
    study = read_study(find_study("pinn"))
    assert {arm.method for arm in study.arms} == {"lm", "engd", "spring", "ssbroyden", "bfgs", "lbfgs", "adam"}
    assert [problem.name for problem in study.problems] == ["poisson-2d", "heat-1d", "poisson-5d", "sine-regression"]
    assert {problem.target.metric for problem in study.problems[:3]} == {"relative_l2"}
    assert "relative_l2" in METRICS and Target("relative_l2", 1e-6).reached({"relative_l2": 1e-7})


def test_train_prints_the_relative_error_and_watching_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = "train --problem poisson-2d --problem-option size=small --method lm --epochs 20 --out run"
    assert execute(words.split()) == 0
    printed = capsys.readouterr().out
    assert "relative L2" in printed and "1000 points, against the solution" in printed
    assert execute([*words.split()[:-1], "other", "--watch"]) == 2
    assert "works on all parameters at once" in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert not Path("other").exists()


@pytest.mark.parametrize("command", ["diagnose", "microscope", "compare-structures"])
def test_measurements_of_layers_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = "train --problem poisson-2d --problem-option size=small --method adam --epochs 1 --out run"
    assert execute(words.split()) == 0
    assert execute([command, "run"]) == 2
    assert "'poisson-2d' is one of residuals" in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_a_time_measurement_says_what_to_do_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["bench", "--problem", "heat-1d", "--batch-size", "10"]) == 2
    assert "osculate compare --problem heat-1d" in " ".join(capsys.readouterr().err.replace("│", "").split())
