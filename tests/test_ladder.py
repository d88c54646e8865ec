"""The ladder and its cascade: who is sent, in which order, and that only what still stands goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import unperturb as up
from unperturb import runs
from unperturb.attackers import Attacker
from unperturb.attacks import Attack
from unperturb.attacks.context import AttackContext
from unperturb.data import ImageSet, as_image_set
from unperturb.evaluation.ladder import BUDGETS, ladder
from unperturb.evaluation.plan import Cascade, Plan
from unperturb.evaluation.run import run_in_hand
from unperturb.evaluation.surrogates import Surrogate
from unperturb.registry import UnknownNameError
from unperturb.results.results import Results
from unperturb.results.robust import robust_accuracy
from unperturb.systems import System
from unperturb.threat_models import KNOWLEDGE, ThreatModel

THREAT = ThreatModel("linf", 0.1)
N = 60


class Linear(nn.Module):
    """Two classes; the margin of an image is known, and with it the least budget that turns it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64).view(1, 64))

    def forward(self, images: Tensor) -> Tensor:
        score = (images.flatten(1) - 0.5) @ self.weight.T
        return torch.cat([-score, score], 1)


class Half(up.Defense):
    """A purifier that halves the contrast: the same decisions, gradients that are half as large."""

    def purify(self, images: Tensor) -> Tensor:
        return 0.5 + (images - 0.5) / 2


class Noisy(up.Defense):
    random = True

    def purify(self, images: Tensor) -> Tensor:
        return images + 0.01 * torch.randn_like(images)


@pytest.fixture(scope="module")
def data() -> ImageSet:
    """Gray images, far from the walls of the box, half of which are safe at the budget by a wide margin."""
    net = Linear()
    generator = torch.Generator().manual_seed(0)
    images = (0.5 + 0.05 * torch.randn(N, 1, 8, 8, generator=generator)).clamp(0.2, 0.8)
    step = net.weight.sign().view(1, 1, 8, 8) * torch.where(torch.arange(N) % 2 == 0, 0.15, 0.02).view(-1, 1, 1, 1)
    sign = torch.where(torch.arange(N) % 4 < 2, 1.0, -1.0).view(-1, 1, 1, 1)
    images = ((images + sign * step).clamp(0, 1) * 255).round() / 255
    with torch.no_grad():
        labels = net(images).argmax(1)
    return as_image_set((images, labels), name="gray")


def safe(data: ImageSet) -> Tensor:
    """`(N,)` bool: the images that no perturbation of the budget turns: |w (x - 1/2)| > eps |w|_1."""
    images, _ = data.batch(torch.arange(len(data)))
    weight = Linear().weight.detach()
    return ((images.flatten(1) - 0.5) @ weight.T).abs().squeeze(1) > 0.1 * weight.abs().sum()


def run(
    out: Path, data: ImageSet, systems: list[System], cascade: Cascade | None, resume: bool = False
) -> pd.DataFrame:
    plan = Plan(data, systems, ladder(THREAT, "quick"), cascade=cascade, shard=25, samples=2)
    return run_in_hand(plan, out, resume=resume, quiet=True)


def test_the_ladder_goes_from_the_weakest_to_the_strongest() -> None:
    places = {kind: i for i, kind in enumerate(KNOWLEDGE)}
    for budget in BUDGETS:
        sent = [a for attackers in ladder(THREAT, budget, transfer=True, gray_box=True).values() for a in attackers]
        assert {a.knowledge for a in sent} == set(KNOWLEDGE)
        before_queries = [places[a.knowledge] for a in sent if a.knowledge != "black_box"]
        assert before_queries == sorted(before_queries)
        assert all(a.attack.eps == 0.1 for a in sent)  # type: ignore[attr-defined]


def test_no_attacker_knows_more_than_the_threat_model_admits() -> None:
    for knowledge in KNOWLEDGE:
        threat = ThreatModel("l2", 1.0, knowledge)
        for attackers in ladder(threat, "standard", transfer=True, gray_box=True).values():
            assert all(threat.admits(a.knowledge) for a in attackers)


def test_a_larger_budget_sends_more() -> None:
    sent = {name: ladder(THREAT, name) for name in BUDGETS}
    assert len(sent["quick"]) < len(sent["standard"]) == len(sent["thorough"])
    assert "fab-t" in sent["standard"]
    assert not any("rays" in label for label in ladder(ThreatModel("l2", 1.0)))


def test_what_gives_no_gradient_is_asked_by_queries() -> None:
    sent = ladder(THREAT, hidden={"oblivious", "bpda", "white_box"})
    assert all(not a.attack.needs_gradient or a.knowledge == "none" for own in sent.values() for a in own)


