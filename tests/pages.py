"""Code on the pages of the documentation, found and run as a reader would.

Blocks may be told apart by a comment of their own line right before them:

* ``<!-- file: NAME -->``: the reader saves the block under that name;
* ``<!-- replace in NAME -->`` and, at the next block, ``<!-- by -->``: the reader edits a saved file;
* ``<!-- exit status N -->``: every command of the block ends with it;
* ``<!-- not run: REASON -->``: nobody runs it here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_BLOCK = re.compile(
    r"^(?:<!-- (?P<note>.*?) -->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One block: language, code, the line on which the code begins (from 0), what the comment before it says."""

    language: str
    code: str
    line: int
    note: str

    @property
    def status(self) -> int:
        """The exit status that its commands have."""
        return int(self.note.removeprefix("exit status")) if self.note.startswith("exit status") else 0

    def commands(self) -> Iterator[list[str]]:
        """Every command in it, taken apart; continued lines are joined, ``a && b`` is two commands."""
        for line in self.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


def blocks(text: str) -> list[Block]:
    """All blocks of a page, in order."""
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")), found["note"] or "")
        for found in _BLOCK.finditer(text)
    ]


def pages() -> list[Path]:
    """Every page of the documentation, and the README."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def run_python(found: list[Block], name: str) -> None:
    """Execute the Python blocks in one namespace, with the page's own line numbers in tracebacks."""
    namespace: dict[str, object] = {"__name__": "page"}
    for block in found:
        exec(compile("\n" * block.line + block.code, name, "exec"), namespace)


def run_page(path: Path, command: Callable[[list[str]], int]) -> None:
    """Do what a page says, in the current folder.

    Args:
        path: the page.
        command: runs the words after ``osculate`` and returns the exit status.
    """
    namespace: dict[str, object] = {"__name__": "page"}
    edited: tuple[Path, str] | None = None
    for block in blocks(path.read_text()):
        if block.note.startswith("not run"):
            continue
        if block.note.startswith("file: "):
            Path(block.note.removeprefix("file: ")).write_text(block.code)
        elif block.note.startswith("replace in "):
            edited = Path(block.note.removeprefix("replace in ")), block.code
        elif block.note == "by":
            assert edited is not None and edited[1] in edited[0].read_text()
            edited[0].write_text(edited[0].read_text().replace(edited[1], block.code))
        elif block.language == "python":
            exec(compile("\n" * block.line + block.code, str(path), "exec"), namespace)
        elif block.language == "sh":
            for words in block.commands():
                assert words[0] == "osculate", words
                assert command(words[1:]) == block.status, words
