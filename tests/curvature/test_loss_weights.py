"""The curvature is that of the user's own loss: weights are read off the gradient at the output, against autograd."""

import warnings
from collections.abc import Callable

import osculate as osc
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from osculate.curvature import Bernoulli, Categorical, Gaussian, Likelihood
from osculate.curvature.loss_weights import LossReader
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]


def truth(model: nn.Module, x: Tensor, loss: Loss) -> Tensor:
    """J' H J over all parameters, H the Hessian of the user's loss in the output."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def flat(*chosen: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(values, chosen, strict=True)), (x,)).reshape(-1)

    parts = torch.autograd.functional.jacobian(flat, tuple(values.values()))
    jacobian = torch.cat([part.reshape(len(part), -1) for part in parts], 1)
    output = model(x).detach()
    hessian = torch.autograd.functional.hessian(lambda o: loss(o.view(output.shape)), output.reshape(-1))
    return jacobian.T @ hessian @ jacobian


def record(
    model: nn.Module, x: Tensor, loss: Loss, likelihood: str | Likelihood, estimator: object = None, **options: object
):
    """osculate's record of the only layer; micro-batches with ``parts``."""
    parts, shares = options.pop("parts", [slice(None)]), options.pop("shares", [1.0])
    estimator = estimator or osc.ExactGGN()
    method = osc.Method(osc.Dense(), estimator, defaults={"lr": 1.0, "damping": 0.1})
    optimizer = osc.build(method, model, likelihood=likelihood, **options)
    for part, share in zip(parts, shares, strict=True):
        (share * (loss(model(x[part])) if len(parts) == 1 else loss(model(x[part]), part))).backward()
    entry = optimizer.collect()["0"]
    optimizer.close()
    return estimator.fill(entry)


def net(*parts: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), *parts).double()


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).double()
SEQUENCES = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(2)).double()
LABELS = torch.arange(16) * 7 % 3
BITS = (torch.arange(48).reshape(16, 3) * 5 % 7 < 3).double()
TOKENS = torch.arange(35).reshape(5, 7) * 11 % 3
MASK = (torch.arange(35).reshape(5, 7) % 4 != 0).double()
CLASSES = torch.tensor([1.0, 5.0, 0.2]).double()
SAMPLES = torch.linspace(0.1, 3.0, 16).double()
PIXELS = (torch.rand(16, 3, generator=torch.Generator().manual_seed(4)) * 2 - 0.5).clamp(0, 1).double()


def tokens(o: Tensor) -> Tensor:
    return F.cross_entropy(o.reshape(-1, 3), TOKENS.reshape(-1), reduction="none").view(5, 7)


CATEGORICAL: dict[str, Loss] = {
    "plain": lambda o: F.cross_entropy(o, LABELS),
    "half": lambda o: 0.5 * F.cross_entropy(o, LABELS),
    "class weights": lambda o: F.cross_entropy(o, LABELS, weight=CLASSES),
    "ignored": lambda o: F.cross_entropy(o, torch.where(torch.arange(16) % 4 == 0, -100, LABELS)),
    "ignored, over N": lambda o: (
        F.cross_entropy(o, torch.where(torch.arange(16) % 4 == 0, -100, LABELS), reduction="sum") / 16
    ),
    "sample weights": lambda o: (SAMPLES * F.cross_entropy(o, LABELS, reduction="none")).mean(),
    "smoothed": lambda o: F.cross_entropy(o, LABELS, label_smoothing=0.1),
    "smoothed, ignored": lambda o: F.cross_entropy(
        o, torch.where(torch.arange(16) % 4 == 0, -100, LABELS), label_smoothing=0.2
    ),
    "mean over classes too": lambda o: F.cross_entropy(o, LABELS) / 3,
}
BERNOULLI: dict[str, Loss] = {
    "nn.BCEWithLogitsLoss": lambda o: F.binary_cross_entropy_with_logits(o, BITS),
    "summed over outputs": lambda o: F.binary_cross_entropy_with_logits(o, BITS, reduction="sum") / 16,
    "pos_weight": lambda o: F.binary_cross_entropy_with_logits(o, BITS, pos_weight=10 * CLASSES),
    "weight": lambda o: F.binary_cross_entropy_with_logits(o, BITS, weight=SAMPLES[:, None]),
    "pixels": lambda o: F.binary_cross_entropy_with_logits(o, PIXELS),
    "smoothed": lambda o: F.binary_cross_entropy_with_logits(o, 0.9 * BITS + 0.05),
}
SEQUENCE: dict[str, Loss] = {
    "sum of tokens": lambda o: tokens(o).sum() / 5,
    "token mean": lambda o: tokens(o).mean(),
    "masked token mean": lambda o: (MASK * tokens(o)).sum() / MASK.sum(),
    "mean per sequence": lambda o: ((MASK * tokens(o)).sum(1) / MASK.sum(1)).mean(),
}


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("name", [*CATEGORICAL, *BERNOULLI])
def test_exact_blocks_are_those_of_the_users_loss(name: str, backend: str) -> None:
    for kind, table in (("categorical", CATEGORICAL), ("bernoulli", BERNOULLI)):
        if name in table:
            model = net()
            entry = record(model, X, table[name], kind, backend=backend)
            equal(entry.matrix(), truth(model, X, table[name]))


