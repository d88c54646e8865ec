"""The contract of every attack: one battery, run over the registry, so a new file is tested before its author writes a
test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb import attackers
from unperturb.attacks import Attack, attacks, budget, create_attack
from unperturb.attacks.apgd import TargetedLoss
from unperturb.attacks.context import AttackContext, NoGradientError
from unperturb.attacks.kinds import BallAttack, Best, MinimalAttack
from unperturb.attacks.losses import LOSSES, margin
from unperturb.modules import frozen
from unperturb.registry import UnknownNameError

# What keeps an attack small here. An attack that is not listed is taken with its defaults; one with a required option
# must have an entry.
SETTINGS: dict[str, dict[str, Any]] = {
    "apgd": {"eps": 0.1, "steps": 6},
    "apgd-t": {"eps": 0.1, "steps": 4, "target_classes": 2},
    "autoattack": {"eps": 0.1, "steps": 4, "target_classes": 2, "queries": 12},
    "cw": {"steps": 12, "search_steps": 2},
    "ddn": {"steps": 12},
    "deepfool": {"steps": 8},
    "di_fgsm": {"eps": 0.1, "steps": 4},
    "ead": {"steps": 12, "search_steps": 3},
    "fab-t": {"steps": 4, "target_classes": 2, "restarts": 2},
    "fgsm": {"eps": 0.1},
    "fmn": {"steps": 12},
    "hop_skip_jump": {"queries": 120, "evaluations": 10},
    "mim": {"eps": 0.1, "steps": 4},
    "ni_fgsm": {"eps": 0.1, "steps": 4},
    "noise": {"eps": 0.1},
    "patch": {"area": 0.1, "steps": 4, "rotation": 20.0, "scale": (0.8, 1.1)},
    "pgd": {"eps": 0.1, "steps": 4, "restarts": 2},
    "rays": {"queries": 30},
    "si_ni_fgsm": {"eps": 0.1, "steps": 4, "copies": 2},
    "sparse_rs": {"pixels": 2, "queries": 12},
    "square": {"eps": 0.1, "queries": 12},
    "vmi_fgsm": {"eps": 0.1, "steps": 4, "samples": 2},
}
CLASSES = 4


def fields(name: str) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(attacks[name])}


def make(name: str, **options: Any) -> Attack:
    settings = {**SETTINGS.get(name, {}), **options}
    missing = [
        k
        for k, f in fields(name).items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and k not in settings
    ]
    assert not missing, f"attack {name!r} needs {', '.join(missing)}: give it an entry in SETTINGS"
    return create_attack(name, **settings)


def norms(name: str) -> tuple[str | None, ...]:
    more = {"fmn": ("l1", "l0")}
    return ("linf", "l2", *more.get(name, ())) if "norm" in fields(name) else (None,)


# Every attack, once per norm that it knows.
CASES = [(name, norm) for name in attacks for norm in norms(name)]
every_attack = pytest.mark.parametrize(
    ("name", "norm"), CASES, ids=[f"{name}-{norm}" if norm else name for name, norm in CASES]
)
with_eps = pytest.mark.parametrize("name", [name for name in attacks if "eps" in fields(name)])


def of(name: str, norm: str | None, **options: Any) -> Attack:
    # An L2 ball of the same radius is a much smaller set: give it room.
    given = {**SETTINGS.get(name, {}), **options}
    wider = {"eps": 0.8} if norm == "l2" and given.get("eps") == 0.1 else {}
    return make(name, **{**({"norm": norm} if norm else {}), **options, **wider})


class Linear(nn.Module):
    """Logits by products and sums of one image at a time: no kernel that rounds by the size of the batch."""

    def __init__(self, classes: int = CLASSES, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = shape[0] * shape[1] * shape[2]
        self.weight = nn.Parameter(torch.randn(classes, size, generator=generator) * 0.3)
        self.bias = nn.Parameter(torch.randn(classes, generator=generator) * 0.1 - self.weight.detach().sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, None] * self.weight).sum(-1) + self.bias


def batch(n: int = 6, shape: tuple[int, int, int] = (1, 8, 8), model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Random images, but the first black and the second white; the model's own labels, but for the last."""
    images = torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))
    images[:1], images[1:2] = 0, 1
    with torch.no_grad():
        labels = (model or Linear(shape=shape))(images).argmax(1)
    labels[n - 1 :] = (labels[n - 1 :] + 1) % CLASSES
    return images, labels


