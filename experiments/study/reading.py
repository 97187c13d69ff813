"""Reading a study from a TOML file.

```toml
title = "What this is about"
seeds = [1, 2, 3]                  # of the final runs

[[problems]]
name = "mnist-autoencoder"
options = { size = "small" }
# also label, batch_size, epochs and seeds of this problem alone
target = { metric = "train_loss", value = 62 }

[budget]                           # of every final run: epochs, seconds or both
epochs = 20
seconds = 500                      # also limit (wall clock) and evaluations (in
                                   # an epoch)
[tuning]
trials = 12                        # equal for all arms
seed = 0                           # none of the final ones
epochs = 5                         # a smaller budget than that of the final
seconds = 100                      # runs; also metric, sampler ("quasi-random"
                                   # or "random"), pruner ("none" or "median")
[arms.kbfgs]                       # an arm: a method, settings, options, parts,
method = "kbfgs"                   # and a space
pairs = "PowellThenLM"
space = { lr = { log = [0.01, 1.0] }, damping = { grid = [0.1, 0.3] } }

[arms.kbfgs-l]
extends = "kbfgs"                  # method, settings and space of another arm
method = "kbfgs-l"

[arms.adamw]                       # lr_schedule: "cosine", "linear" or
method = "adamw"                   # "constant" over the whole run, after a
lr_schedule = "cosine"             # warm-up of a share of it; optimizers of
lr_warm_up = 0.05                  # other packages are methods too ("prodigy",
                                   # ...: 'osculate methods' lists them)
space = { lr = { grid = [1e-3, 3e-3, 1e-2] } }
# other settings, or another space, on the problem of that label
on.mnist-autoencoder = { lr = 3e-3 }

[base]                             # instead of, or beside arms: one base, of
method = "kfac"                    # which ...
[vary]                             # ... one part is changed at a time,
inverses_every = [1, 100]
[cross]                            # ... or several in all combinations
momentum = ["EMA(0.9)", "NoMomentum"]
damping = ["Split", "Factored"]
```
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, cast

from ...errors import ArgumentError, OsculateError, UnknownNameError
from ..runs.config import Budget
from .definition import Arm, Study, StudyProblem, Target, Tuning
from .spaces import Choice, Grid, LogUniform, Range, Uniform

__all__ = ["find_study", "read_study", "shipped_studies"]

_TOP = ("name", "title", "notes", "device", "seeds", "problems", "budget", "tuning", "arms", "base", "vary", "cross")
_TUNING = ("trials", "metric", "sampler", "seed", "epochs", "seconds", "pruner")
_SHIPPED = Path(__file__).parents[1] / "studies"
_BASE = "base"


def shipped_studies() -> dict[str, Path]:
    """Return the studies that come with the package, by name."""
    return {file.stem: file for file in sorted(_SHIPPED.glob("*.toml"))}


def find_study(name: str) -> Path:
    """Return the file that a person means: a path, or the name of a shipped study.

    Raises:
        UnknownNameError: there is neither; near misses are listed.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped_studies()
    if path.is_dir():
        raise ArgumentError(f"{name} is a folder; name a TOML file in it, or a shipped study ('osculate study --list')")
    if path.suffix and path.stem in known and path.name == name:
        return known[path.stem]
    if name not in known:
        if path.suffix or "/" in name:
            raise ArgumentError(f"there is no file {name!r}; 'osculate study --list' lists the shipped studies")
        raise UnknownNameError("study", name, known)
    return known[name]


