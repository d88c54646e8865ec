"""FMN in four norms: exact optima of linear models in the box, the balls it shrinks into, and foolbox's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from digit_nets import digit_net, known
from unperturb.attacks import create_attack
from unperturb.attacks.fmn import FMN, project, size_of
from unperturb.attacks.projections import project_

NORMS = ["l2", "linf", "l1", "l0"]
every_norm = pytest.mark.parametrize("norm", NORMS)


class Linear(nn.Module):
    """Two classes, whose lead is `w x + b`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.w = torch.randn(64, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        lead = ((x.flatten(1) - 0.5) * self.w).sum(1)
        return torch.stack([lead, -lead], 1)


def least(model: Linear, image: Tensor, norm: str) -> float:
    """The least norm at which the other class is met inside [0, 1], in float64."""
    x, w = image.flatten().double(), model.w.double()
    lead = float(((x - 0.5) * w).sum())
    way, slope, gap = -torch.sign(w) * (1 if lead > 0 else -1), w.abs(), abs(lead)
    room = torch.where(way > 0, 1 - x, x)
    if norm == "l0":  # the places that gain most, each all the way
        gained = (slope * room).sort(descending=True).values.cumsum(0)
        return float((gained < gap).sum() + 1)
    if norm == "l1":  # the steepest places first
        order = slope.argsort(descending=True)
        before = torch.cat([torch.zeros(1), (slope * room)[order].cumsum(0)[:-1]])
        spent = ((gap - before) / slope[order]).clamp(min=0).minimum(room[order])
        return float(spent.sum())
    low, high = 0.0, 1e3
    for _ in range(100):
        t = (low + high) / 2
        moved = (torch.full_like(room, t) if norm == "linf" else t * slope).minimum(room)
        low, high = (t, high) if float((moved * slope).sum()) < gap else (low, t)
    return float(moved.max() if norm == "linf" else moved.norm())


@every_norm
def test_it_comes_near_the_optimum_of_a_linear_model_and_never_beyond(norm: Any) -> None:
    model = Linear()
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images[:6] = images[:6].round()  # most pixels of a written digit lie on the box
    labels = model(images).argmax(1)
    result = FMN(norm=norm, steps=200).run(model, images, labels)
    optimum = torch.tensor([least(model, image, norm) for image in images])
    ratio = size_of(result.images - images, norm) / optimum
    assert bool(result.success.all())
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.median()) < (1.01 if norm != "l0" else 1.2)
    assert float(ratio.max()) < (1.1 if norm != "l0" else 2.5)  # one pixel more of two is half as many again


@every_norm
def test_what_it_projects_to_is_the_nearest_point_of_ball_and_box(norm: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 1, 3, 4, generator=generator)
    x = images + 0.7 * torch.randn(images.shape, generator=generator)
    radius = torch.full((8,), 3.0) if norm == "l0" else 0.1 + 0.3 * torch.rand(8, generator=generator)
    found = project(x, images, radius, norm)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert bool((size_of(found - images, norm) <= radius * (1 + 1e-5)).all())
    distance = (found - x).flatten(1).norm(dim=1)
    for scale in (0.01, 0.1, 1.0):
        for _ in range(200):
            near = found + scale * torch.randn(found.shape, generator=generator)
            others = project(near, images, radius, norm)
            assert bool(((others - x).flatten(1).norm(dim=1) >= distance - 1e-5).all())
    if norm != "l0":
        inside = images + 0.001 * (x - images)
        torch.testing.assert_close(project(inside, images, radius, norm), inside)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_radius_per_image_is_as_many_projections(norm: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 4, 5, generator=generator)
    x, radius = images + torch.randn(images.shape, generator=generator), torch.rand(6, generator=generator)
    alone = [project_(x[i : i + 1], images[i : i + 1], float(radius[i]), norm) for i in range(6)]
    torch.testing.assert_close(project_(x, images, radius, norm), torch.cat(alone), rtol=0, atol=1e-6)


