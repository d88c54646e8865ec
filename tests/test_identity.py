"""What tells models apart: settings, weights and code; never a user's object by its looks."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb import runs
from unperturb.attackers import Attacker, rounding
from unperturb.attacks import attacks, create_attack
from unperturb.attacks.base import Attack
from unperturb.attacks.context import AttackContext
from unperturb.classifiers import classifiers, create_classifier, wrap
from unperturb.data import ImageSet
from unperturb.defenses import Defense, Protected, create_defense, defenses
from unperturb.evaluation import adversarials
from unperturb.evaluation.identity import code, identify, is_known
from unperturb.evaluation.run import evaluate
from unperturb.systems import System


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "cache")


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_classifier("convnet", channels=1, size=8, classes=3, mean=[0.3], std=[0.4])


NEEDS = {
    "defense_gan": {"size": 8},
    "paired_gan": {"generator": {"name": "unet", "width": 4}},
    "pipeline": {"parts": [{"name": "jpeg"}, {"name": "median"}]},
}


def made(name: str) -> Defense:
    return create_defense(name, channels=1, **NEEDS.get(name, {}))


# What a folder rebuilds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(classifiers))
def test_every_classifier_is_known_again(name: str) -> None:
    keys = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = create_classifier(name, channels=3, size=32, classes=10, mean=[0.5] * 3, std=[0.2] * 3)
        found = identify(model)
        assert found.lasting
        keys.append(found.key)
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("name", list(defenses))
def test_every_defense_and_what_attackers_make_of_it_is_known_again(name: str) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model, defense = net(), made(name)
        attackers = [Attacker(create_attack("square", eps=0.1), kind) for kind in ("bpda", "white_box", "black_box")]
        seen = [attacker.model_for(System("it", model, defense)) for attacker in attackers]
        found.append([identify(function) for function in (model, defense, *seen)])
    assert all(one.lasting for one in found[0])
    assert found[0] == found[1]
    assert len({one.key for one in found[0]}) == 5


def test_every_attack_is_known_by_its_record() -> None:
    assert all(is_known(attacks[name]) for name in attacks)  # type: ignore[arg-type]
    one, same, other = (create_attack("pgd", eps=0.1, steps=s) for s in (3, 3, 4))
    assert identify(one) == identify(same) != identify(other)
    assert identify(one).lasting
    model = net()
    assert (
        len({identify(model, one).key, identify(model, other).key, identify(one, model).key, identify(model).key}) == 4
    )

    class Mine(Attack):
        def perturb(self, context: AttackContext) -> Tensor:
            return context.images

    assert not is_known(Mine)
    assert not identify(Mine()).lasting
    assert not identify(model, Mine()).lasting
    assert identify(Mine()).key != identify(one).key
    assert code() == code()


def test_what_two_models_may_differ_in() -> None:
    soft, sharp = (
        create_defense("paired_gan", channels=1, generator={"name": "unet", "output": "threshold", "sharpness": s})
        for s in (4.0, 8.0)
    )
    sharp.load_state_dict(soft.state_dict())
    normalized = [wrap(nn.Linear(2, 2), [m], [0.2]) for m in (0.5, 0.4)]
    normalized[1].load_state_dict(normalized[0].state_dict())
    normalized[1].normalize.mean += 0.1  # type: ignore[operator]
    hidden = [nn.Sequential(nn.Flatten()) for _ in range(2)]
    for value, module in enumerate(hidden):
        module.register_buffer("scale", torch.tensor(float(value)), persistent=False)
    double = [nn.Linear(2, 2), nn.Linear(2, 2).double()]
    double[1].load_state_dict(double[0].state_dict())
    attribute = [nn.LeakyReLU(), nn.LeakyReLU()]
    attribute[1].negative_slope = 0.5
    for one, other in ((soft, sharp), normalized, hidden, double, attribute):
        assert identify(one).lasting
        assert identify(one) != identify(other)
        assert identify(Protected(net(), soft)) != identify(Protected(net(), sharp))
    frozen = net().eval().requires_grad_(False)
    assert identify(frozen) == identify(net().train())  # neither changes what is attacked


# What only the process knows -----------------------------------------------------------------------------------------


class Own(nn.Module):
    """A user's: linear, and turned over by an attribute that shows in no weight."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 192).reshape(3, 64).sin())
        self.sign = sign

    def forward(self, images: Tensor) -> Tensor:
        return self.sign * (images.flatten(1) - 0.5) @ self.weight.T


