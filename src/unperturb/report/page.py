"""The report: tables and figures as files, and one page that holds them all and asks nothing of the network."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.report import comparison, cost, detectors, figures, tables
from unperturb.report.tables import BLOCK, attack_name, attacker_name, groups, records
from unperturb.report.text import compare_in_markdown, quality_number, to_markdown
from unperturb.runs import read_costs, read_json, read_rows, read_samples, write_text

if TYPE_CHECKING:
    import pandas as pd


FEW = 3  # defenses, that a page still has a sentence on each of


def write_report(source: str | Path | Iterable[str | Path] | pd.DataFrame, out: str | Path) -> dict[str, Path]:
    """Make `out/tables/*.csv` and `*.md`, `out/figures/*.png` and the self-contained `out/report.html`.

    source: a run folder with rows, several of them, or rows that are already read (then pictures and conditions come
    from the folders that `rows.attrs["runs"]` names, if any). Returns the paths: "page", and every other file by its
    name, such as "tables/accuracy.csv". The same files in give the same files out, byte for byte.

    Raises `unperturb.runs.RunError` where a folder holds no rows or damaged ones.
    """
    rows, folders = _read(source)
    out = Path(out)
    environments = [read_json(f / "environment.json") for f in folders if (f / "environment.json").exists()]
    frames = {
        "accuracy": tables.accuracy_table(rows),
        "worst-case": tables.worst_case(rows),
        "side-by-side": tables.wide_table(rows),
        "quality": tables.quality_table(rows),
        "comparison": comparison.comparison_table(rows, read_costs(*folders)),
        "conditions": tables.conditions(rows, *environments),
    }
    of_detectors = {"detectors": detectors.detector_table(rows), "rejections": detectors.rejection_table(rows)}
    frames |= {name: frame for name, frame in of_detectors.items() if len(frame)}
    written: dict[str, Path] = {}
    for name, frame in frames.items():
        written[f"tables/{name}.csv"] = path = out / "tables" / f"{name}.csv"
        write_text(path, frame.to_csv(index=name == "side-by-side"))
        written[f"tables/{name}.md"] = path = out / "tables" / f"{name}.md"
        write_text(path, compare_in_markdown(frame) if name == "comparison" else to_markdown(frame))
    pictures = _cost_pictures(frames["comparison"], out / "figures") + _pictures(rows, folders, out / "figures")
    written |= {f"figures/{picture['path'].name}": picture["path"] for picture in pictures}
    written["page"] = out / "report.html"
    write_text(written["page"], _page(frames, pictures))
    return written


def _read(source: str | Path | Iterable[str | Path] | pd.DataFrame) -> tuple[pd.DataFrame, list[Path]]:
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        return source, [Path(run) for run in source.attrs.get("runs", [])]
    folders = [Path(source)] if isinstance(source, str | Path) else [Path(run) for run in source]
    if not folders:
        raise ValueError("a report needs at least one run folder")
    return read_rows(*folders), folders


# Pictures -----------------------------------------------------------------------------------------------------------


def _pictures(rows: pd.DataFrame, folders: list[Path], out: Path) -> list[dict[str, Any]]:
    """Draw and save them; of each: its path, kind, caption, and whether it is among the first to be shown."""
    made: list[dict[str, Any]] = []
    for dataset, part in groups(rows, "dataset"):
        path = figures.save(figures.accuracy_figure(part), out / f"{_slug('accuracy', dataset)}.png")
        made.append({"path": path, "kind": "accuracy", "caption": f"Accuracy on {dataset}.", "first": True})
    # Pictures of one classifier say what there is to see; those of the others would look the same.
    samples = [s for folder in folders for s in read_samples(folder) if s[0]["defense"] != "none"]
    samples.sort(key=lambda s: tables.attack_rank(s[0]["attack"]))
    classifiers: dict[str, str] = {}
    for cell, _ in samples:
        classifiers.setdefault(cell["dataset"], cell["classifier"])
    opened: set[tuple[str, ...]] = set()
    for cell, tensors in samples:
        if cell["classifier"] != classifiers[cell["dataset"]]:
            continue
        group = (cell["dataset"], cell["defense"], cell["knowledge"])
        what = (
            f"{attack_name(cell['attack'], cell['eps'])}, {attacker_name(cell['knowledge']).replace(' ', '-')} attacker"
        )
        for kind, figure in (
            ("restored", figures.restored_figure(cell, tensors)),
            ("confidence", figures.confidence_figure(cell, tensors)),
        ):
            stem = _slug(kind, *(cell[k] for k in ("dataset", "classifier", "defense", "attack", "eps", "knowledge")))
            path = _free(out / f"{stem}.png", [m["path"] for m in made])
            caption = f"{cell['defense']} before {cell['classifier']} on {cell['dataset']}: {what}."
            first = group not in opened
            made.append({"path": figures.save(figure, path), "kind": kind, "caption": caption, "first": first})
        opened.add(group)
    return made


def _cost_pictures(frame: pd.DataFrame, out: Path) -> list[dict[str, Any]]:
    """Accuracy against cost, of each table that has defenses enough."""
    made = []
    for key, part in groups(frame, comparison.TABLE):
        figure = cost.cost_figure(part)
        if figure is not None:
            dataset, split, classifier, eps = key
            path = figures.save(figure, out / f"{_slug('cost', dataset, split, classifier, float(eps))}.png")
            caption = f"Worst oblivious accuracy against cost, {dataset} before {classifier}."
            made.append({"path": path, "kind": "cost", "caption": caption, "first": True})
    return made


def _slug(*parts: object) -> str:
    words = (tables.budget_name(p) if isinstance(p, float) else str(p) for p in parts)
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", w.lower()).strip("-") for w in words if w)


def _free(path: Path, taken: list[Path]) -> Path:
    """`path`, or with a number behind its name: cells that differ in seed or record alone share a name."""
    free, number = path, 2
    while free in taken:
        free, number = path.with_name(f"{path.stem}-{number}.png"), number + 1
    return free


# Page ---------------------------------------------------------------------------------------------------------------


def _page(frames: Mapping[str, pd.DataFrame], pictures: list[dict[str, Any]]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    quality = frames["quality"]
    headlines = _headlines(frames["worst-case"])
    comparisons = _comparisons(frames["comparison"]) if "comparison" in frames else []
    # Of many defenses the table is read first; a sentence on each, and attacks that only it has a place for, drown.
    many = bool(comparisons) and any(len(headline["sentences"]) > FEW for headline in headlines)
    if many:
        headlines = [headline | {"sentences": []} for headline in headlines if headline["budget"]]
    # Nor would a page open quickly that held all of their pictures: the others lie beside it.
    held = [picture for picture in pictures if picture["first"] or not many]
    for picture in held:
        data = base64.b64encode(picture["path"].read_bytes()).decode("ascii")
        picture["data"] = f"data:image/png;base64,{data}"
    return environment.get_template("page.html.jinja").render(
        many=many,
        headlines=headlines,
        comparisons=comparisons,
        blocks=_blocks(frames["side-by-side"]),
        quality=[
            {"title": key, "lines": [_quality(line) for _, line in records(part)]}
            for key, part in groups(quality, BLOCK)
        ],
        detectors=_detectors(frames) if "detectors" in frames else [],
        conditions=[line for _, line in records(frames["conditions"])],
        pictures=held,
        beside=len(pictures) - len(held),
    )


def _headlines(worst: pd.DataFrame) -> list[dict[str, Any]]:
    """Per data set and budget: a line per classifier and defense with its worst cases, and a sentence per defense."""
    found = []
    for (dataset, split, eps), part in groups(worst, ["dataset", "split", "eps"]):
        lines = []
        for (classifier, defense), mine in groups(part, ["classifier", "defense"]):
            if defense == "none":
                continue
            bare = part[(part["classifier"] == classifier) & (part["defense"] == "none")]
            of = {line["knowledge"]: line for _, line in records(mine)}
            bare_line = next((line for _, line in records(bare) if line["knowledge"] == "oblivious"), None)
            shown = {"undefended": bare_line, "oblivious": of.get("oblivious"), "white_box": of.get("white_box")}
            lines.append({"classifier": classifier, "defense": defense, "worst": shown, "all": of["all"]})
        if lines:
            found.append(
                {
                    "dataset": dataset,
                    "split": split,
                    "budget": tables.budget_name(eps),
                    "lines": lines,
                    "sentences": _sentences(lines),
                    "covers": sorted({line["all"]["covers"] for line in lines}),
                }
            )
    # Attacks without a budget have no one worst case to lead with: they come last.
    return sorted(found, key=lambda headline: not headline["budget"])


def _sentences(lines: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Per defense, its worst cases as a range over the classifiers: never pooled."""
    sentences = []
    for defense in dict.fromkeys(line["defense"] for line in lines):
        mine = [line["worst"] for line in lines if line["defense"] == defense]
        sentences.append({"defense": defense} | {k: _range([w[k] for w in mine if w[k]]) for k in mine[0]})
    return sentences


