"""A model that moved after the optimizer was built, and losses that were fetched from the device."""

import osculate as osc
import pytest
import torch
from torch import nn


def test_a_model_that_moved_is_refused_by_name_before_anything_changes() -> None:
    model = nn.Linear(3, 2)
    optimizer = osc.build("adam", model)
    model(torch.ones(4, 3)).sum().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    (block,) = optimizer.blocks
    block.storage = tuple(torch.empty_like(value, device="meta") for value in block.storage)
    with pytest.raises(osc.ArgumentError, match=r"moved from meta to cpu after osculate.build.*build after model.to"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_the_loss_of_a_closure_that_returns_a_number_is_on_the_device_of_the_parameters() -> None:
    model, inputs = nn.Linear(3, 2), torch.ones(4, 3)
    optimizer = osc.build("kbfgs", model)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss.item()

    loss = optimizer.step(closure)  # type: ignore[arg-type]
    assert loss is not None and loss.device == next(model.parameters()).device
    assert optimizer.last_report.loss_after is not None
