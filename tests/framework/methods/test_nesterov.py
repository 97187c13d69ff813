"""Nesterov momentum: torch's own, through parts, step-size rules and save files."""

from __future__ import annotations

import osculate as osc
import pytest
import torch
from small_nets import batches, data, differences, flat, make, plain_step, train


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("joint", [False, True])
def test_nesterov_is_torchs(net: str, tau: float, joint: bool) -> None:
    """As one matrix per layer (a Kronecker structure without curvature) and parameter by parameter."""
    structure = osc.Kronecker(osc.IdentityFactor(), osc.IdentityFactor()) if joint else osc.Identity()
    results = []
    for ours in (True, False):
        torch.manual_seed(1)
        model = make(net)
        method = osc.Method(structure, momentum=osc.Nesterov(osc.HeavyBall(0.8)), defaults={"lr": 0.05})
        optimizer = (
            osc.build(method, model, weight_decay=tau)
            if ours
            else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8, nesterov=True, weight_decay=tau)
        )
        for x, y in batches(net, 6):
            plain_step(optimizer, model, x, y)
        results.append(flat(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_a_step_size_rule_sees_the_vector_that_was_preconditioned() -> None:
    """With the identity the slope along the direction is its squared norm: M itself would give another number."""
    seen = []

    class Looking(osc.LayerwiseQuadratic):
        def propose(self, state, evidence):  # type: ignore[no-untyped-def]
            seen.append((evidence.slopes.clone(), evidence.squared_norms.clone()))
            return super().propose(state, evidence)

    method = osc.Method(momentum=osc.Nesterov(osc.EMA(0.9)), step_size=Looking(), defaults={"lr": 1.0})
    model = make()
    train(osc.build(method, model, likelihood="categorical"), model, batches(count=3))
    for slopes, norms in seen:
        torch.testing.assert_close(slopes, norms, rtol=1e-12, atol=0.0)


def test_saving_continues_bit_for_bit() -> None:
    method = osc.Method(osc.Diagonal(), momentum=osc.Nesterov(osc.CorrectedEMA(0.9)), defaults={"lr": 0.01})
    model = make()
    optimizer = osc.build(method, model)
    train(optimizer, model, batches(count=3))
    twin = make()
    twin.load_state_dict(model.state_dict())
    resumed = osc.build(method, twin)
    resumed.load_state_dict(optimizer.state_dict())
    for entry, net in ((optimizer, model), (resumed, twin)):
        train(entry, net, [data()] * 2)
    assert torch.equal(flat(model), flat(twin))
    assert differences(optimizer.state_dict(), resumed.state_dict()) == []
