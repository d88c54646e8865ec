"""The report: tables and figures as files, and one page of what there is to see, that asks nothing of the network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.results import figures, render, tables
from unperturb.results.card import TELEPHONE, raised
from unperturb.results.comparison import comparison_table
from unperturb.results.cost_figure import cost_figure
from unperturb.results.embedded import CRISP, figure_data, flag_page, image_data, templates
from unperturb.results.flags import FLAGS, Flag
from unperturb.results.ladder_figure import every_block, ladder_figure
from unperturb.results.names import (
    attack_name,
    attack_rank,
    attacker_name,
    budget_name,
    in_file_name,
    one_line,
    renamed,
)
from unperturb.results.results import Block, Results
from unperturb.results.robust import ADAPTIVE, Judged, RobustAccuracy
from unperturb.results.samples import read_samples
from unperturb.results.sheet import Sheet, as_csv, as_html, as_markdown
from unperturb.runs import read_json, write_text
from unperturb.threat_models import KNOWLEDGE, ThreatModel

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Sample = tuple[dict[str, Any], dict[str, Any]]

FEW = 3  # systems, that a page still has a sentence on each of
TILES = 8  # images of a strip
LINES = 14  # of a strip that is open from the start
HELD = 1_000_000  # characters of small pictures, that a page still opens quickly with


def write_report(
    source: Results | pd.DataFrame | str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    flags: Iterable[Flag] | None = None,
    title: str | None = None,
    note: str | None = None,
) -> dict[str, Path]:
    """Make `out/tables/*.csv` and `*.md`, `out/figures/*.png` and the self-contained `out/report.html`.

    source: a run folder with rows, several of them, rows that are already read, or results (pictures and conditions
    come from the folders that they were read from, if any). flags: by default all that `flags_of` raises. title, note:
    plain text, the page's heading and what is to be said below it, a paragraph a line. Names from outside are made
    readable first (`Results.readable`). Returns the paths: "page", and every other file by its name, such as
    "tables/accuracy.csv". The same files in give the same files out, byte for byte.

    Figures of images are drawn of one attack per system and attacker; `figures.restored_figure` and
    `figures.confidence_figure` draw those of any sample.

    Raises `unperturb.runs.RunError` where a folder holds no rows or damaged ones.
    """
    results = Results.of(source).readable()
    doubts, out = raised(results, flags), Path(out)
    environments = [read_json(f / "environment.json") for f in results.runs if (f / "environment.json").exists()]
    frames, sheets = _tables(results, doubts, environments)
    written: dict[str, Path] = {}
    for name, frame in frames.items():
        written[f"tables/{name}.csv"] = out / "tables" / f"{name}.csv"
        write_text(written[f"tables/{name}.csv"], as_csv(frame))
    for name, of in sheets.items():
        written[f"tables/{name}.md"] = out / "tables" / f"{name}.md"
        write_text(written[f"tables/{name}.md"], "\n".join(map(as_markdown, of)))
    samples = _samples(results)
    charts = _charts(results, out / "figures")
    drawn = [chart["path"] for chart in charts] + _draw(samples, out / "figures")
    written |= {f"figures/{path.name}": path for path in drawn}
    written["page"] = out / "report.html"
    write_text(written["page"], _page(results, doubts, sheets, charts, _strips(samples), title, note))
    return written


def _tables(
    results: Results, flags: Sequence[Flag], environments: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, pd.DataFrame], dict[str, list[Sheet]]]:
    """Every table as numbers, and as it is read."""
    import pandas as pd

    compared, conditions = comparison_table(results), render.conditions(results, *environments)
    said = ("number", "name", "severity", "dataset", "system", "says")
    doubts = pd.DataFrame([{k: getattr(flag, k) for k in said} for flag in flags], columns=list(said))
    frames = {
        "accuracy": tables.accuracy_table(results),
        "robust": tables.robust_table(results),
        "comparison": compared,
        "quality": tables.quality_table(results),
        "detectors": tables.detector_table(results),
        "rejections": tables.rejection_table(results),
        "flags": doubts,
        "conditions": conditions,
    }
    sheets = {
        "accuracy": render.accuracy_sheets(results),
        "robust": render.robust_sheets(results),
        "comparison": render.comparison_sheets(compared),
        "quality": render.quality_sheets(results),
        "detectors": render.detector_sheets(results),
        "flags": [render.frame_sheet(doubts)] if flags else [],
        "conditions": [render.frame_sheet(conditions)],
    }
    return {k: of for k, of in frames.items() if len(of)}, {k: of for k, of in sheets.items() if of}


# Pictures -----------------------------------------------------------------------------------------------------------


def _charts(results: Results, out: Path) -> list[dict[str, Any]]:
    """Draw and save, per data set, the ladder, what each system keeps, and, where there are systems enough, what that
    costs; of each: its path, kind, caption, and the picture as the page holds it."""
    made: list[dict[str, Any]] = []

    def keep(kind: str, dataset: str, figure: Figure | None, caption: str, narrow: Figure | None = None) -> None:
        if figure is not None:
            path = figures.save(figure, _free(out, made, kind, dataset))
            pictures = {"wide": figure_data(figure), "narrow": narrow and figure_data(narrow)}
            made.append({"path": path, "kind": kind, "caption": caption} | pictures)

    for dataset in results.cells["dataset"].unique():
        mine = results.where(dataset=dataset)
        said = "right when clean and under all attacks up to each step: the farther right, the more the attacker knows"
        small = ladder_figure(mine, width=TELEPHONE)
        keep("ladder", dataset, ladder_figure(mine), f"The ladder on {dataset}: {said}.", small)
        keep("accuracy", dataset, figures.accuracy_figure(mine), f"What each system keeps on {dataset}.")
        said = (
            "what is left under every attacker tried, against what an image costs. Blue: nothing that costs less is as "
            "good. Hollow: what training cost is not known."
        )
        keep("cost", dataset, cost_figure(mine), f"Cost on {dataset}: {said}")
    return made


def _samples(results: Results) -> list[Sample]:
    """What the runs kept of defended systems, by data set, attacker and attack. Pictures of one classifier say what
    there is to see; those of the others would look the same."""
    names = {column: results.renamed(column) for column in results.names}
    found = [(renamed(cell, names), tensors) for run in results.runs for cell, tensors in read_samples(run)]
    order = {knowledge: i for i, knowledge in enumerate(KNOWLEDGE)}
    found.sort(key=lambda s: (s[0]["dataset"], order.get(s[0]["knowledge"], len(order)), attack_rank(s[0]["attack"])))
    first: dict[str, str] = {}
    for cell, _ in found:
        first.setdefault(cell["dataset"], cell["classifier"])
    return [s for s in found if s[0]["defended"] and s[0]["classifier"] == first[s[0]["dataset"]]]


def _telling(samples: list[Sample]) -> set[tuple[str, str]]:
    """The (data set, knowledge) that pictures are shown of: the most that an attacker had who does not know of the
    system, and who does."""
    most = {(cell["dataset"], cell["knowledge"] in ADAPTIVE): cell["knowledge"] for cell, _ in samples}
    return {(dataset, knowledge) for (dataset, _), knowledge in most.items()}


def _draw(samples: list[Sample], out: Path) -> list[Path]:
    """Draw and save the figures of each system and attacker that tells most, under one attack."""
    made: list[dict[str, Any]] = []
    drawn = set()
    telling = _telling(samples)
    for cell, tensors in samples:
        if (cell["dataset"], cell["knowledge"]) not in telling:
            continue
        if (group := (cell["dataset"], cell["system"], cell["knowledge"])) in drawn:
            continue
        drawn.add(group)
        parts = (*(cell[k] for k in ("dataset", "classifier", "system", "attack")), budget_name(cell["eps"]))
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
    """Of each attack: a line of images clean, attacked, and restored by each system. Those of the first attack of each
    attacker who tells most come first, then others, until the page holds enough."""
    found: dict[tuple[Any, ...], list[Sample]] = {}
    for cell, tensors in samples:
        same = ("dataset", "classifier", "knowledge", "attack", "attack_repr", "surrogate", "seed")
        key = (*(cell[k] for k in same), budget_name(cell["eps"]), *tensors["index"].tolist())
        found.setdefault(key, []).append((cell, tensors))
    telling = _telling(samples)
    firsts = {key[:3]: key for key in reversed(found) if (key[0], key[2]) in telling}
    strips: list[dict[str, Any]] = []
    held = 0
    for key in sorted(found, key=lambda key: firsts.get(key[:3]) != key):
        if held > HELD:
            break
        cell, tensors = found[key][0]
        lines = [_line("clean", cell, tensors, "clean", figures.CLEAN)]
        last = None
        for cell, tensors in found[key]:
            if last is None or not last.equal(tensors["adversarial"]):  # attackers who know each make their own
                last = tensors["adversarial"]
                whose = f", by who knows {cell['system']}" if cell["knowledge"] in ADAPTIVE else ""
                lines.append(_line(f"attacked{whose}", cell, tensors, "adversarial", figures.ADVERSARIAL))
            lines.append(_line(cell["system"], cell, tensors, "restored", figures.RESTORED))
        held += sum(len(tile["data"]) for line in lines for tile in line["tiles"])
        title = f"{attack_name(cell['attack'], cell['eps'])}, {attacker_name(cell['knowledge'])}"
        about = {
            "title": title,
            "where": f"{cell['classifier']} on {cell['dataset']}",
            "first": firsts.get(key[:3]) == key and len(lines) <= LINES,
        }
        strips.append(about | {"lines": lines, "crisp": last is not None and max(last.shape[2:]) <= CRISP})
    return strips


def _line(name: str, cell: dict[str, Any], tensors: dict[str, Any], images: str, view: int) -> dict[str, Any]:
    predicted, labels = tensors["prediction"][:, view].tolist(), tensors["label"].tolist()
    sure = tensors["confidence"][:, view].tolist()
    tiles = [
        {
            "data": image_data(image),
            "name": figures.class_name(cell, answer),
            "right": answer == label,
            "sure": figures.confidence(value),
        }
        for image, answer, label, value in list(zip(tensors[images], predicted, labels, sure))[:TILES]
    ]
    return {"name": name, "tiles": tiles}


# Page ---------------------------------------------------------------------------------------------------------------


def _page(
    results: Results,
    flags: Sequence[Flag],
    sheets: Mapping[str, Sequence[Sheet]],
    charts: Sequence[Mapping[str, Any]] = (),
    strips: Sequence[Mapping[str, Any]] = (),
    title: str | None = None,
    note: str | None = None,
) -> str:
    headlines = list(_headlines(results, flags))
    # Of many systems the table is read first; a sentence on each would drown.
    many = any(len(headline["sentences"]) > FEW for headline in headlines)
    return (
        templates()
        .get_template("page.html.jinja")
        .render(
            title=one_line(title) if title else "",
            note=[line for line in map(one_line, (note or "").splitlines()) if line],
            many=many,
            flags=flags,
            kinds=FLAGS,
            pages={flag.name: flag_page(flag.name) for flag in flags},
            worse=list(_worse(results)),
            headlines=headlines,
            sheets={name: [as_html(sheet) for sheet in of] for name, of in sheets.items()},
            charts=charts,
            strips=strips,
        )
    )


def _headlines(results: Results, flags: Sequence[Flag]) -> Iterator[dict[str, Any]]:
    """Per data set, split and budget: a line per classifier and defended system, with what is left undefended, under
    oblivious attackers, and under everything that was tried, with the flags against it; and a sentence per system."""
    by_set: dict[tuple[str, str], dict[Block, list[Judged]]] = {}
    for block, systems in every_block(results).items():
        by_set.setdefault(block[:2], {})[block] = systems
    for (dataset, split), blocks in by_set.items():
        tried = dict.fromkeys(budget for block in blocks for budget in results.budgets(block))
        for number, (norm, eps) in enumerate(tried):
            lines = [
                line | {"flags": _against(flags, dataset, line)}
                for block, systems in blocks.items()
                for line in _lines(block, systems, norm, eps)
            ]
            if lines:
                yield {
                    "dataset": dataset,
                    "split": split,
                    "budget": render.budget_title(norm, eps),
                    "lines": lines,
                    "sentences": list(_sentences(lines)),
                    "first": number == 0,  # what holds without an attack is said once
                }


def _against(flags: Sequence[Flag], dataset: str, line: Mapping[str, Any]) -> list[str]:
    """The severity of each flag against one system before one classifier."""
    return [
        flag.severity
        for flag in flags
        if flag.system == line["system"]
        and flag.dataset in ("", dataset)
        and (not flag.classifiers or line["classifier"] in flag.classifiers)
    ]


def _lines(block: Block, systems: Sequence[Judged], norm: Any, eps: float) -> Iterator[dict[str, Any]]:
    bare = next((one for one in systems if not one.defended), None)
    undefended = bare and bare.left(norm, eps)["adaptive"]
    for judged in systems:
        all_of_it = judged.under(ThreatModel(norm, eps))
        if not judged.defended or all_of_it is None:
            continue
        yield {
            "classifier": block.classifier,
            "system": judged.system,
            "left": {"undefended": undefended} | judged.left(norm, eps),
            "clean": all_of_it.clean,
            "clean_bare": undefended and undefended.clean,
        }


def _sentences(lines: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Per system, what is left as a range over the classifiers: never pooled."""
    for system in dict.fromkeys(line["system"] for line in lines):
        mine = [line for line in lines if line["system"] == system]
        left = {k: _range([of["left"][k] and of["left"][k].accuracy for of in mine]) for k in mine[0]["left"]}
        clean = {k: _range([of[k] for of in mine]) for k in ("clean", "clean_bare")}
        yield {"system": system} | left | clean