def assert_valid(attack: Attack, x: Tensor, images: Tensor) -> None:
    assert x.shape == images.shape
    assert x.dtype == torch.float32
    assert not x.requires_grad
    assert x.grad_fn is None
    if not len(x):
        return
    assert bool(torch.isfinite(x).all())
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    eps = getattr(attack, "eps", None)
    if eps is not None:
        order = 2 if getattr(attack, "norm", "linf") == "l2" else float("inf")
        far = torch.linalg.vector_norm((x - images).double().flatten(1), order, dim=1)
        assert float(far.max()) <= eps * (1 + 1e-6) + 1e-7, f"left its ball of {eps}: {far.tolist()}"


# The battery ---------------------------------------------------------------------------------------------------------


@every_attack
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7)])
def test_answer_has_the_images_shape_and_stays_in_ball_and_box(
    name: str, norm: str | None, shape: tuple[int, int, int]
) -> None:
    model = Linear(shape=shape)
    images, labels = batch(shape=shape)
    before, labels_before = images.clone(), labels.clone()
    attack = of(name, norm)
    assert_valid(attack, attack(model, images, labels), images)
    assert torch.equal(images, before)
    assert torch.equal(labels, labels_before)


@every_attack
def test_targets(name: str, norm: str | None) -> None:
    model = Linear()
    images, labels = batch()
    labels = model(images).argmax(1)
    targets = (labels + 1 + torch.arange(len(labels)) % 3) % CLASSES
    attack = of(name, norm)
    result = attack.run(model, images, labels, targets=targets)
    assert_valid(attack, result.images, images)
    reached = model(result.images).argmax(1) == targets
    assert torch.equal(result.success, reached)
    for how in ("random", "least_likely"):
        attack = of(name, norm, targets=how)
        assert_valid(attack, attack(model, images, labels), images)


