"""More models whose layers see rows: by every backend right, or refused by name; and every method steps or refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import osculate as osc
import pytest
import torch
from measuring import close
from torch import Tensor, nn

N, T = 5, 4


class Net(nn.Module):
    """Layers by name; the forward is a function of them and the input."""

    def __init__(self, parts: dict[str, nn.Module], run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def line(*sides: int) -> nn.Linear:
    return nn.Linear(*sides)


def gru(net: nn.Module, x: Tensor) -> Tensor:
    return net.out(net.rnn(x.transpose(0, 1))[0]).mean(0)


def both_ways(net: nn.Module, x: Tensor) -> Tensor:
    hidden = net.rnn(x.transpose(0, 1))[0]
    return net.out(hidden[-1] + hidden[0])


def top_1(net: nn.Module, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    share = net.gate(flat).softmax(-1)
    result = flat.new_zeros(len(flat), 4)
    for index, expert in enumerate(net.experts):
        (rows,) = (share.argmax(-1) == index).nonzero(as_tuple=True)
        result = result.index_put((rows,), torch.tanh(expert(flat[rows])) * share[rows, index, None])
    return net.out(result.view(len(x), T, 4).sum(1))


def top_2(net: nn.Module, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    weights, chosen = net.gate(flat).softmax(-1).topk(2, -1)
    result = flat.new_zeros(len(flat), 4)
    for index, expert in enumerate(net.experts):
        rows, places = (chosen == index).nonzero(as_tuple=True)
        result = result.index_add(0, rows, torch.tanh(expert(flat[rows])) * weights[rows, places, None])
    return net.out(result.view(len(x), T, 4).sum(1))


def shifted_windows(net: nn.Module, x: Tensor) -> Tensor:
    hidden = net.embed(x).view(len(x), 2, 2, 4).roll((1, 1), (1, 2))
    rows = hidden.permute(0, 2, 1, 3).reshape(-1, 2, 4)
    q, k, v = net.qkv(rows).chunk(3, -1)
    return net.out((rows + (q @ k.transpose(1, 2)).softmax(-1) @ v).view(len(x), 4, 4).mean(1))


def patches_first(net: nn.Module, x: Tensor) -> Tensor:
    patches = x.flatten(1).view(len(x), 3, 2, 2).transpose(0, 1).reshape(-1, 1, 2, 2)
    hidden = torch.tanh(net.conv(patches)).view(3, len(x), 2)
    return net.out(hidden.transpose(0, 1).flatten(1))


def packed(net: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.tensor([4, 3, 3, 2, 1])
    hidden, _ = net.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))
    hidden = hidden._replace(data=torch.tanh(net.mix(hidden.data)))
    return net.out(nn.utils.rnn.pad_packed_sequence(hidden, batch_first=True)[0].sum(1))


def packed_unsorted(net: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.tensor([2, 4, 1, 3, 3])
    rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    rows = rows._replace(data=torch.tanh(net.mix(rows.data)))
    return net.out(nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)[0].sum(1))


def masked(net: nn.Module, x: Tensor) -> Tensor:
    kept = torch.arange(T)[None] < torch.tensor([4, 1, 3, 2, 4])[:, None]
    rows = torch.tanh(net.mix(x[kept]))
    return net.out(x.new_zeros(*x.shape[:2], 4).masked_scatter(kept[..., None], rows).sum(1))


def position_network(net: nn.Module, x: Tensor) -> Tensor:
    places = torch.linspace(0, 1, T, dtype=x.dtype)[:, None]
    return net.out(torch.tanh(net.mix(x + torch.tanh(net.shared(places)))).mean(1))


def relative_positions(net: nn.Module, x: Tensor) -> Tensor:
    places = torch.arange(T)
    bias = net.shared(places[:, None] - places[None] + T - 1)[..., 0]
    q, k = net.mix(x).chunk(2, -1)
    return net.out(((q @ k.transpose(1, 2) + bias).softmax(-1) @ x).mean(1))


def all_classes(net: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(net.mix(x.mean(1))) @ net.shared(torch.arange(3)).T


def hyper(net: nn.Module, x: Tensor) -> Tensor:
    weight = net.shared(torch.tensor([[1.0, 2.0]], dtype=x.dtype)).view(4, 3)
    return net.out(torch.tanh(x.mean(1) @ weight.T))


def latents(net: nn.Module, x: Tensor) -> Tensor:
    k, v = net.mix(x).chunk(2, -1)
    queries = net.shared(torch.eye(3, dtype=x.dtype)[:2])
    return net.out(((queries @ k.transpose(1, 2)).softmax(-1) @ v).mean(1))


def siamese(net: nn.Module, x: Tensor) -> Tensor:
    one, other = torch.tanh(net.mix(torch.cat([x[:, 0], x[:, 1]]))).chunk(2)
    return net.out((one - other).abs())


def interleaved(net: nn.Module, x: Tensor) -> Tensor:
    return net.out(torch.tanh(net.mix(x[:, :2].flatten(0, 1))).view(-1, 2, 4).prod(1))


def beams(net: nn.Module, x: Tensor) -> Tensor:
    start = torch.tanh(net.mix(x[:, 0])).repeat_interleave(3, 0)
    noise = torch.arange(3, dtype=x.dtype).repeat(len(x))[:, None]
    return net.out(torch.tanh(net.then(start + noise)).view(-1, 3, 4).sum(1))


def sorted_inside(net: nn.Module, x: Tensor) -> Tensor:
    hidden = torch.tanh(net.mix(x.mean(1)))
    order = hidden[:, 0].argsort()
    return net.out(torch.tanh(net.then(hidden[order]))[order.argsort()])


def reversed_inside(net: nn.Module, x: Tensor) -> Tensor:
    return net.out(torch.tanh(net.then(torch.tanh(net.mix(x.mean(1))).flip(0))).flip(0))


def unbatched_image(net: nn.Module, x: Tensor) -> Tensor:
    return net.out(torch.tanh(net.conv(x.mean(1).T[None]))[0].T)


def nodes(net: nn.Module, x: Tensor) -> Tensor:
    own = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4])
    return net.out(x.new_zeros(5, 4).index_add(0, own, torch.tanh(net.mix(x.flatten(0, 1)[:11]))))


def messages(net: nn.Module, x: Tensor) -> Tensor:
    flat, source = x.flatten(0, 1), torch.arange(len(x) * T)
    target = source.view(-1, T).roll(1, 1).flatten()
    sent = torch.tanh(net.message(torch.cat([flat[source], flat[target]], 1)))
    received = flat.new_zeros(len(flat), 4).index_add(0, target, sent)
    return net.out(torch.tanh(net.update(torch.cat([flat, received], 1))).view(-1, T, 4).sum(1))


def frames_and_time(net: nn.Module, x: Tensor) -> Tensor:
    frames = x.unsqueeze(2).flatten(0, 1)
    hidden = torch.tanh(net.conv(frames)).view(len(x), T, 4).transpose(1, 2)
    return net.out(torch.tanh(net.time(hidden)).mean(2))


def normed_frames(net: nn.Module, x: Tensor) -> Tensor:
    return net.out(net.norm(torch.tanh(net.mix(x.flatten(0, 1)))).view(len(x), T, 4).sum(1))


def flat_tokens(net: nn.Module, x: Tensor) -> Tensor:
    tokens = (x[..., 0].abs() * 5).long().clamp(max=5)
    return net.out(torch.tanh(net.table(tokens.flatten())).view(*tokens.shape, 4).sum(1))


def unique_tokens(net: nn.Module, x: Tensor) -> Tensor:
    tokens, back = (x[..., 0].abs() * 5).long().clamp(max=5).unique(return_inverse=True)
    return net.out(torch.tanh(net.shared(tokens))[back].sum(1))


def experts(count: int) -> nn.ModuleList:
    return nn.ModuleList(line(3, 4) for _ in range(count))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "time-major GRU": lambda: Net({"rnn": nn.GRU(3, 4), "out": line(4, 3)}, gru),
    "LSTM of both directions": lambda: Net({"rnn": nn.LSTM(3, 2, bidirectional=True), "out": line(4, 3)}, both_ways),
    "one expert per token": lambda: Net({"gate": line(3, 3), "experts": experts(3), "out": line(4, 3)}, top_1),
    "two experts per token": lambda: Net({"gate": line(3, 3), "experts": experts(3), "out": line(4, 3)}, top_2),
    "shifted windows": lambda: Net({"embed": line(3, 4), "qkv": line(4, 12), "out": line(4, 3)}, shifted_windows),
    "patches before samples": lambda: Net({"conv": nn.Conv2d(1, 2, 2), "out": line(6, 3)}, patches_first),
    "packed, recurrent": lambda: Net(
        {"rnn": nn.LSTM(3, 4, batch_first=True), "mix": line(4, 4), "out": line(4, 3)}, packed
    ),
    "packed, unsorted": lambda: Net({"mix": line(3, 4), "out": line(4, 3)}, packed_unsorted),
    "chosen by a mask": lambda: Net({"mix": line(3, 4), "out": line(4, 3)}, masked),
    "network of positions": lambda: Net({"shared": line(1, 3), "mix": line(3, 4), "out": line(4, 3)}, position_network),
    "relative positions": lambda: Net(
        {"shared": nn.Embedding(2 * T - 1, 1), "mix": line(3, 6), "out": line(3, 3)}, relative_positions
    ),
    "table of classes": lambda: Net({"shared": nn.Embedding(3, 4), "mix": line(3, 4)}, all_classes),
    "hypernetwork": lambda: Net({"shared": nn.Linear(2, 12, bias=False), "out": line(4, 3)}, hyper),
    "latents": lambda: Net({"shared": line(3, 3), "mix": line(3, 6), "out": line(3, 3)}, latents),
    "siamese": lambda: Net({"mix": line(3, 4), "out": line(4, 3)}, siamese),
    "interleaved": lambda: Net({"mix": line(3, 4), "out": line(4, 3)}, interleaved),
    "beams": lambda: Net({"mix": line(3, 4), "then": line(4, 4), "out": line(4, 3)}, beams),
    "sorted inside": lambda: Net({"mix": line(3, 4), "then": line(4, 4), "out": line(4, 3)}, sorted_inside),
    "reversed inside": lambda: Net({"mix": line(3, 4), "then": line(4, 4), "out": line(4, 3)}, reversed_inside),
    "the batch as a length": lambda: Net({"conv": nn.Conv1d(3, 4, 1), "out": line(4, 3)}, unbatched_image),
    "nodes of graphs": lambda: Net({"mix": line(3, 4), "out": line(4, 3)}, nodes),
    "messages along edges": lambda: Net({"message": line(6, 4), "update": line(7, 4), "out": line(4, 3)}, messages),
    "frames, then time": lambda: Net(
        {"conv": nn.Conv1d(1, 4, 3), "time": nn.Conv1d(4, 3, 2), "out": line(3, 3)}, frames_and_time
    ),
    "norm of frames": lambda: Net({"mix": line(3, 4), "norm": nn.LayerNorm(4), "out": line(4, 3)}, normed_frames),
    "flat tokens": lambda: Net({"table": nn.Embedding(6, 4), "out": line(4, 3)}, flat_tokens),
    "tokens once each": lambda: Net({"shared": nn.Embedding(6, 4), "out": line(4, 3)}, unique_tokens),
}
LABELS = torch.arange(N) % 3


def made(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model = MODELS[case]().double()
    return model, torch.randn(N, T, 3, dtype=torch.float64)


def loss_of(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, LABELS)


def records(model: nn.Module, x: Tensor, estimator: object, backend: str) -> dict[str, osc.LayerStatistics]:
    method = osc.Method(osc.Dense(), estimator, defaults={"lr": 1.0, "damping": 0.1})
    optimizer = osc.build(method, model, likelihood="categorical", backend=backend)
    model.zero_grad()
    loss_of(model(x)).backward()
    found = optimizer.collect()
    optimizer.close()
    return found


def vectors_and_matrix(model: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """(N, P) gradients of every sample's own loss, and the Gauss-Newton matrix of the mean loss, by plain autograd."""

    def along(values: Tensor) -> Tensor:
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        rows = [torch.autograd.grad(entry, parameters, **options) for entry in values.flatten()]
        return torch.stack([torch.cat([value.flatten() for value in row]) for row in rows])

    output = model(x)
    jacobian = along(output)
    hessian = torch.autograd.functional.hessian(lambda o: loss_of(o.view_as(output)), output.detach().flatten())
    return along(nn.functional.cross_entropy(output, LABELS, reduction="none")), jacobian.T @ hessian @ jacobian


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("case", MODELS)
def test_own_gradients_and_gauss_newton_blocks_are_right_or_refused(case: str, backend: str) -> None:
    """Rows that all samples share are refused by the hooks, and told apart by ``func``."""
    model, x = made(case)
    readable = [layer for layer in osc.discover_layers(model) if layer.adapter is not None]
    empirical = records(model, x, osc.EmpiricalFisher(), backend)
    exact = records(model, x, osc.ExactGGN(), backend)
    for layer in readable:
        if layer.name == "shared" and backend == "hooks":
            with pytest.raises(osc.ArgumentError, match=r"'shared': every row belongs to all samples.*func"):
                empirical["shared"].loss_vectors()
            with pytest.raises(osc.ArgumentError, match="'shared'"):
                osc.ExactGGN().fill(exact["shared"])
            continue
        vectors, matrix = vectors_and_matrix(model, x, list(layer.parameters.values()))
        close(torch.cat([value.flatten(1) for value in empirical[layer.name].loss_vectors()], 1), vectors)
        close(osc.ExactGGN().fill(exact[layer.name]).matrix(), matrix)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "lw-adamw", "joint-kfac", "kbfgs", "mbf", "tnt", "soap", "muon"])