def test_a_ladder_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="norms linf and l2, not 'l0'"):
        ladder(ThreatModel("l0", 5))
    with pytest.raises(UnknownNameError, match="quick, standard, thorough"):
        ladder(THREAT, "quik")


def test_random_systems_meet_other_attackers_than_the_rest(data: ImageSet) -> None:
    net = Linear()
    plan = Plan(data, [System("net", net), System("noisy", net, Noisy())], ladder(THREAT, "standard"))
    met = {name: {c.label for c in plan.cells() if c.system.name == name} for name in ("net", "noisy")}
    assert met["noisy"] - met["net"] == {"apgd-dlr"}
    assert met["net"] - met["noisy"] == {"apgd-t", "fab-t", "rays-1000"}


def test_a_random_system_of_two_classes_meets_the_margin(data: ImageSet) -> None:
    images, labels = data.batch(torch.arange(8))
    found = up.benchmark(up.Protected(Linear(), Noisy()), (images, labels), eps=0.1, budget="quick", quiet=True)
    assert "apgd-margin" in set(found.results.cells["attack"])


def test_a_cascade_leaves_what_no_perturbation_turns(data: ImageSet, tmp_path: Path) -> None:
    net = Linear()
    systems = [System("net", net), System("half", net, Half())]
    results = Results(run(tmp_path / "run", data, systems, Cascade(THREAT, doubted=8)))
    for name in ("net", "half"):
        found = robust_accuracy(results, THREAT, system=name)
        assert found.n == N
        assert torch.equal(torch.tensor(found.images.to_numpy() == 1), safe(data))


def test_what_is_broken_keeps_the_image_that_broke_it(data: ImageSet, tmp_path: Path) -> None:
    net = Linear()
    rows = run(tmp_path / "run", data, [System("half", net, Half())], Cascade(THREAT, doubted=8))
    first = data.index[:8].tolist()
    assert (rows[rows["index"].isin(first)]["made_by"] == "").all()
    kept = rows[rows["made_by"] != ""]
    assert len(kept)
    assert (kept["pred_pure_adv"] != kept["label"]).all()
    assert (kept["linf"] <= 0.1 + 2e-5).all()
    assert (kept["gradients"] == 0).all()
    # What an early attacker broke, no later one is sent against.
    broken = rows[(rows["knowledge"] == "oblivious") & (rows["pred_pure_adv"] != rows["label"])]["index"]
    later = rows[(rows["attack"] == "apgd-ce") & rows["index"].isin(broken) & ~rows["index"].isin(first)]
    assert len(later)
    assert (later["made_by"] == "pgd-50").all()
    assert (later["made_with"] == "oblivious").all()


def test_a_cascade_says_what_attacks_on_all_images_say(data: ImageSet, tmp_path: Path) -> None:
    net = Linear()
    systems = [System("half", net, Half())]
    parts = [run(tmp_path / str(i), data, systems, c) for i, c in enumerate((None, Cascade(THREAT, doubted=0)))]
    whole, cascade = (robust_accuracy(Results(rows), THREAT, system="half") for rows in parts)
    assert whole.accuracy == cascade.accuracy
    assert whole.n == cascade.n


def test_doubted_images_are_attacked_as_if_nobody_had_come_before(data: ImageSet, tmp_path: Path) -> None:
    systems = [System("half", Linear(), Half())]
    alone, cascade = (
        run(tmp_path / str(i), data, systems, c) for i, c in enumerate((None, Cascade(THREAT, doubted=N)))
    )
    clock = [c for c in alone.columns if c.startswith("seconds")]
    pd.testing.assert_frame_equal(alone.drop(columns=clock), cascade.drop(columns=clock))
    assert set(cascade["attack"]) >= {"apgd-ce", "square-1000"}  # who begins at random, and at stripes


