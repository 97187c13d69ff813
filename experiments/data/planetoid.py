"""The Planetoid citation graphs, read from the published pickles with an unpickler that knows six names.

Sources: the files, Z. Yang, W. Cohen and R. Salakhutdinov, ICML 2016; the normalisation of features and adjacency,
T. N. Kipf and M. Welling, arXiv:1609.02907v4, equations 2 and 8.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from .datafiles import DataError, RemoteFile, data_folder, find, published

__all__ = ["CITESEER", "CORA", "PUBMED", "Citations", "GraphFiles", "load_citations"]

_PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")
_MIRRORS = ("https://github.com/kimiyoung/planetoid/raw/master/data/",)
_FOLDER = "planetoid"
_VALIDATION = 500

_ALLOWED: Mapping[tuple[str, str], Any] = MappingProxyType(
    {
        ("scipy.sparse.csr", "csr_matrix"): sp.csr_matrix,
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],  # where numpy keeps it has changed
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "defaultdict"): collections.defaultdict,
        ("__builtin__", "list"): list,
    }
)


@dataclass(frozen=True)
class GraphFiles:
    """The eight files of one graph, and what must be in them.

    Args:
        name: in the names of the files.
        nodes: number of nodes.
        features: features of a node.
        classes: classes of nodes.
        known: by name, those of x, y, tx, ty, allx, ally, graph and test.index whose checksums are known.
    """

    name: str
    nodes: int
    features: int
    classes: int
    known: Mapping[str, RemoteFile] = field(default_factory=lambda: published(_FOLDER, _MIRRORS))


@dataclass(frozen=True)
class Citations:
    """A graph with n nodes.

    Args:
        features: (n, d) sparse float32, every row of sum 1, but for rows of zeros.
        labels: (n,) classes as int64; 0 where a node has none.
        neighbours: (n, n) the sparse pattern of the graph as published, symmetric, no entry twice, float32 ones.
        train: nodes that are trained on.
        valid: the 500 nodes that follow.
        test: in the published order.
    """

    features: sp.csr_matrix
    labels: NDArray[np.int64]
    neighbours: sp.csr_matrix
    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    test: NDArray[np.int64]

    def propagation(self) -> sp.csr_matrix:
        """Return D^(-1/2) (A + I) D^(-1/2), (n, n) float32; a self loop counts once, whether published or added."""
        joined = (self.neighbours + sp.identity(self.neighbours.shape[0], format="csr")).tocsr()
        joined.data[:] = 1.0
        scale = sp.diags(1.0 / np.sqrt(np.asarray(joined.sum(axis=1)).ravel()))
        return sp.csr_matrix(scale @ joined @ scale, dtype=np.float32)


CORA = GraphFiles("cora", 2708, 1433, 7)
"""2708 papers on machine learning, 140 of them labelled for training."""

CITESEER = GraphFiles("citeseer", 3327, 3703, 6)
"""3327 papers on computer science, 120 of them labelled for training; 15 have neither features nor a class."""

PUBMED = GraphFiles("pubmed", 19717, 500, 3)
"""19717 papers on diabetes, 60 of them labelled for training. Its checksums are unknown here: counts are checked."""


def load_citations(files: GraphFiles, data_dir: Path | None = None) -> Citations:
    """Return a citation graph with its published split.

    Args:
        files: ``CORA``, ``CITESEER`` or ``PUBMED``.
        data_dir: folder with ``planetoid/ind.NAME.*`` or the files themselves; None is what ``OSCULATE_DATA`` names.

    Raises:
        ArgumentError: the data folder does not exist.
        DataError: a file is damaged, is not what its name says, or is missing and cannot be downloaded.
    """
    names = [f"ind.{files.name}.{part}" for part in _PARTS]
    remote = [files.known.get(name, RemoteFile(name, _MIRRORS)) for name in names]
    paths = [find(file, _FOLDER, data_folder(data_dir)) for file in remote]
    parts = [_unpickled(path) for path in paths[:-1]]
    try:
        test = np.array([int(line) for line in paths[-1].read_text().split()], dtype=np.int64)
        citations = _assembled(parts, test, files.nodes)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"the files {files.name!r} in {paths[0].parent} do not fit each other: {error}") from error
    found = (*citations.features.shape, parts[1].shape[1])
    if found != (files.nodes, files.features, files.classes):
        raise DataError(
            f"the graph {files.name!r} in {paths[0].parent} has {found[0]} nodes, {found[1]} features and {found[2]} "
            f"classes, expected {files.nodes}, {files.features} and {files.classes}; delete the files to have them "
            "downloaded again"
        )
    return citations


class _Unpickler(pickle.Unpickler):
    """Loads what the published files are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"a graph file asks for {module}.{name}, which the published files do not name; replace it")
        return _ALLOWED[module, name]


def _unpickled(path: Path) -> Any:
    with path.open("rb") as stream:
        try:
            return _Unpickler(stream, encoding="latin1").load()  # written by Python 2
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no intact graph file: {type(error).__name__}: {error}") from error


def _assembled(parts: list[Any], test: NDArray[np.int64], nodes: int) -> Citations:
    """Put the pieces in the order of the node numbers; nodes that no file describes have zero features."""
    _, y, tx, ty, allx, ally, graph = parts
    features = sp.lil_matrix((nodes, allx.shape[1]), dtype=np.float32)
    labels = np.zeros((nodes, ally.shape[1]), dtype=np.int64)
    features[: allx.shape[0]], labels[: len(ally)] = allx, ally
    features[test], labels[test] = tx, ty
    rows = np.concatenate([np.full(len(ends), node) for node, ends in graph.items()])
    columns = np.concatenate([np.asarray(ends, dtype=np.int64) for ends in graph.values()])
    pattern = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(nodes, nodes))
    pattern = pattern.maximum(pattern.T).tocsr()
    pattern.data[:] = 1.0
    total = np.asarray(features.sum(axis=1)).ravel()
    inverse = np.divide(1.0, total, out=np.zeros_like(total), where=total != 0)
    normalised = sp.csr_matrix(sp.diags(inverse) @ features.tocsr(), dtype=np.float32)
    train, valid = np.split(np.arange(len(y) + _VALIDATION), [len(y)])
    return Citations(normalised, labels.argmax(1), pattern, train, valid, test)
