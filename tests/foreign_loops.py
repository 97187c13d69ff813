"""Lightning's and Accelerate's loops against a plain loop; run by ``framework/optimizer/test_loop_recipes.py``.

``python foreign_loops.py lightning|accelerate FOLDER`` prints ``equal`` if all methods end at the same parameters.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import osculate as osc
import torch
from process_worker import Fixed
from small_nets import LOOKING_BACK, METHODS, build, closure_of, cross_entropy, data, everything, make, train
from torch import nn

torch.set_num_threads(1)
X, Y = data(samples=48)
LOADER = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=16)


def plain(name: str, epochs: int = 2) -> nn.Module:
    """A closure loop over the batches."""
    model = make()
    optimizer = build(name, model)
    train(optimizer, model, [batch for _ in range(epochs) for batch in zip(X.split(16), Y.split(16), strict=True)])
    return model


def compare(name: str, model: nn.Module, what: str) -> None:
    """Bitwise."""
    expected, found = everything(plain(name)), everything(model)
    for key, value in expected.items():
        assert torch.equal(value, found[key]), (what, name, key, (value - found[key]).abs().max())


def lightning_modules(lightning: Any) -> tuple[Any, Any]:
    """The same training step under automatic and under manual optimization."""

    class Automatic(lightning.LightningModule):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.net, self.name = make(), name

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build(self.name, self.net)

    class Manual(Automatic):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(self.net(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    return Automatic, Manual


def with_lightning(folder: str) -> None:
    """Automatic and manual optimization, every method; gradual unfreezing; a checkpoint."""
    import lightning

    automatic, manual = lightning_modules(lightning)

    def trainer(epochs: int = 2, **options: Any) -> Any:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        return lightning.Trainer(max_epochs=epochs, enable_checkpointing=False, **quiet, **options)

    for kind in (automatic, manual):
        for name in METHODS:
            module = kind(name)
            trainer().fit(module, LOADER)
            compare(name, module.net, kind.__name__)
    for name in ("kfac", "kbfgs"):  # stopped after one epoch, continued from the checkpoint
        first, path = automatic(name), f"{folder}/{name}.ckpt"
        half = trainer(1)
        half.fit(first, LOADER)
        half.save_checkpoint(path)
        second = automatic(name)
        trainer(2).fit(second, LOADER, ckpt_path=path)
        compare(name, second.net, "resumed")
    unfreeze(lightning, automatic, trainer)
    accumulate(automatic, trainer)


def accumulate(module_type: Any, trainer: Callable[..., Any]) -> None:
    """Four micro-batches of four are one of sixteen, for labels that no random number draws; or are refused by name."""
    loader = torch.utils.data.DataLoader(LOADER.dataset, batch_size=4)

    class Accumulating(module_type):  # type: ignore[misc]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build(self.name, self.net, likelihood=Fixed())

    for name in METHODS:
        if name == "ngd-exact":  # exact roots need a real likelihood
            continue
        module, model = Accumulating(name), make()
        loop = trainer(2, accumulate_grad_batches=4)
        if name in LOOKING_BACK:
            try:
                loop.fit(module, loader)
            except osc.ArgumentError as error:
                assert "accumulate_grad_batches=1" in str(error)
                assert all(torch.equal(value, module.net.state_dict()[key]) for key, value in everything(model).items())
                continue
            raise AssertionError(f"{name} steps on a quarter of the mini-batch")
        loop.fit(module, loader)
        optimizer = build(name, model, likelihood=Fixed())
        train(optimizer, model, [batch for _ in range(2) for batch in zip(X.split(16), Y.split(16), strict=True)])
        for key, value in everything(model).items():
            torch.testing.assert_close(module.net.state_dict()[key], value, rtol=1e-7, atol=1e-8)


def unfreeze(lightning: Any, module_type: Any, trainer: Callable[..., Any]) -> None:
    """Lightning's own callback thaws the first layer after one epoch."""

    class Thaw(lightning.pytorch.callbacks.BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[0])

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=1e-3)

    for name in ("kfac", "kbfgs", "adam"):
        module = module_type(name)
        start = copy.deepcopy(module.net[0].weight.detach())
        trainer(1, callbacks=[Thaw()]).fit(module, LOADER)
        assert torch.equal(module.net[0].weight, start)
        module = module_type(name)
        trainer(2, callbacks=[Thaw()]).fit(module, LOADER)
        assert not torch.equal(module.net[0].weight, start), name


def with_accelerate(folder: str) -> None:
    """Plain steps and closures, accumulation, state of the accelerator, pickles of the wrapped optimizer."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)

    def steps(model: nn.Module, optimizer: Any, loader: Any) -> Iterator[None]:
        for _ in range(2):
            for x, y in loader:
                if optimizer.optimizer.needs_closure:
                    optimizer.step(closure_of(optimizer, model, x, y))
                else:
                    optimizer.zero_grad()
                    accelerator.backward(cross_entropy(model(x), y))
                    optimizer.step()
                yield

    for name in METHODS:
        inner = make()
        model, loader = accelerator.prepare(inner, LOADER)
        optimizer = accelerator.prepare(build(name, model))
        for _ in steps(model, optimizer, loader):
            pass
        compare(name, inner, "accelerate")
        again = pickle.loads(pickle.dumps(optimizer))
        assert again.state_dict()["progress"] == optimizer.state_dict()["progress"]
    accelerator.save_state(folder)
    accelerator.load_state(folder)


if __name__ == "__main__":
    {"lightning": with_lightning, "accelerate": with_accelerate}[sys.argv[1]](sys.argv[2])
    print("equal")