@pytest.mark.parametrize("case", MODELS)
def test_every_method_steps(case: str, method: str) -> None:
    model, x = made(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", osc.FallbackWarning)
        optimizer = osc.build(method, model, likelihood="categorical", certify_records="always")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses[-1] < 3 * losses[0]


@pytest.mark.parametrize("method", ["joint-kfac", "joint-sgdm", "joint-kbfgs", "kfac", "ekfac"])
@pytest.mark.parametrize("reverse", [sorted_inside, reversed_inside])
def test_an_order_inside_of_the_model_changes_no_step(method: str, reverse: Callable[..., Tensor]) -> None:
    """Samples are put back: the function is the same, and so are steps that combine the samples of several layers."""

    def straight(net: nn.Module, x: Tensor) -> Tensor:
        return net.out(torch.tanh(net.then(torch.tanh(net.mix(x.mean(1))))))

    ends = []
    for run in (straight, reverse):
        torch.manual_seed(1)
        model = Net({"mix": line(3, 4), "then": line(4, 4), "out": line(4, 3)}, run).double()
        optimizer = osc.build(method, model, likelihood="categorical")
        for index in range(4):
            x = torch.randn(N, T, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(index))

            def closure(x: Tensor = x, optimizer: osc.SecondOrder = optimizer, model: nn.Module = model) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model(x))
                loss.backward()
                return loss

            optimizer.step(closure)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    close(ends[1], ends[0])


