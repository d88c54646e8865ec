"""What a second reading of the evaluation found: each wrong verdict of then, with the right one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unperturb as up
from unperturb.benchmarking import benchmark_plan
from unperturb.data import ImageSet, as_image_set
from unperturb.results.flags import flags_of
from unperturb.results.render import compare_pair
from unperturb.runs import RunError

THREAT = up.ThreatModel("linf", 0.1)


class Net(nn.Module):
    def __init__(self, seed: int = 0, *, noise: float = 0.0, gradient: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 36, generator=generator))
        self.noise, self.gradient = noise, gradient

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            logits = (images.flatten(1) - 0.5) @ self.weight.T
            return logits + self.noise * torch.randn_like(logits)


def images_of(seed: int = 0, n: int = 40) -> ImageSet:
    """Images that `Net()` is right about."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 6, 6), generator=generator) / 255
    with torch.no_grad():
        return as_image_set((images, Net()(images).argmax(1)), name="made up")


def pgd(**options: Any) -> up.Attack:
    return up.create_attack("pgd", eps=0.1, steps=5, **options)


def test_doubts_travel_with_rows_whose_folder_is_gone() -> None:
    rows = up.evaluate(images_of(), {"net": Net(noise=0.5)}, [pgd()], ["oblivious"], quiet=True)
    assert "random-answers" in [flag.name for flag in flags_of(up.Results(rows))]


@pytest.mark.parametrize("turned", [False, True])
def test_each_classifier_has_doubts_of_its_own(turned: bool) -> None:
    nets = [Net(0), Net(1, noise=0.5)]
    systems = [up.System("undefended", net) for net in (reversed(nets) if turned else nets)]
    rows = up.evaluate(images_of(), systems, [pgd()], ["oblivious"], quiet=True)
    (flag,) = (flag for flag in flags_of(up.Results(rows)) if flag.name == "random-answers")
    assert len(flag.classifiers) == 1
    assert flag.classifiers[0].endswith("-2") is not turned


def test_a_success_that_was_found_is_one_in_the_rows() -> None:
    data, net = images_of(n=100), Net()
    fab = up.create_attack("fab-t", eps=0.1, target_classes=2)
    x, y = data.batch(torch.arange(len(data)))
    stands = 1 - float(fab.run(net, x, y, index=data.index).success.float().mean())
    rows = up.evaluate(data, {"net": net}, {"fab": fab}, ["oblivious"], quiet=True)
    found = 1 - float((rows["pred_pure_adv"] != rows["label"]).mean())
    assert 0 < stands < 1
    assert found == pytest.approx(stands, abs=0.02)


def test_another_attack_of_ones_own_is_not_taken_for_the_first(tmp_path: Path) -> None:
    def own(sign: float) -> up.Attack:
        return pgd(loss=lambda logits, labels: sign * F.cross_entropy(logits, labels, reduction="none"))

    up.evaluate(images_of(), {"net": Net()}, {"own": own(-1)}, ["oblivious"], out=tmp_path / "run", quiet=True)
    again, options = {"own": own(1)}, {"out": tmp_path / "run", "resume": True, "quiet": True}
    with pytest.raises(RunError, match="own holds code of your own"):
        up.evaluate(images_of(), {"net": Net()}, again, ["oblivious"], **options)  # type: ignore[arg-type]


def test_one_name_is_one_model(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    for name in ("convnet", "lenet5"):
        net = up.create_classifier(name, channels=1, size=28, classes=10, mean=[0.5], std=[0.5])
        data = as_image_set((torch.zeros(4, 1, 28, 28), torch.arange(4)))
        noise = [up.create_attack("noise", eps=0.1)]
        up.evaluate(data, {"m": up.System("m", net, base=base)}, noise, ["none"], out=tmp_path / name, quiet=True)
    with pytest.raises(RunError, match=r"m is one model in .*convnet and another in .*lenet5"):
        up.Results.read(tmp_path / "convnet", tmp_path / "lenet5")


def test_images_with_other_labels_are_not_compared(tmp_path: Path) -> None:
    for seed in (0, 9):
        out = tmp_path / str(seed)
        up.evaluate(images_of(seed), {"net": Net()}, [pgd()], ["oblivious"], out=out, quiet=True)
    with pytest.raises(ValueError, match="have other labels"):
        compare_pair(tmp_path / "0", tmp_path / "9")


def test_what_gives_no_gradient_in_anothers_place_meets_no_attack_by_gradients() -> None:
    hard = up.System("hard", Net(1, gradient=False), base=Net())
    plan = benchmark_plan(hard, images_of(), eps=0.1, budget="quick")
    kinds = {attacker.knowledge for sent in plan.attackers.values() for attacker in sent}
    assert kinds == {"none", "oblivious", "black_box"}
    with pytest.raises(ValueError, match="surrogate by its gradients"):
        benchmark_plan(Net(), images_of(), eps=0.1, budget="quick", surrogate=Net(1, gradient=False))


def test_a_system_says_itself_what_its_base_is() -> None:
    with pytest.raises(ValueError, match="a System says itself"):
        benchmark_plan(up.System("s", Net(1)), images_of(), base=Net())


def test_the_budget_of_rays_is_in_linf() -> None:
    rays = [up.create_attack("rays", eps=0.1, queries=50)]
    rows = up.evaluate(images_of(n=4), {"net": Net()}, rays, ["black_box"], quiet=True)
    assert set(rows["norm"]) == {"linf"}
    assert "rays" in up.table(rows)


@pytest.mark.parametrize("eps", [float("nan"), -3])
def test_a_budget_of_pixels_is_a_number(eps: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        up.ThreatModel("l0", eps)
