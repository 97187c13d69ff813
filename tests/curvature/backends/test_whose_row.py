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
from osculate.curvature.backends import probing
from osculate.curvature.backends.table import make_backend
from osculate.curvature.likelihoods import Categorical
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
        return torch.cat([self.net(x[:1, 0]), 2 * self.net(x[1:, 1])])


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


def counted(model: nn.Module, layers: list[osc.Layer], monkeypatch: pytest.MonkeyPatch) -> tuple[object, list[int]]:
    """A device of hooks, and how many probes it has run."""
    runs: list[int] = []
    inner = probing.Probes._probe
    monkeypatch.setattr(probing.Probes, "_probe", lambda self, *given: runs.append(1) or inner(self, *given))
    device = make_backend("hooks", model, layers, Categorical(), "mean", 0)
    device.arm({layer.name: WHOLE for layer in layers})
    return device, runs


@pytest.mark.parametrize("one_frame", [False, True])
def test_models_with_an_entry_per_sample_are_never_probed(one_frame: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Unflatten(0, (-1, 1)) if one_frame else nn.Tanh(), Last()).double()
    device, runs = counted(model, osc.discover_layers(model), monkeypatch)
    for count in (N, 1, 2 * N):
        loss_of(model(torch.randn(count, 3, dtype=torch.float64))).backward()
        assert all(entry.samples == count for entry in device.collect().values())
    assert not runs
    device.close()


class Last(nn.Module):
    """One frame per clip: N * T is N."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 3)

    def forward(self, clip: Tensor) -> Tensor:
        return self.line(clip.flatten(0, -2)).view(len(clip), -1, 3).sum(1)


def test_a_signature_of_shapes_is_probed_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made("frames"), inputs("frames")
    device, runs = counted(model, osc.discover_layers(model), monkeypatch)
    for _ in range(40):
        loss_of(model(x)).backward()
        assert device.collect()["frame"].samples == N
    assert len(runs) == 3  # passes 1, 2, 8
    loss_of(model(x[:2])).backward()
    assert device.collect()["frame"].samples == 2 and len(runs) == 4
    device.close()


def test_what_data_decide_is_probed_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("experts")
    layers = osc.discover_layers(model)
    device, _ = counted(model, layers, monkeypatch)
    for index in range(12):
        x = torch.randn(N, T, 3, generator=generator_of(index), dtype=torch.float64)
        loss_of(model(x)).backward()
        for name, entry in device.collect().items():
            parameters = list(model.get_submodule(name).parameters())
            for value, right in zip(entry.loss_vectors(), own_gradients(model, x, parameters), strict=True):
                close(value, right)
    device.close()


def test_routing_of_equal_shapes_is_noticed() -> None:
    """Two tokens each, of one sample or of both: shapes that look regular in the first pass."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert, self.out = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(0, 1)
            (places,) = (rows[:, 0] > 0).nonzero(as_tuple=True)
            hidden = rows.index_copy(0, places, torch.tanh(self.expert(rows[places])))
            return self.out(hidden.view_as(x).sum(1))

    torch.manual_seed(1)
    model = Chosen().double()
    layers = osc.discover_layers(model)
    device = make_backend("hooks", model, layers, Categorical(), "mean", 0)
    device.arm({layer.name: WHOLE for layer in layers})
    for first in ([1, -1, -1, 1, 1, 1], [1, 1, 1, -1, -1, 1], [-1, -1, 1, 1, 1, 1], [1, 1, 1, 1, -1, -1]):
        x = torch.randn(3, 2, 3, dtype=torch.float64)
        x[..., 0] = x[..., 0].abs() * torch.tensor(first).view(3, 2)
        loss_of(model(x)).backward()
        for name, entry in device.collect().items():
            parameters = list(model.get_submodule(name).parameters())
            for value, right in zip(entry.loss_vectors(), own_gradients(model, x, parameters), strict=True):
                close(value, right)
    device.close()


@pytest.mark.parametrize("case", ["frames", "recurrent", "windows"])
def test_as_many_tokens_as_samples(case: str) -> None:
    model, x = made(case), inputs(case, 4, 4)
    found = measured(model, x, WHOLE)
    for name, entry in found.items():
        if entry.layer.adapter is not None:
            parameters = list(entry.layer.parameters.values())
            assert entry.samples == 4, name
            for value, right in zip(entry.loss_vectors(), own_gradients(model, x, parameters), strict=True):
                close(value, right)


