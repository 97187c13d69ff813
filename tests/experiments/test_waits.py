"""Waits for the device outside the optimizer: batches, augmentation, reports, the network on a graph.

A device of no memory ("meta") tells which copies would go to one, without there being any.
"""

import pytest
import torch
from osculate import StepReport
from osculate.experiments.data.augmentation import Chain, ColourJitter, RandomCrop, RandomFlip
from osculate.experiments.networks.graph_models import GraphConvolutions
from osculate.experiments.problems import get_problem
from osculate.experiments.runs.batches import BatchOrder, augmentation_generator
from osculate.experiments.runs.launches import counting
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """For every copy from the host to a device: whether the host goes on meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and result.device.type != "cpu":
            self.found.append(bool(kwargs.get("non_blocking", False)))
        return result


def test_the_order_of_an_epoch_goes_to_the_device_once() -> None:
    with Copies() as copies:
        order = BatchOrder(20, 5, 0, META)
        batches = [order.next() for _ in range(4)]
    assert len(copies.found) == 1 and all(batch.device == META for batch in batches)


def test_the_order_is_the_same_on_every_device_and_survives_a_continuation() -> None:
    one, other = BatchOrder(20, 5, 0), BatchOrder(20, 5, 0, torch.device("cpu"))
    assert all(torch.equal(one.next(), other.next()) for _ in range(9))
    fresh = BatchOrder(20, 5, 3, META)
    fresh.load_state_dict(other.state_dict())
    assert fresh.next().device == META and fresh.state_dict()["generator"].device.type == "cpu"


def test_changes_of_images_do_not_wait_for_the_device() -> None:
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8, device=META)
    change = Chain((RandomCrop(2), RandomFlip(), ColourJitter((0.5, 1.5), (0.5, 1.5), (0.5, 1.5))))
    with Copies() as copies:
        assert change(images, augmentation_generator(0, 0)).device == META
    assert len(copies.found) >= 3 and all(copies.found)


@pytest.fixture
def report() -> StepReport:
    sizes: dict[str, Tensor | float] = {str(k): torch.tensor(0.1 * k) for k in range(8)}
    events = {"rejected_pairs": torch.tensor(2**24 + 1), "damped_first": torch.tensor(3)}
    return StepReport(4, torch.tensor(1.5), torch.tensor(0.25), sizes | {"last": 0.5}, 0.1, events, rescues=2)


def test_a_report_is_fetched_at_once(report: StepReport) -> None:
    """Losses, step sizes and counts alike, and exactly: counts do not suffer from sharing a vector with floats."""
    with counting() as counter:
        plain = report.as_dict()
        assert counter.read().synchronisations == 1
    assert (plain["loss"], plain["loss_after"]) == (1.5, 0.25)
    assert list(plain["step_sizes"]) == [*map(str, range(8)), "last"] and plain["step_sizes"]["last"] == 0.5
    assert plain["step_sizes"]["3"] == float(torch.tensor(0.1 * 3))
    assert plain["rejected_pairs"] == 2**24 + 1 and plain["damped_first"] == 3 and plain["rescues"] == 2
    assert all(type(plain[name]) is int for name in ("rejected_pairs", "damped_first", "skipped"))
    with counting() as counter:
        counts = report.counts()
        assert counter.read().synchronisations == 1
    assert counts == {name: plain[name] for name in counts} and len(counts) == 5


def test_a_report_without_tensors_waits_for_nothing() -> None:
    with counting() as counter:
        assert StepReport(0, 0.5).as_dict()["loss"] == 0.5
        assert counter.read().synchronisations == 0


def test_a_graph_is_asked_for_the_shapes_of_a_pass_once() -> None:
    problem = get_problem("cora-gcn", size="small")
    data, model = problem.load(None), problem.build_model(0)
    assert isinstance(model, GraphConvolutions)
    with counting() as counter:
        model.set_context(*data.context)
        assert counter.read().synchronisations == 0
        nodes = data.train_inputs.clone()
        waits = []
        for _ in range(3):
            counter.clear()
            model(nodes)
            waits.append(counter.read().synchronisations)
        assert waits == [1, 0, 0]
        counter.clear()
        nodes.copy_(nodes.flip(0))  # another batch in the same memory is asked about again
        model(nodes)
        assert counter.read().synchronisations == 1
        counter.clear()
        model.eval()
        with torch.no_grad():
            model(nodes)
        assert counter.read().synchronisations == 0
