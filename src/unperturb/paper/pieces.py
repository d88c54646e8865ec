"""The pieces of a part: each a few files in its folder, made from rows, samples, logs and networks alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unperturb.data import load_dataset
from unperturb.defenses import load_defense
from unperturb.evaluation.plan import attackers_in
from unperturb.paper import tables
from unperturb.paper.architecture import architecture_figure
from unperturb.paper.figures import curves_figure, distributions_figure, training_logs
from unperturb.paper.parts import Part
from unperturb.paper.steps import Step
from unperturb.results import figures
from unperturb.results.ladder_figure import eps_figure
from unperturb.results.page import write_report
from unperturb.results.results import Results
from unperturb.results.samples import read_samples
from unperturb.results.sheet import as_csv, as_latex, as_markdown
from unperturb.runs import write_text


@dataclass(frozen=True)
class Made:
    """A piece that was made: its title, the files, in the part's folder, and the table or the pictures to be shown."""

    piece: str
    title: str
    files: tuple[Path, ...]
    table: tables.Table | None = None


@dataclass(frozen=True)
class Source:
    """What a piece is made from: the part, the steps behind it, and the folder that it goes to."""

    piece: str
    part: Part
    steps: Sequence[Step]
    out: Path

    @property
    def runs(self) -> list[Path]:
        """The run folders of the evaluations."""
        return [step.place for step in self.steps if not step.trains]

    def judged(self) -> list[tables.Judged]:
        """The results of each evaluation."""
        mine = [step for step in self.steps if not step.trains]
        return [tables.Judged.read(step.place, attackers_in(step.recipe)) for step in mine]

    def path(self, *names: str, suffix: str = "png") -> Path:
        """A file of the piece."""
        return self.out / f"{'-'.join([self.piece, *names])}.{suffix}"


def make(piece: str, part: Part, steps: Sequence[Step], out: Path) -> list[Made]:
    """Make a piece of a part in the folder `out` from the steps behind it, which are done; empty where there is nothing
    to show. Raises `RunError` where what they have left is damaged."""
    return PIECES[piece](Source(piece, part, steps, out))


def _table(source: Source, table: tables.Table) -> list[Made]:
    paths = {suffix: source.path(suffix=suffix) for suffix in ("md", "tex", "csv")}
    write_text(paths["md"], as_markdown(table.sheet))
    write_text(paths["tex"], as_latex(table.sheet))
    write_text(paths["csv"], as_csv(table.frame))
    return [Made(source.piece, table.sheet.title, tuple(paths.values()), table)]


def table1(source: Source) -> list[Made]:
    """Accuracy under each attack, undefended and behind each purifier."""
    title = f"Table 1, {source.part.name}: accuracy without and with each purifier"
    return _table(source, tables.accuracy_by_attack(source.judged(), title))


def table2(source: Source) -> list[Made]:
    """Every defense side by side."""
    title = f"Table 2, {source.part.name}: the defenses side by side"
    return _table(source, tables.accuracy_by_system(source.judged(), title))


def table3(source: Source) -> list[Made]:
    """PSNR before and after."""
    title = f"Table 3, {source.part.name}: PSNR before and after"
    return _table(source, tables.likeness(source.judged(), "psnr", title))


def table4(source: Source) -> list[Made]:
    """SSIM before and after."""
    title = f"Table 4, {source.part.name}: SSIM before and after"
    return _table(source, tables.likeness(source.judged(), "ssim", title))


def _pictures(source: Source, title: str, draw: Callable[..., Any]) -> list[Made]:
    """One figure per purifier, of the attack that the part shows, before the first classifier."""
    paths, first = [], None
    for run in source.runs:
        for cell, tensors in read_samples(run):
            told = cell["knowledge"] == "oblivious" and cell["attack"] == source.part.shown and cell["defended"]
            first = first or (cell["classifier"] if told else None)
            if told and cell["classifier"] == first:
                paths.append(figures.save(draw(cell, tensors), source.path(cell["system"])))
    return [Made(source.piece, title, tuple(paths))] if paths else []


def figure1(source: Source) -> list[Made]:
    """Clean, adversarial, restored, with confidences."""
    title = f"Figure 1, {source.part.name}: clean, adversarial and restored, with the confidence in the true class"
    return _pictures(source, title, figures.confidence_figure)


def pictures(source: Source) -> list[Made]:
    """Normal, Adv and restored."""
    number = source.piece.removeprefix("figure")
    title = f"Figure {number}, {source.part.name}: normal, adversarial and restored"
    return _pictures(source, title, figures.restored_figure)


def figure2(source: Source) -> list[Made]:
    """The networks of each purifier."""
    made = []
    for step in source.steps:
        if step.recipe is None or step.recipe.kind != "defense":
            continue
        defense = load_defense(step.place)
        shape = load_dataset(**step.recipe.data_options).test.shape
        networks = dict(reversed(defense.networks().items()))
        name = step.place.name
        if networks:
            title = f"{name}: {defense.spec['name'] if defense.spec else ''} on {' x '.join(map(str, shape))} images"
            made.append(figures.save(architecture_figure(title, shape, networks), source.path(name)))
    title = f"Figure 2, {source.part.name}: the networks, drawn from their modules"
    return [Made(source.piece, title, tuple(made))] if made else []


def distributions(source: Source) -> list[Made]:
    """Of PSNR and SSIM."""
    (judged,) = source.judged()
    path = figures.save(distributions_figure(judged), source.path())
    return [Made(source.piece, f"PSNR and SSIM over the images of {source.part.name}", (path,))]


def eps(source: Source) -> list[Made]:
    """Accuracy against eps."""
    figure = eps_figure(Results.read(*source.runs))
    path = figures.save(figure, source.path())
    return [Made(source.piece, f"Robust accuracy against eps, {source.part.name}", (path,))]


def curves(source: Source) -> list[Made]:
    """How the trainings went that kept a log."""
    logs = training_logs([(step.place.name, step.place) for step in source.steps])
    if not logs:
        return []
    path = figures.save(curves_figure(logs), source.path())
    return [Made(source.piece, f"How the trainings of {source.part.name} went", (path,))]


def report(source: Source) -> list[Made]:
    """Everything else that rows say: every attacker, every flag, the ladder, the conditions."""
    written = write_report(Results.read(*source.runs), source.out / "report", title=f"The paper on {source.part.name}")
    return [Made(source.piece, f"Every attacker, every doubt, the conditions: {source.part.name}", (written["page"],))]


PIECES: dict[str, Callable[[Source], list[Made]]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "figure1": figure1,
    "figure2": figure2,
    **dict.fromkeys((f"figure{number}" for number in range(3, 8)), pictures),
    "distributions": distributions,
    "eps": eps,
    "curves": curves,
    "report": report,
}
