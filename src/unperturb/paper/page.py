"""The pages of a reproduction: one per part, whose tables lead to the rows behind them, and an index."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from unperturb.evaluation.training_cost import of_folder
from unperturb.paper.parts import Part, parts
from unperturb.results.embedded import templates
from unperturb.runs import write_text

if TYPE_CHECKING:
    from unperturb.paper.pieces import Made
    from unperturb.paper.steps import Step
    from unperturb.paper.tables import Table

PAGE = "index.html"
PAPER = "GAN-based classifier protection against adversarial attacks"


def write_page(part: Part, made: Sequence[Made], steps: Sequence[Step], times: Mapping[str, float], out: Path) -> None:
    """`out/PART/index.html`: every table and picture of `made`, and what they were made from.

    times: seconds that steps have taken, by run folder, as far as they were watched.
    """
    folder = out / part.name
    shown: list[dict[str, Any]] = [
        {
            "piece": one.piece,
            "title": one.title,
            "files": [_link(file, folder) for file in one.files],
            "table": one.table and _table(one.table, folder),
        }
        for one in made
    ]
    title = f"{part.name}: the paper reproduced"
    _write(folder / PAGE, title=title, about=part.about, made=shown, steps=[_step(s, times, folder) for s in steps])


def write_index(out: Path) -> None:
    """`out/index.html`: a link to the page of each part that has one."""
    there = [part for part in parts().values() if (out / part.name / PAGE).exists()]
    links = [{"name": part.name, "about": part.about, "link": f"{part.name}/{PAGE}"} for part in there]
    about = f"Liu, Shao and Liu 2020, {PAPER}: its tables and figures, made anew from recipes."
    _write(out / PAGE, title="The paper reproduced", about=about, parts=links)


def _write(path: Path, **values: Any) -> None:
    text = (resources.files("unperturb") / "paper" / "page.html.jinja").read_text(encoding="utf-8")
    empty: dict[str, Any] = {"made": [], "steps": [], "parts": []}
    write_text(path, templates().from_string(text).render(**{**empty, **values}))


def _table(table: Table, folder: Path) -> dict[str, Any]:
    lines = [
        [{"text": text, "link": source and _link(source, folder)} for text, source in zip(line, sources)]
        for line, sources in zip(table.sheet.lines, table.sources)
    ]
    return {"note": table.sheet.note, "heads": table.sheet.heads, "lines": lines}


def _step(step: Step, times: Mapping[str, float], folder: Path) -> dict[str, Any]:
    pflop, seconds = of_folder(step.place) if step.trains else (None, times.get(step.folder))
    spent = "" if seconds is None else f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
    told = "" if pflop is None else f"{pflop:.2g}"
    return {"name": step.name, "command": step.command, "pflop": told, "time": spent, "link": _link(step.place, folder)}


def _link(path: Path, folder: Path) -> str:
    """The way from a page in `folder` to `path`."""
    return quote(Path(os.path.relpath(path, folder)).as_posix())
