"""Products with the Hessian of models whose fast kernels have no second derivative."""

from collections.abc import Callable

import osculate as osc
import pytest
import torch
from measuring import close, generator_of
from osculate.curvature.layers.discovery import discover_layers
from osculate.curvature.products import GraphKeepingBackward
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return output


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("make", [Attending, encoder])
def test_products_through_attention(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(3, 5, 8, generator=generator_of(1), dtype=torch.float64)
    layers = discover_layers(model)
    products = GraphKeepingBackward(layers)
    with products:
        model(x).square().mean().backward()
    drawn = {
        layer.name: tuple(torch.randn(p.shape, generator=generator_of(1), dtype=p.dtype) for p in own)
        for layer, own in ((layer, layer.parameters.values()) for layer in layers)
    }
    found = products.product(drawn)
    parameters = [p for layer in layers for p in layer.parameters.values()]
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(x).square().mean()
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        along = sum((s * d).sum() for s, d in zip(slopes, [d for v in drawn.values() for d in v], strict=True))
        expected = torch.autograd.grad(along, parameters, materialize_grads=True)
    flat = [value for layer in layers for value in found[layer.name]]
    for one, other in zip(flat, expected, strict=True):
        close(one, other, 1e-10)


@pytest.mark.parametrize("backend", ["hooks", "func"])
def test_a_method_with_products_trains_attention(backend: str) -> None:
    torch.manual_seed(0)
    model = Attending()
    x, y = torch.randn(6, 5, 8), torch.randint(0, 2, (6,))
    method = osc.Method(momentum=osc.NoMomentum(), step_size=osc.GlobalQuadratic(osc.ExactHessian()))
    optimizer = osc.build(method, model, lr=1.0, damping=1.0, likelihood="categorical", backend=backend)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    first = float(optimizer.step(closure))
    assert float(optimizer.step(closure)) < first


def test_settings_are_given_back() -> None:
    """Also when the closure raises; recurrent layers switch cuDNN off, nothing else does."""
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark)
    with pytest.raises(RuntimeError, match="broken"), GraphKeepingBackward(discover_layers(nn.LSTM(3, 2))):
        assert not torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cudnn.enabled
        raise RuntimeError("broken")
    with GraphKeepingBackward(discover_layers(nn.Linear(3, 2))):
        assert torch.backends.cudnn.enabled == before[1]
    after = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark)
    assert before == after
