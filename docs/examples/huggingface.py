"""Fine-tune a tiny GPT-2 and a tiny BERT with Hugging Face's ``Trainer`` and an optimizer of osculate.

    pip install -e ".[foreign]"                      # transformers and accelerate
    python docs/examples/huggingface.py              # all of them
    python docs/examples/huggingface.py kfac muon

Random configurations and made-up data: nothing is downloaded. What is worth a look:

* ``optimizers=(optimizer, scheduler)`` is all that the ``Trainer`` has to be told. It steps without a closure, so a
  method that looks back (``kbfgs``) needs a loop of your own.
* The models return dataclasses: the likelihood finds ``logits`` in them.
* GPT-2 keeps its weights in ``Conv1D`` modules of transformers, which are recognised as linear maps.
* The two ends of GPT-2 are untied: a weight that an embedding and a linear layer share is no matrix of either, and gets
  the method's fallback.
* Every sequence brings its own ``position_ids``, so that the table of positions sees the samples, too.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from typing import Any

import osculate as osc
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

VOCABULARY, LENGTH, WIDTH = 24, 12, 64
OPTIONS = {
    "kfac": {"lr": 0.3, "damping": 0.01},
    "lw-adamw": {},  # this one and the next choose their steps themselves
    "joint-kfac": {},
    "soap": {"lr": 3e-3},
    "muon": {"lr": 0.02},
}


class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences in which token t + 1 is three times token t plus one of two numbers, which is the class."""

    def __init__(self, count: int, classes: bool):
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(0, VOCABULARY, (count,), generator=generator)
        self.kind = torch.randint(0, 2, (count,), generator=generator)
        tokens = [start]
        for _ in range(LENGTH - 1):
            tokens.append((3 * tokens[-1] + 1 + 4 * self.kind) % VOCABULARY)
        self.tokens, self.classes = torch.stack(tokens, 1), classes

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.kind[index] if self.classes else self.tokens[index]
        return {"input_ids": self.tokens[index], "labels": labels, "position_ids": torch.arange(LENGTH)}


def gpt2() -> nn.Module:
    """Two blocks, untied."""
    size = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    return GPT2LMHeadModel(GPT2Config(**size, **ends))


def bert() -> nn.Module:
    """Two blocks and a classifier."""
    size = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH}
    ends = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "num_labels": 2}
    return BertForSequenceClassification(BertConfig(**size, **ends))


def train(method: str, model: nn.Module, data: Dataset[Any], epochs: int = 4) -> tuple[float, float, float]:
    """Train with the ``Trainer``. Returns the first loss, the last, and the share of parameters the method serves."""
    optimizer = osc.build(method, model, likelihood="categorical", **OPTIONS.get(method, {}))
    steps = epochs * (len(data) // 16)  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    served = {block.key: sum(p.numel() for p in block.parameters) for block in optimizer.blocks if not block.fallback}
    return losses[0], losses[-1], sum(served.values()) / sum(p.numel() for p in model.parameters())


def main(methods: list[str]) -> None:
    """Train both models by every method."""
    for method in methods:
        for make, classes in ((gpt2, False), (bert, True)):
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                first, last, share = train(method, make(), Sequences(256, classes))
            print(
                f"{method:11s} {make.__name__}: loss {first:.3f} to {last:.3f}, {100 * share:.1f} % served", flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1:] or list(OPTIONS))
