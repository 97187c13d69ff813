"""Layers whose first axis does not count the samples: per-sample gradients and Gauss-Newton blocks as autograd says.

The truth makes no assumption about axes: gradients of every sample's own loss one by one, and J'HJ of the joint output.
"""

from __future__ import annotations

from collections.abc import Callable

import osculate as osc
import pytest
import torch
from measuring import close, generator_of
from osculate.curvature import Record
from osculate.curvature.backends.table import make_backend
from osculate.curvature.likelihoods import Categorical
from torch import Tensor, nn

N, T = 6, 4


class Frames(nn.Module):
    """Clips as one long list of frames."""

    def __init__(self, sample_major: bool = True) -> None:
        super().__init__()
        self.frame, self.out, self.sample_major = nn.Linear(3, 2), nn.Linear(2, 3), sample_major

    def forward(self, clip: Tensor) -> Tensor:
        clip = clip if self.sample_major else clip.transpose(0, 1)
        hidden = torch.tanh(self.frame(clip.reshape(-1, 3)))
        lead = (-1, clip.shape[1]) if self.sample_major else (clip.shape[0], -1)
        return self.out(hidden.unflatten(0, lead).sum(1 if self.sample_major else 0))


class Video(nn.Module):
    """A convolution on the frames of clips; a normalisation behind it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 2, 2), norm, nn.Linear(2, 3)

    def forward(self, clip: Tensor) -> Tensor:
        maps = torch.tanh(self.norm(self.conv(clip.flatten(0, 1))))
        return self.out(maps.mean((2, 3)).view(*clip.shape[:2], 2).sum(1))


class Windows(nn.Module):
    """Every sequence in windows of two tokens; windows are the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.norm, self.mix = (
            nn.Linear(3, 3),
            nn.LayerNorm(3),
            nn.MultiheadAttention(3, 1, batch_first=True),
        )
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = torch.tanh(self.norm(self.token(x.reshape(-1, 2, 3))))
        windows = self.mix(windows, windows, windows, need_weights=False)[0]
        return self.out(windows.reshape(len(x), -1, 3).mean(1))


class Recurrent(nn.Module):
    """``nn.LSTM`` as it comes, time first, and a linear map at every time."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.lstm, self.line, self.norm, self.out = nn.LSTM(3, 2), nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 3)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.line(self.lstm(x.transpose(0, 1))[0])))
        return self.out(hidden[-1] if self.last else hidden.sum(0))


class Experts(nn.Module):
    """Two experts; a gate that is not learned sends every token to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.experts, self.out = (
            nn.Linear(3, 3),
            nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]),
            nn.Linear(2, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens, hidden = torch.tanh(self.inside(x)).flatten(0, 1), x.new_zeros(x.shape[0] * x.shape[1], 2)
        chosen = (x.flatten(0, 1)[:, 0] > 0.3).long()
        for index, expert in enumerate(self.experts):
            (places,) = (chosen == index).nonzero(as_tuple=True)
            hidden = hidden.index_copy(0, places, torch.tanh(expert(tokens[places])))
        return self.out(hidden.view(*x.shape[:2], 2).sum(1))


class Packed(nn.Module):
    """Sequences of different lengths without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.line, self.out = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + torch.arange(len(x)) % x.shape[1]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        found = self.lstm(packed)[0]
        rows = found._replace(data=torch.tanh(self.line(found.data)))
        return self.out(nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)[0].sum(1))


class Halves(nn.Module):
    """Points of the inside and of the edge in two calls of one network, as physics-informed networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x[:2, 0]), 2 * self.net(x[2:, 1])])


CASES: dict[str, Callable[[], nn.Module]] = {
    "frames": Frames,
    "frames, time first": lambda: Frames(sample_major=False),
    "video": lambda: Video(nn.Identity()),
    "video, group norm": lambda: Video(nn.GroupNorm(1, 2)),
    "video, batch norm in evaluation": lambda: Video(nn.BatchNorm2d(2).eval()),
    "windows": Windows,
    "recurrent": Recurrent,
    "recurrent, last": lambda: Recurrent(last=True),
    "experts": Experts,
    "packed": Packed,
    "two calls": Halves,
}