def _range(fractions: Iterable[float | None]) -> str:
    found = sorted(value for value in fractions if value is not None)
    if not found:
        return ""
    low, high = render.percent(found[0], sign=""), render.percent(found[-1], sign="")
    return f"{low} %" if low == high else f"{low} to {high} %"


def _worse(results: Results) -> Iterator[dict[str, Any]]:
    """Per block and budget, which systems keep fewer images than the undefended one does under the same attacks or
    more."""
    for block, systems in every_block(results).items():
        bare = next((one for one in systems if not one.defended), None)
        if bare is None:
            continue
        for norm, eps in results.budgets(block):
            less = []
            for judged in (one for one in systems if one.defended):
                for knowledge in ("oblivious", "white_box")[: 2 if judged.adaptive else 1]:
                    threat_model = ThreatModel(norm, eps, knowledge)
                    left, other = judged.under(threat_model), bare.under(threat_model)
                    if left is None or other is None:
                        continue
                    fair = left.images.index.equals(other.images.index) and _attacks(left) <= _attacks(other)
                    if fair and left.accuracy < other.accuracy:
                        attacker = attacker_name(knowledge)
                        less.append({"system": judged.system, "attacker": attacker, "left": left, "bare": other})
            if less:
                yield {"block": block, "budget": render.budget_title(norm, eps), "less": less}


def _attacks(left: RobustAccuracy) -> set[str]:
    return set(left.attacks["name"])
