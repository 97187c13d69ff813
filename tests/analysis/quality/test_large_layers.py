"""Comparing structures on layers far too large for their own identity."""

import osculate as osc
import torch
from osculate.analysis.quality.approximation import Effort, measure_approximation
from osculate.analysis.quality.exact_blocks import Probe
from torch import nn


def test_the_bias_of_a_large_layer_is_measured_without_the_layer() -> None:
    """Three biases beside 300 000 weights: a matrix of the layer would take 700 GB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100_000, 3), nn.Tanh(), nn.Linear(3, 2))
    inputs, targets = torch.rand(4, 100_000), torch.tensor([0, 1, 1, 0])
    method = osc.Method(preconditioner=osc.ByLayer({"Linear": osc.Spectral()}), fallback=osc.Identity())
    optimizer = osc.build(method, model, lr=0.1, likelihood="categorical")
    probe = Probe(inputs, targets, nn.functional.cross_entropy, "categorical")
    found = measure_approximation(optimizer, probe, damping=0.1, effort=Effort(largest=3), targets=["ggn"])
    assert [(quality.block, quality.parameters) for quality in found] == [("0:bias", 3), ("2:bias", 2)]
    assert all(quality.error_operator >= 0.0 for quality in found)
