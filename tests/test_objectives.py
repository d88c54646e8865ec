"""Ways of training a classifier: distillation and N-FGSM by hand, and which weights an adversarial training keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unperturb import per_image_rng, runs
from unperturb.attacks import create_attack
from unperturb.classifiers import create_classifier, save_classifier
from unperturb.config import Augmentation, resolve
from unperturb.data import Splits
from unperturb.recipe_files import read_recipe
from unperturb.training import jobs, loop
from unperturb.training.adversarial_batches import Sampler
from unperturb.training.objectives import (
    AdversarialClassifier,
    DistilledClassifier,
    NFGSMClassifier,
    PlainClassifier,
    TradesClassifier,
)

DATASETS = ("mnist", "fashion_mnist", "cifar10", "digits")


pytestmark = pytest.mark.usefixtures("no_probe")


@pytest.fixture
def data(tiny_digits: Splits) -> Splits:
    return tiny_digits


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])


def sampler(data: Splits, batch: int = 16) -> Sampler:
    return Sampler(data.train, batch, 5, Augmentation(), torch.device("cpu"))


def only(task: PlainClassifier, batch: Any) -> torch.Tensor:
    ((network, terms),) = task.losses(batch, task.networks())
    assert network == "classifier"
    return terms["cross_entropy"].detach()


def recipe(objective: dict[str, Any], **training: Any) -> Any:
    fixed = {"steps": 12, "batch": 32, "precision": "float32", "memory_format": "contiguous", "lr": 3e-3}
    return resolve(
        {
            "kind": "classifier",
            "dataset": "digits",
            "size": 8,
            "classifier": {"name": "convnet"},
            "objective": objective,
            "training": {**fixed, **training},
        }
    )


# Distillation --------------------------------------------------------------------------------------------------------


def teacher(folder: Path, temperature: float | None = 20.0, seed: int = 1) -> nn.Module:
    kept = net(seed)
    save_classifier(folder, kept)
    objective = {"name": "plain"} | ({} if temperature is None else {"temperature": temperature})
    runs.write_json(folder / "recipe.json", {"objective": objective})
    return kept.eval()


def test_the_loss_at_a_temperature(data: Splits) -> None:
    task = PlainClassifier(net(), sampler(data), temperature=7.0)
    images, labels = task.batch(0)
    assert torch.equal(only(task, (images, labels)), F.cross_entropy(task.classifier(images) / 7, labels).detach())
    with pytest.raises(ValueError, match="temperature must be above 0"):
        PlainClassifier(net(), sampler(data), temperature=0.0)


def test_a_student_learns_the_teachers_probabilities(data: Splits, tmp_path: Path) -> None:
    wise = teacher(tmp_path)
    task = DistilledClassifier(net(), sampler(data), teacher=str(tmp_path), temperature=20.0)
    images, soft = task.batch(3)
    assert torch.equal(images, PlainClassifier(net(), sampler(data)).batch(3)[0])
    with torch.no_grad():
        expected = (wise(images) / 20).softmax(1)
        torch.testing.assert_close(soft, expected)
        # Cross-entropy of two distributions, and its least value: the teacher's own entropy.
        log_student = (task.classifier(images) / 20).log_softmax(1)
        torch.testing.assert_close(only(task, (images, soft)), -(expected * log_student).sum(1).mean())
        task.classifier.load_state_dict(wise.state_dict())
        torch.testing.assert_close(only(task, (images, soft)), -(expected * expected.log()).sum(1).mean())
    assert set(task.networks()) == {"classifier"}
    assert not any(p.requires_grad for p in task.teacher.parameters())


def test_teachers_that_do_not_fit(data: Splits, tmp_path: Path) -> None:
    teacher(tmp_path / "cold", None)
    with pytest.raises(ValueError, match=r"was trained at temperature 1\.0, not at 100\.0"):
        DistilledClassifier(net(), sampler(data), teacher=str(tmp_path / "cold"))
    other = create_classifier("convnet", channels=1, size=8, classes=4, mean=[0.3], std=[0.35])
    save_classifier(tmp_path / "four", other)
    with pytest.raises(ValueError, match="knows 4 classes, the data has 10"):
        DistilledClassifier(net(), sampler(data), teacher=str(tmp_path / "four"))
    runs.write_json(tmp_path / "cold" / "recipe.json", {"objective": {"temperature": [2]}})
    with pytest.raises(runs.RunError, match=r"recipe.json is not what was written there: objective.temperature: "):
        DistilledClassifier(net(), sampler(data), teacher=str(tmp_path / "cold"))
    with pytest.raises(runs.RunError, match="holds no finished run"):
        DistilledClassifier(net(), sampler(data), teacher=str(tmp_path / "nowhere"))


def test_distilled_by_the_verbs(data: Splits, tmp_path: Path) -> None:
    first = recipe({"name": "plain", "temperature": 30})
    jobs.train_classifier(first, data, out=tmp_path / "teacher", device="cpu")
    second = recipe({"name": "distilled", "teacher": str(tmp_path / "teacher"), "temperature": 30})
    student, outcome = jobs.train_classifier(second, data, out=tmp_path / "student", device="cpu")
    assert set(outcome.validation) == {"score"}
    assert student(data.val.batch(torch.arange(3))[0]).shape == (3, 10)


def test_a_saturated_softmax_hides_the_gradient_and_the_margin_does_not(data: Splits) -> None:
    # What distillation does to an attacker, made by hand: logits a thousand times larger.
    images, _ = data.val.batch(torch.arange(20))
    plain = net().eval()

    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1e5 * plain(x)

    labels = plain(images).argmax(1)
    blind = create_attack("fgsm", eps=0.3).run(Large(), images, labels)
    seeing = create_attack("fgsm", eps=0.3, loss="margin").run(Large(), images, labels)
    assert int((blind.zero_gradients > 0).sum()) >= 15
    assert int((seeing.zero_gradients > 0).sum()) == 0


# N-FGSM --------------------------------------------------------------------------------------------------------------


def test_nfgsm_by_hand(data: Splits) -> None:
    task = NFGSMClassifier(net().train(), sampler(data), eps="16/255", noise=2.0, alpha=1.0)
    images, labels, index = sampler(data).images(2)
    found, same = task.batch(2)
    assert torch.equal(same, labels)
    eta = 2 * 16 / 255 * (2 * per_image_rng.uniform(5 + 7_919, index, 2, (1, 8, 8)) - 1)
    start = (images + eta).clamp(0, 1).requires_grad_()
    F.cross_entropy(task.classifier(start), labels).backward()
    expected = (start.detach() + 16 / 255 * start.grad.sign()).clamp(0, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected)
    # It leaves the ball, which is the point of it, but not the range of images.
    assert 16 / 255 < float((found - images).abs().max()) <= 3 * 16 / 255 + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert task.classifier.training
    assert all(p.requires_grad and p.grad is not None for p in task.classifier.parameters())
    assert torch.equal(task.batch(2)[0], found)
    assert not torch.equal(task.batch(3)[0], found)


def test_without_noise_it_is_fgsm(data: Splits) -> None:
    task = NFGSMClassifier(net(), sampler(data), eps=0.1, noise=0.0)
    images, labels, _ = sampler(data).images(0)
    expected = create_attack("fgsm", eps=0.1)(task.classifier, images, labels)
    torch.testing.assert_close(task.batch(0)[0], expected)


def test_perturbations_grow_along_the_ramp(data: Splits) -> None:
    attacks = [{"name": "fgsm", "eps": 0.2}]
    whole = AdversarialClassifier(net(), sampler(data), attacks=attacks)
    ramped = AdversarialClassifier(net(), sampler(data), attacks=attacks, ramp=10)
    for step, part in ((0, 0.1), (4, 0.5), (9, 1.0), (30, 1.0)):
        images, _, _ = sampler(data).images(step)
        grown, full = ramped.batch(step)[0] - images, whole.batch(step)[0] - images
        torch.testing.assert_close(grown, part * full)


# TRADES --------------------------------------------------------------------------------------------------------------


def test_trades_by_hand(data: Splits) -> None:
    attacks = [{"name": "pgd", "eps": 0.1, "steps": 2}]
    task = TradesClassifier(net(), sampler(data), attacks=attacks, beta=3.0)
    images, labels = task.batch(1)
    clean, _, _ = sampler(data).images(1)
    attacked, same = AdversarialClassifier(net(), sampler(data), attacks=attacks).batch(1)
    assert torch.equal(same, labels)
    assert len(images) == 2 * len(labels)
    torch.testing.assert_close(images, torch.cat([clean, attacked]))
    ((name, terms),) = task.losses((images, labels), {"classifier": task.classifier})
    p, q = task.classifier(clean).softmax(1), task.classifier(attacked).softmax(1)
    assert name == "classifier"
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(task.classifier(clean), labels))
    torch.testing.assert_close(terms["divergence"], 3 * (p * (p / q).log()).sum(1).mean())
    # Nothing is to be gained where the two are one image.
    ((_, still),) = task.losses((torch.cat([clean, clean]), labels), {"classifier": task.classifier})
    assert float(still["divergence"].detach()) == pytest.approx(0, abs=1e-6)


def test_trades_perturbations_grow_and_a_beta_below_nothing_is_refused(data: Splits) -> None:
    attacks = [{"name": "fgsm", "eps": 0.2}]
    images, _ = TradesClassifier(net(), sampler(data), attacks=attacks, ramp=10).batch(4)
    whole, _ = TradesClassifier(net(), sampler(data), attacks=attacks).batch(4)
    (clean, grown), (_, full) = images.chunk(2), whole.chunk(2)
    torch.testing.assert_close(grown - clean, 0.5 * (full - clean))
    with pytest.raises(ValueError, match="beta must not be below 0, not -1"):
        TradesClassifier(net(), sampler(data), attacks=attacks, beta=-1)


# What is kept --------------------------------------------------------------------------------------------------------


def test_the_val_attack_is_pgd_20_at_the_highest_budget(data: Splits) -> None:
    mixture = [{"name": "fgsm", "eps": "8/255"}, {"name": "pgd", "eps": {"uniform": [0.1, 0.2]}, "steps": 3}]
    of = {
        0.2: AdversarialClassifier(net(), sampler(data), attacks=mixture),
        0.1: NFGSMClassifier(net(), sampler(data), eps=0.1),
    }
    for eps, task in of.items():
        assert task.val_attacks() == {"pgd": create_attack("pgd", eps=eps, steps=20)}
    val_attack = {"name": "fgsm", "eps": 0.3}
    own = AdversarialClassifier(net(), sampler(data), attacks=mixture, val_attack=val_attack)
    assert own.val_attacks() == {"fgsm": create_attack("fgsm", eps=0.3)}
    assert PlainClassifier(net(), sampler(data)).val_attacks() == {}


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "adversarial", "attacks": [{"name": "pgd", "eps": 0.1, "steps": 2}]},
        {"name": "trades", "beta": 2.0, "attacks": [{"name": "pgd", "eps": 0.1, "steps": 2}]},
        {"name": "nfgsm", "eps": 0.1},
    ],
    ids=lambda o: o["name"],
)
def test_validation_is_under_attack_and_decides(objective: dict[str, Any], data: Splits, tmp_path: Path) -> None:
    every = 4 * 32 / len(data.train)
    kept = recipe(objective, keep="best", validate_every=every)
    trained, outcome = jobs.train_classifier(kept, data, out=tmp_path, device="cpu")
    images, labels = data.val.batch(torch.arange(len(data.val)))
    pgd = create_attack("pgd", eps=0.1, steps=20)
    x_adv = pgd(trained, images, labels, index=data.val.index)
    by_hand = {
        "clean": float((trained(images).argmax(1) == labels).float().mean()),
        "pgd": float((trained(x_adv).argmax(1) == labels).float().mean()),
    }
    found = outcome.validation
    assert found["clean"] == pytest.approx(by_hand["clean"], abs=1e-4)
    assert found["pgd"] == pytest.approx(by_hand["pgd"], abs=2.1 / len(images))  # the order of images is another
    assert found["score"] == min(found["clean"], found["pgd"])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["validation"]["score"] for line in lines if "validation" in line}
    assert list(scores) == [4, 8, 12]
    assert scores[outcome.kept_step] == max(scores.values()) == found["score"]


def test_a_robustness_lost_overnight_is_not_what_is_kept(data: Splits, tmp_path: Path) -> None:
    # Catastrophic overfitting by hand: clean accuracy only rises, accuracy under attack falls after the second look.
    clean, robust = iter([0.5, 0.7, 0.9]), iter([0.3, 0.4, 0.0])

    class Judged(NFGSMClassifier):
        pass

    task = Judged(net(), sampler(data), eps=0.1)

    def validate() -> dict[str, float]:
        figures = {"clean": next(clean), "pgd": next(robust)}
        return {**figures, "score": min(figures.values())}

    plan = recipe({"name": "nfgsm", "eps": 0.1}, keep="best", validate_every=4 * 16 / len(data.train), batch=16)
    outcome = loop.train(task, plan.training, tmp_path, device="cpu", validate=validate)
    assert outcome.kept_step == 8
    assert outcome.validation["pgd"] == 0.4


@pytest.mark.parametrize("dataset", DATASETS)
def test_each_data_set_has_its_recipes(dataset: str) -> None:
    first, second, third = (read_recipe(f"{k}-{dataset}") for k in ("teacher", "distilled", "adversarial"))
    assert first.objective.options == {"temperature": 100}
    assert second.objective.options == {"teacher": f"runs/teacher-{dataset}", "temperature": 100}
    assert first.classifier == second.classifier
    assert third.training.keep == "best"
    eps = {"mnist": 0.3, "fashion_mnist": 0.1, "cifar10": "8/255", "digits": 0.3}[dataset]
    if dataset == "cifar10":
        assert (third.objective.name, third.objective.options["eps"]) == ("nfgsm", eps)
    else:
        assert third.objective.options["attacks"][0]["attack"]["eps"] == eps