def patched() -> nn.Module:
    model = net()
    model.forward = types.MethodType(lambda self, x: x.flatten(1)[:, :3], model)  # type: ignore[method-assign, assignment]
    return model


def hooked() -> nn.Module:
    model = net()
    model.net.register_forward_hook(lambda module, inputs, out: -out)  # type: ignore[union-attr]
    return model


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    return nn.Sequential(nn.utils.parametrizations.weight_norm(model[1]))


def settings() -> nn.Module:
    model = nn.Sequential(nn.Flatten())
    model.scale = lambda x: x  # type: ignore[assignment]
    return model


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "a class": Own,
    "inside another": lambda: nn.Sequential(Own(), nn.Softmax(1)),
    "wrapped": lambda: wrap(Own()),
    "protected": lambda: Protected(Own(), create_defense("jpeg")),
    "a lambda as stand-in": rounding,
    "a patched forward": patched,
    "a hook": hooked,
    "a parametrization": parametrized,
    "a function among its settings": settings,
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_anything_else_is_the_object_itself(kind: str) -> None:
    one, other = UNKNOWN[kind](), UNKNOWN[kind]()
    assert not identify(one).lasting
    assert identify(one) == identify(one)
    assert identify(one).key != identify(other).key


def test_a_class_that_was_patched_is_no_longer_known(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, before = create_defense("jpeg"), identify(create_defense("jpeg"))
    assert before.lasting
    monkeypatch.setattr(type(defense), "purify", torch.no_grad()(lambda self, images: 1 - images))
    assert not identify(defense).lasting


# In an evaluation ----------------------------------------------------------------------------------------------------


def data(n: int = 24) -> ImageSet:
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        labels = Own()(images.float() / 255).argmax(1)
    return ImageSet(
        images=images, labels=labels, index=torch.arange(n), class_names=list("abc"), source="toy", split="test"
    )


PGD = create_attack("pgd", eps=0.1, steps=3)


def robust(sign: float, out: Path | None = None, resume: bool = False) -> float:
    rows = evaluate(data(), {"undefended": Own(sign)}, [PGD], ["oblivious"], out=out, resume=resume, device="cpu")
    return float((rows["pred_adv"] == rows["label"]).mean())


def test_two_models_that_differ_in_an_attribute_are_two(tmp_path: Path) -> None:
    robust(-1.0)  # what was made against this one is of no use against the other
    first = robust(1.0)
    assert first < 0.2
    assert robust(1.0) == first
    assert not (tmp_path / "cache").exists()  # an object is nothing to be found again
    bare = Own(1.0)
    both = {"bare": bare, "turned": System("turned", Own(-1.0), base=bare)}
    rows = evaluate(data(), both, [PGD], ["oblivious", "white_box"], device="cpu")
    right = (rows["pred_pure_adv"] == rows["label"]).groupby([rows["system"], rows["knowledge"]]).mean()
    assert right["bare", "oblivious"] == first
    assert set(right["turned"].index) == {"oblivious", "white_box"}
    x, y = data().batch(torch.arange(24))
    with torch.no_grad():
        clean = (Own(-1.0)(x).argmax(1) == y).float().mean()
    mine = rows[rows["system"] == "turned"]
    assert (mine["pred_pure_clean"] == mine["label"]).mean() == pytest.approx(float(clean))


def test_what_a_folder_rebuilds_is_kept_for_another_time(tmp_path: Path) -> None:
    evaluate(data(), {"undefended": net()}, [PGD], ["oblivious"], device="cpu")
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    written = kept.stat().st_mtime_ns
    evaluate(data(), {"undefended": net()}, [PGD], ["oblivious"], device="cpu")
    assert kept.stat().st_mtime_ns == written


def test_an_attack_of_ones_own_is_kept_no_longer_than_the_process(tmp_path: Path) -> None:
    def mine(value: float) -> Attack:
        class Mine(Attack):
            def perturb(self, context: AttackContext) -> Tensor:
                return torch.full_like(context.images, value)

        return Mine()

    attacks = {"black": mine(0.0), "white": mine(1.0)}  # one record, two codes
    rows = evaluate(data(), {"undefended": net()}, attacks, ["oblivious"], device="cpu")
    x, _ = data().batch(torch.arange(24))
    for label, value in (("black", 0.0), ("white", 1.0)):
        found = rows[rows["attack"] == label].sort_values("index")["l2"]
        assert found.tolist() == pytest.approx((x - value).flatten(1).norm(dim=1).tolist(), abs=1e-3)
    assert not (tmp_path / "cache").exists()


class Bent(Own):
    def forward(self, images: Tensor) -> Tensor:
        out = super().forward(images)
        return out + F.relu(images.flatten(1)[:, :1] - 0.9)


def test_a_run_goes_on_only_with_models_that_behave_as_its_own(tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = robust(1.0, out)
    for shard in out.glob("rows/*/*.parquet"):
        shard.unlink()
    for other in (Own(-1.0), Bent()):
        with pytest.raises(
            runs.RunError, match="was begun with another model as classifier 'classifier': on 16 images"
        ):
            evaluate(data(), {"undefended": other}, [PGD], ["oblivious"], out=out, resume=True, device="cpu")
    assert robust(1.0, out, resume=True) == whole


def test_a_model_in_hand_is_not_taken_for_one_with_another_gradient(tmp_path: Path) -> None:
    out = tmp_path / "run"
    robust(1.0, out)

    class Hidden(Own):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.detach()) + 0 * images.sum()

    with pytest.raises(runs.RunError, match="was begun with another model as classifier"):
        evaluate(data(), {"undefended": Hidden()}, [PGD], ["oblivious"], out=out, resume=True, device="cpu")


def test_a_purifier_in_hand_is_known_by_its_behavior_too(tmp_path: Path) -> None:
    class Shift(Defense):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def purify(self, images: Tensor) -> Tensor:
            return (images + self.by).clamp(0, 1)

    bare, out = net(), tmp_path / "run"

    def run(by: float, resume: bool) -> None:
        models = {"ours": Protected(bare, Shift(by))}
        evaluate(data(), models, [PGD], ["oblivious"], out=out, resume=resume, device="cpu")

    run(0.1, False)
    run(0.1, True)
    with pytest.raises(runs.RunError, match="was begun with another model as the purifier of 'ours'"):
        run(0.2, True)


def test_one_model_given_twice_is_refused() -> None:
    bare = net()
    with pytest.raises(ValueError, match="'again' is the undefended classifier, which is there already"):
        evaluate(data(), {"one": bare, "again": bare}, [PGD], device="cpu")
    with pytest.raises(ValueError, match="'again' is the undefended classifier, which is there already"):
        evaluate(data(), {"one": net(), "again": net()}, [PGD], device="cpu")  # alike, as far as anybody can tell


def test_a_user_s_objects_are_two_however_alike() -> None:
    rows = evaluate(data(), {"a": Own(), "b": Own()}, [PGD], ["oblivious"], device="cpu")
    assert set(zip(rows["classifier"], rows["system"])) == {("classifier", "a"), ("classifier-2", "b")}
