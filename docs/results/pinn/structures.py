"""Layer-wise structures and step rules on problems of residuals, beside the methods over the whole model.

    python docs/results/pinn/structures.py --seconds 20 --out docs/results/pinn

Every structure with a matrix is damped by the package's Levenberg-Marquardt rule. Its step is chosen by the joint rule
(a length per layer, and one along each layer's last step), by K-FAC's own pair of numbers for the whole network, or by
a length per layer alone; a step that does not lower the loss is shortened. Nothing is tuned. Seconds are those of the
processor in one thread, without evaluations.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import osculate as osc
import torch
from osculate.experiments.problems import ResidualProblem, get_problem
from osculate.experiments.runs.environment import describe_environment
from osculate.experiments.runs.evaluation import relative_error, score

PROBLEMS = ("poisson-2d", "heat-1d", "poisson-5d", "sine-regression")
MARKS = (1e-2, 1e-3, 1e-4, 1e-6)
NEWEST = osc.MovingAverage(0.9)
STRUCTURES: dict[str, Any] = {
    "Dense": osc.Dense(average=NEWEST),
    "Kronecker": osc.Kronecker(osc.Covariance(NEWEST), osc.Covariance(NEWEST)),
    "MiniBlock": osc.MiniBlock(average=NEWEST, schedule=osc.Schedule()),
    "Diagonal": osc.Diagonal(),
}
FREE = {"decay": 0.0, "relative_ridge": 0.0, "sign": osc.Unrestricted()}
RULES: dict[str, Any] = {
    "joint, with last steps": osc.JointWithLastStep(**FREE),
    "one pair for the network (K-FAC*)": osc.GlobalWithLastStep(),
    "joint": osc.JointLayerwise(**FREE),
}


def composed(structure: str, rule: str) -> osc.Method:
    """A structure with a rule."""
    adapts = osc.LevenbergMarquardt(every=1, omega=0.5, minimum=1e-14)
    return osc.Method(
        STRUCTURES[structure],
        osc.ExactGGN(),
        damping=osc.ConstantDamping() if structure == "Diagonal" else adapts,
        momentum=osc.NoMomentum(),
        step_size=RULES[rule],
        guard=osc.Armijo(),
        defaults={"lr": 1.0, "damping": 1e-3},
    )


def measured(name: str, structure: str, rule: str, seed: int, seconds: float) -> dict[str, Any]:
    """One run."""
    problem = get_problem(name, data_seed=seed)
    data = problem.load(None)
    model = problem.build_model(seed)
    optimizer = osc.build(composed(structure, rule), model, backend="residuals")
    inputs, targets = data.train_inputs, data.train_targets
    equations = isinstance(problem, ResidualProblem)
    residuals = problem.residuals(model, inputs, targets) if equations else lambda: {"fit": model(inputs) - targets}
    spent, steps, marks, best, trouble = 0.0, 0, {}, float("inf"), ""
    while spent < seconds and not trouble:
        began = time.process_time()
        try:
            for _ in range(5):
                optimizer.step(residuals)
        except (osc.OsculateError, RuntimeError) as error:
            trouble = f"{type(error).__name__}: {str(error)[:200]}"
        spent, steps = spent + time.process_time() - began, steps + 5
        if not equations:
            error_now = 2 * score(model, problem, inputs, targets, training=True)[0]
        else:
            error_now = relative_error(model, problem, data.test_inputs, data.test_targets)
        best = min(best, error_now)
        for mark in MARKS:
            if error_now <= mark:
                marks.setdefault(f"{mark:.0e}", round(spent, 2))
    row = {"problem": name, "structure": structure, "rule": rule, "seed": seed, "best": best, "steps": steps}
    return row | {"cpu_seconds": round(spent, 2), "cpu_seconds_to": marks, "trouble": trouble}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES))
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in given.problems:
        for structure in given.structures:
            for rule in RULES:
                for seed in range(given.seeds):
                    rows.append(measured(name, structure, rule, seed, given.seconds))
                    print(json.dumps(rows[-1]), flush=True)
                    content = {"seconds": given.seconds, "environment": describe_environment(torch.device("cpu"))}
                    text = json.dumps(content | {"runs": rows}, indent=1)
                    (given.out / "structures.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
