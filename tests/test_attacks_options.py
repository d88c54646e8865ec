"""What a call of an attack may be given: start points, a mask, answers of 8 bits, losses of one's own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.attacks import attacks, create_attack
from unperturb.attacks.apgd import TargetedLoss
from unperturb.attacks.context import SHARED, PerImage
from unperturb.attacks.kinds import BallAttack, Best
from unperturb.attacks.losses import margin
from unperturb.attacks.projections import project_, to_8_bit

CLASSES = 4
SMALL: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 6},
    "apgd-t": {"steps": 4, "target_classes": 2},
    "autoattack": {"steps": 4, "target_classes": 2, "queries": 12},
    "cw": {"steps": 12, "search_steps": 2},
    "ddn": {"steps": 12},
    "deepfool": {"steps": 8},
    "di_fgsm": {"steps": 4},
    "fab-t": {"steps": 4, "target_classes": 2, "restarts": 2},
    "hop_skip_jump": {"queries": 120, "evaluations": 10},
    "mim": {"steps": 4},
    "ni_fgsm": {"steps": 4},
    "patch": {"area": 0.1, "steps": 4},
    "pgd": {"steps": 4, "restarts": 2},
    "rays": {"queries": 30},
    "si_ni_fgsm": {"steps": 4, "copies": 2},
    "sparse_rs": {"queries": 12},
    "square": {"queries": 12},
    "vmi_fgsm": {"steps": 4, "samples": 2},
}
BALLS = [name for name in attacks if issubclass(attacks[name], BallAttack)]  # type: ignore[arg-type]
STARTING = [name for name in attacks if attacks[name].uses_start]  # type: ignore[attr-defined]
MASKING = [name for name in attacks if attacks[name].uses_mask]  # type: ignore[attr-defined]
both_norms = pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.5)])


def make(name: str, **options: Any) -> Any:
    ball = {"eps": 0.06} if name in BALLS else {}
    return create_attack(name, **{**SMALL.get(name, {}), **ball, **options})


class Bent(nn.Module):
    """One hidden layer of ReLU by products and sums of one image at a time: no kernel that rounds by the batch."""

    def __init__(self, seed: int = 0, hidden: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = torch.randn(hidden, 64, generator=generator) / 2
        self.outer = torch.randn(CLASSES, hidden, generator=generator)
        self.bias = torch.randn(CLASSES, generator=generator) / 10

    def forward(self, x: Tensor) -> Tensor:
        hidden = ((x.flatten(1) - 0.5)[:, None] * self.inner).sum(-1).relu()
        return (hidden[:, None] * self.outer).sum(-1) + self.bias


class Recording:
    """A model that keeps what it was shown."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.shown = model, list[Tensor]()

    def __call__(self, x: Tensor) -> Tensor:
        self.shown.append(x.detach().clone())
        answer: Tensor = self.model(x)
        return answer


def some_images(n: int = 12, seed: int = 1) -> Tensor:
    """8-bit images, the first black, the second white."""
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed)).float() / 255
    images[:1], images[1:2] = 0, 1
    return images


