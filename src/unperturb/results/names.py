"""Names as people read them: of attacks, budgets and attackers, and those from outside, made harmless.

A name from outside may hold anything: line breaks, markup, control characters, any script, any length. What a format
of its own needs besides is the business of `render`.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from unperturb.threat_models import KNOWLEDGE

P = ParamSpec("P")
R = TypeVar("R")

LONGEST = 40  # columns of a name
NAMES = ("dataset", "split", "classifier", "surrogate", "system", "attack")  # columns of names from outside
CLEAN = "clean"  # stands where an attack's name does, for images that nobody attacked
_TAKEN = {"attack": (CLEAN, "images")}  # what tables say themselves
_JOINERS = "\u200c\u200d"  # invisible, but spelling in some scripts


# Attacks, budgets and attackers -------------------------------------------------------------------------------------

_ORDER = ("noise", "fgsm", "pgd", "mim", "jsma", "cw", "deepfool")  # the paper's, then whatever else there is
_NORMS = {"linf": "Linf", "l2": "L2", "l0": "L0"}


def attacker_name(knowledge: str) -> str:
    """What the attacker knows, as tables say it: `white box`."""
    return KNOWLEDGE[knowledge].title if knowledge in KNOWLEDGE else knowledge


def budget_name(eps: float) -> str:
    """`eps` as people write it: `0.3`, `8/255`; empty for NaN, which means no budget."""
    if eps != eps:
        return ""
    for text, value in ((f"{eps:.3g}", float(f"{eps:.3g}")), (f"{round(eps * 255)}/255", round(eps * 255) / 255)):
        if abs(value - eps) < 1e-6:
            return text
    return f"{eps:.4g}"


def norm_name(norm: str) -> str:
    """A norm as people write it: `Linf`."""
    return _NORMS.get(norm, norm)


def split_name(split: str) -> str:
    """A split, or a fixed part of it, as people say it: `100 of test`."""
    return re.sub(r"^(.+):(\d+)@\d+$", r"\2 of \1", split)


def attack_name(attack: str, eps: float) -> str:
    """The attack and its budget: `pgd-40, eps 0.3`."""
    return f"{attack}, eps {budget_name(eps)}" if eps == eps else attack


def attack_rank(attack: str) -> int:
    """Where an attack stands in a table: the paper's order, then all others."""
    ranks = {name: i for i, name in enumerate(_ORDER)}
    return ranks.get(attack.partition("-")[0], len(ranks))


# Names from outside -------------------------------------------------------------------------------------------------


def one_line(text: object, longest: int | None = None) -> str:
    """`text` in one line, without what is invisible or turns the writing around; where it takes more than `longest`
    columns, without its middle."""
    kept = (" " if c.isspace() else c for c in str(text) if _shows(c))
    line = " ".join("".join(kept).split())
    if longest is None or columns(line) <= longest:
        return line
    tail = longest // 3
    return f"{first(line, longest - tail - 1)}…{first(line[::-1], tail)[::-1]}"


def columns(text: str) -> int:
    """How many columns of a terminal `text` takes: two for a letter of Chinese, Japanese or Korean."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def first(text: str, most: int) -> str:
    """The beginning of `text` that takes at most `most` columns."""
    while columns(text) > most:
        text = text[: -max(1, (columns(text) - most) // 2)]
    return text


def _shows(character: str) -> bool:
    return character.isspace() or character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs")


def readable(names: Mapping[str, Iterable[str]], longest: int = LONGEST) -> dict[str, dict[str, str]]:
    """Per column of `names`, what those of its names become that people could not read: in one line, of about `longest`
    columns at most, a folder without the way to it. What was told apart still is."""
    changed = {}
    for column, given in names.items():
        found: dict[str, str] = {}
        taken = set(_TAKEN.get(column, ()))
        # Who has a name to read keeps it: the others are told apart from those.
        for name in sorted(set(given), key=lambda name: (name != _short(name, column, longest), name)):
            found[name] = _unlike(_short(name, column, longest), taken, longest)
            taken.add(found[name])
        if other := {old: new for old, new in found.items() if old != new}:
            changed[column] = other
    return changed


def renamed(cell: Mapping[str, Any], names: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """`cell` with the names that `readable` gave."""
    return {k: names[k].get(v, v) if k in names else v for k, v in cell.items()}


def _short(name: str, column: str, longest: int) -> str:
    if column == "dataset" and name.startswith("folder:"):
        name = re.split(r"[/\\]", name.removeprefix("folder:").rstrip("/\\"))[-1]
    # The classifier that a transfer is not made on has no name.
    return one_line(name, longest) or ("unnamed" if name or column != "surrogate" else "")


def _unlike(name: str, taken: set[str], longest: int) -> str:
    unlike, number = name, 2
    while unlike in taken:
        unlike, number = f"{one_line(name, longest - 4)} ({number})", number + 1
    return unlike


def in_file_name(*parts: str) -> str:
    """`parts` as the stem of a file's name: small letters, digits, points and hyphens; a part that has none of them is
    a few digits of its hash."""
    slugs = [(part, re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-.")) for part in parts if part]
    return "-".join(slug or hashlib.sha256(part.encode()).hexdigest()[:6] for part, slug in slugs)


def in_figure(draw: Callable[P, R]) -> Callable[P, R]:
    """Inside `draw` a text is a text: `$` opens no formula, and other fonts, where there are any, fill the gaps of the
    first; what none of them has is a box, without a warning each."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import font_manager, rc_context

        installed = font_manager.get_font_names()
        families = ["DejaVu Sans", *(name for name in _FONTS if name in installed)]
        with rc_context({"text.parse_math": False, "font.family": families}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            return draw(*args, **kwargs)

    return styled


_FONTS = ("Noto Sans CJK JP", "IPAexGothic", "Hiragino Sans", "Yu Gothic", "PingFang SC", "Noto Sans Arabic")
