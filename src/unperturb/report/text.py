"""Tables as text: for a terminal, and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from unperturb import screen
from unperturb.report.comparison import Costs, comparison_table, comparisons, with_names
from unperturb.report.escape import columns, in_markdown, readable
from unperturb.report.tables import BLOCK, attack_name, attacker_name, groups, notes, quality_table, records, wide_table
from unperturb.results.schema import read_costs

if TYPE_CHECKING:
    import pandas as pd

NAME = 24  # columns of a name, of the hundred that a terminal may have
READING = {
    "oblivious": "the attacker sees the bare classifier only and knows nothing of the defense: the usual protocol, and "
    "the weakest attacker",
    "white box": "the attacker differentiates through purifier and classifier: only this column says what a defense is "
    "worth once it is known, and a stronger attack can only lower it",
    "worst case": "the image is classified correctly when clean and under every attack of its column that has the "
    "budget",
    "PSNR, SSIM": "of the adversarial image before and after the purifier, and of a clean image after it",
}


def table(rows: pd.DataFrame, width: int | None = None) -> str:
    """Accuracy and image quality as plain text for a terminal `width` columns wide (default: this one), and how to read
    them.

    rows: as `unperturb.schema.read_rows` gives them. Defenses that do not fit side by side continue below.
    """
    rows, _ = readable(rows, NAME)
    width = width or screen.width()
    quality = quality_table(rows)
    parts = []
    wide = wide_table(rows)
    for (dataset, split, classifier), block in groups(wide, BLOCK):
        parts.append(f"{dataset} ({split}), {classifier}: accuracy [95 % Wilson interval]\n")
        parts += [_grid(page) for page in _pages(block.droplevel([0, 1, 2]), width)]
        mine = quality[(quality[BLOCK] == [dataset, split, classifier]).all(axis=1)]
        if len(mine):
            parts += [_grid(page) for page in _quality(mine, width)]
    said = [textwrap.fill(f"NOTE  {note}", width, subsequent_indent=" " * 6) + "\n" for note in notes(rows)]
    return "\n".join([*parts, *said, _reading(width)])


def _reading(width: int) -> str:
    indent = " " * (max(map(len, READING)) + 2)
    return "".join(
        textwrap.fill(said, width, initial_indent=name.ljust(len(indent)), subsequent_indent=indent) + "\n"
        for name, said in READING.items()
    )


def compare(rows: pd.DataFrame, costs: Costs | None = None, width: int | None = None) -> str:
    """Defenses side by side, a line each, as plain text for a terminal `width` columns wide (default: this one; see
    `comparison_table`).

    Columns that do not fit continue below.
    """
    costs = read_costs(*rows.attrs.get("runs", [])) if costs is None else costs
    rows, names = readable(rows, NAME)
    width = width or screen.width()
    parts = []
    for title, n, heads, lines in comparisons(comparison_table(rows, with_names(costs, names))):
        parts.append(f"{title}: accuracy, % [95 % Wilson interval] of {n:,} images\n")
        filled = [[head, *column] for head, column in zip(heads, zip(*lines))]
        pages = [filled[:1]]
        for column in filled[1:]:
            if len(pages[-1]) > 1 and sum(_widths([*pages[-1], column])) - 2 > width:
                pages.append(filled[:1])
            pages[-1].append(column)
        parts += [_grid(page) for page in pages]
    return "\n".join(parts)


def to_markdown(frame: pd.DataFrame) -> str:
    """`frame` as a Markdown table; named index levels become columns, column levels are joined by a comma."""
    frame = frame.reset_index() if any(name is not None for name in frame.index.names) else frame
    heads: list[Any] = list(frame.columns)
    names = [", ".join(p for p in c if p) if isinstance(c, tuple) else str(c) for c in heads]
    return _markdown(names, [[_entry(value) for value in line] for line in frame.itertuples(index=False, name=None)])


def compare_in_markdown(frame: pd.DataFrame) -> str:
    """What `comparison_table` gives as Markdown to be read: a table with a title for each of its own, accuracies in
    percent with their intervals."""
    parts = []
    for title, n, heads, lines in comparisons(frame):
        head = f"### {in_markdown(title)}\n\nAccuracy, % [95 % Wilson interval] of {n:,} images."
        parts.append(f"{head}\n\n{_markdown(heads, lines)}")
    return "\n".join(parts)


def quality_number(line: Mapping[str, Any], what: str, when: str) -> str:
    """One entry of `quality_table` as text; images that are identical are counted, not averaged."""
    value = line[f"{what}_{when}"]
    if what == "ssim":
        return f"{value:.3f}" if value == value else "-"
    same = line[f"identical_{when}"]
    if value != value:
        return "identical" if same else "-"
    return f"{value:.1f}" + (f" ({same:,} identical)" if same else "")


def _markdown(heads: list[str], lines: list[list[str]]) -> str:
    head, *body = ([in_markdown(value) for value in line] for line in [heads, *lines])
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *body])


def _entry(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)


def _pages(block: pd.DataFrame, width: int) -> list[list[list[str]]]:
    """The columns of one classifier, a defense's attackers kept together, in pages that fit `width`."""
    labels = ["", "", *block.index]
    filled: list[Any] = list(block.columns[(block != "").any()])
    by_defense: dict[str, list[list[str]]] = {}
    for defense, attacker in filled:
        first = "" if defense in by_defense else defense
        by_defense.setdefault(defense, []).append([first, attacker, *block[defense, attacker]])
    pages: list[list[list[str]]] = [[labels]]
    for together in by_defense.values():
        if len(pages[-1]) > 1 and sum(_widths(pages[-1] + together)) - 2 > width:
            pages.append([labels])
        pages[-1] += together
    return pages


def _quality(quality: pd.DataFrame, width: int) -> list[list[list[str]]]:
    """Columns of PSNR and SSIM, on one page or, where that is wider than `width`, on two."""
    measured = [(what, when) for what in ("psnr", "ssim") for when in ("before", "after", "clean")]
    lines = [["against the", "", "", "PSNR, dB", "", "", "SSIM", "", ""]]
    lines.append(["clean images", "", "", *["before", "after", "clean"] * 2])
    last: list[str] = []
    for _, line in records(quality):
        this = [line["defense"], attacker_name(line["knowledge"]), attack_name(line["attack"], line["eps"])]
        same = next((i for i, (a, b) in enumerate(zip(this, last)) if a != b), 2) if last else 0
        lines.append([*[""] * same, *this[same:], *(quality_number(line, *m) for m in measured)])
        last = this
    upright = [list(column) for column in zip(*lines)]
    names, psnr, ssim = upright[:3], upright[3:6], upright[6:]
    whole = [*names, *psnr, *ssim]
    return [whole] if sum(_widths(whole)) - 2 <= width else [[*names, *psnr], [*names, *ssim]]


def _widths(table: Iterable[list[str]]) -> list[int]:
    return [max(map(columns, column)) + 2 for column in table]


def _grid(table: list[list[str]]) -> str:
    widths = _widths(table)
    lines = ("".join(v + " " * (w - columns(v)) for v, w in zip(line, widths)) for line in zip(*table))
    return "".join(f"{line.rstrip()}\n" for line in lines)