def far(x: Tensor, images: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm((x - images).double().flatten(1), 2 if norm == "l2" else torch.inf, dim=1)


# Start points --------------------------------------------------------------------------------------------------------


def test_which_attacks_begin_where_they_are_told() -> None:
    iterated = ["di_fgsm", "mim", "ni_fgsm", "pgd", "si_ni_fgsm", "vmi_fgsm"]
    others = ["apgd", "apgd-t", "autoattack", "fab-t", "hop_skip_jump", "rays", "square"]
    assert sorted(iterated + others) == STARTING


@both_norms
@pytest.mark.parametrize("name", [n for n in STARTING if n in BALLS])
def test_a_start_is_brought_into_the_ball_shown_to_the_model_and_never_given_up(
    name: str, norm: str, eps: float
) -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    # The end of a long climb, and a point far outside the ball.
    strong = create_attack("pgd", norm=norm, eps=eps, steps=60, loss="margin")(model, images, labels, seed=9)
    outside = (images + 3 * (strong - images)).clamp(0, 1)
    for start in (strong, outside):
        inside = project_(start, images, eps, norm)  # type: ignore[arg-type]
        lead = margin(model(inside), labels)
        watched = Recording(model)
        result = make(name, norm=norm, eps=eps).run(watched, images, labels, start=start)
        # What fell at the clean image is not asked about again.
        left = [k for k in range(len(images)) if name != "autoattack" or result.broken_by[k] != "clean"]
        shown = torch.cat(watched.shown[:-2])
        assert all(float((shown - inside[k]).abs().flatten(1).amax(1).min()) < 1e-6 for k in left)
        assert float(far(result.images, images, norm).max()) <= eps * (1 + 1e-6) + 1e-7
        clear = lead > 1e-4
        assert bool(clear.any())
        assert bool(result.success[clear].all())
        # By the margin no worse than the start, where that is what is maximized.
        best = make(name, norm=norm, eps=eps, loss="margin").run(model, images, labels, start=start)
        stands = ~best.success
        assert bool((margin(model(best.images), labels) >= lead - 1e-5)[stands].all())


@pytest.mark.parametrize("name", [n for n in attacks if n not in STARTING])
def test_who_has_no_use_for_a_start_takes_no_notice(name: str) -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    start = (images + 0.05).clamp(0, 1)
    assert torch.equal(make(name)(model, images, labels, start=start), make(name)(model, images, labels))


@pytest.mark.parametrize(("name", "norm"), [("fab-t", "linf"), ("fab-t", "l2"), ("rays", "linf")])
def test_a_minimal_attack_shrinks_a_success_that_it_is_given(name: str, norm: str) -> None:
    for seed in range(3):
        model, images = Bent(seed), some_images(16, seed)
        labels = model(images).argmax(1)
        start = create_attack("pgd", norm=norm, eps=0.25 if norm == "linf" else 2.5)(model, images, labels)
        fooled = margin(model(start), labels) > 1e-3
        options = {"norm": norm, "steps": 1, "restarts": 1} if name == "fab-t" else {"queries": 5}
        least = create_attack(name, **{**options, **({"queries": 2} if name == "rays" else {})})
        result = least.run(model, images, labels, start=start)
        assert bool(fooled.any())
        assert bool(result.success[fooled].all())
        assert bool((far(result.images, images, norm) <= far(start, images, norm) + 1e-6)[fooled].all())
        # With more to spend it comes nearer, and no less near than it does by itself, up to how it searches.
        longer = {"steps": 30} if name == "fab-t" else {"queries": 600}
        found = create_attack(name, **{**options, **longer}).run(model, images, labels, start=start)
        shorter = far(found.images, images, norm) < 0.98 * far(start, images, norm)
        assert float(shorter[fooled].float().mean()) > 0.9
        assert bool(found.success[fooled].all())


@pytest.mark.parametrize("name", ["fab-t", "rays"])
def test_a_start_that_is_no_success_is_no_harm_to_a_minimal_attack(name: str) -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    start = images.clone()
    options = {"steps": 20} if name == "fab-t" else {"queries": 300}
    plain = create_attack(name, **options).run(model, images, labels)
    begun = create_attack(name, **options).run(model, images, labels, start=start)
    assert bool((begun.success >= plain.success).all())
    assert begun.forwards == plain.forwards + (name == "fab-t")  # rays counts it among its queries


@pytest.mark.parametrize(("name", "eps"), [("fab-t", 0.1), ("rays", 0.1)])
def test_a_start_within_the_budget_is_enough(name: str, eps: float) -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    start = create_attack("pgd", eps=0.9 * eps, steps=40)(model, images, labels)
    fooled = margin(model(start), labels) > 1e-3
    options = {"steps": 1, "first_success": True} if name == "fab-t" else {"queries": 2}
    result = create_attack(name, eps=eps, **options).run(model, images, labels, start=start)
    assert bool(result.success[fooled].all())
    assert float(far(result.images, images, "linf").max()) <= eps * (1 + 1e-6)


def test_autoattack_names_the_start_that_broke_an_image() -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    labels[3] = (labels[3] + 1) % CLASSES
    start = create_attack("pgd", eps=0.06, steps=60, loss="margin")(model, images, labels)
    clear = margin(model(start), labels) > 1e-3
    result = make("autoattack").run(model, images, labels, start=start)
    assert result.broken_by[3] == "clean"
    assert {result.broken_by[k] for k in range(12) if k != 3 and clear[k]} == {"start"}
    assert "start" not in make("autoattack").run(model, images, labels).broken_by


@pytest.mark.parametrize("name", STARTING)
def test_each_start_stays_with_its_image(name: str) -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    start = create_attack("pgd", eps=0.06, steps=3)(model, images, labels)
    attack, index = make(name), torch.arange(12) * 3
    whole = attack(model, images, labels, start=start, index=index)
    for rows in torch.tensor([4, 1, 5, 0, 2, 3, 11, 7, 8, 6, 10, 9]).split([2, 7, 3]):
        part = attack(model, images[rows], labels[rows], start=start[rows], index=index[rows])
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=2e-5)