def test_l0_counts_places_not_values() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 25, 4))
    images = torch.rand(12, 3, 5, 5)
    labels = model(images).argmax(1)
    result = FMN(norm="l0", steps=60).run(model, images, labels)
    changed = result.images != images
    places = changed.any(1).flatten(1).sum(1)
    assert bool(result.success.all())
    assert torch.equal(size_of(result.images - images, "l0").long(), places)
    assert bool((changed.flatten(1).sum(1) > places).any())  # a place is changed in more than one channel


def of_foolbox(norm: str, steps: int, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a name that scipy deprecates
        foolbox = pytest.importorskip("foolbox", reason="the oracle foolbox is not installed")

    class Projected(foolbox.attacks.L2FMNAttack):  # type: ignore[misc, name-defined]
        """Its own divides the norm by itself, and so never projects."""

        def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
            delta = (x - x0).raw
            share = (epsilon.raw / delta.flatten(1).norm(dim=1).clamp(min=1e-12)).clamp(max=1)
            return x0 + type(x)(delta * share[:, None, None, None])

    kinds = {"l2": Projected, "linf": "LInfFMNAttack", "l1": "L1FMNAttack", "l0": "L0FMNAttack"}
    kind = kinds[norm] if norm == "l2" else getattr(foolbox.attacks, str(kinds[norm]))
    wrapped = foolbox.PyTorchModel(model, (0, 1), device="cpu")
    x = kind(steps=steps).run(wrapped, images, foolbox.criteria.Misclassification(labels))
    return model(x).argmax(1) != labels, x


@every_norm
def test_it_is_no_farther_than_foolbox(norm: Any) -> None:
    model, (images, labels) = digit_net(), known(48)
    fell, theirs = of_foolbox(norm, 50, model, images, labels)
    result = FMN(norm=norm, steps=50).run(model, images, labels)
    far, their_far = size_of(result.images - images, norm), size_of(theirs - images, norm)
    both = fell & result.success
    assert int(result.success.sum()) >= max(int(fell.sum()), 46)
    assert int(both.sum()) >= 8  # behind a box, theirs takes the boundary to be nearer than it is, and stands still
    assert float(far[both].mean()) <= 1.02 * float(their_far[both].mean())
    assert float((far / their_far)[both].median()) <= 1.005


@every_norm
def test_it_leaves_a_hill_of_the_margin(norm: Any) -> None:
    class Hill(nn.Module):
        """In the mean of the picture the lead rises to a hill at 0.5, and only from 0.8 on the label loses."""

        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            lead = torch.where(mean < 0.5, 1 - mean, torch.where(mean < 0.6, mean, 3 * (0.8 - mean)))
            return torch.stack([lead, torch.zeros_like(lead)], 1)

    images, labels = 0.4 + 0.01 * torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64)
    result = FMN(norm=norm).run(Hill(), images, labels)
    assert bool(result.success.all())
    if norm != "l0":  # all pixels alike is the least in L2 and Linf, and no more in L1
        even = (0.8 - images.mean((1, 2, 3), keepdim=True)).expand_as(images)
        assert float((size_of(result.images - images, norm) / size_of(even, norm)).max()) < 1.1


def test_it_is_as_near_as_far_longer_attacks() -> None:
    model, (images, labels) = digit_net(), known(24)
    found = {
        attack.__class__.__name__: (attack(model, images, labels) - images).flatten(1).norm(dim=1)
        for attack in (FMN(steps=100), create_attack("cw", steps=60, search_steps=5), create_attack("ddn", steps=100))
    }
    assert float((found["FMN"] / torch.minimum(found["CW"], found["DDN"])).median()) < 1.02


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": "l3"}, "norm must be one of l2, linf, l1, l0, not 'l3'"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"gamma": 1.0}, "gamma in"),
        ({"alpha": 0.0}, "alpha positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_attack("fmn", **options)