@dataclass(frozen=True, kw_only=True)
class Push(Attack):
    """As far as the budget goes against the linear net: no other attack finds more."""

    needs_gradient = False

    def perturb(self, context: AttackContext) -> Tensor:
        away = torch.where(context.labels == 0, 0.1, -0.1).view(-1, 1, 1, 1)
        return (context.images + away * Linear().weight.sign().view(1, 1, 8, 8)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Stay(Attack):
    """Whatever it was to begin at."""

    needs_gradient = False
    uses_start = True

    def perturb(self, context: AttackContext) -> Tensor:
        return context.images if context.start is None else context.start


@pytest.mark.parametrize(
    ("first", "then", "begins_there"),
    [
        ("white_box", "oblivious", False),
        ("gray_box", "bpda", False),
        ("white_box", "black_box", False),
        ("oblivious", "gray_box", True),
        ("bpda", "white_box", True),
    ],
)
def test_nobody_begins_at_what_only_others_could_find(
    first: str, then: str, begins_there: bool, data: ImageSet, tmp_path: Path
) -> None:
    attackers = {"push": [Attacker(Push(), first)], "stay": [Attacker(Stay(), then)]}
    surrogates = {"gray_box": Surrogate("other", Half())}
    systems = [System("half", Linear(), Half())]
    whole = Cascade(THREAT, doubted=0, whole=("push",))
    plan = Plan(data, systems, attackers, surrogates=surrogates, cascade=whole, samples=0)
    rows = run_in_hand(plan, tmp_path / "run", quiet=True).query("attack == 'stay' and made_by == ''")
    assert len(rows) > 10
    assert set(rows["linf"] > 0.05) == {begins_there}


def test_a_run_goes_on_by_its_own_cascade_alone(data: ImageSet, tmp_path: Path) -> None:
    systems = [System("half", Linear(), Half())]
    run(tmp_path / "run", data, systems, Cascade(THREAT, doubted=4))
    with pytest.raises(runs.RunError, match=r"another run: cascade\.doubted was 4 and is 8 now"):
        run(tmp_path / "run", data, systems, Cascade(THREAT, doubted=8), resume=True)


def test_two_images_of_one_index_are_refused(data: ImageSet) -> None:
    twice = replace(data, index=data.index.clamp(min=1))
    with pytest.raises(ValueError, match=r"two images of .* have one index"):
        Plan(twice, [System("net", Linear())], ladder(THREAT, "quick")).check()


def test_some_attacks_are_made_on_every_image_all_the_same(data: ImageSet, tmp_path: Path) -> None:
    plan = Plan(data, [System("net", Linear())], ladder(THREAT, "quick"), samples=0)
    plan = replace(plan, cascade=Cascade(THREAT, doubted=0, whole=("noise", "apgd-ce")))
    rows = run_in_hand(plan, tmp_path / "run", quiet=True)
    kept = rows.groupby("attack")["made_by"].agg(lambda names: (names != "").sum())
    assert kept["noise"] == kept["apgd-ce"] == 0
    assert kept["apgd-t"] > 0


def test_who_does_not_look_brings_the_same_images_to_every_defended_system(data: ImageSet, tmp_path: Path) -> None:
    net = Linear()
    systems = [System("half", net, Half()), System("noisy", net, Noisy())]
    plan = Plan(data, systems, ladder(THREAT, "quick", classes=2), samples=0)
    plan = replace(plan, cascade=Cascade(THREAT, doubted=0))
    rows = run_in_hand(plan, tmp_path / "run", quiet=True).query("attack == 'pgd-50' and knowledge == 'oblivious'")
    made = {name: of.query("draw == 0").set_index("index") for name, of in rows.groupby("system")}
    assert (made["half"]["made_by"] == "").all()
    assert made["half"]["l2"].equals(made["noisy"]["l2"])
    assert made["half"]["pred_adv"].equals(made["noisy"]["pred_adv"])


def test_a_cascade_that_was_stopped_goes_on_to_the_same_rows(data: ImageSet, tmp_path: Path) -> None:
    net, cascade = Linear(), Cascade(THREAT, doubted=4)
    whole = run(tmp_path / "whole", data, [System("half", net, Half())], cascade)
    run(tmp_path / "cut", data, [System("half", net, Half())], cascade)
    for path in sorted((tmp_path / "cut" / "rows").glob("*/*.parquet"))[::2]:
        path.unlink()
    again = run(tmp_path / "cut", data, [System("half", net, Half())], cascade, resume=True)
    free = [c for c in whole.columns if c.startswith("seconds")]
    pd.testing.assert_frame_equal(whole.drop(columns=free), again.drop(columns=free))


def test_a_recipe_may_ask_for_a_ladder(tmp_path: Path) -> None:
    from unperturb.config import resolve
    from unperturb.evaluation.plan import plan_of

    values = {
        "kind": "evaluation",
        "dataset": "digits",
        "size": 8,
        "n": 10,
        "classifiers": ["net"],
        "attacks": [{"attack": {"name": "fgsm", "eps": 0.1}, "knowledge": ["oblivious"]}],
        "ladder": {"eps": "8/255", "budget": "quick"},
    }
    plan = plan_of(resolve(values), "cpu", {"net": Flat()})
    assert plan.cascade is not None
    assert plan.cascade.whole == ("fgsm",)
    assert next(iter(plan.attackers)) == "fgsm"
    assert "apgd-t" in plan.attackers
    assert isinstance(plan.attackers["apgd-t"][0], Attacker)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.linear(images.flatten(1))
        return out
