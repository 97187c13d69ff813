"""Train a graph convolutional network of PyG by optimizers of osculate.

    pip install -e ".[foreign]"                      # torch_geometric among others
    python docs/examples/graph_network.py            # all of them
    python docs/examples/graph_network.py kfac muon

Made-up communities: nothing is downloaded. What is worth a look:

* ``GCNConv`` keeps its matrix in a linear map of PyG's own, which is recognised, and adds its bias after the exchange
  along the edges: biases get the method's fallback.
* Every node is a sample, and nodes see each other. Gradients, sampled Fisher factors and secant pairs take every node's
  row for a sample of its own, as K-FAC does with positions. Whole gradients per node, and exact Gauss-Newton blocks,
  are told apart by ``backend="func"`` (the tests compare them with ``torch.func``).
* The loss is the mean over half of the nodes, so the model returns the logits of these only: N is what it returns.
"""

from __future__ import annotations

import sys
import warnings

import osculate as osc
import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

NODES, FEATURES, CLASSES = 120, 32, 4
OPTIONS = {
    "kfac": {"lr": 0.1, "damping": 0.01},
    "lw-adamw": {},  # this one and the next choose their steps themselves
    "joint-kfac": {},
    "soap": {"lr": 0.01},
    "muon": {"lr": 0.02},
}


class Network(nn.Module):
    """Two graph convolutions."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.first, self.second = GCNConv(FEATURES, width), GCNConv(width, CLASSES)

    def forward(self, features: Tensor, edges: Tensor, chosen: Tensor) -> Tensor:
        """Logits of the chosen nodes."""
        logits: Tensor = self.second(torch.relu(self.first(features, edges)), edges)
        return logits[chosen]


def communities() -> tuple[Tensor, Tensor, Tensor]:
    """Features, edges and classes of a graph in which most edges stay inside a class."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(NODES) % CLASSES
    inside = classes[:, None] == classes[None]
    chance = torch.where(inside, 0.15, 0.02)
    edges = (torch.rand(NODES, NODES, generator=generator) < chance).nonzero().T
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    features = 0.4 * centres[classes] + torch.randn(NODES, FEATURES, generator=generator)
    return features, edges, classes


def train(method: str, model: nn.Module, steps: int = 40) -> tuple[float, float, float]:
    """Train on half of the nodes. Returns the first loss, the last, and the share of parameters the method serves."""
    features, edges, classes = communities()
    optimizer = osc.build(method, model, likelihood="categorical", **OPTIONS.get(method, {}))
    chosen, losses = torch.arange(0, NODES // 2), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(features, edges, chosen), classes[chosen])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    served = sum(p.numel() for block in optimizer.blocks if not block.fallback for p in block.parameters)
    return losses[0], losses[-1], served / sum(p.numel() for p in model.parameters())


def main(methods: list[str]) -> None:
    """Train a new network by every method."""
    for method in methods:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", osc.FallbackWarning)
            first, last, share = train(method, Network())
        print(f"{method:11s} gcn: loss {first:.3f} to {last:.3f}, {100 * share:.1f} % served", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(OPTIONS))
