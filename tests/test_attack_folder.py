"""Adversarial images as a folder: 8-bit pictures in their balls, and a manifest that says what is in them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import unperturb
from unperturb import cli
from unperturb.attack_folder import attack_from, attack_images, plan_attack_images, run_plan
from unperturb.attacks import create_attack
from unperturb.classifiers import create_classifier
from unperturb.classifiers.base import save_classifier
from unperturb.data import Splits
from unperturb.data.sets import DataError, ImageSet
from unperturb.defenses import create_defense
from unperturb.registry import UnknownNameError
from unperturb.runs import RunError

EPS = 8 / 255
runner = CliRunner()


class Nearest(nn.Module):
    """Minus the squared distance to the mean picture of each class."""

    def __init__(self, data: ImageSet) -> None:
        super().__init__()
        images = data.images.float() / 255
        self.means = nn.Parameter(torch.stack([images[data.labels == k].mean(0) for k in range(10)]))

    def forward(self, x: Tensor) -> Tensor:
        return -(x[:, None] - self.means).square().sum((2, 3, 4))


@pytest.fixture(scope="module")
def digits(tiny_digits: Splits) -> tuple[nn.Module, ImageSet]:
    return Nearest(tiny_digits.train), tiny_digits.test.take(torch.arange(3, 60, 2))


def lines_of(out: Path) -> list[dict[str, str]]:
    with (out / "manifest.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pixels_of(path: Path) -> Tensor:
    picture = Image.open(path)
    assert picture.format == "PNG"
    assert picture.mode == "L"
    return torch.from_numpy(np.array(picture))[None]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pgd", {"eps": EPS, "steps": 5}),
        ("pgd", {"eps": 0.5, "norm": "l2", "steps": 5}),
        ("deepfool", {}),
        ("fab-t", {"eps": EPS, "steps": 3, "target_classes": 2}),
    ],
)
def test_what_the_folder_says_is_what_the_pictures_are(
    name: str, options: dict[str, Any], digits: tuple[nn.Module, ImageSet], tmp_path: Path
) -> None:
    model, data = digits
    out = tmp_path / "adv"
    done = attack_images(model, data, create_attack(name, **options), out, batch=12, quiet=True)
    lines = lines_of(out)
    assert [int(line["index"]) for line in lines] == data.index.tolist()
    assert sorted(p.name for p in (out / "images").iterdir()) == sorted(f"{i:06d}.png" for i in data.index.tolist())
    clean = data.images.float() / 255
    for k, line in enumerate(lines):
        pixels = pixels_of(out / line["file"])
        x = pixels[None].float() / 255
        delta = (x[0] - clean[k]).double()
        assert int(line["label"]) == int(data.labels[k])
        assert int(line["before"]) == int(model(clean[k : k + 1]).argmax(1))
        assert int(line["after"]) == int(model(x).argmax(1))
        assert int(line["success"]) == (line["after"] != line["label"])
        assert float(line["linf"]) == pytest.approx(float(delta.abs().max()), abs=1e-6)
        assert float(line["l2"]) == pytest.approx(float(delta.norm()), abs=1e-5)
        assert int(line["l0"]) == int((delta != 0).sum())
        eps = options.get("eps", float("inf"))
        assert float(line["l2" if options.get("norm") == "l2" else "linf"]) <= eps + 1e-6
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images"] == len(done.images) == len(data)
    assert summary["right_after"] == done.right_after == sum(line["success"] == "0" for line in lines)
    assert summary["right_before"] == done.right_before == sum(line["before"] == line["label"] for line in lines)
    assert done.right_after < done.right_before


def test_colors_and_a_purifier(tiny_digits: Splits, tmp_path: Path) -> None:
    grey = tiny_digits.test.take(torch.arange(10))
    data = ImageSet(
        images=torch.cat([grey.images, grey.images.flip(2), 255 - grey.images], 1),
        labels=grey.labels,
        index=grey.index,
        class_names=grey.class_names,
        source="colored",
        split="test",
    )

    class Sum(Nearest):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :1])

    model = Sum(tiny_digits.train)
    for knowledge in ("white_box", "oblivious"):
        out = tmp_path / knowledge
        attack = create_attack("pgd", eps=EPS, steps=3)
        attack_images(model, data, attack, out, defense="bit_depth", knowledge=knowledge, quiet=True)
        purifier = create_defense("bit_depth")
        for line in lines_of(out):
            pixels = torch.from_numpy(np.array(Image.open(out / line["file"]))).permute(2, 0, 1)
            k = data.index.tolist().index(int(line["index"]))
            assert int((pixels.int() - data.images[k].int()).abs().max()) <= 8
            after = model(purifier(pixels[None].float() / 255)).argmax(1)
            assert int(line["after"]) == int(after)


class StoppedError(Exception):
    pass


def test_a_stopped_run_goes_on_and_makes_nothing_twice(digits: tuple[nn.Module, ImageSet], tmp_path: Path) -> None:
    model, data = digits
    attack = create_attack("pgd", eps=EPS, steps=3)
    plan = plan_attack_images(model, data, attack, batch=8)
    whole = run_plan(plan, tmp_path / "whole", quiet=True)

    def stop(done: int, total: int) -> None:
        if done >= 16:
            raise StoppedError

    out = tmp_path / "stopped"
    with pytest.raises(StoppedError):
        run_plan(plan, out, progress=stop)
    assert not (out / "summary.json").exists()
    with pytest.raises(RunError, match="already holds this run; go on with --resume"):
        run_plan(plan, out, quiet=True)
    first = lines_of(out)
    assert len(first) == 16
    # One picture of the first batch is lost, one of the second is another's: their batches are made again.
    written = {p: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    (out / first[2]["file"]).unlink()
    assert run_plan(plan, out, resume=True, quiet=True).images == whole.images
    again = [p for p, when in written.items() if p.exists() and p.stat().st_mtime_ns != when]
    assert {p.name for p in again} <= {Path(line["file"]).name for line in first[:8]}
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(out / first[9]["file"])
    assert run_plan(plan, out, resume=True, quiet=True).images == whole.images
    for line in lines_of(out):
        assert (out / line["file"]).read_bytes() == (tmp_path / "whole" / line["file"]).read_bytes()


def test_a_folder_of_something_else_is_left_alone(digits: tuple[nn.Module, ImageSet], tmp_path: Path) -> None:
    model, data = digits
    attack = create_attack("fgsm", eps=EPS)
    foreign = tmp_path / "holiday"
    foreign.mkdir()
    (foreign / "photo.txt").write_text("mine")
    with pytest.raises(RunError, match="already holds something else"):
        attack_images(model, data, attack, foreign, quiet=True)
    assert (foreign / "photo.txt").read_text() == "mine"
    out = tmp_path / "adv"
    attack_images(model, data, attack, out, quiet=True)
    for other, said in (
        (create_attack("fgsm", eps=EPS / 2), rf"attack was eps={EPS}\b.* and is eps={EPS / 2}\b.* now"),
        (create_attack("pgd", eps=EPS), r"attack was FGSM\(.* and is PGD\(.* now"),
    ):
        with pytest.raises(RunError, match=said):
            attack_images(model, data, other, out, resume=True, quiet=True)
    changed = Nearest(data)
    with pytest.raises(RunError, match="another run: model was"):
        attack_images(changed, data, attack, out, resume=True, quiet=True)
    (out / "manifest.csv").write_text("index,file\nx,y\n")
    with pytest.raises(RunError, match=r"manifest.csv is damaged .* delete it"):
        attack_images(model, data, attack, out, resume=True, quiet=True)


def test_an_attack_that_leaves_its_ball_is_found_out_by_the_files(
    digits: tuple[nn.Module, ImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unperturb.attacks.base import Attack

    model, data = digits
    original = Attack.solve

    def faulty(self: Any, *arguments: Any, **options: Any) -> Any:
        x, counter = original(self, *arguments, **options)
        return (x + 20 / 255).clamp(0, 1), counter

    monkeypatch.setattr(Attack, "solve", faulty)
    with pytest.raises(RunError, match="farther than eps"):
        attack_images(model, data, create_attack("fgsm", eps=EPS), tmp_path / "adv", quiet=True)
    assert not (tmp_path / "adv" / "manifest.csv").exists()


def test_what_cannot_be_attacked_so(digits: tuple[nn.Module, ImageSet], tmp_path: Path) -> None:
    model, data = digits
    attack = create_attack("fgsm", eps=EPS)
    assert unperturb.attack_images is attack_images
    for options, said in (
        ({"batch": 0}, "batch must be at least 1"),
        ({"knowledge": "transfer"}, "knowledge must be one of white_box"),
        ({"knowledge": "black_box"}, "needs a gradient"),
    ):
        with pytest.raises(ValueError, match=said):
            attack_images(model, data, attack, tmp_path / "adv", quiet=True, **options)  # type: ignore[arg-type]
    large = create_classifier("convnet", channels=1, size=28, classes=10, mean=[0.5], std=[0.5])
    said = (
        rf"'Classifier' takes images of 1 channel, 28x28 pixels, but those of {data.source} have 1 channel, .*size=28"
    )
    with pytest.raises(ValueError, match=said):
        attack_images(large, data, attack, tmp_path / "adv", quiet=True)
    two = ImageSet(
        images=torch.zeros(3, 2, 8, 8, dtype=torch.uint8),
        labels=torch.zeros(3, dtype=torch.int64),
        index=torch.arange(3),
        class_names=["a", "b"],
        source="two",
        split="test",
    )
    with pytest.raises(DataError, match="of 2 channels; a PNG has 1 or 3"):
        attack_images(model, two, attack, tmp_path / "adv", quiet=True)


def test_settings_of_the_attack() -> None:
    assert attack_from("pgd", "8/255", ["steps=7", "norm=l2", "random_start=false"]) == create_attack(
        "pgd", eps="8/255", steps=7, norm="l2", random_start=False
    )
    assert attack_from("deepfool", None, []) == create_attack("deepfool")
    assert attack_from("patch", None, ["scale=[0.8, 1.1]"]) == create_attack("patch", scale=(0.8, 1.1))
    with pytest.raises(ValueError, match="pgd needs a budget, such as --eps 8/255"):
        attack_from("pgd", None, [])
    with pytest.raises(ValueError, match="reads key=value"):
        attack_from("pgd", "0.1", ["steps"])
    with pytest.raises(UnknownNameError, match="option of attack 'pgd', 'stepps'"):
        attack_from("pgd", "0.1", ["stepps=3"])
    with pytest.raises(UnknownNameError, match="unknown attack 'pdg'"):
        attack_from("pdg", "0.1", [])


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = create_classifier("lenet5", channels=1, size=28, classes=10, mean=[0.5], std=[0.5])
    save_classifier(tmp_path / "runs" / "net", net)
    call = ["attack", "runs/net", "--data", "digits", "--attack", "fgsm", "--eps", "8/255", "--n", "12"]
    planned = runner.invoke(cli.app, [*call, "--dry-run"], catch_exceptions=False)
    assert "attack = FGSM(targets=None, norm='linf', eps=0.0313" in planned.output
    assert "cost: 12 images, at most" in planned.output
    assert not (tmp_path / "runs" / "fgsm-net").exists()
    done = runner.invoke(cli.app, [*call, "--set", "loss=margin"], catch_exceptions=False)
    assert "12 images by FGSM(" in done.output
    out = tmp_path / "runs" / "fgsm-net"
    assert len(lines_of(out)) == 12
    assert len(list((out / "images").glob("*.png"))) == 12
    again = runner.invoke(cli.app, [*call, "--set", "loss=margin", "--resume"], catch_exceptions=False)
    assert again.output == done.output


def test_a_model_of_ones_own_is_known_by_its_weights(digits: tuple[nn.Module, ImageSet], tmp_path: Path) -> None:
    _, data = digits
    channels, height, width = data.shape

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(channels * height * width, data.classes)

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.linear(images.flatten(1))
            return out

    model, attack = Own(), create_attack("fgsm", eps=EPS)
    attack_images(model, data, attack, tmp_path / "adv", n=4, quiet=True)
    attack_images(Own(), data, attack, tmp_path / "adv", n=4, resume=True, quiet=True)  # as in another process
    with torch.no_grad():
        model.linear.weight.neg_()
    with pytest.raises(RunError, match="another run: model was"):
        attack_images(model, data, attack, tmp_path / "adv", n=4, resume=True, quiet=True)


def test_an_attack_of_ones_own_is_not_gone_on_with(digits: tuple[nn.Module, ImageSet], tmp_path: Path) -> None:
    model, data = digits
    own = create_attack("fgsm", eps=EPS, loss=lambda logits, labels: -logits.gather(1, labels[:, None]).squeeze(1))
    attack_images(model, data, own, tmp_path / "adv", n=4, quiet=True)
    with pytest.raises(RunError, match="holds code of your own"):
        attack_images(model, data, own, tmp_path / "adv", n=4, resume=True, quiet=True)


class Fails(nn.Module):
    """After its first call."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise LookupError("no more")
        return images.flatten(1)[:, :10]


def test_a_model_that_fails_is_named(digits: tuple[nn.Module, ImageSet], tmp_path: Path) -> None:
    model, (_, data), attack = Fails(), digits, create_attack("fgsm", eps=EPS)
    for what in ("'Fails', under FGSM with knowledge white_box,", "Fails, at a first look,"):
        with pytest.raises(unperturb.ModelError, match=rf"^{what} failed: .*, line \d+: LookupError: no more$"):
            attack_images(model, data, attack, tmp_path / "adv", n=2, resume=True, quiet=True)
