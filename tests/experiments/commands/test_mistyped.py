"""Words that no command and no option has: short, with what was probably meant, and status 2."""

from __future__ import annotations

import platform
import re
import shlex

import osculate as osc
import pytest
import torch
from osculate.experiments.commands.cli import GROUPS, execute
from osculate.experiments.commands.mistyped import SHOWN

COMMANDS = {name: kind for group in GROUPS.values() for name, (kind, _) in group.items()}


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def refused(capsys: pytest.CaptureFixture[str], line: str, most: int = 8) -> str:
    """What is said, on one line; status 2, nothing else printed, few lines of at most 80 columns."""
    with pytest.raises(SystemExit, match="2"):
        execute(shlex.split(line))
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == "" and len(lines) <= most and max(map(len, lines)) <= 80
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown.err).split())


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_version_with_those_of_torch_and_python_in_one_line(capsys: pytest.CaptureFixture[str], word: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        execute([word])
    expected = f"osculate {osc.__version__}, torch {torch.__version__}, Python {platform.python_version()}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_a_letter_too_few_or_two_exchanged_in_any_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    for wrong in (command[:-2] + command[-1], command[0] + command[2] + command[1] + command[3:]):
        text = refused(capsys, f"{wrong} --whatever")
        assert f"unknown command '{wrong}'" in text and f"'osculate {command}'" in text and "osculate --help" in text


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("parts", "methods --parts"),
        ("show", "methods"),
        ("run", "train"),
        ("race", "compare"),
        ("tune", "study"),
        ("plot", "report"),
        ("help", "--help"),
    ],
)
def test_what_other_programs_call_it(capsys: pytest.CaptureFixture[str], word: str, meant: str) -> None:
    assert f"did you mean 'osculate {meant}'" in refused(capsys, word)


def test_a_word_like_no_command_gets_the_way_out_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "xyzzy")
    assert "did you mean" not in text and "'osculate --help' lists the commands" in text
    assert "osculate COMMAND --problem" in refused(capsys, "--problem tiny")
    assert "osculate compare" in refused(capsys, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_letter_too_few_in_any_option(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        execute([command, "--help"])
    options = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)(?= |,|$)", capsys.readouterr().out)) - {"help"}
    known = {name for name in options if name.replace("-", "_") in COMMANDS[command].__dataclass_fields__}
    for option in known - {"out", "lr", "list"}:
        text = refused(capsys, f"{command} --{option[:-2] + option[-1]}=1")
        assert f"did you mean --{option}" in text or f"or --{option}" in text
        assert f"osculate {command} --help" in text


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("train --epoch 3", "--epochs"),
        ("train --learning-rate 0.1", "--lr"),
        ("compare --optimizer adam", "--methods"),
        ("train --optimizer adam", "--method"),
        ("train --dataset mnist", "--problem"),
        ("train --weight_deacy 1", "--weight-decay"),
        ("train kbfgs", "--method kbfgs"),
        ("train quadratic", "--problem quadratic"),
        ("study smoke --no-lst", "--no-list"),
    ],
)
def test_what_options_were_meant_for(capsys: pytest.CaptureFixture[str], line: str, meant: str) -> None:
    assert f"did you mean {meant}" in refused(capsys, line)


def test_an_option_of_another_command_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'bench' has one of this name" in refused(capsys, "verify --only T1")


def test_what_is_told_by_its_place_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert "takes its method without --method" in refused(capsys, "export-submission --method kfac")
    assert "can do nothing with the word 'b'" in refused(capsys, "diagnose a b")
    assert "can do nothing with the option '-v'" in refused(capsys, "train -v")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --epochs abc", "--epochs: 'abc' is not a whole number, such as 3"),
        ("train --seed 1.5", "--seed: '1.5' is not a whole number"),
        ("train --lr 0.1x", "--lr: '0.1x' is not a number, such as 0.1 or 1e-3"),
        ("compare --seconds soon", "--seconds: 'soon' is not a number"),
        ("bench --processes x", "--processes: 'x' is not a whole number"),
    ],
)
def test_what_is_no_number_is_refused_in_plain_words(capsys: pytest.CaptureFixture[str], line: str, said: str) -> None:
    text = refused(capsys, line, most=14)
    assert said in text and "NoneType" not in text and "literal" not in text


def test_show_says_what_can_be_shown_and_its_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        execute(["show", "--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for example in SHOWN:
        assert f"  {example} " in shown
        if not re.search("[A-Z]{2}|compose", example):  # not those of folders and of the table that takes long
            assert execute(shlex.split(example)[1:]) == 0
    capsys.readouterr()


def said(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What a command itself refuses, on one line."""
    assert execute(shlex.split(line)) == 2
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


@pytest.mark.parametrize(
    "line", ["study smoke --seeds", "study smoke --arms --dry-run", "bench --only", "train --option"]
)
def test_an_option_of_any_number_of_values_takes_one_at_least(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert "needs at least one value" in refused(capsys, line)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("compare --methods kbfgs adam --option kbfg.lr=0.1", "did you mean 'kbfgs'?"),
        ("bench --launches sgd", "did you mean 'sgdm'"),
        ("certify osculate:kbfgs --contracts method-purty", "did you mean 'method-purity'"),
        ("certify osculate:kbfgs --contracts zzz", "about this: method-trains"),
        ("train --option kbfgs.lr=3", "write --option lr=..."),
        ("bounded-training --methods adam", "methods that have: kbfgs"),
        ("bench --processes 0", "it takes 2 processes"),
        ("methods --compose kroneker", "did you mean 'Kronecker'?"),
        ("methods --parts zzz", "known: average, coupling, curvature, damping"),
    ],
)
def test_what_commands_refuse_says_the_way_out_in_few_lines(
    capsys: pytest.CaptureFixture[str], line: str, meant: str
) -> None:
    text = said(capsys, line)
    assert meant in text and len(text) < 600


@pytest.mark.parametrize("command", COMMANDS)
def test_no_help_says_that_the_default_is_none(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        execute([command, "--help"])
    assert "default: None" not in " ".join(capsys.readouterr().out.split())


def test_the_line_in_python_names_the_likelihood_where_one_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["methods", "kfac", "sgdm"]) == 0
    text = capsys.readouterr().out
    assert "lr=0.3, likelihood='categorical', ...)" in text and text.count("likelihood='categorical'") == 1