@every_attack
def test_the_model_is_left_as_it_was(name: str, norm: str | None) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, CLASSES)
    )
    model.train()
    model[1].eval()  # a mixture, as a fine-tuner leaves it
    model[0].weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    modes = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    images, _ = batch()
    seen: list[bool] = []
    model[3].register_forward_hook(lambda module, *_: seen.append(module.training))
    of(name, norm)(model, images, torch.zeros(len(images), dtype=torch.int64))
    assert not any(seen)  # attacked in eval mode
    assert modes == [m.training for m in model.modules()]
    assert wants == [p.requires_grad for p in model.parameters()]
    assert all(bool((p.grad == 3).all()) for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@every_attack
def test_the_model_is_left_as_it_was_after_an_error(name: str, norm: str | None) -> None:
    class Breaks(Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            raise RuntimeError("broken model")

    model = Breaks().train()
    images, labels = batch()
    with pytest.raises(RuntimeError, match="broken model"):
        of(name, norm).run(model, images, labels)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@every_attack
def test_same_seed_same_answer_whatever_torchs_own_generator_says(name: str, norm: str | None) -> None:
    model = Linear()
    images, labels = batch()
    attack = of(name, norm)
    torch.manual_seed(1)
    first = attack(model, images, labels, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, attack(model, images, labels, seed=5))
    assert torch.equal(torch.get_rng_state(), state)


@every_attack
def test_batch_size_and_order_change_nothing(name: str, norm: str | None) -> None:
    # A patch for the whole batch is the exception, and asks for it: universal is off by default.
    model = Linear()
    images, labels = batch()
    index = torch.tensor([17, 3, 99, 4, 50, 23])
    attack = of(name, norm)
    whole = attack(model, images, labels, index=index, seed=3)
    order = torch.tensor([4, 1, 5, 0, 2, 3])
    for rows in order.split([2, 3, 1]):
        part = attack(model, images[rows], labels[rows], index=index[rows], seed=3)
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=2e-5)


@every_attack
def test_run_finds_the_same_and_counts_what_it_spent(
    name: str, norm: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Linear()
    images, labels = batch()
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x)

    attack = of(name, norm)
    told: list[int] = []
    result = attack.run(counted, images, labels, seed=2, progress=told.append)
    assert torch.equal(result.images, attack(model, images, labels, seed=2))
    # The last two calls re-check the answer: as it is, and rounded to 8 bits.
    assert calls[-2:] == [len(images)] * 2
    assert result.forwards == len(calls) - 2
    assert told == list(range(1, result.forwards + 1))
    assert int(result.queries.sum()) == sum(calls[:-2])
    assert torch.equal(result.success, model(result.images).argmax(1) != labels)
    assert torch.equal(result.success_8bit, model((result.images * 255).round() / 255).argmax(1) != labels)
    assert capfd.readouterr() == ("", "")  # an attack never prints


@every_attack
@pytest.mark.filterwarnings("ignore:the gradient of")
@pytest.mark.parametrize("graph", [True, False], ids=["zero_gradient", "no_graph"])
def test_constant_model(name: str, norm: str | None, graph: bool) -> None:
    def constant(x: Tensor) -> Tensor:
        logits = torch.arange(float(CLASSES)).expand(len(x), CLASSES)
        return logits + 0 * x.sum((1, 2, 3))[:, None] if graph else logits.clone()

    images, _ = batch()
    labels = torch.tensor([CLASSES - 1] * (len(images) - 1) + [0])  # the last is wrong from the start
    attack = of(name, norm)
    if graph or (name, norm) not in BY_GRADIENT:
        assert_valid(attack, attack(constant, images, labels), images)
    else:
        with pytest.raises(NoGradientError, match="by queries"):
            attack(constant, images, labels)


@every_attack
def test_two_classes(name: str, norm: str | None) -> None:
    model = Linear(2)
    images, _ = batch()
    labels = model(images).argmax(1)
    attack = of(name, norm)
    assert_valid(attack, attack(model, images, labels), images)
    assert_valid(attack, attack(model, images, labels, targets=1 - labels), images)


@every_attack
@pytest.mark.parametrize("n", [0, 1])
def test_no_image_and_one(name: str, norm: str | None, n: int) -> None:
    model = Linear()
    images, labels = batch(n)
    attack = of(name, norm)
    result = attack.run(model, images, labels)
    assert_valid(attack, result.images, images)
    assert result.success.shape == result.success_8bit.shape == result.queries.shape == (n,)


@every_attack
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:the gradient of")
@pytest.mark.parametrize("when", ["always", "for_one_image", "away_from_the_image"])
def test_logits_that_are_not_numbers(name: str, norm: str | None, bad: float, when: str) -> None:
    model = Linear()
    images, _ = batch()
    labels = model(images).argmax(1)

    def broken(x: Tensor) -> Tensor:
        logits = model(x)
        if when == "always":
            hit = torch.ones(len(x), dtype=torch.bool)
        elif when == "for_one_image":
            hit = x.sum((1, 2, 3)) > 60  # the white one
        else:
            hit = (x[:, None] - images).abs().amax((2, 3, 4)).amin(1) > 1e-4
        return torch.where(hit[:, None], bad, logits)

    # By `run`, which asks once more at the answer: a single step looks at the image alone, noise at nothing.
    attack = of(name, norm)
    with pytest.warns(UserWarning, match="of 6 images were NaN or infinite: these count as wrong answers"):
        result = attack.run(broken, images, labels)
    assert_valid(attack, result.images, images)
    wrong = broken(result.images).isfinite().all(1).logical_not()
    assert bool(result.success[wrong].all())
    if when == "always":
        assert bool((result.nonfinite > 0).all())
    elif when == "for_one_image" and name != "rays":  # which shows every image white corners
        assert (result.nonfinite > 0).tolist() == [False, True, False, False, False, False]
        expected = attack(model, images, labels)  # the others do not know of it
        for row in (0, 2, 3, 4, 5):
            torch.testing.assert_close(result.images[row], expected[row], rtol=0, atol=1e-6)
    # One that is to be led to a class is never there where the model says nothing.
    targets = (labels + 1) % CLASSES
    with pytest.warns(UserWarning, match="NaN or infinite"):
        result = attack.run(broken, images, labels, targets=targets)
    assert_valid(attack, result.images, images)
    right = broken(result.images).isfinite().all(1) & (model(result.images).argmax(1) == targets)
    assert torch.equal(result.success, right)


@every_attack
def test_its_repr_is_its_record(name: str, norm: str | None) -> None:
    attack = of(name, norm)
    settings = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}
    assert create_attack(name, **settings) == attack
    assert all(f"{key}={value!r}" in repr(attack) for key, value in settings.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.targets = "random"  # type: ignore[misc]


@with_eps
def test_a_budget_may_be_a_fraction(name: str) -> None:
    assert make(name, eps="8/255").eps == pytest.approx(8 / 255)  # type: ignore[attr-defined]
    for wrong in ("eight", -0.1, float("nan"), "1/0"):
        with pytest.raises(ValueError, match="budget"):
            make(name, eps=wrong)


@pytest.mark.parametrize("name", [n for n in attacks if issubclass(attacks[n], BallAttack)])  # type: ignore[arg-type]
def test_no_budget_no_change(name: str) -> None:
    images, labels = batch()
    for norm in ("linf", "l2"):
        assert torch.equal(make(name, eps=0.0, norm=norm)(Linear(), images, labels), images)


@pytest.mark.parametrize("name", [n for n in attacks if "norm" in fields(n)])
def test_unknown_norm(name: str) -> None:
    with pytest.raises(ValueError, match="norm must be"):
        make(name, norm="l7")


class Bent(nn.Module):
    """One hidden layer of ReLU, by products and sums as `Linear`: a loss with many slopes, so that climbs turn back."""

    def __init__(self, seed: int, hidden: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = torch.randn(hidden, 64, generator=generator) / 2
        self.outer = torch.randn(CLASSES, hidden, generator=generator)
        self.bias = torch.randn(CLASSES, generator=generator) / 10  # where all of them are at rest, no two classes tie

    def forward(self, x: Tensor) -> Tensor:
        hidden = ((x.flatten(1) - 0.5)[:, None] * self.inner).sum(-1).relu()
        return (hidden[:, None] * self.outer).sum(-1) + self.bias


# Every attack that looks at more than the image itself, once more for each way to stop.
LOOKING = [
    (name, norm, options)
    for name, norm in CASES
    if name != "fgsm"
    for options in ([{"first_success": True}, {"first_success": False}] if "first_success" in fields(name) else [{}])
]


every_way_to_look = pytest.mark.parametrize(
    ("name", "norm", "options"), LOOKING, ids=["-".join(map(str, (n, p, *o.values()))) for n, p, o in LOOKING]
)
# What may be maximized besides a loss: minus a distance (order, power), or the elastic net's; the lead (target_class,
# scaled) of one class.
NEARNESS = ((2, 1), (2, 2), (math.inf, 1), (1, 1), (0, 1))
LEADS = [(target_class, scaled) for target_class in range(CLASSES) for scaled in (False, True)]


@every_way_to_look
def test_a_success_that_was_met_is_returned_and_no_other_is_claimed(
    name: str, norm: str | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # By what the model said of every point it was shown, whoever shared its batch.
    met: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(method: str, position: int) -> None:
        original = getattr(AttackContext, method)

        def watched(self: AttackContext, x: Tensor, *args: Any) -> Any:
            answer = original(self, x, *args)
            met.append((self.rows, x.detach().clone(), (answer if position < 0 else answer[position]).detach()))
            return answer

        monkeypatch.setattr(AttackContext, method, watched)

    for method, position in (("logits", -1), ("gradient", 2), ("forward", 1)):
        watch(method, position)
    tries = {"num_trials": 3}
    more = {"noise": tries, "occlusion": tries, "apgd": {"steps": 12}, "apgd-t": {"steps": 12}}.get(name, {})
    attack = of(name, norm, **more, **options)
    fell = 0
    for seed in range(3):
        met.clear()
        model = Bent(seed)
        images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        labels = model(images).argmax(1)
        result = attack.run(model, images, labels, seed=seed)
        fell += int(result.success.sum())
        eps = getattr(attack, "eps", None) or math.inf
        order = 2 if getattr(attack, "norm", "linf") == "l2" else math.inf
        clear, claimed = torch.zeros(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)
        for rows, x, logits in met:
            far = torch.linalg.vector_norm((x - images[rows]).flatten(1), order, dim=1)
            lead = margin(logits, labels[rows])
            clear[rows] |= (lead > 2e-5 * logits.abs().amax(1)) & (far <= eps + 1e-6)
            claimed[rows] |= (lead > 0) & ((x - result.images[rows]).abs().amax((1, 2, 3)) < 1e-6)
        assert bool(result.success[clear].all())
        assert torch.equal(result.success, claimed)
    if name != "noise":
        assert fell > 0


@every_way_to_look
def test_the_best_that_is_kept_has_the_value_that_the_model_gives_it(
    name: str, norm: str | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Best] = []

    def watched(self: Best, images: Tensor) -> None:
        kept.append(self)
        original(self, images)

    original = Best.__init__
    monkeypatch.setattr(Best, "__init__", watched)
    small = {"eps": 0.2 if norm == "l2" else 0.03} if "eps" in fields(name) else {}
    for seed in range(3):
        kept.clear()
        model = Bent(seed)
        images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        more = {"noise": {"num_trials": 3}, "apgd": {"steps": 12}, "apgd-t": {"steps": 12}}.get(name, {})
        make(name, **{**more, **small, **({"norm": norm} if norm else {}), **options})(
            model, images, model(images).argmax(1), seed=seed
        )
        for best in kept:
            if best.images.shape[1:] != images.shape[1:]:
                continue  # patches, which are judged where they are pasted
            met = best.value > -torch.inf
            said = [-((best.images[:, None] - images).flatten(2).norm(dim=2, p=p) ** q) for p, q in NEARNESS]
            said += [0.01 * said[3] + said[1]]
            logits = model(best.images)
            for label in torch.arange(CLASSES)[:, None].expand(-1, len(logits)):
                said += [loss(logits, label)[:, None] for loss in LOSSES.values()]
                said += [
                    TargetedLoss(torch.full_like(label, r), False, scaled)(logits, label)[:, None]
                    for r, scaled in LEADS
                ]
            off = (torch.cat(said, 1) - best.value[:, None]).abs().amin(1)
            assert bool((off[met] < 1e-5).all())


@every_attack
def test_what_needs_a_gradient_says_so(name: str, norm: str | None) -> None:
    images, labels = batch()
    result = of(name, norm, **({"num_trials": 3} if name == "noise" else {})).run(Linear(), images, labels)
    assert attacks[name].needs_gradient == (result.backwards > 0)  # type: ignore[attr-defined]


class Drawn(Linear):
    """Logits with noise: each answer is a draw."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise, self.generator = noise, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + self.noise * torch.randn(logits.shape, generator=self.generator)


@every_attack
def test_no_image_leaves_at_its_first_success_where_the_model_is_random(name: str, norm: str | None) -> None:
    attack = of(name, norm)
    if isinstance(attack, MinimalAttack):
        with pytest.raises(ValueError, match="a random model's answer is a draw; attack it with a budget instead"):
            attack.for_random_model()
        return
    attack = attack.for_random_model(eot_samples=2)
    images, _ = batch()
    result = attack.run(Drawn(1.0), images, Linear()(images).argmax(1))
    if name == "autoattack":  # an image leaves between two climbs, by the mean of `eot_samples` draws
        asked = 2 * (SETTINGS[name]["steps"] + 1)
        assert set(result.queries.tolist()) <= {2, 2 + asked + 2, 2 + 2 * (asked + 2)}
    else:
        assert len(set(result.queries.tolist())) == 1


@pytest.mark.parametrize(("name", "options"), [("square", {}), ("autoattack", {"steps": 10})])
def test_what_falls_at_a_random_model_falls_again(name: str, options: dict[str, Any]) -> None:
    images = 0.3 + 0.4 * torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = Linear()(images).argmax(1)

    def falls_again(attack: Attack) -> float:
        x = attack(Drawn(0.5), images, labels)
        return float(torch.stack([fresh(x).argmax(1) != labels for _ in range(40)]).float().mean())

    fresh = Drawn(0.5)
    attack = create_attack(name, eps=0.2, queries=400, **options)
    assert falls_again(attack.for_random_model()) > falls_again(attack) + 0.1


# What a model may do inside, and what an attacker may put around it --------------------------------------------------

BY_GRADIENT = [(name, norm) for name, norm in CASES if attacks[name].needs_gradient]  # type: ignore[attr-defined]
every_gradient_attack = pytest.mark.parametrize(
    ("name", "norm"), BY_GRADIENT, ids=[f"{name}-{norm}" if norm else name for name, norm in BY_GRADIENT]
)


@every_attack
def test_bfloat16_inside_the_model(name: str, norm: str | None) -> None:
    class Half(Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.linear(x.flatten(1), self.weight, self.bias)

    model = Half()
    images, _ = batch()
    labels = model(images).argmax(1)
    assert model(images).dtype == torch.bfloat16
    attack = of(name, norm)
    result = attack.run(model, images, labels)
    assert_valid(attack, result.images, images)
    plain = attack.run(Linear(), images, labels)
    # bfloat16 rounds logits to three digits: a boundary is met a little earlier or later, not elsewhere.
    assert abs(int(result.success.sum()) - int(plain.success.sum())) <= 1


@every_gradient_attack
@pytest.mark.filterwarnings("ignore:the gradient of")
def test_every_adapter_fits_every_gradient_attack(name: str, norm: str | None) -> None:
    model = Linear()
    images, _ = batch()
    labels = model(images).argmax(1)
    attack = of(name, norm)
    plain = attack.run(model, images, labels)

    # Adapters around what hides nothing change nothing: an exact copy with a stand-in, a mean of equal draws.
    def copied(x: Tensor) -> Tensor:
        return x.clone()

    for seen in (
        nn.Sequential(attackers.BPDA(copied), model),
        nn.Sequential(attackers.BPDA(copied, surrogate_backward=lambda x: 1.0 * x), model),
        attackers.EOT(model, eot_samples=2),
        attackers.EOT(model, eot_samples=2, seed=7),
    ):
        torch.testing.assert_close(attack(seen, images, labels), plain.images, rtol=0, atol=2e-5)

    # Rounding hides the gradient from every one of them, and the adapter gives it back.
    hidden = attack.run(lambda x: model((x * 255).round() / 255), images, labels)
    assert int(hidden.zero_gradients.min()) > 0
    seen = nn.Sequential(attackers.rounding(), model)
    found = attack.run(seen, images, labels)
    assert_valid(attack, found.images, images)
    assert int(found.zero_gradients.sum()) == 0
    assert int(found.success.sum()) >= int(plain.success.sum()) - 1
    assert torch.equal(found.success, found.success_8bit)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "name", ["pgd", "mim", "di_fgsm", "si_ni_fgsm", "vmi_fgsm", "apgd", "apgd-t", "ddn", "fmn", "ead", "patch"]
)
def test_no_step_waits_for_the_device(name: str, norm: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        """Counts what would stop a GPU's queue: numbers read by Python, and results whose shape depends on data."""

        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func._overloadpacket._qualified_op_name in ("aten::_local_scalar_dense", "aten::nonzero")
            return func(*args, **(kwargs or {}))

    model = Linear()
    images, labels = batch()
    counts = []
    for steps in (3, 9):
        attack = make(name, steps=steps, **({"norm": norm} if "norm" in fields(name) else {}))
        with Waits() as waits:
            attack(model, images, labels)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0  # the checks of the input and the answer do wait


# What is wrong with the input, said for every attack by the one `__call__` -------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x * 2, y), ValueError, r"must lie in \[0, 1\], found"),
        (lambda x, y: (x - 0.5, y), ValueError, "normalization belongs in the classifier's first layer"),
        (lambda x, y: (x.masked_fill(x == x[3, 0, 2, 2], float("nan")), y), ValueError, "NaN pixels"),
        (lambda x, y: ((x * 255).to(torch.uint8), y), TypeError, "divide 8-bit images by 255"),
        (lambda x, y: (x[0], y), ValueError, r"shape \(N, C, H, W\), not \(1, 8, 8\)"),
        (lambda x, y: (x.numpy(), y), TypeError, "float tensor"),
        (lambda x, y: (x, y[:4]), ValueError, r"need labels of shape \(6,\), not \(4,\)"),
        (lambda x, y: (x, y.float()), TypeError, "integer tensor"),
        (lambda x, y: (x, F.one_hot(y)), ValueError, "need labels of shape"),
        (lambda x, y: (x, y - 5), ValueError, "out of range"),
        (lambda x, y: (x, y + CLASSES), ValueError, f"out of range: the model has {CLASSES} classes"),
    ],
)
def test_wrong_input(change: Callable[..., Any], error: type[Exception], message: str) -> None:
    images, labels = change(*batch())
    with pytest.raises(error, match=message):
        make("fgsm")(Linear(), images, labels)


def test_wrong_options_of_the_call() -> None:
    images, labels = batch()
    attack, model = make("fgsm"), Linear()
    with pytest.raises(ValueError, match="index must have shape"):
        attack(model, images, labels, index=torch.arange(3))
    with pytest.raises(ValueError, match="target equals the true class"):
        attack(model, images, labels, targets=labels)
    with pytest.raises(ValueError, match="out of range"):
        attack(model, images, labels, targets=torch.full_like(labels, CLASSES))
    with pytest.raises(ValueError, match="targets must be None"):
        make("fgsm", targets="nearest")(model, images, labels)
    with pytest.raises(ValueError, match=r"must return logits of shape \(6, classes\), it returned \(6,\)"):
        attack(lambda x: x.mean((1, 2, 3)), images, labels)
    with pytest.raises(ValueError, match="it returned tuple"):
        attack(lambda x: (model(x), x), images, labels)


def test_unknown_names_and_options() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown attack 'fgms'. Did you mean 'fgsm'\?.*Choices: .*pgd"):
        create_attack("fgms", eps=0.1)
    with pytest.raises(UnknownNameError, match=r"option of attack 'pgd', 'step'. Did you mean 'steps'\?"):
        create_attack("pgd", eps=0.1, step=3)
    for options in ({"steps": 0}, {"restarts": 0}, {"loss": "hinge"}, {"norm": "l1"}, {"alpha": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options)) if "alpha" not in options else "budget"):
            create_attack("pgd", eps=0.1, **options)


@pytest.mark.parametrize(
    ("given", "number"), [("8/255", 8 / 255), (0.3, 0.3), (1, 1.0), ("0.25", 0.25), (0, 0.0), ("1e-2", 0.01)]
)
def test_budget(given: float | str, number: float) -> None:
    assert budget(given) == pytest.approx(number, abs=0)


@pytest.mark.parametrize("wrong", ["8/0", "", "a", -1, "-1/255", float("inf"), float("nan"), None, [0.1]])
def test_what_is_no_budget(wrong: Any) -> None:
    with pytest.raises(ValueError, match="a budget is"):
        budget(wrong)


def test_frozen_restores_flags_inside_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].bias.requires_grad_(False)
    with frozen(model), frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    with frozen(lambda x: x):  # a plain function has no flags
        pass
