"""Text from a small grammar: sentences with agreement in number, relative clauses and a closing full stop.

Nothing has to be downloaded, and nothing of it is anybody's work; a model needs memory over some twenty characters to
choose between the forms of a verb.
"""

from __future__ import annotations

import numpy as np

__all__ = ["ALPHABET", "encode", "write_text"]

ALPHABET = " abcdefghijklmnopqrstuvwxyz,.\n"
"""Every character that a text may have, in the order of the codes."""

_NOUNS = ("gradient", "matrix", "layer", "network", "sample", "student", "teacher", "rule", "step", "model")
_ADJECTIVES = ("small", "large", "old", "quiet", "damped", "sparse", "random", "exact", "deep", "stable")
_TRANSITIVE = ("follow", "bound", "teach", "scale", "find", "train", "move", "test", "reject", "measure")
_INTRANSITIVE = ("converge", "wait", "return", "grow", "diverge", "sleep")
_ADVERBS = ("slowly", "often", "quickly", "at last", "once more")
_DETERMINERS = {False: ("the", "a", "every", "this"), True: ("the", "some", "all", "these")}


def write_text(length: int, seed: int) -> str:
    """Return a text of exactly ``length`` characters, cut where it ends.

    Args:
        length: characters, >= 0.
        seed: decides the text, >= 0.
    """
    rng = np.random.default_rng(seed)
    pieces: list[str] = []
    written = 0
    while written < length:
        sentence = _sentence(rng).replace(",,", ",").rstrip(",") + (".\n" if rng.random() < 0.2 else ". ")
        pieces.append(sentence)
        written += len(sentence)
    return "".join(pieces)[:length]


def encode(text: str) -> list[int]:
    """Return the code of each character, its place in ``ALPHABET``."""
    places = {character: code for code, character in enumerate(ALPHABET)}
    return [places[character] for character in text]


def _sentence(rng: np.random.Generator) -> str:
    plural = bool(rng.random() < 0.5)
    return f"{_noun_phrase(rng, plural, 0.35)} {_verb_phrase(rng, plural)}"


def _noun_phrase(rng: np.random.Generator, plural: bool, clause: float) -> str:
    words = [_one(rng, _DETERMINERS[plural])]
    if rng.random() < 0.4:
        words.append(_one(rng, _ADJECTIVES))
    if words[0] == "a" and len(words) > 1 and words[1][0] in "aeiou":
        words[0] = "an"
    noun = _one(rng, _NOUNS)
    words.append(("matrices" if noun == "matrix" else noun + "s") if plural else noun)
    if rng.random() < clause:
        words.append(f"that {_verb_phrase(rng, plural)},")
    return " ".join(words)


def _verb_phrase(rng: np.random.Generator, plural: bool) -> str:
    if rng.random() < 0.3:
        return f"{_verb(_one(rng, _INTRANSITIVE), plural)} {_one(rng, _ADVERBS)}"
    return f"{_verb(_one(rng, _TRANSITIVE), plural)} {_noun_phrase(rng, bool(rng.random() < 0.5), 0.1)}"


def _verb(stem: str, plural: bool) -> str:
    if plural:
        return stem
    return stem + ("es" if stem.endswith("ch") else "s")


def _one(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]
