"""Node classification with two graph convolutions on the Planetoid citation graphs, all labelled nodes at once.

Source: PAPERS 4.1; network, weight decay of the first layer only, learning rate and the split into training, validation
and test nodes are those of Kipf and Welling, arXiv:1609.02907v4, section 5.2. No early stopping.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from .problem import PUBLISHED, Data, Problem, Source, Target, is_small

__all__ = ["GRAPH_TASKS", "graph_network", "made_citations"]

_SETTINGS: Mapping[str, Mapping[str, float | str]] = MappingProxyType(
    {
        "adamw": MappingProxyType({"lr": 0.02, "weight_decay": 0.5, "epsilon": 1e-3}),
        "mbf": MappingProxyType({"lr": 2e-3, "damping": 1e-3, "weight_decay": 1.5, **PUBLISHED["mbf"]}),
        "lw-adamw": MappingProxyType({"lr": 0.1, "weight_decay": 1.5, "epsilon": 1e-3}),
    }
)
"""Chosen on Cora's validation nodes. Gradients of one class in 140 nodes are of size 1e-3: an epsilon or a damping far
below that lets every noise set the direction."""

GRAPH_TASKS: Mapping[str, tuple[GraphFiles, float]] = MappingProxyType(
    {"cora-gcn": (CORA, 0.81), "citeseer-gcn": (CITESEER, 0.70), "pubmed-gcn": (PUBMED, 0.79)}
)
"""By the name of the problem: the graph, and the test accuracy of arXiv:1609.02907v4, table 2."""

_SOURCE = (
    "repository MIT, Zhilin Yang; the graphs come from the LINQS group",
    "Sen et al., Collective Classification in Network Data, 2008; split of Yang, Cohen and Salakhutdinov, ICML 2016",
    "https://github.com/kimiyoung/planetoid",
)


def graph_network(name: str, size: str = "full", hidden: int = 16, dropout: float = 0.5) -> Problem:
    """Return the classifier of the nodes of a citation graph.

    Args:
        name: of the problem.
        size: ``full``: the published graph; ``small``: a generated one of 150 nodes, for tests.
        hidden: width of the layer in between, >= 1.
        dropout: share of features and of hidden values dropped in training, in [0, 1).
    """
    (files, accuracy), small = GRAPH_TASKS[name], is_small(size)
    title = files.name.capitalize()
    features, classes = (_MADE_FEATURES, _MADE_CLASSES) if small else (files.features, files.classes)

    def load(data_dir: Path | None) -> Data:
        citations = made_citations() if small else load_citations(files, data_dir)
        labels = torch.from_numpy(citations.labels)
        train, valid, test = (torch.from_numpy(part) for part in (citations.train, citations.valid, citations.test))
        context = (*_rows(citations.features), *_rows(citations.propagation()))
        return Data(train, labels[train], test, labels[test], valid, labels[valid], context)

    network = partial(GraphConvolutions, features, hidden, classes, dropout)
    return Problem(
        name=name,
        summary=f"{title} citations, two graph convolutions, {features}-{hidden}-{classes}, cross entropy",
        likelihood="categorical",
        epochs=200,
        classes=classes,
        build_model=partial(seeded, network),
        load=load,
        source=Source(f"{title} citation graph", *_SOURCE),
        target=None if small else Target("test_accuracy", accuracy),
        undecayed=("second.*",),
        settings=MappingProxyType({}) if small else _SETTINGS,
    )


_MADE_NODES, _MADE_FEATURES, _MADE_CLASSES = 150, 24, 3


def made_citations() -> Citations:
    """Return a generated graph of three communities: 12 training, 40 validation and 98 test nodes."""
    rng = np.random.default_rng(0)
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


def _rows(matrix: sp.csr_matrix) -> tuple[Tensor, Tensor, Tensor]:
    matrix = matrix.sorted_indices()
    starts, columns = (torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices))
    return starts, columns, torch.from_numpy(matrix.data)
