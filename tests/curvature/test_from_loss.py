"""The curvature of any twice differentiable loss, from the loss itself: against autograd's own second derivatives."""

import warnings
from collections.abc import Callable

import osculate as osc
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from osculate.curvature import Gaussian
from osculate.curvature.loss_curvature import LossShape
from osculate.framework.optimizer.observers import Observer
from torch import Tensor, nn

from .test_loss_weights import BITS, CATEGORICAL, LABELS, SEQUENCE, SEQUENCES, X, equal, net, tokens, truth

Loss = Callable[[Tensor], Tensor]
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(5)).double()
MIX = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.7]]).double()


def heteroscedastic(o: Tensor) -> Tensor:
    """A normal distribution whose logarithmic variance is convex here."""
    return (torch.cosh(o[:, 0] - o[:, 1]) + o[:, 2].exp()).mean()


LOSSES: dict[str, Loss] = {
    "mse": lambda o: F.mse_loss(o, Y),
    "huber": lambda o: F.huber_loss(o, Y, delta=0.5),
    "smooth l1, sum": lambda o: F.smooth_l1_loss(o, Y, reduction="sum") / 7,
    "poisson": lambda o: F.poisson_nll_loss(o, Y.abs(), log_input=True),
    "log cosh, masked": lambda o: (torch.cosh(o - Y).log() * BITS).sum() / BITS.sum(),
    "mahalanobis": lambda o: ((o - Y) @ MIX * (o - Y)).sum(1).mean(),
    "cross entropy": CATEGORICAL["class weights"],
    "label smoothing": CATEGORICAL["smoothed"],
    "bce": lambda o: F.binary_cross_entropy_with_logits(o, BITS, pos_weight=torch.tensor([3.0, 1.0, 0.1]).double()),
    "coupled coordinates": heteroscedastic,
    "kl of logits": lambda o: F.kl_div(o.log_softmax(-1), Y.softmax(-1), reduction="batchmean"),
    "exponential of margins": lambda o: (1.3 * o.logsumexp(-1) - o[torch.arange(16), LABELS]).exp().mean(),
}


class Look(Observer):
    """Keeps the block of one layer as a step has measured it."""

    def __init__(self, optimizer: osc.SecondOrder, layer: str, estimator: object = None) -> None:
        self.layer, self.estimator, self.found = layer, estimator or osc.ExactGGN(), []
        optimizer.observers.append(self)

    def after_step(self, optimizer: object, trace: object) -> None:
        self.found.append(self.estimator.fill(trace.statistics[self.layer]).matrix())


def collected(
    model: nn.Module,
    x: Tensor,
    loss: Loss,
    estimator: object = None,
    likelihood: object = "from-loss",
    **options: object,
) -> torch.Tensor:
    """The block of the only layer, measured in the closure of a step; micro-batches with ``parts``."""
    parts = options.pop("parts", None)
    estimator = estimator or osc.ExactGGN()
    method = osc.Method(osc.Dense(), estimator, defaults={"lr": 0.0, "damping": 0.1})
    optimizer = osc.build(method, model, likelihood=likelihood, **options)
    look = Look(optimizer, "0", estimator)

    def closure() -> Tensor:
        optimizer.zero_grad()
        if parts is None:
            total = loss(model(x))
            total.backward()
            return total
        total = torch.zeros(())
        for part, share in parts:
            value = share * loss(model(x[part]), part)
            value.backward()
            total = total + value.detach()
        return total

    optimizer.step(closure)
    optimizer.close()
    return look.found[0]


@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("name", LOSSES)
def test_blocks_are_those_of_the_loss(name: str, backend: str) -> None:
    model = net()
    equal(collected(model, X, LOSSES[name], backend=backend), truth(model, X, LOSSES[name]))


@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("name", SEQUENCE)
def test_positions_are_apart(name: str, backend: str) -> None:
    model, loss = net(), SEQUENCE[name]
    equal(collected(model, SEQUENCES, loss, backend=backend), truth(model, SEQUENCES, loss))


