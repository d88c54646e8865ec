"""Stores the weights of a purifier or classifier in half precision, where its answers stay: half the bytes in the zoo.

    python benchmarks/halve.py zoo/paper-mnist --classifier zoo:mnist-resnet8 --eps 0.3
    python benchmarks/halve.py zoo/cifar10-airbench --eps 8/255

It is tried on clean test images and on those of a PGD-40 against the classifier, before and after. Where the class of
more than `--most` of them changes, nothing is written.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from unperturb import runs
from unperturb.attacks.base import create_attack
from unperturb.classifiers import load_classifier
from unperturb.data import load_dataset
from unperturb.defenses import Protected, load_defense
from unperturb.threat_models import budget


def kind_of(folder: Path) -> str:
    """The name of the file that describes what is in `folder`."""
    return "classifier.json" if (folder / "classifier.json").exists() else "defense.json"


def halved(folder: Path, out: Path) -> None:
    """What is in `folder`, in `out`, its floating-point weights in float16; read again, they are float32."""
    for file in folder.glob("*.json"):
        shutil.copy(file, out)
    tensors = runs.load_tensors(folder / "model.safetensors", finite=False)
    half = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    digest = runs.save_tensors(out / "model.safetensors", half, {"stored_as": "float16"})
    described = runs.read_json(folder / kind_of(folder), dict)
    runs.write_json(out / kind_of(folder), {**described, "sha256": digest})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="run folder whose weights are replaced")
    parser.add_argument("--classifier", help="of a purifier: a run folder or zoo:NAME")
    parser.add_argument("--eps", default="0.3", help="of PGD-40, a number or a fraction such as 8/255")
    parser.add_argument("--n", type=int, default=500, help="test images, a fixed random subset")
    parser.add_argument("--most", type=float, default=0.002, help="share of images whose class may change")
    options = parser.parse_args()
    described, recipe = kind_of(options.folder), runs.read_json(options.folder / "recipe.json", dict)
    own = described == "classifier.json"
    if own == bool(options.classifier):
        raise SystemExit("a purifier needs --classifier, and a classifier has none")
    test = load_dataset(recipe["dataset"], size=recipe.get("size")).test.subset(options.n)
    images, labels = test.batch(torch.arange(len(test)), torch.device("cpu"))
    bare = load_classifier(options.folder if own else options.classifier).eval()
    eps = budget(options.eps)
    pgd = create_attack("pgd", eps=eps, alpha=eps / 10, steps=40)
    seen = torch.cat([images, pgd(bare, images, labels, index=test.index, seed=0)])

    @torch.no_grad()
    def answers(folder: Path) -> Tensor:
        model = (load_classifier(folder) if own else Protected(bare, load_defense(folder))).eval()
        return torch.cat([model(batch).argmax(1) for batch in seen.split(100)])

    with tempfile.TemporaryDirectory() as place:
        halved(options.folder, Path(place))
        changed = float((answers(options.folder) != answers(Path(place))).float().mean())
        print(f"{options.folder}: the class of {100 * changed:.2f} % of {len(seen)} images changes")
        if changed > options.most:
            raise SystemExit(f"more than {100 * options.most:g} %: nothing is written")
        for file in ("model.safetensors", described):
            shutil.copy(Path(place) / file, options.folder / f".{file}.new")
        for file in ("model.safetensors", described):
            (options.folder / f".{file}.new").replace(options.folder / file)


if __name__ == "__main__":
    main()
