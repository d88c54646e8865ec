"""The main job from end to end on the embedded digits."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRYING = "which precision is quickest here?"


@dataclass(frozen=True)
class DemoResult:
    """The table as text, the page, the figures' folder, and seconds spent."""

    table: str
    page: Path
    figures: Path
    seconds: float


Bar = Callable[[str], AbstractContextManager[Callable[..., None]]]


def run_demo(
    out: str | Path = "runs/demo",
    recipe: str = "demo",
    *,
    bar: Bar | None = None,
    show: Callable[[str], None] = print,
) -> DemoResult:
    """Train a classifier and a purifier, attack the test images, restore them, judge and report, all under `out`.

    What an earlier run left in `out` is replaced, if it is a demo's. bar: called with the name of each stage, gives its
    progress bar (default: `unperturb.screen.bar`). show: gets a sentence per stage.
    """
    from unperturb.data import load_dataset
    from unperturb.evaluation.run import run_evaluation
    from unperturb.recipe_files import read_recipe
    from unperturb.results.page import write_report
    from unperturb.results.render import table
    from unperturb.screen import bar as own_bar

    start = time.perf_counter()
    bar = bar or own_bar
    out = Path(out)
    plan = read_recipe(recipe, kind="demo")
    _begin(out, plan)
    with bar("decoding the digits") as update:
        data = load_dataset(**plan.classifier.data_options, progress=update)
    show(
        f"data        {data.source}: {len(data.train)} train, {len(data.val)} validation, {len(data.test)} test images"
    )
    _train(plan, data, out, bar, show)
    evaluation = plan.evaluation.model_copy(
        update={"classifiers": [str(out / "classifier")], "systems": ["undefended", str(out / "ours")]}
    )
    with bar("attacking") as update:
        rows = run_evaluation(evaluation, out / "rows", progress=update)
    show(f"attacks     {len(rows)} rows: {rows['attack'].nunique()} attacks on {len(data.test)} test images\n")
    with bar("writing the report") as update:
        update(0, 0)
        written = write_report([out / "rows"], out / "report")
    return DemoResult(table(rows), written["page"], out / "report" / "figures", time.perf_counter() - start)


def _begin(out: Path, plan: Any) -> None:
    """Empty `out`, if it holds a demo, and mark it as one; raises `RunError` where it holds anything else."""
    from unperturb.runs import RunError, read_json, write_json

    marker = out / "demo.json"
    if out.exists() and any(out.iterdir()):
        if not marker.exists():
            raise RunError(f"{out} holds something that is not a demo; choose another folder with --out")
        read_json(marker)
        shutil.rmtree(out)
    write_json(marker, json.loads(plan.model_dump_json()))


def _train(plan: Any, data: Any, out: Path, bar: Bar, show: Callable[[str], None]) -> None:
    """The classifier and the purifier before it, in run folders of their own."""
    from unperturb.training.jobs import train_classifier, train_defense

    with bar("training a classifier") as update:
        update(0, 0, TRYING)
        _, cost = train_classifier(plan.classifier, data, out=out / "classifier", progress=update)
    show(
        f"classifier  {plan.classifier.classifier.name}: {cost.seconds:.0f} s, "
        f"{100 * cost.validation['score']:.1f} % of validation images right"
    )
    recipe = plan.defense.model_copy(update={"classifiers": [str(out / "classifier")]})
    with bar("training the purifier") as update:
        update(0, 0, TRYING)
        defense = train_defense(recipe, data=data, out=out / "ours", progress=update)
    cost = defense.outcome
    show(
        f"purifier    {cost.seconds:.0f} s, {cost.images_per_second:.0f} pairs/s, {cost.pflop:.2g} PFLOP, "
        f"{cost.fraction_of_peak:.0%} of a plain convolution's rate"
    )
