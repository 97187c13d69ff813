"""How far a method comes on a problem of residuals, seed by seed, and when it passes 1e-3, 1e-4 and 1e-6.

    python docs/results/pinn/measure.py poisson-2d lm --seconds 60 --seeds 10 --out docs/results/pinn

The run is that of ``osculate train --problem poisson-2d --method lm --seed S --problem-option data_seed=S``; seconds
are those of the processor in one thread, without evaluations, so that other work on the machine does not count. A run
ends after ``--seconds`` of them, or where the error passes ``--enough``. The file is written after every seed.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from osculate.experiments.problems import get_problem
from osculate.experiments.runs.config import RunConfig, parse_options
from osculate.experiments.runs.environment import describe_environment
from osculate.experiments.runs.evaluation import relative_error, score
from osculate.experiments.runs.training import prepare

MARKS = (1e-3, 1e-4, 1e-6)


def measured(name: str, method: str, options: dict, seed: int, seconds: float, enough: float) -> dict:
    """One run."""
    chosen = {"data_seed": seed}
    problem = get_problem(name, **chosen)
    data = problem.load(None)
    config = RunConfig(name, method, seed=seed, problem_options=chosen, method_options=options)
    run = prepare(config, problem, data)
    spent, wall, marks, best = 0.0, 0.0, {}, float("inf")
    by_loss = problem.target.metric == "train_loss"  # of a regression: the mean squared error is what is asked for
    while spent < seconds and best > enough:
        began, clock = time.process_time(), time.perf_counter()
        for _ in range(5):
            run.step()
        spent, wall = spent + time.process_time() - began, wall + time.perf_counter() - clock
        if by_loss:
            error = 2 * score(run.model, problem, data.train_inputs, data.train_targets, training=True)[0]
        else:
            error = relative_error(run.model, problem, data.test_inputs, data.test_targets)
        best = min(best, error)
        for mark in (1e-8,) if by_loss else MARKS:
            if error <= mark:
                marks.setdefault(f"{mark:.0e}", round(spent, 2))
    loss = score(run.model, problem, data.train_inputs, data.train_targets, training=True)[0]
    return {
        "seed": seed,
        "mean squared error" if by_loss else "relative_l2": error,
        "best": best,
        "train_loss": loss,
        "steps": run.iterations,
        "evaluations": int(run.optimizer.gradient_evaluations),
        "cpu_seconds": round(spent, 2),
        "seconds": round(wall, 2),
        "cpu_seconds_to": marks,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("problem")
    parser.add_argument("method")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--enough", type=float, default=0.0)
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = given.out / f"{given.problem}-{given.method}.json"
    rows = []
    for seed in range(given.first, given.first + given.seeds):
        row = measured(given.problem, given.method, parse_options(given.option), seed, given.seconds, given.enough)
        rows.append(row)
        print(json.dumps(row), flush=True)
        settings = {"problem": given.problem, "method": given.method, "options": given.option, "seconds": given.seconds}
        content = {**settings, "enough": given.enough, "environment": describe_environment(torch.device("cpu"))}
        file.write_text(json.dumps(content | {"runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
