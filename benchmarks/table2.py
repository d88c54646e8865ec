"""Fills the tables of every defense side by side, in README, docs and the cards of the defenses, from `results/`.

    python benchmarks/table2.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. It holds what `results/*/tables/comparison.csv` say of
the recipes' classifier and budget; of a system that several folders have, the line of the most images counts.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from unperturb.runs import write_text

ROOT = Path(__file__).resolve().parent.parent
CARDS = sorted((ROOT / "docs" / "defenses").glob("*.md"))
PAGES = [
    "README.md",
    "docs/faq.md",
    "docs/results.md",
    "docs/table2.md",
    *(f"docs/defenses/{card.name}" for card in CARDS),
]

Line = dict[str, str]
Table = dict[str, Line]

SYSTEMS = ["undefended", "median", "jpeg", "bit_depth", "total_variation", "magnet", "defense_gan", "ape_gan"]
SYSTEMS += [
    "denoised_smoothing",
    "hgd",
    "distilled",
    "adversarial",
    "adversarial_large",
    "paper",
    "protect",
    "finetune",
    "harden",
]
CLASSIFIERS = ("undefended", "distilled", "adversarial", "adversarial_large")  # no image comes back from these
OBLIVIOUS = {
    "fgsm": "FGSM",
    "fgsm-0.1": "FGSM, 0.1",
    "fgsm-0.15": "FGSM, 0.15",
    "pgd-40": "PGD-40",
    "mim-10": "MIM-10",
    "jsma": "JSMA",
    "cw-60": "C&W",
    "deepfool-l2-50": "DeepFool",
}
COLUMNS = {
    "clean": "clean",
    **{f"oblivious: {attack}": heading for attack, heading in OBLIVIOUS.items()},
    "paper: oblivious": "paper protocol (oblivious, any distance)",
    "robust: oblivious": "oblivious",
    "robust: white_box": "adaptive",
}
SUMMARY = ("clean", "robust: oblivious", "robust: white_box")
OURS = ("undefended", "paper", "protect", "finetune", "harden", "adversarial")


class Block(NamedTuple):
    """The systems of one table: before one classifier of one data set, at one budget in Linf."""

    title: str
    dataset: str
    classifier: str
    eps: float


BLOCKS = {
    "mnist": Block("MNIST, 0.3", "mnist", "resnet8", 0.3),
    "fashion_mnist-0.1": Block("Fashion-MNIST, 0.1", "fashion_mnist", "resnet8", 0.1),
    "fashion_mnist-0.3": Block("Fashion-MNIST, 0.3", "fashion_mnist", "resnet8", 0.3),
    "cifar10": Block("CIFAR-10, 8/255", "cifar10", "airbench", 8 / 255),
}
SUMMARIZED = ("mnist", "fashion_mnist-0.1", "cifar10")


def read(block: Block) -> Table:
    """`{system: line}`. What other budgets have as columns of their own is added. Nothing of results that were made
    with an earlier definition of robust accuracy: those tables had no norm."""
    lines: list[Line] = []
    for path in sorted((ROOT / "results").glob("**/tables/comparison.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            lines += [line for line in csv.DictReader(file) if "norm" in line]
    lines = [x for x in lines if (x["dataset"], x["classifier"]) == (block.dataset, block.classifier)]
    lines.sort(key=lambda line: -int(line["clean n"]))
    found: Table = {}
    for line in lines:
        if line["norm"] == "linf" and abs(float(line["eps"]) - block.eps) < 1e-4:
            found.setdefault(line["system"], line)
    for line in lines:
        mine = found.get(line["system"], {})
        for column in (f"oblivious: {attack}" for attack in OBLIVIOUS):
            if line.get(column) and not mine.get(column) and line["clean n"] == mine.get("clean n"):
                mine |= {key: value for key, value in line.items() if key.startswith(column)}
    return found


def percent(line: Line | None, column: str, *, interval: bool = False) -> str:
    """An entry, with its 95 % Wilson interval if asked for."""
    value = (line or {}).get(column, "")
    if line is None or value in ("", "nan"):
        return ""
    low, high = (100 * float(line[f"{column} {end}"]) for end in ("low", "high"))
    return f"{100 * float(value):.1f}" + (f" [{low:.1f}, {high:.1f}]" if interval else "")


def two_digits(value: str) -> str:
    number = float(value or 0)
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}"


def markdown(headings: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    rows = [headings, ["---"] * len(headings), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def name_of(system: str) -> str:
    return system if system == "undefended" else f"`{system}`"


def whole(block: Block) -> str:
    """Every column of one block; empty where there are no results."""
    table = read(block)
    if not table:
        return ""
    columns = {c: heading for c, heading in COLUMNS.items() if any(percent(line, c) for line in table.values())}

    def cells(system: str) -> list[str]:
        line = table[system]
        restored = ["", ""]
        if system not in CLASSIFIERS:
            restored = [f"{float(line['psnr']):.1f}, {float(line['ssim']):.2f}", two_digits(line["ms"])]
        values = [percent(line, c, interval=c.startswith("robust")) for c in columns]
        return [name_of(system), line["clean n"], *values, *restored, two_digits(line["pflop"])]

    headings = ["", "n", *columns.values(), "PSNR, SSIM after", "ms", "PFLOP"]
    return markdown(headings, (cells(s) for s in SYSTEMS if s in table))


def summary(systems: Iterable[str]) -> str:
    """Clean, oblivious and adaptive accuracy of the three data sets; empty where there are no results."""
    tables = {BLOCKS[name].title: read(BLOCKS[name]) for name in SUMMARIZED}
    if not any(tables.values()):
        return ""

    def cell(line: Line | None) -> str:
        values = [percent(line, column) for column in SUMMARY]
        fewer = "" if line is None or int(line["clean n"]) >= 1000 else f" (n = {line['clean n']})"
        return " / ".join(values) + fewer if any(values) else ""

    shown = [s for s in systems if any(s in table for table in tables.values())]
    lines = ([name_of(s), *(cell(table.get(s)) for table in tables.values())] for s in shown)
    return markdown(["clean / oblivious / adaptive", *tables], lines)


def measured(system: str) -> str:
    """One system on every data set, robust accuracies with their intervals; empty where there are no results."""
    found = {block.title: read(block).get(system) for block in BLOCKS.values()}
    lines = {title: line for title, line in found.items() if line is not None}
    if not lines:
        return ""
    columns = {c: heading for c, heading in COLUMNS.items() if any(percent(line, c) for line in lines.values())}
    rows = (
        [title, line["clean n"], *(percent(line, c, interval=c.startswith(("robust", "clean"))) for c in columns)]
        for title, line in lines.items()
    )
    return markdown(["", "n", *columns.values()], rows)


TABLES: dict[str, Callable[[], str]] = {
    "summary": lambda: summary(SYSTEMS),
    "readme": lambda: summary(OURS),
    **{name: partial(whole, block) for name, block in BLOCKS.items()},
    **{f"measured-{system}": partial(measured, system) for system in SYSTEMS},
}


def filled(page: str) -> str:
    """`page` with each table between `<!-- table: NAME -->` and `<!-- end -->` made anew, where there are results."""

    def made(found: re.Match[str]) -> str:
        table = TABLES[found[2]]()
        return f"{found[1]}\n{table}\n\n{found[3]}" if table else found[0]

    return re.sub(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", made, page, flags=re.S)


def main() -> None:
    for name in PAGES:
        path = ROOT / name
        write_text(path, filled(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
