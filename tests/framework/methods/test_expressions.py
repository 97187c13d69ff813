"""Parts as text, and methods with parts exchanged."""

from __future__ import annotations

import osculate as osc
import pytest
from osculate import registry
from osculate.errors import ArgumentError, CompatibilityError, UnknownNameError
from osculate.framework.methods.expressions import is_part_text, places, read_part, with_parts
from osculate.framework.methods.parts import instances, label


def test_every_registered_part_with_defaults_is_built_from_its_name() -> None:
    read = 0
    for kind, table in registry.examples().items():
        for name, part in table.items():
            if "(" not in name and type(part).__name__ == name:
                again = read_part(name)
                assert type(again) is type(part) and label(again) == name, kind
                read += 1
    assert read > 40


def test_arguments_are_numbers_texts_tuples_tables_and_parts() -> None:
    assert read_part("Kronecker(Covariance(), LBFGS(3, PowellH(mu1=0.3)), Schedule(inverses=None))") == osc.Kronecker(
        osc.Covariance(), osc.LBFGS(3, osc.PowellH(mu1=0.3)), osc.Schedule(inverses=None)
    )
    assert read_part("ByLayer({'Linear': MiniBlock}, otherwise=Diagonal(source='momentum'))") == osc.ByLayer(
        {"Linear": osc.MiniBlock()}, otherwise=osc.Diagonal(source="momentum")
    )
    assert read_part("Spectral(coefficients=(3.0, -4.0, 2.0))").coefficients == (3.0, -4.0, 2.0)


def test_parts_are_exchanged_by_any_tail_of_their_place_and_the_base_stays() -> None:
    base = registry.method("kbfgs")
    changed = with_parts(base, {"pairs": "PowellThenLM", "momentum.decay": 0.5, "damping": "Split"})
    assert changed.preconditioner.outputs == osc.BFGS(osc.PowellThenLM())
    assert changed.momentum == osc.EMA(0.5)
    assert base.preconditioner.outputs == osc.BFGS() and base.momentum == osc.EMA(0.9)


def test_a_star_exchanges_all_and_a_table_is_entered_by_key() -> None:
    base = registry.method("mbf")
    changed = with_parts(base, {"table.Linear.partition": "FlatChunk", "*.schedule.inverses": 7})
    blocks = changed.preconditioner.table
    assert blocks["Linear"].partition == osc.FlatChunk() and blocks["Conv2d"].partition == osc.Kernel()
    assert {part.schedule.inverses for part in blocks.values()} == {7}


def test_all_changes_are_made_before_the_method_is_composed() -> None:
    """One after the other these would meet a refusal on the way: a structure without its estimator."""
    changes = {"preconditioner": "MiniBlock", "curvature": "BatchMean"}
    changed = with_parts(registry.method("sgdm"), changes, {"damping": 0.3})
    assert changed.preconditioner == osc.MiniBlock()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"pars": "PowellH"}, UnknownNameError, "did you mean 'pairs'"),
        ({"pairs": "PowelH"}, UnknownNameError, "did you mean 'PowellH'"),
        ({"pairs": "PowellH(mu3=1)"}, ArgumentError, "unknown argument of PowellH: 'mu3'; did you mean 'mu1'"),
        ({"pairs": "PowellH("}, ArgumentError, "a part reads"),
        ({"pairs": "PowellH(__import__('os'))"}, UnknownNameError, "unknown part '__import__'"),
        ({"average": "MovingAverage(0.5)"}, ArgumentError, "names 2 places"),
        ({"preconditioner": "Identity", "pairs": "PowellH"}, ArgumentError, "inside it too"),
        ({"curvature": "EmpiricalFisher"}, CompatibilityError, "secant pairs"),
    ],
)
def test_refusals_name_the_way_out(changes: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says.replace("(", r"\(")):
        with_parts(registry.method("kbfgs"), changes)


def test_places_cover_every_nested_number() -> None:
    known = places(registry.method("kfac"))
    assert known["preconditioner.inputs.average.decay"] == 0.9 and "defaults" not in known


def test_capital_letters_make_a_part() -> None:
    assert is_part_text("Split") and not is_part_text("sampled") and not is_part_text(1.0)


class Sized:
    """A part that is no dataclass, and has no default."""

    def __init__(self, size: int) -> None:
        self.size = size


def test_a_class_of_ones_own_that_misses_arguments_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osculate.framework.methods.expressions.parts", lambda: {"guard": {"Sized": Sized}})
    assert read_part("Sized(size=3)").size == 3
    with pytest.raises(osc.ArgumentError, match=r"Sized cannot be built: .*'size'"):
        read_part("Sized")
    with pytest.raises(osc.UnknownNameError, match="did you mean 'size'"):
        read_part("Sized(sise=3)")
    assert instances(Sized) == ()