def test_what_is_no_start() -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    for name in ("pgd", "cw"):
        for start, said in (
            (images[:5], "start must have the images' shape"),
            (images - 0.5, r"must lie in \[0, 1\]"),
            (images.masked_fill(images == images[3, 0, 2, 2], torch.nan), "NaN"),
        ):
            with pytest.raises(ValueError, match=said):
                make(name)(model, images, labels, start=start)


# Masks ---------------------------------------------------------------------------------------------------------------


def test_which_attacks_keep_pixels_as_they_are() -> None:
    iterated = ["di_fgsm", "mim", "ni_fgsm", "pgd", "si_ni_fgsm", "vmi_fgsm"]
    assert sorted(["apgd", "apgd-t", "fgsm", *iterated]) == MASKING


@both_norms
@pytest.mark.parametrize("name", MASKING)
def test_masked_pixels_never_change(name: str, norm: str, eps: float) -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    mask = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    start = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    first = {"first_success": True} if name.startswith("apgd") else {}
    for options in ({}, {"start": start}, {"quantize": True}):
        attack = make(name, norm=norm, eps=eps, **first)
        result = attack.run(model, images, labels, mask=mask, **options)
        assert torch.equal(result.images[~mask], images[~mask])
        assert float(far(result.images, images, norm).max()) <= eps * (1 + 1e-6) + 1e-7
        moved = ((result.images - images).abs() > 1e-4) & mask
        assert bool(moved.flatten(1).any(1).all())
        assert torch.equal(result.success, model(result.images).argmax(1) != labels)
        if name != "si_ni_fgsm":  # of the white image it shows a half, where all of `Bent` is at rest
            assert int(result.zero_gradients.sum()) == 0  # a mask says nothing of the model


@pytest.mark.parametrize("name", ["fgsm", "pgd", "mim", "ni_fgsm", "si_ni_fgsm", "vmi_fgsm", "apgd"])
def test_the_optimum_of_a_linear_model_under_a_mask(name: str) -> None:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor) -> Tensor:
        lead = (x.flatten(1) * weight).sum(1)
        return torch.stack([lead, -lead], 1)

    images, labels = some_images(), torch.zeros(12, dtype=torch.int64)
    mask = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.3
    way = torch.where(mask, -weight.sign().reshape(1, 8, 8), 0.0)
    options = {"steps": 30} if name in ("pgd", "apgd") else {}
    found = create_attack(name, eps=0.1, loss="margin", **options)(model, images, labels, mask=mask)
    torch.testing.assert_close(found, (images + 0.1 * way).clamp(0, 1), rtol=0, atol=2e-6)


