"""Models of transformers, timm and PyG against ``torch.func``; run by ``framework/optimizer/test_foreign_models.py``.

``python foreign_models.py CASE`` prints ``right`` if per-sample gradients and Gauss-Newton blocks are those of
``torch.func`` and the method serves more than 95 % of the parameters.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import osculate as osc
import torch
from torch import Tensor, nn

torch.set_num_threads(1)
Call = Callable[[nn.Module, Any], Tensor]


def served(model: nn.Module, name: str = "kfac") -> float:
    """Share of the parameters that the method serves itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", osc.FallbackWarning)
        optimizer = osc.build(name, model, likelihood="categorical")
    own = sum(p.numel() for block in optimizer.blocks if not block.fallback for p in block.parameters)
    optimizer.close()
    return own / sum(p.numel() for p in model.parameters())


def built(parts: dict[str, Any], estimator: Any, model: nn.Module) -> osc.SecondOrder:
    """An optimizer that measures the named layers only."""
    method = osc.Method(osc.ByLayer(parts), estimator, defaults={"lr": 1.0, "damping": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", osc.FallbackWarning)
        return osc.build(method, model, likelihood="gaussian")


def compare(model: nn.Module, batch: Tensor, call: Call, layers: list[str], largest: int = 400) -> None:
    """Per-sample gradients of half the squared logits, and Gauss-Newton blocks of small layers, per named layer.

    Args:
        model: in float64 and evaluation.
        batch: its first axis counts samples.
        call: logits (N, ...) of the model on a batch.
        layers: names of the layers that are looked at.
        largest: number of entries of a layer up to which the Gauss-Newton block is built.
    """
    values = {name: value.detach() for name, value in model.named_parameters()}

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, given: Tensor) -> Tensor:
            return call(self.inner, given)

    whole = {f"inner.{name}": value for name, value in values.items()}

    def loss(chosen: dict[str, Tensor], sample: Tensor) -> Tensor:
        return 0.5 * torch.func.functional_call(Called(), chosen, (sample.unsqueeze(0),)).square().sum()

    expected = [torch.func.grad(loss)(whole, sample) for sample in batch]
    sizes = {layer.name: sum(p.numel() for p in layer.parameters.values()) for layer in osc.discover_layers(model)}
    small = {name: osc.Dense() for name in layers if sizes[name] <= largest}
    large = {name: osc.Kronecker(osc.Covariance(), osc.Covariance()) for name in layers if name not in small}
    optimizer = built(small | large, osc.EmpiricalFisher(), model)
    (0.5 * call(model, batch).square().sum() / len(batch)).backward()
    records = optimizer.collect()
    optimizer.close()
    for name in layers:
        record = records[name]
        own = {
            key: torch.stack([entry[f"inner.{name}.{key}"] for entry in expected]) for key in record.layer.parameters
        }
        scale = max(float(right.abs().max()) for right in own.values())  # biases of keys have none
        for (key, right), found in zip(own.items(), record.loss_vectors(), strict=True):
            error = float((found - right).abs().max()) / scale
            assert error < 1e-9, (name, key, error)
    optimizer = built(small, osc.ExactGGN(), model)
    model.zero_grad()
    (0.5 * call(model, batch).square().sum() / len(batch)).backward()
    records = optimizer.collect()
    optimizer.close()
    for name in small:
        layer = records[name].layer
        names = [f"inner.{name}.{key}" for key in layer.parameters]

        def logits(*chosen: Tensor, names: list[str] = names) -> Tensor:
            given = {**whole, **dict(zip(names, chosen, strict=True))}
            return torch.func.functional_call(Called(), given, (batch,)).reshape(-1)

        found = torch.autograd.functional.jacobian(logits, tuple(whole[key] for key in names))
        jacobian = torch.cat([value.flatten(1) for value in found], 1)
        right = jacobian.T @ jacobian / len(batch)
        matrix = osc.ExactGGN().fill(records[name]).matrix()
        error = float((matrix - right).abs().max() / right.abs().max())
        assert error < 1e-9, (name, "ggn", error)


def gpt2() -> None:
    """A GPT-2 block: ``Conv1D`` everywhere."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"vocab_size": 9, "n_positions": 5, "n_embd": 8, "n_layer": 1, "n_head": 2, "tie_word_embeddings": False}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)

    def call(given: nn.Module, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        return given(input_ids=tokens, position_ids=places).logits

    names = [layer.name for layer in osc.discover_layers(model)]
    assert sum("c_" in name for name in names) == 4
    compare(model, torch.randint(0, 9, (4, 5)), call, names)
    assert served(model) > 0.95


def timm() -> None:
    """A network with ``BatchNormAct2d`` and convolutions that are standardised when they are used."""
    import timm as library
    from timm.layers import BatchNormAct2d

    model = library.create_model("efficientnet_lite0", num_classes=4).double().eval()
    assert any(isinstance(module, BatchNormAct2d) for module in model.modules())
    layers = osc.discover_layers(model)
    odd = [layer for layer in layers if isinstance(layer.module, BatchNormAct2d)]
    assert odd and all(layer.kind == "Other" and "BatchNormAct2d" in layer.note for layer in odd)
    chosen = [layer.name for layer in layers if layer.adapter is not None]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        osc.build("kfac", model, likelihood="categorical").close()
    assert [entry.category for entry in found] == [osc.FallbackWarning]
    assert "BatchNormAct2d does something else than BatchNorm2d" in str(found[0].message)
    compare(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), lambda given, x: given(x), chosen[:3] + chosen[-2:])
    assert served(model) > 0.95, served(model)
    standard = library.create_model("nf_resnet26", num_classes=4)
    kinds = {type(layer.module).__name__: layer.kind for layer in osc.discover_layers(standard)}
    assert kinds["ScaledStdConv2d"] == "Other"


def coupled(model: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Samples that see each other, by the func backend: every output's own loss, through the joint output."""
    values = {name: value.detach() for name, value in model.named_parameters()}

    def outputs(chosen: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model, {**values, **chosen}, given)
        return found

    count = len(model(*given))
    for estimator in (osc.EmpiricalFisher(), osc.ExactGGN()):
        method = osc.Method(osc.Dense(), estimator, defaults={"lr": 1.0, "damping": 0.1})
        optimizer = osc.build(method, model, likelihood="gaussian", backend="func")
        (0.5 * model(*given).square().sum() / count).backward()
        records = optimizer.collect()
        optimizer.close()
        for name, record in records.items():
            names = [f"{name}.{key}" for key in record.layer.parameters]
            chosen = {key: values[key] for key in names}
            if isinstance(estimator, osc.EmpiricalFisher):
                right = torch.func.jacrev(lambda c: 0.5 * outputs(c).square().sum(1))(chosen)
                for found, key in zip(record.loss_vectors(), names, strict=True):
                    assert float((found - right[key]).abs().max()) < 1e-9, (name, key)
            else:
                found = torch.func.jacrev(lambda c: outputs(c).reshape(-1))(chosen)
                jacobian = torch.cat([found[key].flatten(1) for key in names], 1)
                matrix = estimator.fill(record).matrix()
                assert float((matrix - jacobian.T @ jacobian / count).abs().max()) < 1e-9, (name, "ggn")


def bert() -> None:
    """An encoder with a classifier on its first token: everything but LayerNorm is a matrix."""
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    ends = {"vocab_size": 9, "max_position_embeddings": 5, "num_labels": 3}
    model = BertForSequenceClassification(BertConfig(**size, **ends)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)

    def call(given: nn.Module, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits: Tensor = given(input_ids=tokens, position_ids=places).logits
        return logits

    names = [layer.name for layer in osc.discover_layers(model) if "embeddings" not in layer.name]
    assert sum(name.endswith("dense") for name in names) == 4
    compare(model, torch.randint(0, 9, (4, 5)), call, names)
    large = BertForSequenceClassification(BertConfig(**size | {"hidden_size": 64, "intermediate_size": 128}, **ends))
    assert served(large) > 0.95


def gcn() -> None:
    """A graph convolution: the linear map is PyG's own; every node is a sample of its first layer."""
    from torch_geometric.nn import GCNConv
    from torch_geometric.nn.dense import Linear

    class Net(nn.Module):
        def __init__(self, features: int = 32, width: int = 64, classes: int = 16) -> None:
            super().__init__()
            self.first, self.second = GCNConv(features, width), GCNConv(width, classes)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x, edges)), edges)

    model = Net().double()
    x, edges = torch.randn(7, 32, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 0]])
    kinds = {layer.name: layer.kind for layer in osc.discover_layers(model)}
    assert isinstance(model.first.lin, Linear) and kinds["first.lin"] == kinds["second.lin"] == "Linear"
    linear = nn.Sequential(Linear(32, 3)).double()
    compare(linear, x, lambda given, rows: given(rows), ["0"])
    coupled(Net(4, 5, 3).double(), (x[:, :4], edges))
    optimizer = osc.build("kfac", model, likelihood="categorical")
    before = [value.detach().clone() for value in model.parameters()]
    nn.functional.cross_entropy(model(x, edges), torch.arange(7) % 3).backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert served(model) > 0.95


if __name__ == "__main__":
    torch.manual_seed(0)
    {"gpt2": gpt2, "bert": bert, "timm": timm, "gcn": gcn}[sys.argv[1]]()
    print("right")
