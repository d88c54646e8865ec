"""Every registered defense against what the contract promises: a new file is tested before its author writes a test."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unperturb import runs
from unperturb.attackers import Attacker
from unperturb.attacks import create_attack
from unperturb.classifiers import create_classifier
from unperturb.config import resolve
from unperturb.data import Splits
from unperturb.defenses import (
    Batch,
    Defense,
    Protected,
    create_defense,
    defenses,
    load_defense,
    save_defense,
    with_options,
)
from unperturb.defenses.defense_gan import DefenseGAN
from unperturb.recipe_files import read_recipe
from unperturb.systems import System
from unperturb.training import adversarial_batches, jobs

# A defense that cannot be made from channels alone, or is large without, has small options here, one set a variant.
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "paired_gan": {
        "unet": {"generator": {"name": "unet", "width": 4}},
        "game": {
            "generator": {"name": "ape", "width": 4},
            "discriminator": {"name": "ape", "width": 4},
            "label_reading": "both",
            "weights": {"repair": 0.7, "label": 0.3, "recovery": 0.7, "isomorphic": 0.7},
        },
    },
    "feature_squeezing": {
        "filters": {},
        "learned": {"squeezers": [{"name": "hgd", "denoiser": {"width": 4}}, {"name": "bit_depth"}]},
        "alone": {"squeezers": [{"name": "jpeg"}], "purifies": False},
    },
    "hgd": {"": {"denoiser": {"width": 4}}},
    "denoised_smoothing": {
        "": {"denoiser": {"width": 4}},
        "mse": {"denoiser": {"width": 4}, "weights": {"stability": 1.0, "mse": 10.0}},
    },
    "pipeline": {
        "smooth": {"parts": [{"name": "magnet", "drop_rate": 0.02}, {"name": "total_variation", "steps": 3}]},
        "steps": {"parts": [{"name": "jpeg"}, {"name": "hgd", "denoiser": {"width": 4}}, {"name": "bit_depth"}]},
    },
    "ape_gan": {"rmse": {"width": 4}, "mse": {"width": 4, "content": "mse"}},
    "magnet": {
        "errors": {"drop_rate": 0.02},
        "divergences": {"structure": [3], "detectors": [{"error": 1}, {"temperature": 10}, {"temperature": 40}]},
        "pack": {"pack": 3, "diversity": 0.2},
    },
    "defense_gan": {
        "hidden": {"size": 8, "width": 2, "latent": 6, "steps": 5, "restarts": 2},
        "unrolled": {"size": 8, "width": 2, "latent": 6, "steps": 5, "restarts": 2, "unroll": 5},
        "drawn": {"size": 8, "width": 2, "latent": 6, "steps": 5, "restarts": 2, "seed": None},
        "blind": {"size": 8, "width": 2, "latent": 6, "steps": 2, "restarts": 2, "detect": False},
    },
}
CASES = {
    name + (f"-{variant}" if variant else ""): (name, options)
    for name in defenses
    for variant, options in SMALL.get(name, {"": {}}).items()
}
SHAPES = [(1, 8, 8), (3, 8, 8), (3, 13, 17), (1, 28, 28)]
every_case = pytest.mark.parametrize("case", CASES)


def shake(network: nn.Module) -> None:
    """Weights as training leaves them: none at its first value, batch norms' statistics neither."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and torch.isfinite(tensor).all():
            noise = torch.randn_like(tensor) * 0.1
            tensor.add_(noise.abs() if name.endswith("running_var") else noise)


def made(case: str, channels: int = 1) -> Defense:
    name, options = CASES[case]
    defense = create_defense(name, channels=channels, **options)
    shake(defense)
    return defense.eval()


def images_for(defense: Defense, shape: tuple[int, int, int] = (1, 8, 8), n: int = 5) -> Tensor:
    channels, height, width = shape
    if defense.size is not None:
        height = width = defense.size
    return torch.rand(n, channels, height, width)


def seeded(defense: Defense, images: Tensor) -> Tensor:
    torch.manual_seed(7)
    return defense.purify(images)