@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("name", SEQUENCE)
def test_tokens_have_their_own_weights(name: str, backend: str) -> None:
    model, loss = net(), SEQUENCE[name]
    equal(record(model, SEQUENCES, loss, "categorical", backend=backend).matrix(), truth(model, SEQUENCES, loss))


class Second(nn.Module):
    """(N, T, C) as (N, C, T, ...)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, self.shape) if self.shape else x.transpose(1, 2)


@pytest.mark.parametrize("shape", [(), (7, 1), (1, 7)])
def test_classes_may_come_second(shape: tuple[int, ...]) -> None:
    model, labels = net(Second(*shape)), TOKENS.reshape(5, *(shape or (7,)))
    ignored = torch.where(labels == 2, -100, labels)
    for target in (labels, ignored):
        loss = lambda o, t=target: F.cross_entropy(o, t)  # noqa: E731
        equal(record(model, SEQUENCES, loss, "categorical").matrix(), truth(model, SEQUENCES, loss))


@pytest.mark.parametrize(("kind", "loss"), [
    ("bernoulli", lambda o: F.binary_cross_entropy_with_logits(o, BITS[:, 0])),
    (Gaussian(weight=1.0), lambda o: 0.5 * (o - BITS[:, 0]).square().mean()),
])  # fmt: skip
def test_outputs_may_be_one_number_per_sample(kind: str | Likelihood, loss: Loss) -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    equal(record(model, X, loss, kind).matrix(), truth(model, X, loss))


@pytest.mark.parametrize("backend", ["hooks", "func"])
def test_micro_batches_are_parts_of_one_loss(backend: str) -> None:
    model, parts = net(), [slice(0, 4), slice(4, 16)]
    per_sample = lambda o, part: F.cross_entropy(o, LABELS[part], weight=CLASSES, reduction="none")  # noqa: E731
    loss = lambda o, part=slice(None): per_sample(o, part).mean()  # noqa: E731
    entry = record(model, X, loss, "categorical", parts=parts, shares=[0.25, 0.75], backend=backend)
    equal(entry.matrix(), truth(model, X, loss))


def test_a_summed_loss_keeps_its_weights() -> None:
    model = net()
    loss = lambda o: F.cross_entropy(o, LABELS, weight=CLASSES, reduction="sum")  # noqa: E731
    entry = record(model, X, loss, "categorical", loss_reduction="sum")
    equal(16 * entry.matrix(), truth(model, X, loss))


@pytest.mark.parametrize(("kind", "loss"), [
    ("categorical", CATEGORICAL["class weights"]), ("bernoulli", BERNOULLI["pos_weight"]),
])  # fmt: skip
def test_sampled_rows_average_to_the_exact_block(kind: str, loss: Loss) -> None:
    model = net()
    found = [record(model, X, loss, kind, osc.SampledFisher(), seed=seed).matrix() for seed in range(400)]
    expected = truth(model, X, loss)
    assert (torch.stack(found).mean(0) - expected).norm() < 0.1 * expected.norm()


def test_a_plain_loss_has_weight_one() -> None:
    model = net()
    optimizer = osc.build("kfac", model, likelihood="categorical")
    CATEGORICAL["plain"](model(X)).backward()
    weights = optimizer.capture.readers[0].weights(model(X).detach(), torch.autograd.grad(
        CATEGORICAL["plain"](output := model(X)), output)[0])  # fmt: skip
    torch.testing.assert_close(weights, torch.ones(16, dtype=torch.float64), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize(("kind", "options", "loss", "words"), [
    ("gaussian", {}, CATEGORICAL["plain"], "build with likelihood='categorical'"),
    ("gaussian", {}, BERNOULLI["nn.BCEWithLogitsLoss"], "build with likelihood='bernoulli'"),
    ("bernoulli", {}, CATEGORICAL["plain"], "build with likelihood='categorical'"),
    ("categorical", {}, BERNOULLI["summed over outputs"], "build with likelihood='bernoulli'"),
    ("categorical", {}, lambda o: F.cross_entropy(o, LABELS, reduction="sum"), "loss_reduction='sum'"),
    ("bernoulli", {}, lambda o: F.binary_cross_entropy_with_logits(o, BITS, reduction="sum"), "loss_reduction='sum'"),
])  # fmt: skip
def test_another_loss_is_refused_before_anything_is_written(
    kind: str, options: dict[str, object], loss: Loss, words: str
) -> None:
    model = net()
    before = model[0].weight.detach().clone()
    optimizer = osc.build("kfac", model, likelihood=kind, damping=0.1, **options)
    loss(model(X)).backward()
    with pytest.raises(osc.ArgumentError, match=words):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_weights_that_cannot_be_read_are_said_once() -> None:
    model = net()
    optimizer = osc.build("kfac", model, likelihood="categorical", damping=0.1)
    advantages = torch.linspace(-1, 1, 16).double() + 0.01
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            (advantages * F.cross_entropy(model(X), LABELS, reduction="none")).mean().backward()
            optimizer.step()
    assert len(said) == 1
    assert "weight 1 for every sample" in str(said[0].message)


def test_a_graph_that_is_thrown_away_leaves_nothing() -> None:
    model = net()
    optimizer = osc.build("kfac", model, likelihood="categorical")
    for _ in range(3):
        model(X)
    assert not optimizer.capture._calls.alive()


def test_several_backwards_through_one_pass_add_up() -> None:
    model = net()
    method = osc.Method(osc.Dense(), osc.ExactGGN(), defaults={"lr": 1.0, "damping": 0.1})
    optimizer = osc.build(method, model, likelihood="categorical")
    output = model(X)
    each = (SAMPLES * F.cross_entropy(output, LABELS, reduction="none")) / 16
    each[:8].sum().backward(retain_graph=True)
    each[8:].sum().backward()
    found = osc.ExactGGN().fill(optimizer.collect()["0"]).matrix()
    equal(found, truth(model, X, CATEGORICAL["sample weights"]))


@pytest.mark.parametrize("backend", ["hooks", "func"])
def test_the_weight_of_a_squared_error_can_be_said(backend: str) -> None:
    model, loss = net(), lambda o: F.mse_loss(o, BITS)
    entry = record(model, X, loss, Gaussian(weight=2 / 3), backend=backend)
    equal(entry.matrix(), truth(model, X, loss))
    with pytest.raises(osc.ArgumentError, match="weight"):
        Gaussian(weight=0.0)


def test_an_output_that_is_changed_in_place_is_refused() -> None:
    """By dividing in place the loss hides that it reads another distribution; dividing otherwise is seen, and said."""
    model = net()
    optimizer = osc.build("kfac", model, likelihood="categorical", damping=0.1)
    with pytest.raises(osc.ArgumentError, match="changed in place"):
        F.cross_entropy(model(X).div_(3.0), LABELS).backward()
    optimizer.zero_grad()
    F.cross_entropy(model(X) / 3.0, LABELS).backward()
    with pytest.warns(osc.LossWarning, match="from-loss"):
        optimizer.step()


def test_a_loss_that_is_not_made_of_the_output_is_named() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.line(x)
            return {"logits": logits.clone(), "loss": F.cross_entropy(logits, LABELS)}

    model = Both().double()
    optimizer = osc.build("kfac", model, likelihood="categorical", damping=0.1)
    before = model.line.weight.detach().clone()
    model(X)["loss"].backward()
    with pytest.raises(osc.ArgumentError, match="the loss is not made of it"):
        optimizer.step()
    assert torch.equal(model.line.weight, before)
    optimizer.zero_grad()
    F.cross_entropy(model(X)["logits"], LABELS).backward()
    optimizer.step()


@settings(max_examples=60)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.01, 1.0, 5.0, 15.0, 40.0, 100.0]),
    shape=st.tuples(st.integers(2, 40), st.sampled_from([2, 3, 10, 200])),
    trained=st.booleans(),
    kind=st.sampled_from(["categorical", "class weights", "bernoulli", "mean over outputs"]),
    seed=st.integers(0, 1000),
)
def test_hard_labels_are_read_as_such_at_any_confidence(
    dtype: torch.dtype, scale: float, shape: tuple[int, int], trained: bool, kind: str, seed: int
) -> None:
    """Nearly sure predictions have gradients that are rounded: they must not be taken for another loss."""
    generator = torch.Generator().manual_seed(seed)
    samples, classes = shape
    labels = torch.randint(0, classes, (samples,), generator=generator)
    output = (scale * torch.randn(samples, classes, generator=generator)).to(dtype)
    if trained:
        output[torch.arange(samples), labels] += 3 * scale
    output.requires_grad_(True)
    wide = output.float() if dtype == torch.bfloat16 else output
    bits = F.one_hot(labels, classes).to(wide.dtype)
    weight = (torch.arange(classes) % 3 + 0.5).to(wide.dtype)
    loss = {
        "categorical": lambda: F.cross_entropy(wide, labels),
        "class weights": lambda: F.cross_entropy(wide, labels, weight=weight, reduction="sum") / samples,
        "bernoulli": lambda: F.binary_cross_entropy_with_logits(wide, bits, reduction="sum") / samples,
        "mean over outputs": lambda: F.binary_cross_entropy_with_logits(wide, bits),
    }[kind]()
    (gradient,) = torch.autograd.grad(loss, output)
    soft = kind in ("bernoulli", "mean over outputs")
    reader = LossReader(Bernoulli() if soft else Categorical(), "mean")
    weights = reader.weights(wide.detach(), gradient)
    if reader.found is None:
        return  # no gradient that could be read
    assert (reader.found.mode, reader.found.looks_like, reader.found.summed) == ("hard", "", False)
    expected = {"categorical": 1.0, "class weights": weight[labels], "bernoulli": 1.0, "mean over outputs": 1 / classes}
    right = torch.as_tensor(expected[kind], dtype=wide.dtype).expand(weights.shape)
    own = wide.detach().sigmoid() if soft else wide.detach().softmax(-1).amax(-1)
    matters = own * (1 - own)  # the curvature that carries the weight
    limit = {torch.float64: 1e-7, torch.float32: 2e-3, torch.bfloat16: 0.2}[dtype]
    assert float(((weights - right).abs() * matters).max()) <= limit * float(right.max())


@pytest.mark.parametrize("lower", [torch.float32, torch.bfloat16])
def test_the_loss_may_be_computed_in_lower_precision_than_the_output(lower: torch.dtype) -> None:
    model = net() if lower == torch.float32 else net().float()
    x = X if lower == torch.float32 else X.float()
    optimizer = osc.build("kfac", model, likelihood="categorical", damping=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x).to(lower), LABELS).backward()
        optimizer.step()
    assert optimizer.capture.readers[0].found.mode == "hard"
