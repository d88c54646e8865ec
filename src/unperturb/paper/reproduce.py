"""The paper from recipes: what is missing is trained and evaluated, what is there is read, and everything is drawn."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unperturb import mistakes, runs, screen
from unperturb.paper.page import write_index, write_page
from unperturb.paper.parts import TRAININGS, Part, chosen
from unperturb.paper.pieces import Made, make
from unperturb.paper.steps import Cost, Step, Steps

Show = Callable[[str], None]
Bar = Callable[[str], AbstractContextManager[Callable[..., None]]]
TIMES = "steps.json"  # seconds that each step has taken so far, by its run folder


@dataclass
class Reproduction:
    """What a call has come to. page: the index. made: the pieces of each part. failed: by run folder, or by the name of
    a piece, what went wrong."""

    page: Path
    made: dict[str, list[Made]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Plan:
    """What `names` ask for, and the steps that it takes, each behind those that it needs."""

    chosen: dict[str, tuple[Part, list[str]]]
    steps: Steps
    n: int | None = None

    @classmethod
    def of(cls, names: Iterable[str] = (), n: int | None = None) -> Plan:
        """The plan of the parts and pieces called `names` (`unperturb.paper.parts.chosen`). n: images that evaluations
        judge, in place of their own number. Raises `UnknownNameError` or `RecipeError`."""
        plan = cls(chosen(names), Steps(), n)
        for part, pieces in plan.chosen.values():
            for piece in pieces:
                plan.sources(part, piece)
        return plan

    def sources(self, part: Part, piece: str) -> list[Step]:
        """The evaluations that a piece is made from; of one that shows trainings, these."""
        if piece in TRAININGS:
            protocol = self.steps.evaluation(part.protocol, self.n)
            return [step for step in self.steps.before(protocol.folder) if step.trains]
        return [self.steps.evaluation(name, self.n) for name in part.pieces[piece]]

    def ready(self, part: Part, piece: str) -> bool:
        """Whether every step that a piece takes is done."""
        sources = self.sources(part, piece)
        return all(step.done() for source in sources for step in self.steps.before(source.folder))

    def needed(self) -> list[Step]:
        """Every step, in order."""
        found: dict[str, Step] = {}
        for part, pieces in self.chosen.values():
            for piece in pieces:
                for source in self.sources(part, piece):
                    found |= {step.folder: step for step in self.steps.before(source.folder)}
        return list(found.values())

    def told(self, device: str = "auto") -> Iterator[str]:
        """A line on each step, done or with its cost, and their sum. Nothing is trained or attacked for it."""
        total, unknown, left = Cost(), 0, 0
        missing: set[str] = set()
        for step in self.needed():
            if not missing & set(step.needs) and step.done():
                yield f"done      {step.name}"
                continue
            missing.add(step.folder)
            left += 1
            cost = step.cost(device)
            if cost is None:
                unknown += 1
                yield f"missing   {step.folder}: {step.command or 'no recipe is known that makes it'}; cost not known"
                continue
            total += cost
            verb = "train" if step.trains else "evaluate"
            yield f"{verb:<9} {step.folder}: {cost}; {step.command}"
        pieces = ", ".join(f"{name}: {' '.join(of)}" for name, (_, of) in self.chosen.items())
        yield f"then draw {pieces}"
        yield f"in all    {left} steps, {total}" + (f", and {unknown} of unknown cost" if unknown else "")


def reproduce(
    names: Iterable[str] = (),
    *,
    out: str | Path = "report/paper",
    n: int | None = None,
    device: str = "auto",
    show: Show | None = None,
    bar: Bar = screen.bar,
) -> Reproduction:
    """Make the parts and pieces of the paper called `names` (default: all) in the folder `out`, with an index page.

    What is missing is trained into `runs/NAME` and evaluated there; what a run folder or the zoo has is used. A call
    that was stopped goes on where it was. Other pieces of a part that take no further step are drawn too. n: images
    that evaluations judge, in place of their own number. show: gets a line on each step. bar: opens a progress bar by
    its title.

    A step that fails is told, and what does not need it still runs. Raises `UnknownNameError` or `RecipeError` before
    anything is computed.
    """
    plan, out = Plan.of(names, n), Path(out)
    say = show or (lambda line: None)
    done = Reproduction(out / "index.html")
    times: dict[str, float] = runs.read_json(out / TIMES, dict[str, float]) if (out / TIMES).exists() else {}
    for step in plan.needed():
        if gone := [need for need in step.needs if need in done.failed]:
            done.failed[step.folder] = f"not begun: {', '.join(gone)} failed"
            say(f"left out  {step.folder}: {', '.join(gone)} failed")
            continue
        said = _guarded(lambda step=step: _do(step, out, times, device, say, bar))  # type: ignore[misc]
        if said:
            done.failed[step.folder] = said
            say(f"failed    {step.folder}: {said}")
    for part, pieces in plan.chosen.values():
        _draw(plan, part, pieces, out, times, done, say)
    write_index(out)
    return done


def _do(step: Step, out: Path, times: dict[str, float], device: str, say: Show, bar: Bar) -> None:
    if step.done():
        say(f"done      {step.name}")
        return
    say(f"{'train' if step.trains else 'evaluate':<9} {step.folder}: {step.command}")
    began = time.monotonic()
    try:
        with bar(step.folder) as update:
            step.run(device=device, show=None, progress=update)
    finally:  # also of a sitting that was stopped
        times[step.folder] = round(times.get(step.folder, 0.0) + time.monotonic() - began, 1)
        runs.write_json(out / TIMES, times)


def _draw(
    plan: Plan, part: Part, pieces: list[str], out: Path, times: dict[str, float], done: Reproduction, say: Show
) -> None:
    """Write what of a part can be drawn, asked for or there for nothing, and its page."""
    made: list[Made] = []
    pieces = [piece for piece in part.pieces if piece in pieces or plan.ready(part, piece)]
    for piece in pieces:
        sources = plan.sources(part, piece)
        if lacking := [step.folder for step in sources if step.folder in done.failed]:
            say(f"left out  {piece} of {part.name}: {', '.join(lacking)} failed")
            continue
        said = _guarded(lambda piece=piece, sources=sources: made.extend(make(piece, part, sources, out / part.name)))  # type: ignore[misc]
        if said:
            done.failed[f"{piece}-{part.name}"] = said
            say(f"failed    {piece} of {part.name}: {said}")
    if made:
        steps = {step.folder: step for piece in pieces for step in plan.sources(part, piece)}
        every = {before.folder: before for folder in steps for before in plan.steps.before(folder)}
        write_page(part, made, list(every.values()), times, out)
        done.made[part.name] = made
        say(f"drew      {part.name}: {out / part.name / 'index.html'}")


def _guarded(work: Callable[[], Any]) -> str | None:
    """What `work` failed by, if it did; Ctrl-C passes."""
    try:
        work()
    except Exception as error:
        if mistakes.interrupted(error):
            raise KeyboardInterrupt from error
        return mistakes.sentence(error) or traceback.format_exc()
    return None
