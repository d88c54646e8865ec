"""What a training step costs: images/s, GFLOP/s, and the share of what a plain convolution reaches in the same run.

    python benchmarks/training.py                         # the embedded digits
    python benchmarks/training.py protect-mnist --steps 30 --repeat 5

A recipe whose classifiers are not there is measured in front of fresh, untrained ones: a step costs the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from unperturb.classifiers import create_classifier, load_classifier
from unperturb.data import load_dataset
from unperturb.recipe_files import read_recipe
from unperturb.runs import RunError, environment, write_json
from unperturb.training import jobs
from unperturb.training.loop import train


def measure(name: str, steps: int, repeat: int) -> dict[str, object]:
    """Median and spread of `repeat` short trainings of `steps` steps by the recipe `name`."""
    recipe = read_recipe(name)
    data = load_dataset(recipe.dataset, size=recipe.size)
    if recipe.kind == "classifier":
        task = jobs.classifier_task(recipe, data)
    else:
        channels, size, _ = data.train.shape
        shape = {"channels": channels, "size": size, "classes": data.train.classes}
        classifiers = []
        for folder in recipe.classifiers:
            try:
                classifiers.append(load_classifier(folder))
            except RunError:
                family = Path(folder).name.removeprefix(f"{recipe.dataset}-")
                classifiers.append(
                    create_classifier(family, mean=[0.5] * channels, std=[0.5] * channels, **shape).eval()
                )
        task = jobs.defense_task(recipe, data, classifiers)
    with tempfile.TemporaryDirectory() as folder:
        plan = jobs.decided(recipe, task, Path(folder), resume=False)
        settings = plan.training.model_copy(update={"steps": steps, "epochs": None, "checkpoint_seconds": 1e9})
        outcomes = [asdict(train(task, settings, Path(folder) / str(i))) for i in range(repeat)]
    figures: dict[str, object] = {"recipe": name, "steps": steps, "repeat": repeat}
    figures |= {k: outcomes[0][k] for k in ("precision", "memory_format")}
    for key in ("images_per_second", "gflops", "convolution_gflops", "fraction_of_peak"):
        values = [o[key] for o in outcomes]
        figures[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["classifier-digits", "protect-digits", "paper-digits"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    found = []
    for name in arguments.recipes:
        found.append(measure(name, arguments.steps, arguments.repeat))
        print(json.dumps(found[-1]))
    if arguments.out:
        write_json(arguments.out, {"environment": environment(), "threads": torch.get_num_threads(), "figures": found})


if __name__ == "__main__":
    main()