def test_a_masked_random_start_lies_in_the_ball_of_the_free_pixels() -> None:
    def constant(x: Tensor) -> Tensor:
        return torch.stack([0 * x.sum((1, 2, 3)), 0 * x.sum((1, 2, 3)) - 1], 1)

    images = torch.full((400, 1, 8, 8), 0.5)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :2, :2] = True
    watched = Recording(constant)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="exactly zero"):
        create_attack("pgd", norm="l2", eps=0.3, steps=1)(
            watched, images, torch.zeros(400, dtype=torch.int64), mask=mask
        )
    share = far(watched.shown[0], images, "l2") / 0.3
    # Uniform in a ball of 4 dimensions: the fourth power of the radius is uniform in [0, 1].
    assert float(share.max()) <= 1 + 1e-5
    assert float((share**4).mean()) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("shape", [(12, 1, 8, 8), (1, 1, 8, 8), (8, 8), (1, 8, 8), (8,), ()])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64, torch.uint8])
def test_shapes_and_types_of_a_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    mask = torch.ones(shape, dtype=dtype)
    expected = make("pgd")(model, images, labels)
    assert torch.equal(make("pgd")(model, images, labels, mask=mask), expected)
    assert torch.equal(make("pgd")(model, images, labels, mask=torch.zeros_like(mask)), images)


def test_what_is_no_mask() -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    for mask, said in (
        (torch.full((1, 8, 8), 0.5), "hold 0 and 1 alone"),
        (torch.ones(3, 8, 8), r"broadcasts to the images \(12, 1, 8, 8\), such as \(12, 1, 8, 8\), not \(3, 8, 8\)"),
        (torch.ones(1, 12, 1, 8, 8), "broadcasts to the images"),
        ("corner", "broadcasts to the images .* not str"),
    ):
        with pytest.raises(ValueError, match=said):
            make("pgd")(model, images, labels, mask=mask)
    for name in set(attacks) - set(MASKING):
        with pytest.raises(ValueError, match="cannot keep pixels as they are: mask is for attacks that follow"):
            make(name)(model, images, labels, mask=torch.ones(8, 8))


# 8 bits --------------------------------------------------------------------------------------------------------------


def is_8_bit(x: Tensor) -> bool:
    return torch.equal(x, (x * 255).round() / 255)


@pytest.mark.parametrize("name", list(attacks))
@both_norms
def test_an_answer_of_8_bits_is_in_the_ball_and_what_it_is_said_to_be(name: str, norm: str, eps: float) -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    ball = {"norm": norm, "eps": eps} if name in BALLS else {}
    attack = make(name, **ball)
    result = attack.run(model, images, labels, quantize=True)
    assert is_8_bit(result.images)
    assert torch.equal(result.images, attack(model, images, labels, quantize=True))
    assert torch.equal(result.success, result.success_8bit)
    assert torch.equal(result.success, model(result.images).argmax(1) != labels)
    if name in BALLS:
        assert float(far(result.images, images, norm).max()) <= eps * (1 + 1e-6) + 1e-7
    plain = attack(model, images, labels)
    assert float((result.images - plain).abs().max()) <= 1 / 255 + 1e-6


def test_linf_rounds_each_pixel_to_the_nearest_level_in_the_ball() -> None:
    generator = torch.Generator().manual_seed(0)
    for eps in (8 / 255, 0.3, 0.1234, 0.5 / 255):
        for whole in (True, False):
            center = torch.rand(4, 3, 5, 5, generator=generator)
            center = (center * 255).round() / 255 if whole else center
            x = project_(center + eps * (4 * torch.rand(center.shape, generator=generator) - 2), center, eps, "linf")
            found = to_8_bit(x, center, eps, "linf")
            levels = np.arange(256)[:, None] / 255
            allowed = np.abs(levels - center.double().flatten().numpy()) <= eps + 1e-7
            cost = np.where(allowed, np.abs(levels - x.double().flatten().numpy()), np.inf)
            off = np.abs(found.double().flatten().numpy() - x.double().flatten().numpy())
            np.testing.assert_allclose(off, cost.min(0), atol=1e-6)  # ties may go either way
            assert is_8_bit(found)


