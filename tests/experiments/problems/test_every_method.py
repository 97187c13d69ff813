"""Methods take finite steps on problems at ``size=small``: each method on many, each problem with many.

Problems of which a step takes milliseconds meet every method; every other problem meets every third one, another third
than its neighbours, and those that the documentation runs on it. A problem of residuals meets every method over the
whole model too.
"""

import math
from functools import cache

import pytest
import torch
from osculate import registry
from osculate.experiments.problems import PROBLEMS, Data, ResidualProblem, get_problem
from osculate.experiments.runs.config import RunConfig
from osculate.experiments.runs.training import prepare
from osculate.framework.whole_model.method import whole_methods

STEPS = 3
SAMPLES = 12
IMAGES = {"cifar10-resnet32", "cifar10-vgg16", "cifar100-vgg16", "svhn-vgg11"}
EVERY = {"fashion-cnn", "cora-gcn", "logistic", "quadratic"}
SHARE = 3
DOCUMENTED = {
    "curves-autoencoder": {"kbfgs", "kfac", "joint-kfac", "sgdm", "adam"},
    "mnist-autoencoder": {"kbfgs", "joint-kfac"},
    "fashion-autoencoder": {"kfac", "joint-kfac", "adam"},
    "fashion-mlp": {"kbfgs", "mbf"},
}
FILES = {"mnist-autoencoder": (784,), "fashion-autoencoder": (784,), "faces-autoencoder": (625,)}
FILES |= {"mnist-cnn": (1, 28, 28), "fashion-cnn": (1, 28, 28), "fashion-mlp": (784,), "curves-autoencoder": (784,)}


@cache
def data(name: str) -> Data:
    """Numbers in the place of files; the data themselves where they are generated."""
    problem = get_problem(name, size="small")
    if name not in IMAGES | FILES.keys():
        return problem.load(None)
    generator = torch.Generator().manual_seed(1)
    if name in IMAGES:
        inputs = torch.randint(0, 256, (SAMPLES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    else:
        inputs = torch.rand(SAMPLES, *FILES[name], generator=generator)
    targets = inputs
    if problem.classes is not None:
        targets = torch.randint(0, problem.classes, (SAMPLES,), generator=generator)
    return Data(inputs, targets, inputs, targets)


def methods_on(problem: str) -> list[str]:
    """The methods that a problem meets."""
    offset = list(PROBLEMS).index(problem)
    wanted = DOCUMENTED.get(problem, set())
    chosen = [
        method
        for number, method in enumerate(registry.methods())
        if problem in EVERY or method in wanted or (number + offset) % SHARE == 0
    ]
    return [*chosen, *(whole_methods() if isinstance(get_problem(problem), ResidualProblem) else ())]


def test_every_method_meets_a_deep_network_and_every_problem_several_methods() -> None:
    met = {problem: set(methods_on(problem)) for problem in PROBLEMS}
    assert all(len(methods) >= 4 for methods in met.values())
    deep = set().union(*(met[problem] for problem in PROBLEMS if problem not in EVERY))
    assert deep == set(registry.methods()) | set(whole_methods())


@pytest.mark.parametrize("problem", PROBLEMS)
def test_methods_take_finite_steps(problem: str) -> None:
    broken = {}
    for method in methods_on(problem):
        small = get_problem(problem, size="small")
        batch = SAMPLES // 2 if small.batch_size is not None else None
        run = prepare(RunConfig(problem, method, batch_size=batch), small, data(problem))
        run.warm_start()
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        for _ in range(STEPS):
            run.step()
        after = list(run.model.parameters())
        found = run.evaluate()
        finite = math.isfinite(found.train_loss) and math.isfinite(found.test_loss)
        finite = finite and all(bool(value.isfinite().all()) for value in after)
        moved = any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        layers = () if method in whole_methods() else run.optimizer.layers
        others = {entry.kind for entry in layers if entry.kind == "Other"}
        if not finite or not moved or others:
            broken[method] = (finite, moved, others)
    assert not broken
