"""The paper's tables from rows: as they are read, as numbers, and of each entry the rows that it was counted from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.results import render, tables
from unperturb.results.names import CLEAN, attack_name, attack_rank, budget_name, split_name
from unperturb.results.results import Results, records
from unperturb.results.schema import cell_folder
from unperturb.results.sheet import Sheet

if TYPE_CHECKING:
    import pandas as pd

BASE = "base"  # how the paper calls what is undefended, and what is not restored
ROBUST = {"oblivious": "robust, oblivious", "white_box": "robust, adaptive"}


@dataclass(frozen=True)
class Judged:
    """The results of one run that a table is made from. labels: of the attacks that its recipe names, ladder aside."""

    run: Path
    results: Results
    labels: tuple[str, ...]

    @classmethod
    def read(cls, run: Path, labels: Iterable[str]) -> Judged:
        """Those of the run folder `run`; raises `RunError` where it holds none."""
        return cls(run, Results.read(run).whole_splits(), tuple(labels))


@dataclass
class Table:
    """A table of the paper. frame: its numbers. sources: per line and entry of the sheet, the folder of the rows behind
    it; None where an entry is no measurement of its own, or is made from many."""

    sheet: Sheet
    frame: pd.DataFrame
    sources: list[list[Path | None]] = field(default_factory=list)


@dataclass(frozen=True)
class _Entry:
    """One accuracy: what it is of (`under`, the head of its line or column), its numbers, and where its rows lie."""

    classifier: str
    system: str
    under: str
    numbers: Mapping[str, Any]
    source: Path | None

    @property
    def line(self) -> dict[str, Any]:
        """For a table of numbers."""
        named = {"classifier": self.classifier, "system": self.system, "under": self.under}
        kept = {k: self.numbers[k] for k in ("attack", "knowledge", "norm", "eps", "n", "accuracy", "low", "high")}
        return named | kept | {"rows": "" if self.source is None else self.source.as_posix()}


# Accuracy -----------------------------------------------------------------------------------------------------------


def accuracies(runs: Sequence[Judged]) -> list[_Entry]:
    """Clean, under each oblivious attack of the recipes, and robust by who knows nothing or all of the defense; of an
    entry that several runs have, the first counts."""
    found: dict[tuple[str, str, str], _Entry] = {}
    for judged in runs:
        for _, line in records(tables.accuracy_table(judged.results)):
            clean = line["attack"] == CLEAN
            if clean or (line["knowledge"] == "oblivious" and line["attack"] in judged.labels):
                under = CLEAN if clean else _attack(line)
                _keep(found, under, line, None if clean else _rows(judged.run, line))
        for _, line in records(tables.robust_table(judged.results)):
            adaptive = line["knowledge"] == "white_box"
            if adaptive or line["knowledge"] == "oblivious":
                budget = render.budget_title(line["norm"], line["eps"])
                _keep(found, f"{ROBUST[line['knowledge']]}, {budget}", line | {"attack": "robust"}, None)
    return list(found.values())


def _keep(found: dict[tuple[str, str, str], _Entry], under: str, line: Mapping[str, Any], source: Path | None) -> None:
    key = (line["classifier"], line["system"], under)
    found.setdefault(key, _Entry(*key, line, source))


def _attack(line: Mapping[str, Any]) -> str:
    """`fgsm, eps 0.15`; a label may have ended in the budget already, to be told from another."""
    eps = budget_name(line["eps"])
    return attack_name(line["attack"].removesuffix(f"-{eps}") if eps else line["attack"], line["eps"])


def _rows(run: Path, line: Mapping[str, Any]) -> Path:
    return run / "rows" / cell_folder(line["classifier"], line["system"], line["attack"], line["knowledge"])


def accuracy_by_attack(runs: Sequence[Judged], title: str) -> Table:
    """Table 1: a line per classifier and attack, a column per system, the undefended as `base`."""
    found = accuracies(runs)
    lines = dict.fromkeys((one.classifier, one.under) for one in found)
    systems = list(dict.fromkeys(one.system for one in found))
    by = {(one.classifier, one.under, one.system): one for one in found}
    grid = [[by.get((*line, system)) for system in systems] for line in _in_order(lines)]
    heads = ["classifier", "attack", *_called(systems, runs)]
    return _table(title, heads, [list(line) for line in _in_order(lines)], grid, _note(runs))


def accuracy_by_system(runs: Sequence[Judged], title: str) -> Table:
    """Table 2: a line per classifier and system, a column per attack."""
    found = accuracies(runs)
    lines = list(dict.fromkeys((one.classifier, one.system) for one in found))
    unders = [under for _, under in _in_order(dict.fromkeys(("", one.under) for one in found))]
    by = {(one.classifier, one.system, one.under): one for one in found}
    grid = [[by.get((*line, under)) for under in unders] for line in lines]
    names = dict(zip([system for _, system in lines], _called([system for _, system in lines], runs)))
    return _table(title, ["classifier", "defense", *unders], [[c, names[s]] for c, s in lines], grid, _note(runs))


def _table(title: str, heads: list[str], names: list[list[str]], grid: list[list[_Entry | None]], note: str) -> Table:
    import pandas as pd

    sizes = [one.numbers["n"] for line in grid for one in line if one]
    common = max(set(sizes), key=sizes.count)

    def text(one: _Entry | None) -> str:
        if one is None:
            return ""
        n = one.numbers["n"]
        return render.percent_of(one.numbers, sign="") + (f" n {n:,}" if n != common else "")

    lines = [[*name, *map(text, line)] for name, line in zip(names, grid)]
    said = f"% right [95 % Wilson interval], n {common:,} {note}"
    sheet = Sheet(title, said, [""] * len(heads), heads, lines, names=2)
    frame = pd.DataFrame([one.line for line in grid for one in line if one]).astype({"eps": "float32"})
    return Table(sheet, frame, [[None, None, *(one.source if one else None for one in line)] for line in grid])


def _in_order(lines: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Classifiers as they come; of each the clean images, the paper's attacks, the robust accuracies."""
    places = {classifier: i for i, (classifier, _) in enumerate(dict.fromkeys((c, "") for c, _ in lines))}

    def place(line: tuple[str, str]) -> tuple[Any, ...]:
        classifier, under = line
        kind = 0 if under == CLEAN else 2 if under.startswith(tuple(ROBUST.values())) else 1
        attack = under.partition(",")[0]
        return places[classifier], kind, attack_rank(attack) if kind == 1 else 0

    return sorted(lines, key=place)