@functools.cache
def classifier(channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    net = create_classifier(
        "convnet", channels=channels, size=8, classes=10, mean=[0.4] * channels, std=[0.3] * channels
    )
    return net.eval().requires_grad_(False)


# What comes out ------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_and_range(case: str, shape: tuple[int, int, int]) -> None:
    defense = made(case, shape[0])
    images = images_for(defense, shape)
    images[0], images[1] = 0.0, 1.0
    before = images.clone()
    out = defense(images)
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert bool(torch.isfinite(out).all())
    assert 0 <= float(out.detach().min()) <= float(out.detach().max()) <= 1
    assert torch.equal(images, before)  # what was given is not written over
    with torch.no_grad():
        logits = Protected(classifier(shape[0]), defense)(images[..., :8, :8]) if images.shape[-1] == 8 else None
    assert logits is None or logits.shape == (5, 10)
    with torch.no_grad():
        assert defense.purify(images[:0]).shape == (0, *images.shape[1:])


@pytest.mark.parametrize("name", defenses)
def test_no_defense_checks_or_clamps_for_itself(name: str) -> None:
    made_by: Any = defenses[name]
    assert made_by.forward is Defense.forward
    assert made_by.purify_and_score is Defense.purify_and_score
    assert made_by.purify is not Defense.purify


class Brighter(Defense):
    """Half a grey brighter, in place; what is too bright overshoots. Its detector writes over its images too."""

    channels = 1

    def __init__(self) -> None:
        super().__init__()
        self.add_detectors(1, 0.1)

    def purify(self, images: Tensor) -> Tensor:
        return images.add_(0.5)

    def scores(self, images: Tensor, logits_fn: Any) -> Tensor:
        return images.mul_(0).flatten(1).sum(1, keepdim=True)


def test_what_is_called_checks_copies_and_clamps() -> None:
    defense, images = Brighter(), torch.tensor([0.0, 0.2, 0.5, 0.9]).reshape(1, 1, 2, 2)
    before, brighter = images.clone(), torch.tensor([0.5, 0.7, 1.0, 1.0]).reshape(1, 1, 2, 2)
    torch.testing.assert_close(defense(images), brighter)
    purified, scores = defense.purify_and_score(images, nn.Flatten())
    torch.testing.assert_close(purified, brighter)
    assert scores.shape == (1, 1)
    assert torch.equal(images, before)
    at = images.requires_grad_()
    (slope,) = torch.autograd.grad(defense(at).sum(), at)
    assert slope.flatten().tolist() == [1, 1, 1, 0]  # none of what is cut off
    for asked in (defense, lambda x: defense.purify_and_score(x, nn.Flatten())):
        with pytest.raises(ValueError, match=r"purifies images of 1 channel\(s\), and these have 3"):
            asked(torch.rand(2, 3, 2, 2))
        with pytest.raises(ValueError, match=r"must have shape \(N, C, H, W\), not \(2, 2\)"):
            asked(torch.rand(2, 2))
        with pytest.raises(TypeError, match=r"must be a float tensor in \[0, 1\], not torch.uint8"):
            asked(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))


@every_case
def test_a_defense_made_for_one_size_says_so(case: str) -> None:
    defense = made(case)
    if defense.size is not None:
        with pytest.raises(ValueError, match=f"{defense.size}x{defense.size} images, not 9x11"):
            defense.purify(torch.rand(2, 1, 9, 11))


@every_case
def test_what_a_seed_fixes(case: str) -> None:
    defense = made(case)
    images = images_for(defense, n=40)
    first = seeded(defense, images)
    assert torch.equal(seeded(defense, images), first)
    again = defense.purify(images)  # with the generator where the last call left it
    assert torch.equal(again, first) != defense.random


@every_case
def test_an_image_does_not_depend_on_the_rest_of_the_batch(case: str) -> None:
    defense = made(case)
    images = images_for(defense)
    scores = defense.scores(images, classifier())
    if not defense.random:
        alone = torch.cat([defense.purify(image[None]) for image in images])
        torch.testing.assert_close(defense.purify(images), alone, rtol=0, atol=1e-5)
        alone = torch.cat([defense.scores(image[None], classifier()) for image in images])
        torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-6)
    assert scores.shape == (5, len(defense.thresholds))
    assert bool(torch.isfinite(scores).all())


