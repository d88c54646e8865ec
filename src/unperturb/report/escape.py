"""Names from outside, made fit to be read and put where they can do no harm: a function per format.

HTML has jinja's own. A name may hold anything: line breaks, markup, control characters, any script, any length.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")
R = TypeVar("R")

LONGEST = 40  # columns of a name
_NAMES = ("dataset", "split", "classifier", "surrogate", "defense", "attack")
# What tables say themselves.
_TAKEN = {"defense": ("none", "undefended"), "attack": ("clean", "images", "worst case")}
_JOINERS = "\u200c\u200d"  # invisible, but spelling in some scripts


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


def readable(rows: pd.DataFrame, longest: int = LONGEST) -> tuple[pd.DataFrame, dict[str, dict[str, str]]]:
    """`rows` with the names that people read, and per column the name of each that changed: in one line, of about
    `longest` columns at most, a folder without the way to it. What was told apart still is."""
    changed = {}
    for column in _NAMES:
        names = {"none": "none"} if column == "defense" else {}
        taken = set(_TAKEN.get(column, ()))
        # Who has a name to read keeps it: the others are told apart from those.
        for name in sorted(rows[column].unique(), key=lambda name: name != _short(name, column, longest)):
            if name not in names:
                names[name] = _unlike(_short(name, column, longest), taken, longest)
                taken.add(names[name])
        if other := {old: new for old, new in names.items() if old != new}:
            changed[column] = other
            rows = rows.assign(**{column: rows[column].map(names)})
    return rows, changed


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


# Formats ------------------------------------------------------------------------------------------------------------


def in_markdown(text: object) -> str:
    """`text` for a cell of a table or a heading: no markup, no formulas, no links, no end of the cell."""
    line = re.sub(r"([\\`*|$~])|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(text))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("](", r"]\(")


def in_csv(frame: pd.DataFrame, *, index: bool = False) -> str:
    """`frame` as CSV; text that a spreadsheet would take for a formula has an apostrophe before it."""

    def inert(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        line = one_line(value)
        return f"'{line}" if line[:1] in tuple("=+-@") else line

    return frame.map(inert).rename(index=inert, columns=inert).to_csv(index=index)


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