class Neighbours(nn.Module):
    """Every sample is a node of one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = line(3, 4), line(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.eye(len(x), dtype=x.dtype) + torch.eye(len(x), dtype=x.dtype).roll(1, 0)
        return mixed @ self.second(torch.tanh(mixed @ self.first(x.mean(1))))


def test_samples_that_see_each_other_are_named_once_and_told_apart_by_func() -> None:
    model, x = Neighbours().double(), torch.randn(N, T, 3, dtype=torch.float64)
    optimizer = osc.build("kfac", model, likelihood="categorical")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(12):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
    assert [entry.category for entry in told] == [osc.FallbackWarning]
    assert "see each other in layer 'first'" in str(told[0].message) and "backend='func'" in str(told[0].message)
    optimizer.close()
    for name in ("first", "second"):
        vectors, matrix = vectors_and_matrix(model, x, list(model.get_submodule(name).parameters()))
        found = records(model, x, osc.EmpiricalFisher(), "func")[name]
        close(torch.cat([value.flatten(1) for value in found.loss_vectors()], 1), vectors)
        close(osc.ExactGGN().fill(records(model, x, osc.ExactGGN(), "func")[name]).matrix(), matrix)


@pytest.mark.parametrize("how", ["rows", "vectors"])
def test_samples_given_one_by_one_without_an_axis_are_refused_by_name(how: str) -> None:
    def alone(net: nn.Module, x: Tensor) -> Tensor:
        parts = [row if how == "rows" else row.mean(0) for row in x]
        hidden = [torch.tanh(net.mix(part)) for part in parts]
        return torch.stack([net.out(value.mean(0) if how == "rows" else value) for value in hidden])

    model = Net({"mix": line(3, 4), "out": line(4, 3)}, alone).double()
    optimizer = osc.build("kfac", model, likelihood="categorical")
    with pytest.raises(osc.ArgumentError, match="unbatched sample; give it a batch of size 1"):
        loss_of(model(torch.randn(N, T, 3, dtype=torch.float64))).backward()
    optimizer.close()