def test_l2_rounds_back_no_more_pixels_than_it_must() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        center = (torch.rand(1, 1, 2, 4, generator=generator) * 255).round() / 255
        eps = 0.03
        x = project_(center + 0.1 * torch.randn(center.shape, generator=generator), center, eps, "l2")
        found = to_8_bit(x, center, eps, "l2")
        assert is_8_bit(found)
        assert float(far(found, center, "l2")) <= eps + 1e-7
        # Brute force over both neighbors of every pixel: how many must leave their nearest level.
        flat, nearest = (x.double() * 255).flatten(), (x.double() * 255).round().flatten()
        fewest = 8
        for ups in itertools.product((0, 1), repeat=8):
            tried = flat.floor() + torch.tensor(ups, dtype=torch.float64)
            if float((tried / 255 - center.double().flatten()).norm()) <= eps:
                fewest = min(fewest, int((tried != nearest).sum()))
        assert int(((found.double() * 255).round().flatten() != nearest).sum()) == fewest


def test_without_a_ball_each_pixel_goes_to_its_nearest_level() -> None:
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_8_bit(x, x, None, "linf"), (x * 255).round() / 255)


def test_a_ball_without_an_8_bit_image_says_so() -> None:
    model, images = Bent(), some_images() * 0.9 + 0.05
    labels = model(images).argmax(1)
    for norm in ("linf", "l2"):
        with pytest.raises(ValueError, match=r"no 8-bit image was found within eps .* Round them first"):
            create_attack("pgd", norm=norm, eps=1e-4)(model, images, labels, quantize=True)


# Losses of one's own -------------------------------------------------------------------------------------------------


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.double(), labels, reduction="none")


OWN = ["apgd", "di_fgsm", "fgsm", "mim", "ni_fgsm", "noise", "patch", "pgd", "si_ni_fgsm", "vmi_fgsm"]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("targeted", [False, True])
def test_a_loss_of_ones_own_is_climbed_as_the_same_one_built_in(name: str, targeted: bool) -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    targets = (labels + 1) % CLASSES if targeted else None
    more = {"num_trials": 3} if name == "noise" else {}
    own = make(name, loss=plain_cross_entropy, **more)
    built_in = make(name, loss="cross_entropy", **more)
    found = own(model, images, labels, targets=targets)
    assert torch.equal(found, built_in(model, images, labels, targets=targets))
    assert "loss=plain_cross_entropy" in repr(own)
    assert (own.holds_own, built_in.holds_own) == (True, False)


