"""A table of text, and how it is written down: for a terminal, as Markdown, HTML, LaTeX and CSV."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from unperturb.results.names import columns, one_line

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Sheet:
    """A table as people read it; every entry is text and belongs to no format yet.

    title: what it is of. note: what its numbers are. groups: of each column, what it has in common with its neighbors,
    such as a system's name, or "". heads: each column's own. lines: the entries. names: the first so many columns name
    their line.
    """

    title: str
    note: str
    groups: Sequence[str]
    heads: Sequence[str]
    lines: Sequence[Sequence[str]] = field(default_factory=list)
    names: int = 1

    def spans(self) -> list[tuple[str, int]]:
        """Each group with the number of columns that it spans; the columns of names stand alone."""
        named = [(group, 1) for group in self.groups[: self.names]]
        return named + [(group, len(list(same))) for group, same in groupby(self.groups[self.names :])]

    def without_empty(self) -> Sheet:
        """The sheet without columns that say nothing in any line."""
        kept = [i for i in range(len(self.heads)) if i < self.names or any(line[i] for line in self.lines)]
        return self.only(kept)

    def only(self, kept: Sequence[int]) -> Sheet:
        """The sheet with these of its columns."""
        groups, heads, *lines = ([line[i] for i in kept] for line in (self.groups, self.heads, *self.lines))
        return replace(self, groups=groups, heads=heads, lines=lines)


# Terminal -----------------------------------------------------------------------------------------------------------


def as_text(sheet: Sheet, width: int) -> str:
    """For a terminal `width` columns wide: columns that do not fit continue below, those of one group together where
    they can."""
    title = textwrap.fill(": ".join(filter(None, (sheet.title, sheet.note))), max(width, 20))
    return "\n".join([f"{title}\n", *(_grid(_upright(sheet.only(kept))) for kept in _pages(sheet, width))])


def _upright(sheet: Sheet) -> list[list[str]]:
    """The columns, each from its group down; a group is said once."""
    groups = [group for name, span in sheet.spans() for group in (name, *[""] * (span - 1))]
    top = [groups] if any(groups) else []
    return [list(column) for column in zip(*top, sheet.heads, *_said_once(sheet))]


def _said_once(sheet: Sheet) -> list[list[str]]:
    """The lines; a name is left out where the line above has the same, and the same before it."""
    found: list[list[str]] = []
    last: Sequence[str] = []
    for line in sheet.lines:
        same = 0
        while last and same < sheet.names - 1 and line[same] == last[same]:
            same += 1
        found.append([*[""] * same, *line[same:]])
        last = line
    return found


def _pages(sheet: Sheet, width: int) -> list[list[int]]:
    """The columns of each page: as many whole groups as fit; a group that is wider than a page is broken."""
    names = list(range(sheet.names))
    pages, number = [list(names)], sheet.names

    def fits(page: list[int]) -> bool:
        return sum(_widths(_upright(sheet.only(page)))) - 2 <= width

    for _, span in sheet.spans()[sheet.names :]:
        together = list(range(number, number + span))
        number += span
        if pages[-1] != names and not fits([*pages[-1], *together]):
            pages.append(list(names))
        for i in together:
            if pages[-1] != names and not fits([*pages[-1], i]):
                pages.append(list(names))
            pages[-1].append(i)
    return pages


def _widths(table: Iterable[list[str]]) -> list[int]:
    return [max(map(columns, column)) + 2 for column in table]


def _grid(table: list[list[str]]) -> str:
    widths = _widths(table)
    lines = ("".join(v + " " * (w - columns(v)) for v, w in zip(line, widths)) for line in zip(*table))
    return "".join(f"{line.rstrip()}\n" for line in lines)


# Markup -------------------------------------------------------------------------------------------------------------


def in_markdown(text: object) -> str:
    """`text` for a cell of a table or a heading: no markup, no formulas, no links, no end of the cell."""
    line = re.sub(r"([\\`*|$~])|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(text))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("](", r"]\(")


def in_latex(text: object) -> str:
    """`text` for a cell of a table or a caption."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda c: special.get(c[0], rf"\{c[0]}"), one_line(text))