def _range(lines: list[dict[str, Any]]) -> str:
    shares = sorted(f"{100 * line['accuracy']:.1f}" for line in lines if line["n"])
    shares.sort(key=float)
    if not shares:
        return ""
    return f"{shares[0]} %" if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]} %"


def _comparisons(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Tables of at least two defenses: title, n, heads (attacker over attack), over (each attacker with the number of
    columns it spans), and lines of entries."""
    found = []
    for title, n, heads, lines in comparison.comparisons(frame):
        if len(lines) > 2:
            split = [head.partition(": ") for head in heads]
            over = [(attacker, attack) if attack else ("", attacker) for attacker, _, attack in split]
            entries = [[entry.partition(" [") for entry in line] for line in lines]
            wide = [(attacker, len(list(same))) for attacker, same in groupby(attacker for attacker, _ in over)]
            found.append({"title": title, "n": n, "heads": over, "over": wide, "lines": entries})
    return found


def _blocks(wide: pd.DataFrame) -> list[dict[str, Any]]:
    """The side-by-side table, one block per classifier: heads (defense, its number of columns), attackers, lines."""
    blocks = []
    for key, block in groups(wide, BLOCK):
        columns: list[Any] = list(block.columns[(block != "").any()])
        heads: dict[str, int] = {}
        for defense, _ in columns:
            heads[defense] = heads.get(defense, 0) + 1
        lines = [
            {"name": index[-1], "entries": [entry.partition(" [") for entry in values]}
            for index, values in zip(block.index, block[columns].to_numpy().tolist())
        ]
        blocks.append({"title": key, "heads": heads, "attackers": [a for _, a in columns], "lines": lines})
    return blocks


def _quality(line: dict[str, Any]) -> dict[str, Any]:
    whens = ("before", "after", "clean")
    return line | {
        "name": attack_name(line["attack"], line["eps"]),
        "attacker": attacker_name(line["knowledge"]),
        "psnr": [quality_number(line, "psnr", when) for when in whens],
        "ssim": [quality_number(line, "ssim", when) for when in whens],
    }


def _detectors(frames: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Per classifier, a line per cell: what was rejected and how accuracy is counted, and each detector's own marks."""
    own = frames["detectors"]
    found = []
    for key, part in groups(frames["rejections"], BLOCK):
        lines = []
        for _, line in records(part):
            cell = [*BLOCK, "defense", "attack", "knowledge"]
            mine = own[(own[cell] == [line[k] for k in cell]).all(axis=1) & _same(own["eps"], line["eps"])]
            lines.append(
                line
                | {
                    "name": attack_name(line["attack"], line["eps"]),
                    "attacker": attacker_name(line["knowledge"]),
                    "auroc": [f"{value:.3f}" for value in mine["auroc"]],
                    "tpr_1": [f"{100 * value:.1f}" for value in mine["tpr_1"]],
                    "tpr_5": [f"{100 * value:.1f}" for value in mine["tpr_5"]],
                }
            )
        found.append({"title": key, "lines": lines})
    return found


def _same(column: pd.Series[Any], value: float) -> Any:
    """Where `column` is `value`; NaN, no budget, is itself."""
    return column.eq(value) if value == value else column.isna()