def test_batch_norm_on_frames_keeps_samples_apart() -> None:
    torch.manual_seed(0)
    model, x = Video(nn.BatchNorm2d(2)).double(), inputs("video")
    state, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    found = measured(model, x, Record.INPUTS | Record.GRADIENTS | Record.MEANS)
    assert torch.equal(random, torch.get_rng_state()) and int(model.norm.num_batches_tracked) == 1
    positions = {"conv": 4 * T, "norm": 4 * T, "out": 1}
    for name, entry in found.items():
        assert entry.samples == N and entry.positions == positions[name] and not entry.ragged
        total = [value.mean(0) for value in entry.loss_vectors()]
        for value, parameter in zip(total, entry.layer.parameters.values(), strict=True):
            close(value, parameter.grad)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items() if "weight" in key)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(3, 3), (4, 2)])
def test_micro_batches_add_up(case: str, sizes: tuple[int, int]) -> None:
    model, x = made(case), inputs(case)
    layers = osc.discover_layers(model)
    device = make_backend("hooks", model, layers, Categorical(), "mean", 0)
    device.arm({layer.name: Record.INPUTS | Record.GRADIENTS | Record.MEANS for layer in layers})
    own: dict[str, list[list[Tensor]]] = {}
    for piece in x.split(sizes):
        (loss_of(model(piece)) * len(piece) / N).backward()
        for layer in layers:
            found = own_gradients(model, piece, list(layer.parameters.values()))
            own.setdefault(layer.name, []).append(found)
    for name, entry in device.collect().items():
        if entry.layer.adapter is None:
            continue
        assert entry.samples == N
        for value, *right in zip(entry.loss_vectors(), *own[name], strict=True):
            close(value, torch.cat(right))
        close(entry.mean_gradient, entry.gradient_rows().sum(0) * N / entry.rows)
    device.close()


class TimeMajor(nn.Module):
    """Logits with the time first, as loops around ``nn.LSTM`` have them; or with tokens in one long list."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.line, self.out, self.flat = nn.Linear(3, 4), nn.Linear(4, 3), flat

    def forward(self, x: Tensor) -> Tensor:
        logits = self.out(torch.tanh(self.line(x)))
        return logits.flatten(0, 1) if self.flat else logits


@pytest.mark.parametrize("flat", [False, True])
def test_the_user_says_where_samples_are(flat: bool) -> None:
    torch.manual_seed(0)
    model, x = TimeMajor(flat).double(), torch.randn(*((N, T) if flat else (T, N)), 3, dtype=torch.float64)
    where = (lambda out: out.unflatten(0, (N, T))) if flat else 1
    optimizer = osc.build(
        osc.Method(osc.Dense(), osc.ExactGGN(), defaults={"lr": 1.0, "damping": 0.1}),
        model,
        likelihood="categorical",
        samples=where,
    )
    target = torch.arange(N * T).view(N, T) % 3

    def loss(out: Tensor) -> Tensor:
        out = out.unflatten(0, (N, T)) if flat else out.transpose(0, 1)
        return nn.functional.cross_entropy(out.flatten(0, 1), target.flatten(), reduction="sum") / N

    loss(model(x)).backward()
    found = optimizer.collect()
    optimizer.close()
    for layer in ("line", "out"):
        entry, parameters = found[layer], list(model.get_submodule(layer).parameters())
        assert entry.samples == N and entry.positions == T
        output = model(x)
        rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in output.flatten()]
        jacobian = torch.stack([torch.cat([value.flatten() for value in row]) for row in rows])
        along = lambda o, like=output: loss(o.view_as(like))  # noqa: E731
        hessian = torch.autograd.functional.hessian(along, output.detach().flatten())
        close(osc.ExactGGN().fill(entry).matrix(), jacobian.T @ hessian @ jacobian)


def test_samples_elsewhere_are_for_hooks() -> None:
    with pytest.raises(osc.CompatibilityError, match="samples="):
        osc.build("ngd-exact", nn.Linear(3, 3), likelihood="categorical", backend="func", samples=1)
    with pytest.raises(osc.ArgumentError, match="samples"):
        osc.build("kfac", nn.Linear(3, 3), likelihood="categorical", samples="first")


def test_a_forward_that_returns_its_loss_says_nothing_about_samples() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Places(True)

        def forward(self, x: Tensor) -> Tensor:
            return loss_of(self.inner(x))

    model, x = Whole(), inputs("frames").float()
    optimizer = osc.build("kbfgs", model)
    with pytest.raises(osc.ArgumentError, match=r"samples=, a function"):
        optimizer.step(lambda: model(x))


def test_points_of_two_calls_are_one_mini_batch() -> None:
    """Inside and edge of a physics-informed network: N is their sum, a sample's own gradient N times what it got."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inside, edge = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    layers = osc.discover_layers(model)
    device = make_backend("hooks", model, layers, Categorical(), "mean", 0)
    device.arm({layer.name: Record.INPUTS | Record.GRADIENTS for layer in layers})
    (loss_of(model(inside)) + 3 * loss_of(model(edge))).backward()
    for name, entry in device.collect().items():
        parameters = list(model.get_submodule(name).parameters())
        first, second = own_gradients(model, inside, parameters), own_gradients(model, edge, parameters)
        for value, a, b in zip(entry.loss_vectors(), first, second, strict=True):
            close(value, torch.cat([a * 7 / 5, b * 3 * 7 / 2]))
    device.close()