def test_classes_may_be_anywhere() -> None:
    model = net()
    loss = lambda o: F.cross_entropy(o.transpose(1, 2), torch.arange(35).reshape(5, 7) % 3)  # noqa: E731
    equal(collected(model, SEQUENCES, loss), truth(model, SEQUENCES, loss))
    images = nn.Sequential(nn.Conv2d(1, 3, 1)).double()
    x, labels = torch.randn(2, 1, 4, 2, generator=torch.Generator().manual_seed(0)).double(), torch.arange(16) % 3
    loss = lambda o: F.cross_entropy(o, labels.reshape(2, 4, 2))  # noqa: E731
    equal(collected(images, x, loss), truth(images, x, loss))


@pytest.mark.parametrize("name", ["mse", "mahalanobis", "cross entropy"])
def test_sampled_signs_average_to_the_exact_block(name: str) -> None:
    model = net()
    found = [collected(model, X, LOSSES[name], osc.SampledFisher(), seed=seed) for seed in range(300)]
    expected = truth(model, X, LOSSES[name])
    assert (torch.stack(found).mean(0) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("backend", ["hooks", "func"])
def test_micro_batches_are_parts_of_one_loss(backend: str) -> None:
    model = net()
    loss = lambda o, part=slice(None): ((o - Y[part]) @ MIX * (o - Y[part])).sum(1).mean()  # noqa: E731
    parts = [(slice(0, 4), 0.25), (slice(4, 16), 0.75)]
    equal(collected(model, X, loss, parts=parts, backend=backend), truth(model, X, loss))


@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("name", ["mse", "huber", "log cosh, masked"])
def test_the_scale_of_a_gaussian_is_measured_in_a_closure(name: str, backend: str) -> None:
    model = net()
    equal(collected(model, X, LOSSES[name], likelihood="gaussian", backend=backend), truth(model, X, LOSSES[name]))


def test_the_scale_of_a_gaussian_in_a_plain_loop_is_said_once() -> None:
    for likelihood, count in (("gaussian", 1), (Gaussian(weight=2 / 3), 0)):
        model = net()
        optimizer = osc.build("kfac", model, likelihood=likelihood, damping=0.1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.zero_grad()
                F.mse_loss(model(X), Y).backward()
                optimizer.step()
        assert [str(entry.message).count("Gaussian(weight=2 / D)") for entry in said] == [1] * count


def test_a_plain_loop_has_no_second_derivative() -> None:
    model = net()
    optimizer = osc.build("kfac", model, likelihood="from-loss", damping=0.1)
    before = model[0].weight.detach().clone()
    with pytest.raises(osc.ArgumentError, match="step\\(closure\\)"):
        F.mse_loss(model(X), Y).backward()
    assert optimizer.needs_closure
    with pytest.raises(osc.ClosureRequiredError):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def contrastive(o: Tensor) -> Tensor:
    return F.cross_entropy(o @ o.T, torch.arange(16))


@pytest.mark.parametrize(("loss", "words"), [
    (contrastive, "couples samples"),
    (lambda o: (o - o.mean(0)).square().sum(), "couples samples"),
])  # fmt: skip
def test_losses_without_curvature_per_sample_are_refused(loss: Loss, words: str) -> None:
    model = net()
    before = model[0].weight.detach().clone()
    with pytest.raises(osc.ArgumentError, match=words):
        collected(model, X, loss)
    assert torch.equal(model[0].weight, before)


def test_a_loss_with_one_derivative_only_is_refused() -> None:
    model = net()
    before = model[0].weight.detach().clone()
    with pytest.raises(osc.ArgumentError, match="differentiated twice"):
        collected(model, X, lambda o: F.multi_margin_loss(o, LABELS))
    assert torch.equal(model[0].weight, before)


def test_concave_parts_are_left_out_with_a_word() -> None:
    model = net()
    with pytest.warns(UserWarning, match="not convex"):
        found = collected(model, X, lambda o: (o[:, 0].square() - 2 * o[:, 1].square()).mean())
    equal(found, truth(model, X, lambda o: o[:, 0].square().mean()))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.policy(hidden), self.value(hidden).squeeze(-1)


def two_heads(output: tuple[Tensor, Tensor]) -> Tensor:
    policy, value = output
    return F.cross_entropy(policy, LABELS, weight=torch.tensor([1.0, 5.0, 0.2]).double()) + 3 * F.mse_loss(
        value, Y[:, 0]
    )


def truth_of_two(model: nn.Module, loss: Callable[[tuple[Tensor, Tensor]], Tensor]) -> Tensor:
    """Over the trunk, of both heads together."""
    names = ["trunk.weight", "trunk.bias"]
    values = {name: p.detach() for name, p in model.named_parameters()}

    def flat(*chosen: Tensor) -> Tensor:
        policy, value = torch.func.functional_call(model, {**values, **dict(zip(names, chosen, strict=True))}, (X,))
        return torch.cat([policy, value[:, None]], 1).reshape(-1)

    chosen = tuple(values[name] for name in names)
    jacobian = torch.cat([j.reshape(len(j), -1) for j in torch.autograd.functional.jacobian(flat, chosen)], 1)
    split = lambda o: (o.view(16, 4)[:, :3], o.view(16, 4)[:, 3])  # noqa: E731
    hessian = torch.autograd.functional.hessian(lambda o: loss(split(o)), flat(*chosen).detach())
    return jacobian.T @ hessian @ jacobian


@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("likelihood", [
    {0: "categorical", 1: Gaussian(weight=6.0)}, {0: "categorical", 1: "gaussian"}, {0: "from-loss", 1: "from-loss"},
])  # fmt: skip
def test_every_head_has_its_own_weights(likelihood: dict[int, object], backend: str) -> None:
    torch.manual_seed(0)
    model = Two().double()
    expected = truth_of_two(model, two_heads)
    method = osc.Method(osc.Dense(), osc.ExactGGN(), defaults={"lr": 0.0, "damping": 0.1})
    optimizer = osc.build(method, model, likelihood=likelihood, backend=backend)
    look = Look(optimizer, "trunk")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = two_heads(model(X))
        loss.backward()
        return loss

    optimizer.step(closure)
    equal(look.found[0], expected)


def test_heads_in_micro_batches_keep_their_weights() -> None:
    for backend in ("hooks", "func"):
        torch.manual_seed(0)
        model = Two().double()
        method = osc.Method(osc.Dense(), osc.ExactGGN(), defaults={"lr": 0.0, "damping": 0.1})
        optimizer = osc.build(method, model, likelihood={0: "categorical", 1: Gaussian(weight=6.0)}, backend=backend)
        weights = torch.tensor([1.0, 5.0, 0.2]).double()

        def loss(output: tuple[Tensor, Tensor], part: slice, weights: Tensor = weights) -> Tensor:
            losses = F.cross_entropy(output[0], LABELS[part], weight=weights, reduction="none")
            return (losses + 3 * (output[1] - Y[part, 0]).square()).mean()

        for part, share in ((slice(0, 4), 0.25), (slice(4, 16), 0.75)):
            (share * loss(model(X[part]), part)).backward()
        found = osc.ExactGGN().fill(optimizer.collect()["trunk"]).matrix()
        equal(found, truth_of_two(model, lambda o: loss(o, slice(None))))
        optimizer.close()


def test_a_head_computed_from_another_is_said() -> None:
    class Stacked(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            policy, _ = super().forward(x)
            return policy, policy.sum(1)

    model = Stacked().double()
    optimizer = osc.build("kfac", model, likelihood={0: "categorical", 1: Gaussian(weight=1.0)}, damping=0.1)
    two_heads(model(X)).backward()
    with pytest.warns(UserWarning, match="computed from another"):
        optimizer.step()


@pytest.mark.parametrize("name", ["mse", "mahalanobis"])
def test_warm_starts_take_the_loss(name: str) -> None:
    model, loss = net(), LOSSES[name]
    optimizer = osc.build(
        osc.Method(osc.Dense(), osc.ExactGGN(), warm_start=osc.ExactGGN(), defaults={"lr": 0.1, "damping": 0.1}),
        model,
        likelihood="from-loss",
    )
    with pytest.raises(osc.ArgumentError, match="functions that return the loss"):
        optimizer.warm_start([lambda: model(X)])
    optimizer.warm_start([lambda: loss(model(X))])
    state = optimizer.state_dict()["state"]
    matrix = next(iter(next(iter(state.values())).values()))
    found = [value for value in _tensors(state) if value.shape == (15, 15)]
    assert matrix is not None
    equal(found[0], truth(model, X, loss))


def test_warm_starts_read_the_weights_of_a_loss() -> None:
    model, loss = net(), CATEGORICAL["class weights"]
    for backend in ("hooks", "func"):
        optimizer = osc.build(
            osc.Method(osc.Dense(), osc.ExactGGN(), warm_start=osc.ExactGGN(), defaults={"lr": 0.1, "damping": 0.1}),
            model,
            likelihood="categorical",
            backend=backend,
        )
        optimizer.warm_start([lambda: loss(model(X))])
        found = [value for value in _tensors(optimizer.state_dict()["state"]) if value.shape == (15, 15)]
        equal(found[0], truth(model, X, loss))
        optimizer.close()


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [entry for part in value.values() for entry in _tensors(part)]
    return []


@pytest.mark.parametrize("backend", ["hooks", "func"])
def test_a_loss_that_is_scaled_keeps_its_curvature(backend: str) -> None:
    for likelihood, loss in (
        ("gaussian", LOSSES["mse"]),
        ("from-loss", LOSSES["mahalanobis"]),
        ("categorical", CATEGORICAL["class weights"]),
    ):
        model = net()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        method = osc.Method(osc.Dense(), osc.ExactGGN(), defaults={"lr": 0.0, "damping": 0.1})
        optimizer = osc.build(method, model, likelihood=likelihood, grad_scaler=scaler, backend=backend)
        look = Look(optimizer, "0")

        def closure(model=model, loss=loss, optimizer=optimizer, scaler=scaler) -> Tensor:
            optimizer.zero_grad()
            value = loss(model(X))
            scaler.scale(value).backward()
            return value

        optimizer.step(closure)
        equal(look.found[0], truth(model, X, loss))


def test_time_major_outputs_are_read_where_they_are() -> None:
    class TimeMajor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(x).transpose(0, 1)

    model = nn.Sequential(nn.Linear(4, 3)).double()
    outer = nn.Sequential(model[0]).double()
    losses = torch.tensor([1.0, 5.0, 0.2]).double()
    loss = lambda o: F.cross_entropy(o.reshape(-1, 3), torch.arange(35) % 3, weight=losses)  # noqa: E731
    expected = truth(outer, SEQUENCES, loss)
    major = TimeMajor().double()
    major.line.load_state_dict(model[0].state_dict())
    method = osc.Method(osc.Dense(), osc.ExactGGN(), defaults={"lr": 0.0, "damping": 0.1})
    for where in (1, lambda out: out.transpose(0, 1)):
        optimizer = osc.build(method, major, likelihood="categorical", samples=where)
        loss(major(SEQUENCES).transpose(0, 1)).backward()
        equal(osc.ExactGGN().fill(optimizer.collect()["line"]).matrix(), expected)
        optimizer.close()
    assert tokens(model(SEQUENCES)).shape == (5, 7)


def test_a_loss_without_curvature_at_first_is_looked_at_again() -> None:
    """Zeros have every structure: a structure is known once there is curvature, however late that is."""
    shape, like = LossShape(), X[:, :3]
    for _ in range(5):
        shape.measure(torch.zeros_like, like, only_diagonal=False)
    found = shape.measure(lambda vector: vector @ MIX, like, only_diagonal=False)
    torch.testing.assert_close(found.blocks, MIX.expand(16, 1, 3, 3))