@every_case
def test_judging_is_purifying_and_scoring(case: str) -> None:
    defense = made(case)
    images = images_for(defense)
    torch.manual_seed(7)
    purified, scores = defense.purify_and_score(images, classifier())
    assert torch.equal(purified, seeded(defense, images))
    torch.manual_seed(7)
    assert torch.equal(purified, defense(images))
    assert scores.shape == (5, len(defense.thresholds))
    if not defense.random:
        assert torch.equal(scores, defense.scores(images, classifier()))


def test_a_batch_norm_in_training_mode_would_depend_on_it() -> None:
    defense = made("ape_gan-rmse").train()  # that the test above can fail
    images = torch.rand(5, 1, 8, 8)
    assert float((defense.purify(images)[:1] - defense.purify(images[:2])[:1]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_the_identity_leaves_images_alone(shape: tuple[int, int, int]) -> None:
    images = torch.rand(3, *shape)
    assert torch.equal(create_defense("identity").purify(images), images)


# What an attacker is told ---------------------------------------------------------------------------------------------


@every_case
def test_the_gradient_reaches_the_input_where_it_is_promised(case: str) -> None:
    defense = made(case)
    images = images_for(defense).requires_grad_()
    out = defense.purify(images)
    assert out.requires_grad == defense.differentiable or defense.networks() == {}
    if not defense.differentiable:
        return
    (gradient,) = torch.autograd.grad(out.square().sum(), images)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.flatten(1).abs().amax(1).min()) > 0


@pytest.mark.parametrize("case", [c for c in CASES if made(c).networks() and made(c).differentiable])
def test_the_gradient_of_a_learned_defense_against_finite_differences(case: str) -> None:
    defense = made(case).requires_grad_(False).double()
    images = 0.2 + 0.6 * images_for(defense, n=8).double()
    weights, direction = torch.randn_like(images), torch.randn_like(images)

    def value(x: Tensor) -> Tensor:
        return (seeded(defense, x) * weights).flatten(1).sum(1)

    at = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(at).sum(), at)
    slope = (gradient * direction).flatten(1).sum(1)
    expected = (value(images + 1e-6 * direction) - value(images - 1e-6 * direction)) / 2e-6
    assert float(expected.abs().min()) > 0
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", [c for c in CASES if not made(c).differentiable])
def test_what_hides_its_gradient_is_attacked_through_its_surrogate(case: str) -> None:
    defense = made(case)
    images = images_for(defense).requires_grad_()
    torch.manual_seed(3)
    attacker = Attacker(create_attack("fgsm", eps=0.1), "white_box", eot_samples=1)
    seen = attacker.model_for(System("whole", classifier(), defense))(images)
    (found,) = torch.autograd.grad(seen[:, 0].sum(), images)
    torch.manual_seed(3)
    restored = defense.purify(images).detach().requires_grad_()
    (at_restored,) = torch.autograd.grad(classifier()(restored)[:, 0].sum(), restored)
    (expected,) = torch.autograd.grad(defense.surrogate_backward(images), images, at_restored)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# Saved, loaded, varied -----------------------------------------------------------------------------------------------


@every_case
def test_saved_and_loaded_to_the_same_output(case: str, tmp_path: Path) -> None:
    defense = made(case)
    images = images_for(defense, n=50)
    defense.calibrate(defense.scores(images, classifier()))
    save_defense(tmp_path, defense, {})
    torch.manual_seed(99)  # a fresh one would start from other weights
    again = load_defense(tmp_path)
    assert type(again) is type(defense)
    assert torch.equal(seeded(again, images), seeded(defense, images))
    torch.manual_seed(1)
    scores = again.scores(images, classifier())
    torch.manual_seed(1)
    assert torch.equal(scores, defense.scores(images, classifier()))
    assert torch.equal(again.thresholds, defense.thresholds)
    assert bool(torch.isfinite(again.thresholds).all())
    assert (again.differentiable, again.random) == (defense.differentiable, defense.random)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    with torch.no_grad():
        assert Protected(classifier(), again).rejects(images).shape == (50,)


