"""The report: tables and figures as files, and one page of what there is to see, that asks nothing of the network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.report import comparison, cost, detectors, figures, tables
from unperturb.report.escape import in_csv, in_file_name, one_line, readable, renamed
from unperturb.report.tables import BLOCK, attack_name, attacker_name, budget_name, groups, records
from unperturb.report.text import compare_in_markdown, quality_number, to_markdown
from unperturb.results.samples import read_samples
from unperturb.results.schema import read_costs, read_rows
from unperturb.runs import read_json, write_text

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

Sample = tuple[dict[str, Any], dict[str, Any]]

FEW = 3  # defenses, that a page still has a sentence on each of
TILES = 8  # images of a strip
LINES = 14  # of a strip that is open from the start
CRISP = 64  # pixels of a side, up to which each is shown as a square of its own
LARGEST = 160  # pixels of a side, that a larger picture is reduced to
HELD = 1_000_000  # characters of small pictures, that a page still opens quickly with


def write_report(
    source: str | Path | Iterable[str | Path] | pd.DataFrame,
    out: str | Path,
    *,
    title: str | None = None,
    note: str | None = None,
) -> dict[str, Path]:
    """Make `out/tables/*.csv` and `*.md`, `out/figures/*.png` and the self-contained `out/report.html`.

    source: a run folder with rows, several of them, or rows that are already read (then pictures and conditions come
    from the folders that `rows.attrs["runs"]` names, if any). title, note: plain text, the page's heading and what is
    to be said below it, a paragraph a line. Names from outside are made readable first (`escape.readable`). Returns the
    paths: "page", and every other file by its name, such as "tables/accuracy.csv". The same files in give the same
    files out, byte for byte.

    Figures of images are drawn of one attack per defense and attacker; `figures.restored_figure` and
    `figures.confidence_figure` draw those of any sample.

    Raises `unperturb.runs.RunError` where a folder holds no rows or damaged ones.
    """
    rows, folders = _read(source)
    rows, names = readable(rows)
    out = Path(out)
    environments = [read_json(f / "environment.json") for f in folders if (f / "environment.json").exists()]
    frames = {
        "accuracy": tables.accuracy_table(rows),
        "worst-case": tables.worst_case(rows),
        "side-by-side": tables.wide_table(rows),
        "quality": tables.quality_table(rows),
        "comparison": comparison.comparison_table(rows, comparison.with_names(read_costs(*folders), names)),
        "conditions": tables.conditions(rows, *environments, names=names),
    }
    of_detectors = {"detectors": detectors.detector_table(rows), "rejections": detectors.rejection_table(rows)}
    frames |= {name: frame for name, frame in of_detectors.items() if len(frame)}
    written: dict[str, Path] = {}
    for name, frame in frames.items():
        written[f"tables/{name}.csv"] = path = out / "tables" / f"{name}.csv"
        write_text(path, in_csv(frame, index=name == "side-by-side"))
        written[f"tables/{name}.md"] = path = out / "tables" / f"{name}.md"
        write_text(path, compare_in_markdown(frame) if name == "comparison" else to_markdown(frame))
    samples = _samples(folders, names)
    charts = _charts(rows, frames["comparison"], out / "figures")
    drawn = [chart["path"] for chart in charts] + _draw(samples, out / "figures")
    written |= {f"figures/{path.name}": path for path in drawn}
    written["page"] = out / "report.html"
    write_text(written["page"], _page(frames, charts, _strips(samples), tables.notes(rows), title, note))
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


def _charts(rows: pd.DataFrame, compared: pd.DataFrame, out: Path) -> list[dict[str, Any]]:
    """Draw and save accuracy per attack, and against cost where a table has defenses enough; of each: its path, kind
    and caption."""
    made: list[dict[str, Any]] = []
    for (dataset, split, classifier, eps), part in groups(compared, comparison.TABLE):
        if (figure := cost.cost_figure(part)) is not None:
            path = _free(out, made, "cost", dataset, split, classifier, budget_name(float(eps)))
            caption = f"Worst oblivious accuracy against cost, {dataset} before {classifier}."
            made.append({"path": figures.save(figure, path), "kind": "cost", "caption": caption})
    for dataset, part in groups(rows, "dataset"):
        path = figures.save(figures.accuracy_figure(part), _free(out, made, "accuracy", dataset))
        made.append({"path": path, "kind": "accuracy", "caption": f"Accuracy on {dataset}."})
    return made


def _samples(folders: list[Path], names: Mapping[str, Mapping[str, str]]) -> list[Sample]:
    """What the runs kept of defenses, by data set, attacker and attack. Pictures of one classifier say what there is to
    see; those of the others would look the same."""
    found = [(renamed(cell, names), tensors) for folder in folders for cell, tensors in read_samples(folder)]
    order = {knowledge: i for i, knowledge in enumerate(tables.KNOWLEDGE)}
    found.sort(
        key=lambda s: (s[0]["dataset"], order.get(s[0]["knowledge"], len(order)), tables.attack_rank(s[0]["attack"]))
    )
    first: dict[str, str] = {}
    for cell, _ in found:
        first.setdefault(cell["dataset"], cell["classifier"])
    return [s for s in found if s[0]["defense"] != "none" and s[0]["classifier"] == first[s[0]["dataset"]]]


def _draw(samples: list[Sample], out: Path) -> list[Path]:
    """Draw and save the figures of each defense and attacker, under one attack."""
    made: list[dict[str, Any]] = []
    drawn = set()
    for cell, tensors in samples:
        if (group := (cell["dataset"], cell["defense"], cell["knowledge"])) in drawn:
            continue
        drawn.add(group)
        parts = (*(cell[k] for k in ("dataset", "classifier", "defense", "attack")), budget_name(cell["eps"]))
        for kind, draw in (("restored", figures.restored_figure), ("confidence", figures.confidence_figure)):
            path = _free(out, made, kind, *parts, cell["knowledge"])
            made.append({"path": figures.save(draw(cell, tensors), path)})
    return [one["path"] for one in made]


def _free(folder: Path, made: list[dict[str, Any]], *parts: str) -> Path:
    """A path by these names that none of `made` has: numbered where a path cannot say what tells them apart."""
    stem, taken = in_file_name(*parts), {one["path"] for one in made}
    free, number = folder / f"{stem}.png", 2
    while free in taken:
        free, number = folder / f"{stem}-{number}.png", number + 1
    return free


def _strips(samples: list[Sample]) -> list[dict[str, Any]]:
    """Of each attack: a line of images clean, attacked, and restored by each defense. Those of the first attack of each
    attacker come first, then others, until the page holds enough."""
    found: dict[tuple[Any, ...], list[Sample]] = {}
    for cell, tensors in samples:
        same = ("dataset", "classifier", "knowledge", "attack", "attack_repr", "surrogate", "seed")
        key = (*(cell[k] for k in same), budget_name(cell["eps"]), *tensors["index"].tolist())
        found.setdefault(key, []).append((cell, tensors))
    firsts = {key[:3]: key for key in reversed(found)}
    strips: list[dict[str, Any]] = []
    held = 0
    for key in sorted(found, key=lambda key: firsts[key[:3]] != key):
        if held > HELD:
            break
        cell, tensors = found[key][0]
        lines = [_line("clean", cell, tensors, "clean", figures.CLEAN)]
        last = None
        for cell, tensors in found[key]:
            if last is None or not last.equal(tensors["adversarial"]):  # attackers who know each make their own
                last = tensors["adversarial"]
                whose = "" if cell["knowledge"] in tables.OBLIVIOUS else f", by who knows {cell['defense']}"
                lines.append(_line(f"attacked{whose}", cell, tensors, "adversarial", figures.ADVERSARIAL))
            lines.append(_line(cell["defense"], cell, tensors, "restored", figures.RESTORED))
        held += sum(len(tile["data"]) for line in lines for tile in line["tiles"])
        title = f"{attack_name(cell['attack'], cell['eps'])}, {attacker_name(cell['knowledge'])}"
        about = {
            "title": title,
            "where": f"{cell['classifier']} on {cell['dataset']}",
            "first": firsts[key[:3]] == key and len(lines) <= LINES,
        }
        strips.append(about | {"lines": lines, "crisp": max(last.shape[2:]) <= CRISP if last is not None else False})
    return strips


def _line(name: str, cell: dict[str, Any], tensors: dict[str, Any], images: str, view: int) -> dict[str, Any]:
    predicted, labels = tensors["prediction"][:, view].tolist(), tensors["label"].tolist()
    sure = tensors["confidence"][:, view].tolist()
    tiles = [
        {
            "data": _webp(_picture(image)),
            "name": figures.class_name(cell, answer),
            "right": answer == label,
            "sure": figures.confidence(value),
        }
        for image, answer, label, value in list(zip(tensors[images], predicted, labels, sure))[:TILES]
    ]
    return {"name": name, "tiles": tiles}


def _picture(image: Any) -> Image:
    """One uint8 `(C, H, W)` image."""
    from PIL import Image

    pixels = image.numpy().transpose(1, 2, 0)
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    picture.thumbnail((LARGEST, LARGEST))
    return picture


def _webp(picture: Image, lossless: bool | None = None) -> str:
    """`picture` as the address of an image: as it is where each pixel can be seen, else as small as the eye allows."""
    file = io.BytesIO()
    lossless = max(picture.size) <= CRISP if lossless is None else lossless
    picture.save(file, "WEBP", lossless=lossless, quality=80, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


# Page ---------------------------------------------------------------------------------------------------------------


def _page(
    frames: Mapping[str, pd.DataFrame],
    charts: Iterable[dict[str, Any]] = (),
    strips: Iterable[dict[str, Any]] = (),
    notes: Iterable[str] = (),
    title: str | None = None,
    note: str | None = None,
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from PIL import Image

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["split"] = tables.split_name
    headlines = _headlines(frames["worst-case"], frames["accuracy"])
    many = any(len(headline["sentences"]) > FEW for headline in headlines)
    # Of many defenses the table is read first; a sentence on each, and attacks that only it has a place for, drown.
    if many:
        headlines = [headline | {"sentences": []} for headline in headlines if headline["budget"]]
    held = []
    for chart in charts:
        with Image.open(chart["path"]) as picture:
            held.append(chart | {"data": _webp(picture.convert("RGB"), lossless=True), "size": picture.size})
    return environment.get_template("page.html.jinja").render(
        title=one_line(title) if title else "",
        note=[line for line in map(one_line, (note or "").splitlines()) if line],
        many=many,
        worse=_worse(frames["worst-case"]),
        notes=list(notes),
        headlines=headlines,
        comparisons=_comparisons(frames["comparison"], whole=many) if "comparison" in frames else [],
        blocks=_blocks(frames["side-by-side"]),
        quality=[
            {"title": key, "lines": [_quality(line) for _, line in records(part)]}
            for key, part in groups(frames["quality"], BLOCK)
        ],
        detectors=_detectors(frames) if "detectors" in frames else [],
        conditions=[{k: one_line(v) for k, v in line.items()} for _, line in records(frames["conditions"])],
        charts=held,
        strips=list(strips),
    )


def _worse(worst: pd.DataFrame) -> list[dict[str, Any]]:
    """Per data set, classifier and budget, who keeps fewer images than the bare classifier does under the same attacks
    or more."""
    found = []
    for (dataset, split, classifier, eps), part in groups(worst, [*BLOCK, "eps"]):
        bare = {line["knowledge"]: line for _, line in records(part[part["defense"] == "none"])}
        less = []
        for _, line in records(part[(part["defense"] != "none") & ~part["knowledge"].isin(["none", "all"])]):
            other = bare.get(line["knowledge"], bare.get("oblivious"))
            fair = other is not None and line["n"] == other["n"] and _attacks(line) <= _attacks(other)
            if other and fair and line["accuracy"] < other["accuracy"]:
                less.append(line | {"attacker": attacker_name(line["knowledge"]), "bare": other})
        if less:
            found.append({"place": (dataset, split, classifier), "budget": budget_name(eps), "less": less})
    return found


def _attacks(line: Mapping[str, Any]) -> set[str]:
    return set(line["covers"].partition(": ")[2].split(", "))


def _headlines(worst: pd.DataFrame, accuracy: pd.DataFrame) -> list[dict[str, Any]]:
    """Per data set and budget: a line per classifier and defense with its worst cases, and a sentence per defense."""
    clean = {
        tuple(line[k] for k in [*BLOCK, "defense"]): line
        for _, line in records(accuracy[(accuracy["attack"] == "clean") & (accuracy["knowledge"] == "")])
    }
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
            at = (dataset, split, classifier)
            unharmed = {"clean": clean.get((*at, defense)), "clean_bare": clean.get((*at, "none"))}
            lines.append(
                {"classifier": classifier, "defense": defense, "worst": shown, "all": of["all"], "clean": unharmed}
            )
        if lines:
            found.append(
                {
                    "dataset": dataset,
                    "split": split,
                    "budget": budget_name(eps),
                    "lines": lines,
                    "sentences": _sentences(lines),
                    "covers": sorted({line["all"]["covers"] for line in lines}),
                }
            )
    # Attacks without a budget have no one worst case to lead with: they come last.
    found.sort(key=lambda headline: not headline["budget"])
    first = {(headline["dataset"], headline["split"]): headline for headline in reversed(found)}
    # What holds without an attack is said once.
    return [headline | {"first": first[headline["dataset"], headline["split"]] is headline} for headline in found]


def _sentences(lines: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Per defense, its worst cases as a range over the classifiers: never pooled."""
    sentences = []
    for defense in dict.fromkeys(line["defense"] for line in lines):
        mine = [line["worst"] | line["clean"] for line in lines if line["defense"] == defense]
        sentences.append({"defense": defense} | {k: _range([w[k] for w in mine if w[k]]) for k in mine[0]})
    return sentences


def _range(lines: list[dict[str, Any]]) -> str:
    shares = sorted(f"{100 * line['accuracy']:.1f}" for line in lines if line["n"])
    shares.sort(key=float)
    if not shares:
        return ""
    return f"{shares[0]} %" if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]} %"


def _comparisons(frame: pd.DataFrame, whole: bool) -> list[dict[str, Any]]:
    """Tables of at least two defenses: title, n, heads (attacker over attack), over (each attacker with the number of
    columns it spans), and lines of entries; `whole` with the single attacks, which the page shows once more."""
    found = []
    for title, n, heads, lines in comparison.comparisons(frame):
        if len(lines) > 2:
            shown = [i for i, head in enumerate(heads) if whole or ": " not in head or head.startswith("worst: ")]
            heads, lines = [heads[i] for i in shown], [[line[i] for i in shown] for line in lines]
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
