"""Node classification with two graph convolutions on the Planetoid citation graphs, all labelled nodes at once.

Source: PAPERS 4.1; network, weight decay of the first layer only, learning rate and the split into training, validation
and test nodes are those of Kipf and Welling, arXiv:1609.02907v4, section 5.2. No early stopping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ..data.planetoid import CITESEER, CORA, PUBMED, Citations, GraphFiles, load_citations
from ..networks.graph_models import GraphConvolutions
from ..networks.models import seeded
from .problem import Data, Problem, Target, categorical_loss, is_small
from .sources import GRAPHS

__all__ = ["GRAPH_TASKS", "GraphTask", "graph_network", "made_citations"]


@dataclass(frozen=True)
class GraphTask:
    """A citation graph and what is known about it.

    Args:
        title: of the graph.
        files: with the data.
        accuracy: test accuracy of arXiv:1609.02907v4, table 2.
        settings: recommended numbers, see ``Problem``.
    """

    title: str
    files: GraphFiles
    accuracy: float
    settings: Mapping[str, Mapping[str, float]]


_SETTINGS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "adamw": MappingProxyType({"lr": 0.02, "weight_decay": 0.5, "epsilon": 1e-3}),
        "mbf": MappingProxyType({"lr": 2e-3, "damping": 1e-3, "weight_decay": 1.5}),
        "lw-adamw": MappingProxyType({"lr": 0.1, "weight_decay": 1.5, "epsilon": 1e-3}),
    }
)
"""Chosen on Cora's validation nodes. Gradients of one class in 140 nodes are of size 1e-3: an epsilon or a damping far
below that lets every noise set the direction."""

GRAPH_TASKS: Mapping[str, GraphTask] = MappingProxyType(
    {
        "cora-gcn": GraphTask("Cora", CORA, 0.81, _SETTINGS),
        "citeseer-gcn": GraphTask("Citeseer", CITESEER, 0.70, _SETTINGS),
        "pubmed-gcn": GraphTask("Pubmed", PUBMED, 0.79, _SETTINGS),
    }
)
"""By the name of the problem."""


def graph_network(name: str, size: str = "full", hidden: int = 16, dropout: float = 0.5) -> Problem:
    """Return the classifier of the nodes of a citation graph.

    Args:
        name: of the problem.
        size: ``full``: the published graph; ``small``: a generated one of 150 nodes, for tests.
        hidden: width of the layer in between, >= 1.
        dropout: share of features and of hidden values dropped in training, in [0, 1).
    """
    task, small = GRAPH_TASKS[name], is_small(size)
    features, classes = (_MADE_FEATURES, _MADE_CLASSES) if small else (task.files.features, task.files.classes)

    def load(data_dir: Path | None) -> Data:
        return _nodes(made_citations() if small else load_citations(task.files, data_dir))

    network = partial(GraphConvolutions, features, hidden, classes, dropout)
    return Problem(
        name=name,
        summary=f"{task.title} citations, two graph convolutions, {features}-{hidden}-{classes}, cross entropy",
        likelihood="categorical",
        batch_size=None,
        epochs=200,
        classes=classes,
        build_model=partial(seeded, network),
        loss=categorical_loss,
        load=load,
        source=GRAPHS[task.title],
        target=None if small else Target("test_accuracy", task.accuracy),
        undecayed=("second.*",),
        settings=MappingProxyType({}) if small else task.settings,
    )


_MADE_NODES, _MADE_FEATURES, _MADE_CLASSES = 150, 24, 3


def made_citations(seed: int = 0) -> Citations:
    """Return a generated graph of three communities: 12 training, 40 validation and 98 test nodes.

    Args:
        seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(_MADE_NODES) % _MADE_CLASSES
    likely = np.where(labels[:, None] == labels, 0.06, 0.004)
    upper = np.triu(rng.random((_MADE_NODES, _MADE_NODES)) < likely, 1)
    words = rng.random((_MADE_NODES, _MADE_FEATURES)) < np.where(
        np.arange(_MADE_FEATURES) % _MADE_CLASSES == labels[:, None], 0.35, 0.1
    )
    words[words.sum(1) == 0, 0] = True
    features = sp.csr_matrix(words / words.sum(1, keepdims=True), dtype=np.float32)
    order = np.arange(_MADE_NODES)
    pattern = sp.csr_matrix(upper | upper.T, dtype=np.float32)
    return Citations(features, labels.astype(np.int64), pattern, order[:12], order[12:52], order[52:])


def _nodes(citations: Citations) -> Data:
    labels = torch.from_numpy(citations.labels)
    train, valid, test = (torch.from_numpy(part) for part in (citations.train, citations.valid, citations.test))
    context = (*_rows(citations.features), *_rows(citations.propagation()))
    return Data(train, labels[train], test, labels[test], valid, labels[valid], context)


def _rows(matrix: sp.csr_matrix) -> tuple[Tensor, Tensor, Tensor]:
    matrix = matrix.sorted_indices()
    starts, columns = (torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices))
    return starts, columns, torch.from_numpy(matrix.data)