def test_a_loss_may_be_any_callable() -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)

    class Scaled(nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return 3 * margin(logits, labels)

    expected = make("pgd", loss="margin")(model, images, labels)
    for loss, name in (
        (Scaled(), "Scaled"),
        (partial(plain_cross_entropy), "partial"),
        (lambda z, y: margin(z, y), "<lambda>"),
    ):
        attack = make("pgd", loss=loss)
        assert f"loss={name}" in repr(attack)
        if name != "partial":
            assert torch.equal(attack(model, images, labels), expected)
    # Equal text, other function: not the same attack.
    one, two = (make("pgd", loss=lambda z, y, k=k: k * margin(z, y)) for k in (1, 2))
    assert repr(one) == repr(two)
    assert one != two
    assert one == create_attack("pgd", **{**SMALL["pgd"], "eps": 0.06, "loss": one.loss})


def test_what_is_no_loss() -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        return margin(logits, labels).mean()

    def detached(logits: Tensor, labels: Tensor) -> Tensor:
        return margin(logits.detach(), labels)

    with pytest.raises(ValueError, match=r"the loss mean must give one number per image, \(12,\), it gave \(\)"):
        make("pgd", loss=mean)(model, images, labels)
    with pytest.raises(ValueError, match="the loss detached gives no gradient"):
        make("pgd", loss=detached)(model, images, labels)
    for name in ("pgd", "patch"):
        for wrong in ("hinge", 3, None):
            with pytest.raises(ValueError, match=r"loss must be one of cross_entropy, margin, dlr, or a function"):
                make(name, loss=wrong)
    for name in ("apgd-t", "autoattack", "square"):
        with pytest.raises(ValueError, match="loss"):
            make(name, loss=margin)


# What is kept of each image ------------------------------------------------------------------------------------------


def test_images_leave_with_all_that_is_theirs() -> None:
    @dataclass
    class State(PerImage):
        x: Tensor
        best: Best
        loss: Any
        note: str
        size: Tensor
        table: Tensor = field(metadata=SHARED)
        start: Tensor | None = None

    x = torch.arange(5.0)[:, None, None, None].expand(5, 1, 2, 2).clone()
    best = Best(x)
    best.update(x, torch.arange(5.0) * 10)
    state = State(x, best, TargetedLoss(torch.arange(5), False), "shared", torch.arange(5), torch.zeros(7))
    for rows in (torch.tensor([3, 1]), torch.tensor([False, True, False, True, False])):
        part = state.select(rows)
        kept = torch.arange(5)[rows]
        assert torch.equal(part.x[:, 0, 0, 0], kept.float())
        assert torch.equal(part.best.images, part.x)
        assert torch.equal(part.best.value, kept.double() * 10)
        assert torch.equal(part.loss.target_class, kept)
        assert torch.equal(part.size, kept)
        assert part.table is state.table
        assert (part.note, part.start) == ("shared", None)
    assert len(state.x) == len(state.best.value) == 5  # the whole is as it was


def test_a_tensor_of_another_length_is_an_error() -> None:
    @dataclass
    class State(PerImage):
        x: Tensor
        value: Tensor

    with pytest.raises(ValueError, match="value has 4 entries, the tensors beside it 5"):
        State(torch.zeros(5), torch.zeros(4)).select(torch.tensor([0]))


# Occlusion -----------------------------------------------------------------------------------------------------------


def test_occlusion_covers_squares_of_its_area_and_nothing_else() -> None:
    model, images = Bent(), some_images()
    labels = model(images).argmax(1)
    for count, area, side in ((1, 0.15, 3), (2, 0.15, 3), (1, 1.0, 8), (3, 0.001, 1)):
        attack = create_attack("occlusion", area=area, count=count, fill=0.25)
        found = attack(model, images, labels, seed=1)
        changed = (found != images).any(1)
        assert bool((found[changed[:, None].expand_as(found)] == 0.25).all())
        sizes = changed.flatten(1).sum(1)
        assert int(sizes.max()) <= count * side**2
        assert int(sizes.min()) >= side**2 - 1  # a pixel may have been of that grey
        if count == 1:
            for one in changed:
                rows, columns = one.any(1).nonzero()[:, 0], one.any(0).nonzero()[:, 0]
                assert len(rows) <= side
                assert len(columns) <= side
    first, second = (create_attack("occlusion")(model, images, labels, seed=s) for s in (0, 1))
    assert not torch.equal(first, second)
    tried = create_attack("occlusion", area=0.3, num_trials=20).run(model, images, labels)
    assert int(tried.success.sum()) >= int(
        create_attack("occlusion", area=0.3).run(model, images, labels).success.sum()
    )


@pytest.mark.parametrize(("wrong", "said"), [({"area": 0}, "area"), ({"count": 0}, "count"), ({"fill": 2}, "fill")])
def test_an_occlusion_that_cannot_be(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_attack("occlusion", **wrong)