def _called(systems: Iterable[str], runs: Sequence[Judged]) -> list[str]:
    bare = {cell["system"] for judged in runs for _, cell in records(judged.results.cells) if not cell["defended"]}
    return [BASE if system in bare else system for system in systems]


def _note(runs: Sequence[Judged]) -> str:
    where = runs[0].results.cells.iloc[0]
    return f"{split_name(where['split'])} images of {where['dataset']}"


# Likeness -----------------------------------------------------------------------------------------------------------


def likeness(runs: Sequence[Judged], what: str, title: str) -> Table:
    """Tables 3 and 4: PSNR or SSIM (`what`: "psnr", "ssim") against the clean image, a line per classifier and
    oblivious attack: `base` before, and after each purifier."""
    import pandas as pd

    (judged,) = runs
    quality = tables.quality_table(judged.results)
    quality = quality[(quality["knowledge"] == "oblivious") & quality["attack"].isin(judged.labels)]
    found: dict[tuple[str, str], dict[str, tuple[str, Path]]] = {}
    frame = []
    for _, line in records(quality):
        rows = _rows(judged.run, line)
        of = found.setdefault((line["classifier"], _attack(line)), {})
        of.setdefault(BASE, (render.quality(line, what, "before"), rows))
        of[line["system"]] = (render.quality(line, what, "after"), rows)
        kept = {k: line[k] for k in ("classifier", "attack", "norm", "eps", "system", "n")}
        numbers = {f"{what}_{when}": line[f"{what}_{when}"] for when in tables.WHENS}
        same = {f"identical_{when}": line[f"identical_{when}"] for when in tables.WHENS} if what == "psnr" else {}
        frame.append(kept | numbers | same | {"rows": rows.as_posix()})
    systems = list(dict.fromkeys(system for of in found.values() for system in of))
    heads = ["classifier", "attack", *systems]
    lines, sources = [], []
    for name in _in_order(found):
        entries = [found[name].get(system, ("", None)) for system in systems]
        lines.append([*name, *(text for text, _ in entries)])
        sources.append([None, None, *(source for _, source in entries)])
    unit = {"psnr": "PSNR, dB", "ssim": "SSIM"}[what]
    said = f"{unit} against the clean image, a mean over n {frame[0]['n']:,} {_note(runs)}"
    sheet = Sheet(title, said, [""] * len(heads), heads, lines, names=2)
    return Table(sheet, pd.DataFrame(frame).astype({"eps": "float32"}), sources)