def read_study(path: Path) -> Study:
    """Read a study, and check everything that can be checked without building a network.

    Raises:
        ArgumentError: the file cannot be read or is no TOML; a key is unknown, or a value out of range. The message
            names the file, the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be read as TOML ({error}); see the shipped studies for examples") from error
    return _Reader(path, text).study(content)


class _Reader:
    """Turns the content of one file into a study, and errors into ones that name the place."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._text = text

    def study(self, content: Mapping[str, Any]) -> Study:
        with self._at():
            _require_keys("key of a study", content, _TOP)
        arms = self._arms(content)
        with self._at("problems"):
            problems = tuple(self._problem(number, entry) for number, entry in enumerate(content.get("problems", ())))
        with self._at("budget"):
            keys = ("epochs", "seconds", "limit", "evaluations")
            bounds = dict(_known("key of [budget]", _table(content, "budget"), keys))
            extras = {key: bounds.pop(key) for key in ("limit", "evaluations") if key in bounds}
            budget = Budget(**bounds)
        with self._at("tuning"):
            tuning = Tuning(**_known("key of [tuning]", _table(content, "tuning"), _TUNING))
        with self._at("seeds"):
            seeds = tuple(_list(content, "seeds"))
        for arm in arms:
            for label in arm.on:
                with self._at("arms", arm.label, "on"):
                    if label not in (known := [problem.label for problem in problems]):
                        raise UnknownNameError("problem", label, known)
        with self._at():
            return Study(
                name=content.get("name", self._path.stem),
                title=content.get("title", ""),
                arms=arms,
                problems=problems,
                seeds=seeds,
                budget=budget,
                tuning=tuning,
                base=_BASE if "base" in content else None,
                notes=tuple(_list(content, "notes")),
                device=content.get("device", "cpu"),
                **extras,
            )

    def _problem(self, number: int, entry: Any) -> StudyProblem:
        with self._at("problems", number):
            keys = ("name", "label", "options", "batch_size", "epochs", "target", "seeds")
            given = dict(_known("key of a problem", _is_table("a problem", entry), keys))
            if "name" not in given:
                raise ArgumentError("a problem needs a name; 'osculate problems' lists them")
            if "target" in given:
                given["target"] = Target(**_known("key of a target", given["target"], ("metric", "value")))
            if "seeds" in given:
                given["seeds"] = tuple(_list(given, "seeds"))
            return StudyProblem(**{"label": given["name"]} | given, source=self._source("problems", number))

    def _arms(self, content: Mapping[str, Any]) -> tuple[Arm, ...]:
        found: list[Arm] = []
        table = _table(content, "arms")
        for label in table:
            with self._at("arms", label):
                found.append(self._arm(label, self._extended(label, table), ("arms", label)))
        if "base" in content:
            with self._at("base"):
                base = self._arm(_BASE, content["base"], ("base",))
            found += [base, *self._varied(base, content)]
        elif "vary" in content or "cross" in content:
            with self._at("vary" if "vary" in content else "cross"):
                raise ArgumentError("[vary] and [cross] change parts of a [base]; add one with a method")
        return tuple(found)

    def _extended(self, label: str, table: Mapping[str, Any], seen: tuple[str, ...] = ()) -> dict[str, Any]:
        """An arm's entries, with those of the arm that it extends."""
        entry = dict(_is_table(f"arm {label!r}", table[label]))
        parent = entry.pop("extends", None)
        if parent is None:
            return entry
        if parent not in table:
            raise UnknownNameError("arm", str(parent), table)
        if parent in (*seen, label):
            raise ArgumentError(f"arm {label!r} extends itself, by way of {', '.join((*seen, parent))}")
        inherited = self._extended(parent, table, (*seen, label))
        searched = {k: v for k, v in inherited.get("space", {}).items() if k not in entry}
        space = entry.get("space", searched)
        kept = {k: v for k, v in inherited.items() if k not in space}
        return kept | entry | ({"space": space} if space else {"space": {}})

    def _arm(self, label: str, entry: Any, place: tuple[str, ...]) -> Arm:
        settings = dict(_is_table(f"arm {label!r}", entry))
        method, space, on = settings.pop("method", None), settings.pop("space", {}), settings.pop("on", {})
        if not isinstance(method, str):
            got = "" if method is None else f", its name as text, got {method!r}"
            raise ArgumentError(f"arm {label!r} needs a method{got}; 'osculate methods' lists them")
        ranges = {}
        for name, value in _is_table("space", space).items():
            with self._at(*place, "space", name):
                ranges[name] = _range(name, value)
        forms = {
            problem: self._arm(label, _there(entry, changes), (*place, "on", problem))
            for problem, changes in _is_table("on", on).items()
        }
        return Arm(label, method, settings, ranges, source=self._source(*place), on=forms)

    def _varied(self, base: Arm, content: Mapping[str, Any]) -> Iterator[Arm]:
        crossed = _table(content, "cross")
        short = _short_names([*_table(content, "vary"), *crossed])
        for place, values in _table(content, "vary").items():
            with self._at("vary", place):
                for value in _values(place, values):
                    yield _changed(base, {place: value}, short, self._source("vary", place))
        if crossed:
            with self._at("cross"):
                choices = [[(place, value) for value in _values(place, values)] for place, values in crossed.items()]
                where = self._source("cross")
                yield from (_changed(base, dict(choice), short, where) for choice in product(*choices))

    def _source(self, *place: str | int) -> str:
        return f"{self._path}, line {line_of(self._text, place)}"

    @contextmanager
    def _at(self, *place: str | int) -> Iterator[None]:
        """Name the file, the line and the key in every error of the block that does not name them yet."""
        try:
            yield
        except OsculateError as error:
            if str(self._path) in str(error):
                raise
            keys = ".".join(str(key) for key in place if isinstance(key, str))
            where = f", line {line_of(self._text, place)}" if place else ""
            key = f", {keys}" if keys else ""
            raise ArgumentError(f"{self._path}{where}{key}: {error}") from error
        except TypeError as error:
            raise ArgumentError(
                f"{self._source(*place)}, {'.'.join(map(str, place))}: a value is of the wrong kind: {error}"
            ) from error


