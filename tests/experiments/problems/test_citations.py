"""Citation graphs: the published files, and the network whose samples are labelled nodes."""

import io
import os
import pickle
import struct
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from osculate import EmpiricalFisher, SampledFisher
from osculate.curvature.backends.capture import Capture
from osculate.curvature.layers.discovery import discover_layers
from osculate.curvature.likelihoods import Categorical
from osculate.curvature.records.needs import Record
from osculate.errors import ArgumentError
from osculate.experiments.data import planetoid
from osculate.experiments.data.datafiles import DataError, RemoteFile
from osculate.experiments.data.planetoid import CITESEER, CORA, GraphFiles, load_citations
from osculate.experiments.networks.graph_models import GraphConvolutions
from osculate.experiments.problems import get_problem
from osculate.experiments.problems.citations import made_citations
from torch import Tensor

DATA = Path(os.environ.get("OSCULATE_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
TINY = GraphFiles("tiny", 8, 3, 2)


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_string


def published(value: object) -> bytes:
    """A pickle that names its globals as the files written by Python 2 and an old SciPy do."""
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2, fix_imports=True).dump(value)
    raw = stream.getvalue()
    for module, name in (
        (b"scipy.sparse._csr", b"scipy.sparse.csr"),
        (b"numpy._core.multiarray", b"numpy.core.multiarray"),
    ):
        raw = raw.replace(b"c" + module + b"\n", b"c" + name + b"\n")
    return raw


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight nodes: 0 and 1 for training, 5 and 7 for tests, in the order 7, 5; nothing is known about 6."""
    monkeypatch.setattr(planetoid, "_VALIDATION", 2)
    features = np.array([[1, 1, 0], [0, 2, 0], [0, 0, 1], [1, 0, 3], [0, 0, 0]], dtype=np.float32)
    one_hot = np.eye(2, dtype=np.int32)
    graph = defaultdict(list, {0: [1, 1, 4], 1: [0, 0], 2: [2, 3], 3: [2], 4: [0], 5: [7], 6: [], 7: [5]})
    parts = {
        "x": sp.csr_matrix(features[:2]),
        "y": one_hot[[0, 1]],
        "tx": sp.csr_matrix(np.array([[0, 5, 5], [4, 0, 0]], dtype=np.float32)),
        "ty": one_hot[[1, 0]],
        "allx": sp.csr_matrix(features),
        "ally": one_hot[[0, 1, 1, 0, 1]],
        "graph": graph,
    }
    (tmp_path / "planetoid").mkdir()
    for name, value in parts.items():
        (tmp_path / "planetoid" / f"ind.tiny.{name}").write_bytes(published(value))
    (tmp_path / "planetoid" / "ind.tiny.test.index").write_text("7\n5\n")
    return tmp_path


def test_pieces_are_put_in_the_order_of_the_nodes(folder: Path) -> None:
    citations = load_citations(TINY, folder)
    expected = [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1], [0.25, 0, 0.75], [0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0.5, 0.5]]
    np.testing.assert_allclose(citations.features.toarray(), expected)
    assert citations.labels.tolist() == [0, 1, 1, 0, 1, 0, 0, 1]
    assert (citations.train.tolist(), citations.valid.tolist(), citations.test.tolist()) == ([0, 1], [2, 3], [7, 5])
    edges = {(int(a), int(b)) for a, b in np.argwhere(citations.neighbours.toarray())}
    assert edges == {(0, 1), (1, 0), (0, 4), (4, 0), (2, 2), (2, 3), (3, 2), (5, 7), (7, 5)}


def test_the_propagation_is_the_symmetrically_normalised_adjacency(folder: Path) -> None:
    citations = load_citations(TINY, folder)
    joined = np.minimum(citations.neighbours.toarray() + np.eye(8), 1)
    degree = joined.sum(1)
    np.testing.assert_allclose(citations.propagation().toarray(), joined / np.sqrt(np.outer(degree, degree)), rtol=1e-6)


@pytest.mark.parametrize(
    "name", [("os", "system"), ("builtins", "eval"), ("collections", "OrderedDict"), ("numpy", "load")]
)
def test_a_pickle_that_names_anything_else_is_refused(folder: Path, name: tuple[str, str]) -> None:
    (folder / "planetoid" / "ind.tiny.graph").write_bytes(f"c{name[0]}\n{name[1]}\n(tR.".encode())
    with pytest.raises(DataError, match=rf"asks for {name[0]}\.{name[1]}"):
        load_citations(TINY, folder)


def test_damaged_and_other_files_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="8 nodes, 3 features and 2"):
        load_citations(replace(TINY, features=4), folder)
    path = folder / "planetoid" / "ind.tiny.x"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="no intact graph file"):
        load_citations(TINY, folder)
    with pytest.raises(DataError, match="sha256"):
        load_citations(replace(TINY, known={path.name: RemoteFile(path.name, (), f"sha256:{0:064x}")}), folder)
    (folder / "planetoid" / "ind.tiny.x").write_bytes(published(sp.csr_matrix(np.eye(2, dtype=np.float32))))
    (folder / "planetoid" / "ind.tiny.test.index").write_text("7\n9\n")
    with pytest.raises(DataError, match="do not fit"):
        load_citations(TINY, folder)


@pytest.mark.skipif(not (DATA / "planetoid").is_dir(), reason="the published files are not here")
@pytest.mark.parametrize(
    ("files", "nodes", "features", "classes", "edges", "loops", "train"),
    [(CORA, 2708, 1433, 7, 5278, 0, 140), (CITESEER, 3327, 3703, 6, 4552, 124, 120)],
)
def test_the_published_graphs_have_the_published_counts(files, nodes, features, classes, edges, loops, train) -> None:
    citations = load_citations(files, DATA)
    assert citations.features.shape == (nodes, features)
    assert len(np.unique(citations.labels)) == classes
    pattern = citations.neighbours
    assert int(pattern.diagonal().sum()) == loops
    assert (pattern.nnz - loops) // 2 == edges
    assert abs(pattern - pattern.T).nnz == 0
    assert (len(citations.train), len(citations.valid), len(citations.test)) == (train, 500, 1000)
    assert citations.valid[0] == train
    described = np.asarray(citations.features.sum(1)).ravel()
    assert np.allclose(described[described > 0], 1, atol=1e-5)
    absent = set(range(int(citations.test.min()), nodes)) - set(citations.test.tolist())
    assert len(absent) == (15 if files is CITESEER else 0)
    assert not described[sorted(absent)].any()


@pytest.fixture
def graph() -> tuple[GraphConvolutions, Tensor, Tensor, Tensor, Tensor]:
    """A network in double precision without dropout; dense X and P; training nodes and their classes."""
    problem = get_problem("cora-gcn", size="small", dropout=0.0, hidden=5)
    data, citations = problem.load(None), made_citations()
    model = problem.build_model(0).double()
    assert isinstance(model, GraphConvolutions)
    model.set_context(*(part.double() if part.is_floating_point() else part for part in data.context))
    dense = (
        torch.tensor(citations.features.toarray()).double(),
        torch.tensor(citations.propagation().toarray()).double(),
    )
    return model, *dense, data.train_inputs, data.train_targets


def usual_form(first: Tensor, second: Tensor, features: Tensor, propagation: Tensor, nodes: Tensor) -> Tensor:
    """Equation 9 of arXiv:1609.02907v4, for all nodes."""
    return (propagation @ (propagation @ features @ first.T).relu() @ second.T)[nodes]


def test_both_forms_are_the_usual_one(graph) -> None:
    model, features, propagation, nodes, _ = graph
    expected = usual_form(model.first.weight, model.second.weight, features, propagation, nodes)
    torch.testing.assert_close(model(nodes), expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(nodes), expected.detach())
    order = torch.randperm(len(nodes))
    torch.testing.assert_close(model(nodes[order]), expected[order])


def measured(model: GraphConvolutions, nodes: Tensor, targets: Tensor, record: Record):
    """Statistics of both layers, the mean loss sent back."""
    capture = Capture(model, discover_layers(model), Categorical(), "mean", seed=3)
    capture.arm(dict.fromkeys(("first", "second"), record))
    torch.nn.functional.cross_entropy(model(nodes), targets).backward()
    statistics = capture.collect()
    capture.close()
    return statistics


def of_each_node(graph, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient of the loss of every node alone, by the usual form over the whole graph."""
    model, features, propagation, nodes, _ = graph
    weights = [model.first.weight.detach().requires_grad_(), model.second.weight.detach().requires_grad_()]
    losses = torch.nn.functional.cross_entropy(
        usual_form(*weights, features, propagation, nodes), targets, reduction="none"
    )
    found = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
    return [pair[0] for pair in found], [pair[1] for pair in found]


def test_a_sample_is_a_labelled_node_with_its_own_loss(graph) -> None:
    """Though nodes share neighbours: per-sample gradients are those of each labelled node's loss, hence mini-blocks."""
    model, *_, nodes, targets = graph
    statistics = measured(model, nodes, targets, EmpiricalFisher().records(EmpiricalFisher.provides))
    for name, expected in zip(("first", "second"), of_each_node(graph, targets), strict=True):
        assert statistics[name].samples == len(nodes)
        torch.testing.assert_close(statistics[name].loss_vectors()[0], torch.stack(expected))
        filled = EmpiricalFisher().fill(statistics[name])
        assert filled.matrix is not None
        flat = torch.stack(expected).flatten(1)
        torch.testing.assert_close(filled.matrix(), flat.T @ flat / len(nodes))
    assert statistics["first"].positions > 1


def test_scores_along_a_direction_belong_to_the_labelled_nodes(graph) -> None:
    """What layer-wise steps measure: the derivative of each node's log-likelihood, labels drawn for them only."""
    model, *_, nodes, targets = graph
    statistics = measured(model, nodes, targets, SampledFisher().records(SampledFisher.provides))
    from osculate.curvature.backends.sampling import label_generator

    labels = Categorical().sample(model(nodes).detach(), label_generator(3, 0, 0, torch.device("cpu")))
    for name, expected in zip(("first", "second"), of_each_node(graph, labels), strict=True):
        direction = torch.randn_like(expected[0])
        scores = torch.stack([(gradient * direction).sum() for gradient in expected])
        torch.testing.assert_close(statistics[name].scores((direction,)), scores)


def test_dropout_hits_a_node_alike_wherever_it_is_a_neighbour() -> None:
    """Shared masks: the mean over two copies of a node is the node, not an average over two masks."""
    problem = get_problem("cora-gcn", size="small")
    data = problem.load(None)
    model = problem.build_model(0)
    assert isinstance(model, GraphConvolutions)
    with pytest.raises(ArgumentError, match="no graph"):
        model(data.train_inputs)
    with pytest.raises(ArgumentError, match="3 tensors"):
        model.set_context(data.train_inputs)
    model.set_context(*data.context)
    torch.manual_seed(0)
    alone = model(data.train_inputs[[4]])
    torch.manual_seed(0)
    twice = model(data.train_inputs[[4, 4]])
    torch.testing.assert_close(twice, alone.expand(2, -1))
    assert not torch.allclose(model(data.train_inputs[[4]]), alone)