def inputs(case: str, count: int = N, tokens: int = T) -> Tensor:
    shape = (count, tokens, 1, 3, 3) if case.startswith("video") else (count, tokens, 3)
    return torch.randn(shape, generator=generator_of(5), dtype=torch.float64)


def labels(count: int = N) -> Tensor:
    return torch.arange(count) % 3


def loss_of(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, labels(len(output)))


def made(case: str) -> nn.Module:
    torch.manual_seed(2)
    return CASES[case]().double()


def own_gradients(model: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """(N, *shape) per parameter: every sample's own loss, differentiated by itself."""
    losses = nn.functional.cross_entropy(model(x), labels(len(x)), reduction="none")
    found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return [torch.stack(values) for values in zip(*found, strict=True)]


def gauss_newton(model: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """J'HJ of the mean loss in the joint output."""
    output = model(x)
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in output.flatten()]
    jacobian = torch.stack([torch.cat([value.flatten() for value in row]) for row in rows])
    hessian = torch.autograd.functional.hessian(lambda o: loss_of(o.view_as(output)), output.detach().flatten())
    return jacobian.T @ hessian @ jacobian


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # fused attention under vmap
@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_curvature_are_each_samples_own(case: str, backend: str) -> None:
    model, x = made(case), inputs(case)
    layers = osc.discover_layers(model)
    device = make_backend(backend, model, layers, Categorical(), "mean", 0)
    record = Record.INPUTS | Record.GRADIENTS | Record.SAMPLED | Record.CURVATURE_ROOTS | Record.PER_SAMPLE
    device.arm({layer.name: record | Record.SAMPLED_PARAMETERS for layer in layers})
    loss_of(model(x)).backward()
    if backend == "func" and case in ("experts", "packed", "two calls"):  # samples run one by one there
        with pytest.raises(osc.ArgumentError, match="sample by sample"):
            device.collect()
        return
    found = device.collect()
    device.close()
    for layer in layers:
        if layer.adapter is None:
            continue
        entry, parameters = found[layer.name], list(layer.parameters.values())
        assert entry.samples == N and entry.gradient_scale == N
        for value, right in zip(entry.loss_vectors(), own_gradients(model, x, parameters), strict=True):
            close(value, right)
        close(osc.ExactGGN().fill(entry).matrix(), gauss_newton(model, x, parameters))
        rows = entry.gradient_rows() * entry.gradient_scale
        for value, right in zip(entry.per_sample_gradients(rows), own_gradients(model, x, parameters), strict=True):
            close(value, right)
        for value, right in zip(entry.sampled_vectors(), entry.sampled_parameter_gradients, strict=True):
            close(value.mean(0), right)
        directions = tuple(torch.randn_like(parameter) for parameter in parameters)
        expected = [(v * d).flatten(1).sum(1) for v, d in zip(entry.sampled_vectors(), directions, strict=True)]
        close(entry.scores(directions), torch.stack(expected).sum(0))


class Places(nn.Module):
    """Learned positions: one table for all samples, looked into once per mini-batch."""

    def __init__(self, lead: bool, tokens: int = T) -> None:
        super().__init__()
        self.line, self.place, self.head = nn.Linear(3, 3), nn.Embedding(tokens, 3), nn.Linear(3, 3)
        self.lead = lead

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1])
        place = self.place(index[None] if self.lead else index)
        return self.head(torch.tanh(self.line(x) + place).sum(1))


def measured(model: nn.Module, x: Tensor, record: Record, backend: str = "hooks", seed: int = 0) -> dict[str, object]:
    layers = osc.discover_layers(model)
    device = make_backend(backend, model, layers, Categorical(), "mean", seed)
    device.arm({layer.name: record for layer in layers})
    model.zero_grad()
    loss_of(model(x)).backward()
    found = device.collect()
    device.close()
    return found


WHOLE = Record.INPUTS | Record.GRADIENTS | Record.SAMPLED | Record.CURVATURE_ROOTS | Record.PER_SAMPLE