def _short_names(places: Sequence[str]) -> dict[str, str]:
    """The last word of every place that is varied; the whole place where two end in the same word."""
    tails = {place: place.rpartition(".")[2] for place in places}
    shared = Counter(tails.values())
    return {place: re.sub(r"[^\w.]", "", place) if shared[tail] > 1 else tail for place, tail in tails.items()}


def _there(entry: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """An arm's entries with those that it has on one problem alone; what is set there is not searched there."""
    changes = _is_table("what an arm has on a problem", changes)
    if "method" in changes or "on" in changes:
        raise ArgumentError("an arm has one method on all problems; write another arm, or leave the key out")
    space = changes.get("space", {k: v for k, v in entry.get("space", {}).items() if k not in changes})
    kept = {k: v for k, v in entry.items() if k not in space and k != "on"}
    return kept | dict(changes) | {"space": space}


def _changed(base: Arm, changes: Mapping[str, Any], short: Mapping[str, str], source: str) -> Arm:
    label = ",".join(f"{short[place]}={_word(value)}" for place, value in changes.items())
    space = {name: entry for name, entry in base.space.items() if name not in changes}
    varied = (", ".join(changes), ", ".join(_word(value) for value in changes.values()))
    on = {problem: _changed(form, changes, short, source) for problem, form in base.on.items()}
    return Arm(label, base.method, {**base.settings, **changes}, space, varied, source, on)


def _word(value: Any) -> str:
    text = str(value).replace(" ", "").replace("()", "")
    return re.sub(r"[^\w.,=+()-]", "", text)


def _range(name: str, value: Any) -> Range:
    kinds = {made.kind: made for made in (LogUniform, Uniform, Choice, Grid)}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ArgumentError(
            f"the range of {name} reads {{ log = [low, high] }} or uniform, choice, grid; got {value!r}"
        )
    ((kind, bounds),) = value.items()
    if kind not in kinds:
        raise UnknownNameError("kind of range", kind, kinds)
    if not isinstance(bounds, list):
        raise ArgumentError(f"{kind} takes a list, got {bounds!r}")
    made: Any = kinds[kind]
    if issubclass(made, Choice | Grid):
        return cast(Range, made(tuple(bounds)))
    if len(bounds) != 2:
        raise ArgumentError(f"{kind} takes [low, high], got {bounds!r}")
    return cast(Range, made(*bounds))


def line_of(text: str, place: Sequence[str | int]) -> int:
    """Return the line (from 1) where a key of a TOML text stands: the deepest of its parts that has a line."""
    lines, at = text.splitlines(), 0
    tables = [str(key) for key in place if isinstance(key, str)]
    number = next((key for key in place if isinstance(key, int)), 0)
    for depth in range(len(tables), 0, -1):
        name = re.escape(".".join(tables[:depth])).replace("\\.", r"\.")
        header = re.compile(rf"\s*\[\[?\s*(?:{name})\s*\]\]?\s*(#.*)?$".replace('"', '"?'))
        found = [
            index
            for index, line in enumerate(lines)
            if header.match(line.replace('"', "")) or _names(line, tables[:depth])
        ]
        if found:
            at = found[min(number, len(found) - 1)]
            rest = tables[depth:]
            return 1 + _key_line(lines, at, rest)
    return 1 + _key_line(lines, -1, tables)


def _names(line: str, tables: Sequence[str]) -> bool:
    """Whether a line is the header of a table, quotes and escapes in its name read as TOML does."""
    if not line.lstrip().startswith("["):
        return False
    wanted: dict[str, Any] = {}
    for key in reversed(tables):
        wanted = {key: wanted}
    try:
        return tomllib.loads(line) == wanted
    except ValueError:
        return False


def _key_line(lines: Sequence[str], at: int, keys: Sequence[str]) -> int:
    for key in reversed(keys):
        pattern = re.compile(rf'(^|[\s,{{])"?{re.escape(key)}"?(\s*=|\.)')
        for index in range(at + 1, len(lines)):
            if lines[index].lstrip().startswith("[") and "=" not in lines[index]:
                break
            if pattern.search(lines[index]):
                return index
    return max(at, 0)


def _values(place: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise ArgumentError(f"{place} takes a list of at least one thing that comes there, got {values!r}")
    return values


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return _is_table(f"[{key}]", content.get(key, {}))


def _is_table(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{what} must be a table, got {value!r}")
    return value


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    value = content.get(key, [])
    if not isinstance(value, list):
        raise ArgumentError(f"{key} must be a list, got {value!r}")
    return value


def _known(kind: str, table: Any, keys: Sequence[str]) -> Mapping[str, Any]:
    _require_keys(kind, _is_table(kind, table), keys)
    return dict(table)


def _require_keys(kind: str, table: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in table:
        if key not in keys:
            raise UnknownNameError(kind, key, keys)
