"""Which structure serves which parameters: names over kinds, otherwise, leftovers; and sides of factors."""

import pytest
from osculate.curvature import Layer, Needs, discover_layers
from osculate.errors import CompatibilityError
from osculate.preconditioners import (
    BFGS,
    LBFGS,
    ByLayer,
    Covariance,
    Diagonal,
    HessianActionBFGS,
    Identity,
    IdentityFactor,
    Kernel,
    Kronecker,
    MiniBlock,
    PerOutput,
    Preconditioner,
)
from osculate.preconditioners.structures.by_layer import leaves, select
from torch import nn

KFAC = Kronecker(Covariance(), Covariance())
KERNEL, ROWS, PLAIN, DIAGONAL = MiniBlock(Kernel()), MiniBlock(PerOutput()), Identity(), Diagonal()


def layers() -> dict[str, Layer]:
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3)),
            "decoder": nn.Sequential(nn.Linear(3, 4), nn.Bilinear(2, 2, 4), nn.Conv2d(1, 2, 3, bias=False)),
        }
    )
    return {layer.name: layer for layer in discover_layers(model)}


def chosen(part: Preconditioner | ByLayer, name: str) -> list[tuple[Preconditioner, tuple[str, ...]]]:
    return select(part, layers()[name])


BOTH = ("weight", "bias")


@pytest.mark.parametrize(
    ("table", "name", "expected"),
    [
        (ByLayer({"Linear": KFAC}), "encoder.2", [(KFAC, BOTH)]),
        (ByLayer({"Linear": KFAC}), "encoder.0", []),
        (ByLayer({"Linear": KFAC, "encoder.*": ROWS}), "encoder.2", [(ROWS, BOTH)]),
        (ByLayer({"Linear": KFAC, "encoder.*": ROWS}), "decoder.0", [(KFAC, BOTH)]),
        (ByLayer({"decoder.0": PLAIN, "decoder.*": ROWS}), "decoder.0", [(PLAIN, BOTH)]),
        (ByLayer({"decoder.*": ROWS, "decoder.0": PLAIN}), "decoder.0", [(ROWS, BOTH)]),
        (ByLayer({"*": ROWS}), "decoder.1", []),
        (ByLayer({"*": ROWS}, otherwise=DIAGONAL), "decoder.1", [(DIAGONAL, BOTH)]),
        (ByLayer({"Other": DIAGONAL}), "decoder.1", [(DIAGONAL, BOTH)]),
        (ByLayer({"BatchNorm": DIAGONAL}), "encoder.1", [(DIAGONAL, BOTH)]),
        (ByLayer({"Conv2d": KERNEL}), "encoder.0", [(KERNEL, ("weight",))]),
        (
            ByLayer({"Conv2d": KERNEL}, otherwise=DIAGONAL),
            "encoder.0",
            [(KERNEL, ("weight",)), (DIAGONAL, ("bias",))],
        ),
        (ByLayer({"Conv2d": KERNEL}, otherwise=DIAGONAL), "decoder.2", [(KERNEL, ("weight",))]),
        (ByLayer({"Conv2d": KERNEL}, otherwise=KFAC), "encoder.0", [(KERNEL, ("weight",))]),
        (ByLayer({"Conv2d": KERNEL}, otherwise=KFAC), "encoder.2", [(KFAC, BOTH)]),
        (ByLayer({"encoder.2": KERNEL}, otherwise=ROWS), "encoder.2", [(ROWS, BOTH)]),
        (ByLayer({"encoder.*": ByLayer({"Linear": KFAC})}), "encoder.2", [(KFAC, BOTH)]),
        (ByLayer({"encoder.*": ByLayer({"Linear": KFAC})}), "encoder.1", []),
        (KFAC, "encoder.1", []),
        (PLAIN, "decoder.1", [(PLAIN, BOTH)]),
        (KERNEL, "encoder.2", []),
    ],
)
def test_selection(
    table: Preconditioner | ByLayer, name: str, expected: list[tuple[Preconditioner, tuple[str, ...]]]
) -> None:
    assert chosen(table, name) == expected


def test_patterns_are_case_sensitive_and_match_whole_names() -> None:
    assert chosen(ByLayer({"Encoder.*": ROWS}), "encoder.2") == []
    assert chosen(ByLayer({"encoder": ROWS}), "encoder.2") == []
    assert chosen(ByLayer({"*.[02]": ROWS}), "encoder.2") == [(ROWS, BOTH)]


def test_needs_and_leaves_cover_every_entry() -> None:
    table = ByLayer({"Linear": KFAC, "x": ByLayer({"Conv2d": KERNEL}, otherwise=PLAIN)}, otherwise=DIAGONAL)
    assert list(leaves(table)) == [KFAC, KERNEL, PLAIN, DIAGONAL]
    assert table.needs == Needs.INPUTS | Needs.ROOTS | Needs.VECTORS
    assert list(leaves(KFAC)) == [KFAC]


def test_a_table_does_not_follow_its_argument() -> None:
    table = {"Linear": KFAC}
    part = ByLayer(table)
    table["Linear"] = PLAIN
    assert chosen(part, "encoder.2") == [(KFAC, BOTH)]


def test_a_frozen_weight_leaves_only_the_bias() -> None:
    module = nn.Linear(3, 2)
    module.weight.requires_grad_(False)
    (layer,) = discover_layers(module)
    assert select(KFAC, layer) == [] and select(ROWS, layer) == []
    assert select(ByLayer({"Linear": KFAC}, otherwise=DIAGONAL), layer) == [(DIAGONAL, ("bias",))]


@pytest.mark.parametrize(
    ("make", "side"),
    [
        (lambda: Kronecker(BFGS(), BFGS()), "inputs"),
        (lambda: Kronecker(LBFGS(), Covariance()), "inputs"),
        (lambda: Kronecker(Covariance(), HessianActionBFGS()), "outputs"),
        (lambda: Kronecker(IdentityFactor(), HessianActionBFGS()), "outputs"),
    ],
)
def test_factors_know_their_side(make: object, side: str) -> None:
    with pytest.raises(CompatibilityError, match=f"cannot serve the {side}"):
        make()
