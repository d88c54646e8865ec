"""Fills the tables of `docs/table2.md` and of the comparison in `docs/results.md` from `results/table2-*`."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from unperturb.runs import write_text

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/results.md", "docs/table2.md")

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
    "robust: oblivious": "robust, oblivious",
    "white_box: pgd-40": "PGD-40, white box",
    "robust: white_box": "robust, all knowledge",
}
SUMMARY = {"clean": "clean", "robust: oblivious": "robust, oblivious", "robust: white_box": "robust, all knowledge"}


def read(name: str, eps: float) -> Table:
    """`{system: line}` of one data set at one budget; what other budgets have as columns of their own is added. Nothing
    of results that were made with an earlier definition of robust accuracy: those tables had no norm."""
    found: Table = {}
    for folder in (f"table2-{name}", f"table2-{name}/defense_gan"):
        path = ROOT / "results" / folder / "tables" / "comparison.csv"
        if not path.exists():
            continue
        with path.open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.DictReader(file) if "norm" in line]
        for line in lines:
            if line["norm"] == "linf" and abs(float(line["eps"]) - eps) < 1e-4:
                found.setdefault(line["system"], line)
        for line in lines:
            column = f"oblivious: fgsm-{line['eps']}"
            mine = found.get(line["system"], {})
            if line.get(column) and not mine.get(column):
                mine[column] = line[column]
    return found


def percent(line: Line | None, column: str) -> str:
    """An entry; with its n where that is small."""
    value, n = (line or {}).get(column, ""), (line or {}).get(f"{column} n", "")
    if value in ("", "nan"):
        return ""
    return f"{100 * float(value):.1f}" + (f" (n = {n})" if n and int(float(n)) < 100 else "")


def two_digits(value: str) -> str:
    number = float(value or 0)
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}"


def markdown(headings: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    rows = [headings, ["---"] * len(headings), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def whole(table: Table) -> str:
    """Every column of one data set at one budget; empty where there are no results."""
    if not table:
        return ""
    columns = {c: heading for c, heading in COLUMNS.items() if any(percent(line, c) for line in table.values())}
    most = max(int(line["clean n"]) for line in table.values())

    def cells(system: str) -> list[str]:
        line = table[system]
        fewer = "" if int(line["clean n"]) == most else f" (n = {line['clean n']})"
        name = system if system == "undefended" else f"`{system}`"
        restored = ["", ""]
        if system not in CLASSIFIERS:
            restored = [f"{float(line['psnr']):.1f}, {float(line['ssim']):.2f}", two_digits(line["ms"])]
        return [name + fewer, *(percent(line, c) for c in columns), *restored, two_digits(line["pflop"])]

    return markdown(
        ["", *columns.values(), "PSNR, SSIM after", "ms", "PFLOP"], (cells(s) for s in SYSTEMS if s in table)
    )


def summary() -> str:
    """Clean and robust accuracies of the three data sets."""
    parts = {"MNIST, 0.3": read("mnist", 0.3), "Fashion-MNIST, 0.1": read("fashion_mnist", 0.1)}
    parts["CIFAR-10, 8/255"] = read("cifar10", 8 / 255)
    if not all(parts.values()):
        return ""
    headings = [
        f"{part}: {heading}" if column == "clean" else heading for part in parts for column, heading in SUMMARY.items()
    ]
    return markdown(
        ["", *headings],
        (
            [s if s == "undefended" else f"`{s}`", *(percent(t.get(s), c) for t in parts.values() for c in SUMMARY)]
            for s in SYSTEMS
        ),
    )


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "mnist": lambda: whole(read("mnist", 0.3)),
    "fashion_mnist-0.3": lambda: whole(read("fashion_mnist", 0.3)),
    "fashion_mnist-0.1": lambda: whole(read("fashion_mnist", 0.1)),
    "cifar10": lambda: whole(read("cifar10", 8 / 255)),
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