def test_thresholds_turn_away_the_share_that_was_asked_for() -> None:
    defense = Defense()
    defense.add_detectors(2, 0.03)
    assert defense.thresholds.tolist() == [float("inf")] * 2
    scores = torch.stack([torch.randperm(200), torch.randperm(200) * 2], 1).float()
    defense.calibrate(scores)
    assert defense.thresholds.tolist() == [193.0, 386.0]  # 194 ... 199: six of 200
    assert (scores > defense.thresholds).sum(0).tolist() == [6, 6]
    few = Defense()
    few.add_detectors(1, 0.001)
    few.calibrate(torch.arange(200.0)[:, None])
    assert few.thresholds.tolist() == [199.0]  # less than one image in 200: none
    plain = Defense()
    plain.calibrate(torch.zeros(5, 0))
    assert plain.thresholds.shape == (0,)
    with pytest.raises(ValueError, match=r"drop_rate must be in \[0, 1\)"):
        Defense().add_detectors(1, 1.0)


def test_varied() -> None:
    defense = made("defense_gan-hidden")
    images = images_for(defense)
    again = with_options(defense, steps=3, unroll=3)
    assert again.differentiable
    assert not defense.differentiable
    assert again.spec == {"name": "defense_gan", "options": {**defense.spec["options"], "steps": 3, "unroll": 3}}  # type: ignore[index]
    assert not torch.equal(again.purify(images), defense.purify(images))
    assert torch.equal(with_options(again, steps=5, unroll=0).purify(images), defense.purify(images))
    defense.calibrate(torch.rand(10, 1))
    assert torch.equal(with_options(defense, steps=2).thresholds, defense.thresholds)
    assert with_options(defense, detect=False).scores(images, classifier()).shape == (5, 0)
    with pytest.raises(ValueError, match="only a defense made by create_defense"):
        with_options(Defense())


# Trained --------------------------------------------------------------------------------------------------------------

LEARNED = [c for c in CASES if made(c).networks()]


pytestmark = pytest.mark.usefixtures("no_probe")


@pytest.fixture
def data(tiny_digits: Splits) -> Splits:
    return tiny_digits


def recipe(case: str, **training: Any) -> Any:
    name, options = CASES[case]
    fixed = {"steps": 4, "batch": 20, "precision": "float32", "memory_format": "contiguous", "checkpoint_seconds": 0}
    return resolve(
        {
            "kind": "defense",
            "dataset": "digits",
            "size": 8,
            "classifiers": ["unused"],
            "defense": {"name": name, **options},
            "adversarial_batches": {"attacks": [{"name": "fgsm", "eps": 0.2}]},
            "training": {**fixed, **training},
        }
    )


class StoppedError(Exception):
    """What kills the run."""


@pytest.mark.parametrize("case", LEARNED)
def test_a_killed_training_resumes_bit_for_bit(case: str, data: Splits, tmp_path: Path) -> None:
    def stop(step: int, _: int) -> None:
        if step == 3:
            raise StoppedError

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kept = recipe(case, validate_every=0.05, keep="best", ema=0.5)
    trained = jobs.train_defense(kept, classifier(), data, out=whole, device="cpu")
    with pytest.raises(StoppedError):
        jobs.train_defense(kept, classifier(), data, out=killed, device="cpu", progress=stop)
    steps: list[int] = []
    jobs.train_defense(
        kept, classifier(), data, out=killed, device="cpu", resume=True, progress=lambda s, _: steps.append(s)
    )
    assert steps == [3, 4]
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # It has learned something, and it knows its thresholds.
    torch.manual_seed(0)
    fresh = create_defense(kept.defense.name, channels=1, **kept.defense.options).state_dict()
    assert not [k for k, v in trained.named_parameters() if v.dim() > 1 and torch.equal(v, fresh[k])]
    assert bool(torch.isfinite(load_defense(whole).thresholds).all())