def as_markdown(sheet: Sheet, width: int = 0) -> str:
    """As a Markdown table below a heading; it has one line of heads, so a group stands in the head of each column."""
    heads = [", ".join(filter(None, (group, head))) for group, head in zip(sheet.groups, sheet.heads)]
    lines = [list(map(in_markdown, line)) for line in (heads, *sheet.lines)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], ["---"] * len(heads), *lines[1:]))
    above = [f"### {in_markdown(sheet.title)}\n"] * bool(sheet.title) + [f"{in_markdown(sheet.note)}\n"] * bool(
        sheet.note
    )
    return "\n".join([*above, table])


def as_html(sheet: Sheet, width: int = 0) -> str:
    """As a fragment of HTML: a table that slides in its own box."""
    title, note = (html.escape(one_line(text)) for text in (sheet.title, sheet.note))
    caption = f"<caption>{title}{f' <small>{note}</small>' if note else ''}</caption>\n" if title or note else ""

    def cells(texts: Iterable[str], tag: Callable[[int], str]) -> str:
        found = "".join(f"<{tag(i)}>{html.escape(one_line(t))}</{tag(i)[:2]}>" for i, t in enumerate(texts))
        return f"<tr>{found}</tr>\n"

    spans = sheet.spans()
    spanning = [f'th colspan="{span}"' if span > 1 else "th" for _, span in spans]
    top = cells((group for group, _ in spans), lambda i: spanning[i]) if any(sheet.groups) else ""
    head = top + cells(sheet.heads, lambda i: 'th scope="col"')
    body = "".join(cells(line, lambda i: 'th scope="row"' if i < sheet.names else "td") for line in sheet.lines)
    table = f"<table>\n{caption}<thead>\n{head}</thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f'<div class="scroll">{table}</div>\n'


def as_latex(sheet: Sheet, width: int = 0) -> str:
    """As a LaTeX table with the rules of `booktabs`."""
    spans, at, top, rules = sheet.spans(), 1, [], []
    for group, span in spans:
        top.append(rf"\multicolumn{{{span}}}{{c}}{{{in_latex(group)}}}" if span > 1 else in_latex(group))
        if group and at > sheet.names:
            rules.append(rf"\cmidrule(lr){{{at}-{at + span - 1}}}")
        at += span
    above = [f"{' & '.join(top)} \\\\", " ".join(rules)] if any(sheet.groups) else []
    caption = in_latex(f"{sheet.title}. {sheet.note}".strip(". ")) + "."
    ends = [f"{' & '.join(map(in_latex, line))} \\\\" for line in (sheet.heads, *sheet.lines)]
    lines = [
        r"\begin{table}",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{{'l' * sheet.names}{'r' * (len(sheet.heads) - sheet.names)}}}",
        r"\toprule",
        *filter(None, above),
        ends[0],
        r"\midrule",
        *ends[1:],
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


STYLES: dict[str, Callable[[Sheet, int], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "html": as_html,
    "latex": as_latex,
}


# Spreadsheets -------------------------------------------------------------------------------------------------------


def as_csv(frame: pd.DataFrame) -> str:
    """A table of numbers as CSV, to their last digit: named index levels become columns, column levels are joined
    ("white_box: pgd-40 n"). Text that a spreadsheet would take for a formula has an apostrophe before it."""
    flat = frame.reset_index() if any(name is not None for name in frame.index.names) else frame
    flat = flat.set_axis([_joined(column) for column in flat.columns], axis="columns")

    def inert(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        line = one_line(value)
        return f"'{line}" if line[:1] in tuple("=+-@") else line

    return flat.map(inert).rename(columns=inert).to_csv(index=False)


def _joined(column: Any) -> str:
    """A column of `comparison_table` by one name: what is no cost says its group, what is no accuracy its number."""
    if not isinstance(column, tuple):
        return str(column)
    group, name, number = column
    named = name if group == "cost" else ": ".join(filter(None, (group, name)))
    return named if number in ("", "accuracy") else f"{named} {number}"