@pytest.mark.parametrize("tokens", [T, N])
@pytest.mark.parametrize("lead", [True, False])
def test_func_measures_every_samples_part_in_shared_rows(lead: bool, tokens: int) -> None:
    torch.manual_seed(3)
    model, x = Places(lead, tokens).double(), inputs("frames", tokens=tokens)
    found = measured(model, x, WHOLE | Record.MEANS, "func")
    for name, entry in found.items():
        parameters = list(model.get_submodule(name).parameters())
        assert entry.samples == N
        rows = entry.gradient_rows() * entry.gradient_scale
        for values in (entry.loss_vectors(), entry.per_sample_gradients(rows)):
            for value, right in zip(values, own_gradients(model, x, parameters), strict=True):
                close(value, right)
        close(osc.ExactGGN().fill(entry).matrix(), gauss_newton(model, x, parameters))
        roots = entry.root_rows().unflatten(0, (-1, N * entry.positions))
        vectors = [torch.stack(v) for v in zip(*map(entry.per_sample_gradients, roots), strict=True)]
        flat = torch.cat([v.flatten(0, 1).flatten(1) for v in vectors], 1)
        close(flat.T @ flat / N, gauss_newton(model, x, parameters))
    place = found["place"]
    close(place.mean_preactivation, model.place.weight.detach().mean(0))
    own = own_gradients(model, x, [model.place.weight])[0]
    close(place.mean_gradient, own.mean((0, 1)))


@pytest.mark.parametrize("tokens", [T, N])
@pytest.mark.parametrize("lead", [True, False])
def test_shared_rows_hold_sums_over_samples(lead: bool, tokens: int) -> None:
    torch.manual_seed(3)
    model, x = Places(lead, tokens).double(), inputs("frames", tokens=tokens)
    found = measured(model, x, WHOLE | Record.MEANS | Record.SAMPLED_PARAMETERS)
    own = {name: own_gradients(model, x, list(model.get_submodule(name).parameters())) for name in found}
    for name in ("line", "head"):
        for value, right in zip(found[name].loss_vectors(), own[name], strict=True):
            close(value, right)
    place = found["place"]
    assert place.samples == N and place.positions == tokens and place.rows == N * tokens and place.shared_by == N
    close(place.mean_preactivation, model.place.weight.detach().mean(0))
    close(place.mean_gradient, own["place"][0].mean((0, 1)))
    (vector,), (mean,) = place.sampled_vectors(), place.sampled_parameter_gradients
    close(vector[0], mean * N**0.5)
    for read in (place.loss_vectors, place.root_vectors, lambda: osc.EmpiricalFisher().fill(place)):
        with pytest.raises(osc.ArgumentError, match=r"'place'.*all samples.*backend='func'"):
            read()
    with pytest.raises(osc.ArgumentError, match="'place'"):
        osc.ExactGGN().fill(place)
    inputs_moment, outputs_moment = osc.SampledFisher().fill(place).kronecker_factors()
    close(inputs_moment, torch.eye(tokens, dtype=torch.float64))
    rows = place.sampled_rows()
    close(outputs_moment, rows.T @ rows / (N * tokens))


def test_the_sampled_fisher_of_shared_rows_is_unbiased() -> None:
    torch.manual_seed(3)
    model, x = Places(True).double(), inputs("frames")
    total = torch.zeros(T * 3, T * 3, dtype=torch.float64)
    count = 3000
    layers = osc.discover_layers(model)
    device = make_backend("hooks", model, layers, Categorical(), "mean", 0)
    device.arm({layer.name: Record.INPUTS | Record.SAMPLED for layer in layers})
    for device.step in range(count):
        loss_of(model(x)).backward()
        total += osc.SampledFisher().fill(device.collect()["place"]).matrix()
    device.close()
    right = gauss_newton(model, x, [model.place.weight])
    assert (total / count - right).norm() < 0.06 * right.norm()


@pytest.mark.parametrize("name", ["kfac", "ekfac", "joint-kfac", "kbfgs", "lw-adamw", "soap", "mbf"])
def test_methods_step_with_learned_positions(name: str) -> None:
    torch.manual_seed(3)
    model, x = Places(True), inputs("frames").float()
    optimizer = osc.build(name, model, likelihood="categorical")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(12)]
    assert losses[-1] < losses[0]