@pytest.mark.parametrize("case", LEARNED)
def test_only_who_learns_from_pairs_pays_for_them(
    case: str, data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    mixture = adversarial_batches.Mixture.__call__

    def counted(self: Any, system: System, images: Tensor, *rest: Any) -> Tensor:
        asked.append(len(images))
        return mixture(self, system, images, *rest)

    monkeypatch.setattr(adversarial_batches.Mixture, "__call__", counted)
    task = jobs.defense_task(recipe(case), data, [classifier()])
    batch = task.batch(0)
    assert asked == ([20] if task.defense.learns_from_pairs else [])
    assert torch.equal(batch.x_adv, batch.x_real) != task.defense.learns_from_pairs
    if not task.defense.learns_from_pairs:  # and it really does not look at them
        without = Batch(batch.x_real, torch.full_like(batch.x_real, float("nan")), batch.y, batch.logits_fn)
        for a, b in zip(played(task.defense, without), played(task.defense, batch)):
            assert a == b


def played(defense: Defense, batch: Batch) -> Iterator[tuple[str, dict[str, float]]]:
    torch.manual_seed(5)
    for network, terms in list(defense.losses(batch, defense.networks())):
        yield network, {k: float(v.detach()) for k, v in terms.items()}


@pytest.mark.parametrize("case", LEARNED)
def test_each_network_moves_alone(case: str) -> None:
    defense = made(case).train()
    x_real = torch.rand(10, 1, 8, 8)
    x_adv = (x_real + 0.1 * torch.randn_like(x_real)).clamp(0, 1)
    batch = Batch(x_real, x_adv, torch.arange(10), classifier())
    seen = set()
    for name, terms in defense.losses(batch, defense.networks()):
        seen.add(name)
        defense.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        for other, network in defense.networks().items():
            # Matrices and kernels: a bias before a batch norm, or at the end of a critic, has nothing to learn.
            moved = [p.grad is not None and bool(p.grad.any()) for p in network.parameters() if p.dim() > 1]
            assert all(moved) if other == name else not any(moved), (name, other)
    assert seen == set(defense.networks())


def test_thresholds_come_from_held_out_images_in_front_of_every_classifier(data: Splits, tmp_path: Path) -> None:
    kept = recipe("magnet-divergences", steps=1)
    kept = kept.model_copy(update={"defense": kept.defense.model_copy(update={"drop_rate": 0.05})})
    torch.manual_seed(8)
    other = create_classifier("resnet8", channels=1, size=8, classes=10, mean=[0.4], std=[0.3])
    other.eval().requires_grad_(False)
    defense = jobs.train_defense(kept, [classifier(), other], data, out=tmp_path, device="cpu")
    images, _ = data.val.batch(torch.arange(len(data.val)))
    scores = torch.cat([defense.scores(images, c) for c in (classifier(), other)])
    allowed = int(0.05 * len(scores))
    for column, limit in zip(scores.T, defense.thresholds):
        assert abs(int((column > limit).sum()) - allowed) <= 1  # the fast copies answer a last bit differently
    assert runs.read_json(tmp_path / "defense.json")["options"]["drop_rate"] == 0.05


def test_a_dear_defense_is_looked_at_on_few_images(
    data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    reconstruct = DefenseGAN.reconstruct

    def counted(self: DefenseGAN, images: Tensor) -> tuple[Tensor, Tensor]:
        looked.append(len(images))
        return reconstruct(self, images)

    monkeypatch.setattr(DefenseGAN, "held_out", 10)
    monkeypatch.setattr(DefenseGAN, "reconstruct", counted)
    jobs.train_defense(recipe("defense_gan-hidden", steps=1), classifier(), data, out=tmp_path, device="cpu")
    assert looked == [10, 10, 10]  # clean and attacked, to judge it, and clean for its threshold


def test_a_defense_of_another_size_is_refused_before_it_is_trained(data: Splits, tmp_path: Path) -> None:
    kept = recipe("defense_gan-hidden")
    kept = kept.model_copy(update={"defense": kept.defense.model_copy(update={"size": 16})})
    with pytest.raises(ValueError, match=r"made for 16x16 images, but those of digits are 8x8; set defense.size=8"):
        jobs.train_defense(kept, classifier(), data, out=tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


# Written down --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ape_gan", "defense_gan", "magnet"])
def test_cards(name: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / "defenses" / f"{name}.md").read_text(encoding="utf-8")
    for part in (f"# `{name}`", "**Idea.**", "**Source.**", "**What we changed, and why.**", "**Cost**"):
        assert part in text, part
    for recipe_name in re.findall(r"unperturb train ([\w-]+)", text):
        read_recipe(recipe_name, kind="defense")


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion_mnist", "cifar10"])
@pytest.mark.parametrize("name", ["ape_gan", "defense_gan", "magnet"])
def test_there_is_a_recipe_for_each_data_set(name: str, dataset: str) -> None:
    made = read_recipe(f"{name}-{dataset}", kind="defense")
    assert (made.defense.name, made.dataset) == (name, dataset)