@pytest.mark.parametrize("name", ["kfac", "ekfac", "kbfgs", "soap", "mbf", "joint-kfac"])
def test_an_expert_that_no_token_is_sent_to_sits_the_step_out(name: str) -> None:
    torch.manual_seed(2)
    model = Experts()
    optimizer = osc.build(name, model, likelihood="categorical")
    for index in range(6):
        x = inputs("experts").float()
        x[..., 0] = x[..., 0].abs() + 1 if index % 2 else x[..., 0]

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(x))
            loss.backward()
            return loss

        before = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            optimizer.step(closure)
        except osc.ArgumentError as error:
            assert name == "joint-kfac" and "experts.0" in str(error)
            assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if name in ("kfac", "kbfgs"):  # the others place no hooks
        with pytest.raises(osc.ArgumentError, match="0 samples"):
            optimizer.step(lambda: model(x[:0]).sum())


def test_backpack_refuses_rows_that_are_no_samples() -> None:
    pytest.importorskip("backpack")
    model = nn.Sequential(
        nn.Flatten(0, 1), nn.Linear(3, 2), nn.Unflatten(0, (-1, T)), nn.Flatten(), nn.Linear(2 * T, 3)
    )
    with pytest.raises(osc.CompatibilityError, match="backend='hooks'"):
        measured(model.double(), inputs("frames"), Record.INPUTS | Record.GRADIENTS, "backpack")


class Repeated(Frames):
    """Frames inside a checkpoint, which runs its part again during the backward pass."""

    reentrant = True

    def forward(self, clip: Tensor) -> Tensor:
        part = lambda rows: torch.tanh(self.frame(rows))  # noqa: E731
        rows = clip.reshape(-1, 3).clone().requires_grad_()
        hidden = checkpoint(part, rows, use_reentrant=self.reentrant)
        return self.out(hidden.view(len(clip), -1, 2).sum(1))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["kfac", "kbfgs"])
def test_checkpoints_are_refused_or_right(name: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = Repeated(), inputs("frames").float()
    model.reentrant = reentrant
    optimizer = osc.build(name, model, likelihood="categorical")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        return loss

    if not reentrant:
        optimizer.step(closure)
        return
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(osc.ArgumentError, match=r"use_reentrant=False|nothing was recorded"):
        optimizer.step(closure)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("count", [17, 300])
@pytest.mark.parametrize("case", ["frames", "frames, time first", "windows", "video, group norm", "two calls"])
def test_many_samples_in_single_precision(case: str, count: int) -> None:
    model, x = made(case).float(), inputs(case, count).float()
    found = measured(model, x, Record.INPUTS | Record.GRADIENTS)
    for name, entry in found.items():
        assert entry.samples == count and not entry.ragged and entry.shared_by == 1.0, name
        parameters = list(entry.layer.parameters.values())
        for value, right in zip(entry.loss_vectors(), own_gradients(model, x, parameters), strict=True):
            close(value, right, 1e-4)
