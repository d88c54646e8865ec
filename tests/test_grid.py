"""Cells to rows: every cell once, rows against a computation by hand, and what is made once for several."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from toy import Linear, purifier, toy
from unperturb.attackers import Attacker
from unperturb.attacks import Attack, create_attack
from unperturb.attacks.context import AttackContext
from unperturb.benchmarking import benchmark_plan
from unperturb.classifiers import create_classifier
from unperturb.data import Splits
from unperturb.defenses import Defense, Protected, create_defense
from unperturb.devices import Speed
from unperturb.evaluation import adversarials
from unperturb.evaluation import costs as told
from unperturb.evaluation.costs import estimate
from unperturb.evaluation.grid import run_grid, shown_rows
from unperturb.evaluation.plan import Plan
from unperturb.evaluation.surrogates import Surrogate
from unperturb.results import samples, schema
from unperturb.systems import System


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "cache")


def attackers(attack: Attack, *kinds: str, **options: Any) -> list[Attacker]:
    return [Attacker(attack, kind, **options) for kind in kinds]


def plan(
    purifiers: dict[str, Defense | None] | None = None, classifiers: dict[str, nn.Module] | None = None, **changed: Any
) -> Plan:
    """purifiers: what stands before each classifier, by the names of the systems; None: nothing."""
    purifiers = {"bare": None, "ours": purifier()} if purifiers is None else purifiers
    classifiers = classifiers or {"linear": Linear()}
    options: dict[str, Any] = {
        "data": toy(),
        "classifiers": classifiers,
        "systems": [System(name, c, p) for c in classifiers.values() for name, p in purifiers.items()],
        "attackers": {"pgd": attackers(create_attack("pgd", eps=0.1, steps=3), "oblivious", "white_box")},
        "seed": 7,
        "batch": 3,
        "shard": 4,
        "samples": 3,
        **changed,
    }
    return Plan(**options)


FGSM = create_attack("fgsm", eps=0.1)


def names(plan: Plan) -> list[tuple[str, str, str]]:
    return [cell.names[1:] for cell in plan.cells()]


def test_cells() -> None:
    pgd = create_attack("pgd", eps=0.1)
    both = plan(attackers={"a": attackers(FGSM, "oblivious", "white_box"), "b": attackers(pgd, "oblivious")})
    assert names(both) == [
        ("bare", "a", "oblivious"),
        ("ours", "a", "oblivious"),
        ("ours", "a", "white_box"),
        ("bare", "b", "oblivious"),
        ("ours", "b", "oblivious"),
    ]
    assert len({c.folder for c in both.cells()}) == len(both.cells())


def test_cells_that_would_be_the_same_are_asked_once() -> None:
    bare = Linear()
    systems = [System("bare", bare), System("ours", bare, purifier()), System("robust", Linear(1), base=bare)]
    crossed = plan(systems=systems, classifiers={"linear": bare}, attackers={"a": attackers(FGSM, "bpda", "white_box")})
    assert names(crossed) == [
        ("bare", "a", "oblivious"),
        ("ours", "a", "bpda"),
        ("robust", "a", "white_box"),
        ("ours", "a", "white_box"),
    ]


def test_classifiers_are_named_after_their_family_or_given_a_number() -> None:
    torch.manual_seed(0)
    family = create_classifier("convnet", channels=1, size=8, classes=4, mean=[0.3], std=[0.35])
    models = [Linear(0), family, Linear(1), Linear(2)]
    crossed = Plan(data=toy(), systems=[System(str(k), m) for k, m in enumerate(models)], attackers={})
    assert list(crossed.classifiers) == ["classifier", "convnet", "classifier-2", "classifier-3"]
    assert [crossed.block(name)[0].name for name in crossed.classifiers] == ["0", "1", "2", "3"]


def test_a_defense_without_a_gradient_is_still_asked_by_the_white_box_attacker(tmp_path: Path) -> None:
    made = {"bare": None, "bits": create_defense("bit_depth", bits=3)}
    run_grid(plan(made, attackers={"fgsm": attackers(FGSM, "oblivious", "white_box")}), tmp_path)
    rows = schema.read_rows(tmp_path)
    kinds = set(zip(rows["system"], rows["knowledge"]))
    assert kinds == {("bare", "oblivious"), ("bits", "oblivious"), ("bits", "white_box")}
    assert (rows["linf"] > 0.05).all()  # through the stand-in's gradient the budget is spent


def test_no_attack_on_a_random_defense_stops_at_its_first_success() -> None:
    drawn = create_defense("denoised_smoothing", channels=1, denoiser={"width": 2}).eval()
    made = {n: create_attack(n, eps=0.1, first_success=True) for n in ("apgd", "square")}
    kinds = {n: attackers(attack, "oblivious", "white_box") for n, attack in made.items()}
    cells = plan({"ours": purifier(), "drawn": drawn}, attackers=kinds).cells()
    stops = {(c.system.name, c.names[-1]): c.attacker.attack.first_success for c in cells}  # type: ignore[attr-defined]
    assert stops == {
        ("ours", "oblivious"): True,
        ("ours", "white_box"): True,
        ("drawn", "oblivious"): True,  # who looks at the bare classifier meets no draw
        ("drawn", "white_box"): False,
    }


def psnr(a: Tensor, b: Tensor) -> float:
    error = float((a.double() - b.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def test_rows_against_one_image_at_a_time(tmp_path: Path) -> None:
    model, defense, data = Linear(), purifier(), toy()
    attack = create_attack("pgd", eps=0.1, steps=3)
    run_grid(plan(), tmp_path / "out")
    rows = schema.read_rows(tmp_path / "out")
    assert list(rows.columns) == list(schema.ROW_COLUMNS)
    assert len(rows) == 3 * 10
    assert sorted(f.name for f in (tmp_path / "out" / "rows").glob("*/*"))[::3] == [
        "0000.parquet",
        "0001.parquet",
        "0002.parquet",
    ]
    assert set(rows.groupby(["system", "knowledge"]).size()) == {10}
    for row in rows.to_dict("records"):
        place = row["index"] - 100
        x, y = data.batch(torch.tensor([place]))
        function = Protected(model, defense) if row["knowledge"] == "white_box" else model
        x_adv = attack(function, x, y, index=torch.tensor([row["index"]]), seed=7)
        purify = defense.purify if row["defended"] else (lambda z: z)
        with torch.no_grad():
            restored, recovered = purify(x_adv), purify(x)
            views = {"clean": x, "adv": x_adv, "pure_clean": recovered, "pure_adv": restored}
            for name, view in views.items():
                logits = model(view)[0]
                assert row[f"pred_{name}"] == int(logits.argmax())
                assert row[f"conf_{name}"] == pytest.approx(float(logits.softmax(0)[y]), abs=2e-4)
            rounded = model(purify((x_adv * 255).round() / 255))[0].topk(2)
            if float(rounded.values[0] - rounded.values[1]) > 1e-2:  # x_adv may round to another level than was kept
                assert row["pred_pure_adv_8bit"] == int(rounded.indices[0])
        delta = (x_adv - x)[0, 0]
        assert row["l0"] == int((delta.abs() > 1e-4).sum())
        assert row["l2"] == pytest.approx(float(delta.norm()), abs=1e-4)
        assert row["linf"] == pytest.approx(float(delta.abs().max()), abs=2e-5)
        assert row["linf"] <= 0.1 + 1e-5
        assert row["psnr_adv"] == pytest.approx(psnr(x_adv, x), abs=0.01)
        assert row["psnr_pure_adv"] == pytest.approx(psnr(restored, x), abs=0.01)
        assert row["psnr_pure_clean"] == pytest.approx(psnr(recovered, x), abs=0.01)
        assert all(math.isnan(row[k]) for k in ("ssim_adv", "ssim_pure_adv", "ssim_pure_clean"))  # 8x8: no window
        assert (row["label"], row["seed"], row["dataset"], row["split"]) == (int(y), 7, "toy", "test")
        assert (row["classifier"], row["attack"], row["attack_repr"]) == ("linear", "pgd", repr(attack))
        assert row["eps"] == pytest.approx(0.1)
        assert not row["rejected_adv"]
        assert row["seconds_attack"] > 0
        assert (row["system"], row["defended"]) in {("bare", False), ("ours", True)}
        assert (row["norm"], row["draw"], row["made_by"]) == ("linf", 0, "")
    fooled = rows["pred_adv"] != rows["label"]
    assert 0.2 < fooled.mean() <= 1


def gan() -> Any:
    options = {"size": 8, "width": 2, "latent": 4, "steps": 3, "restarts": 2}
    torch.manual_seed(3)
    return create_defense("defense_gan", channels=1, **options).eval().requires_grad_(False)


def magnet() -> Any:
    torch.manual_seed(4)
    defense = create_defense("magnet", channels=1, detectors=[{"error": 2}, {"temperature": 10}, {"error": 1}])
    defense.limits.fill_(0.09)
    return defense.eval()


def test_what_detects_is_judged_as_purifying_and_scoring_apart_would(tmp_path: Path) -> None:
    chain = create_defense("pipeline", parts=[magnet(), create_defense("bit_depth", bits=2), gan()])
    made = {"bare": None, "gan": gan(), "magnet": magnet(), "chain": chain}
    two = {"linear": Linear(), "other": Linear(5)}
    run_grid(plan(made, two, batch=4, shard=5, samples=0), tmp_path)
    rows = schema.read_rows(tmp_path)
    assert len(rows) == 2 * 10 * (1 + 2 * 3)
    x, _ = toy().batch(torch.arange(10))
    for (at, by, knowledge), part in rows.groupby(["classifier", "system", "knowledge"]):
        with torch.no_grad():
            own = made[by] or create_defense("identity")
            purified, scores = own.purify(x), own.scores(x, two[at])
            predicted = two[at](purified).argmax(1)
        mine = part.sort_values("index")
        assert (mine["pred_pure_clean"].to_numpy() == predicted.numpy()).all(), (at, by, knowledge)
        kept = np.stack(mine["scores_clean"].to_numpy()) if scores.shape[1] else np.zeros((10, 0))
        np.testing.assert_allclose(kept, scores.numpy(), rtol=1e-5, atol=1e-7)
        rejected = (scores > own.thresholds).any(1).numpy()
        assert (mine["rejected_clean"].to_numpy() == rejected).all()
    # The classifier is asked by one of magnet's detectors: what it says in front of one is not said of the other.
    clean = rows[rows["system"] == "magnet"].groupby("classifier")["scores_clean"].apply(lambda s: np.stack(s)[:, 1])
    assert np.abs(clean["linear"][:10] - clean["other"][:10]).max() > 1e-4


def test_each_image_is_reconstructed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unperturb.defenses.defense_gan import DefenseGAN

    seen, whole = list[int](), DefenseGAN.reconstruct

    def counted(self: DefenseGAN, images: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(DefenseGAN, "reconstruct", counted)
    kinds = {"a": attackers(FGSM, "oblivious"), "b": attackers(create_attack("pgd", eps=0.1, steps=2), "oblivious")}
    run_grid(plan({"bare": None, "gan": gan()}, attackers=kinds), tmp_path)
    assert sum(seen) == 10 * (1 + 2 * 2)  # clean images once; those of each attack, and these rounded to 8 bits


def test_systems_share_what_is_made_without_them(tmp_path: Path) -> None:
    seen: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Counted(Attack):
        def perturb(self, context: AttackContext) -> Tensor:
            seen.append(len(context.images))
            return (context.images + 0.1).clamp(0, 1)

    made = {"bare": None, "ours": purifier(), "median": create_defense("median")}
    kinds = {"counted": attackers(Counted(), "oblivious", "white_box", "bpda", "transfer", "gray_box")}
    surrogates = {"transfer": Surrogate("other", Linear(5)), "gray_box": Surrogate("mine", purifier(1))}
    crossed = plan(made, attackers=kinds, surrogates=surrogates, samples=0)
    run_grid(crossed, tmp_path)
    assert len(crossed.cells()) == 3 + 2 + 2 + 3 + 2
    # On the classifier, on the other one and through the attacker's own purifier once; on each of two systems twice.
    assert sum(seen) == 10 * (1 + 1 + 1 + 2 * 2)
    rows = schema.read_rows(tmp_path)
    assert rows.groupby("knowledge")["surrogate"].agg(set).to_dict() == {
        "oblivious": {""},
        "white_box": {""},
        "bpda": {""},
        "transfer": {"other"},
        "gray_box": {"mine"},
    }


def test_one_purifier_before_two_classifiers_purifies_clean_images_once(tmp_path: Path) -> None:
    class Half(Defense):
        seen = 0

        def purify(self, images: Tensor) -> Tensor:
            self.seen += len(images)
            return images / 2

    half, two = Half(), {"linear": Linear(), "other": Linear(5)}
    run_grid(plan({"half": half}, two, attackers={"a": attackers(FGSM, "oblivious")}), tmp_path)
    assert half.seen == 10 * (1 + 2 * 2)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_random_defense_draws_the_same_when_resumed(lost: int, tmp_path: Path) -> None:
    torch.manual_seed(5)
    drawn = create_defense("defense_gan", channels=1, size=8, width=2, latent=4, steps=2, restarts=2, seed=None).eval()
    pgd = create_attack("pgd", eps=0.1, steps=2)
    kinds = {"a": attackers(FGSM, "oblivious"), "b": attackers(pgd, "oblivious", "white_box", eot_samples=2)}
    many = plan({"bare": None, "drawn": drawn}, attackers=kinds, samples=0, draws=3)
    run_grid(many, tmp_path)
    first = schema.read_rows(tmp_path)
    sorted(tmp_path.glob("rows/linear.drawn.*"))[lost].joinpath("0001.parquet").unlink()
    run_grid(many, tmp_path)
    pd.testing.assert_frame_equal(without_clock(schema.read_rows(tmp_path)), without_clock(first))


def test_samples_are_a_choice_over_classes_from_all_shards(tmp_path: Path) -> None:
    data, labels = toy(), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 3, 3])  # sorted, as a folder is
    data = replace(data, labels=labels)
    assert labels[shown_rows(labels, 3)].sort().values.tolist() == [0, 1, 3]
    assert labels[shown_rows(labels, 8)].bincount().tolist() == [3, 3, 0, 2]
    assert sorted(shown_rows(labels, 99).tolist()) == list(range(10))
    chosen = shown_rows(labels, 5)
    assert len(set((chosen // 4).tolist())) > 1  # of several shards
    run_grid(plan(data=data, samples=5), tmp_path)
    found = {(cell["system"], cell["knowledge"]): tensors for cell, tensors in samples.read_samples(tmp_path)}
    assert set(found) == {("bare", "oblivious"), ("ours", "oblivious"), ("ours", "white_box")}
    rows = schema.read_rows(tmp_path).query("system == 'ours' and knowledge == 'white_box'").set_index("index")
    tensors = found["ours", "white_box"]
    assert tensors["index"].tolist() == data.index[chosen].tolist()
    assert torch.equal(tensors["clean"], data.images[chosen])
    rows = rows.loc[tensors["index"].tolist()]
    order = ("clean", "adv", "pure_clean", "pure_adv")
    assert tensors["prediction"].tolist() == rows[[f"pred_{k}" for k in order]].to_numpy().tolist()
    np.testing.assert_allclose(tensors["confidence"], rows[[f"conf_{k}" for k in order]].to_numpy())


def test_names_that_read_alike_are_cells_of_their_own(tmp_path: Path) -> None:
    labels = ["a b", "a_b", "A_B", "eps<4", "eps>4", "雑音", "攻撃", "x" * 300, "x" * 299 + "y"]
    bits = {name: create_defense("bit_depth", bits=3) for name in ("median+jpeg", "median_jpeg")}
    kinds = {label: attackers(FGSM, "oblivious") for label in labels}
    crossed = plan(bits, attackers=kinds, shard=10, samples=2)
    folders = [cell.folder for cell in crossed.cells()]
    assert len({f.casefold() for f in folders}) == len(folders) == 2 * len(labels)
    assert max(map(len, folders)) == 120
    run_grid(crossed, tmp_path)
    rows = schema.read_rows(tmp_path)
    assert rows.groupby(["system", "attack"])["index"].nunique().tolist() == [10] * len(folders)
    assert len(samples.read_samples(tmp_path)) == len(folders)


def test_an_attack_without_a_budget_has_none_in_its_rows(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unbounded(Attack):
        eps: float | None = None

        def perturb(self, context: AttackContext) -> Tensor:
            return 1 - context.images

    run_grid(plan(attackers={"inverse": attackers(Unbounded(), "oblivious")}), tmp_path)
    rows = schema.read_rows(tmp_path)
    assert rows["eps"].isna().all()
    assert set(rows["norm"]) == {""}


def test_cost_of_a_grid_against_a_count_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "probe", lambda device: Speed({("float32", "contiguous"): 10.0}))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images.flatten(1))

    attack = create_attack("pgd", eps=0.1, steps=3)
    net, forward = Net(), 2 * 64 * 4
    one = plan({"bare": None}, {"net": net}, attackers={"a": attackers(attack, "oblivious")})
    cost = estimate(one)
    # Four forward passes and three backward to the image; the clean ones, the attacked ones and these in 8 bits.
    assert cost.pflop * 1e15 == pytest.approx((4 + 3 + 3) * forward * 10, rel=0.01)
    assert (cost.cells, cost.images) == (1, 10)

    class Noisy(Defense):
        random = True

        def purify(self, images: Tensor) -> Tensor:
            return images + torch.randn_like(images) / 100

    kinds = {"a": attackers(attack, "oblivious", "white_box", eot_samples=2)}
    two = plan({"bare": None, "noisy": Noisy()}, {"net": net}, attackers=kinds, draws=5)
    # What is made on the bare classifier is made once, and what is made through the draws takes each pass twice; of the
    # noisy system each of the two is asked for five times in 8 bits and as it is, and the clean images as often.
    attacks, answers = 7 + 2 * 7, 3 + 1 + 5 * (1 + 2 * 2)
    assert estimate(two).pflop * 1e15 == pytest.approx((attacks + answers) * forward * 10, rel=0.01)


def test_cost_of_a_slow_model_is_told_without_attacking_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "probe", lambda device: Speed({("float32", "contiguous"): 10.0}))

    class Slow(nn.Module):
        asked = 0

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, images: Tensor) -> Tensor:
            self.asked += 1
            return self.layer(images.flatten(1))

    net = Slow()
    sent = {"a": attackers(create_attack("apgd-t", eps=0.1, steps=50, first_success=True), "oblivious")}
    assert estimate(plan({"bare": None}, {"net": net}, attackers=sent)).pflop > 0
    assert net.asked < 10


@pytest.mark.parametrize(
    ("options", "forwards", "backwards"),
    [
        ({"name": "pgd", "eps": 0.1, "steps": 7, "restarts": 2}, 16, 14),
        ({"name": "pgd", "eps": 0.1, "steps": 45, "restarts": 7}, 7 * 46, 7 * 45),
        ({"name": "fgsm", "eps": 0.1}, 1, 1),
        ({"name": "cw", "steps": 60, "search_steps": 3}, 181, 180),
        # Four classes are three to aim at; who stops at a success, stops nowhere when the most is asked for.
        ({"name": "apgd-t", "eps": 0.1, "steps": 10, "target_classes": 9, "first_success": True}, 3 * 11 + 1, 3 * 10),
        ({"name": "square", "eps": 0.1, "queries": 5000}, 5000, 0),
        ({"name": "deepfool", "steps": 5}, 6, 5 * 3),
    ],
)
def test_passes_of_attacks_are_billed(options: dict[str, Any], forwards: int, backwards: int) -> None:
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    least, most = told.billed(create_attack(**options), images, 4)
    assert most == (forwards, backwards)
    assert least[0] <= forwards
    assert least[1] <= backwards
    if options.get("first_success"):
        assert least[0] < forwards / 2


def test_a_cascade_costs_least_where_every_image_falls_at_once(
    monkeypatch: pytest.MonkeyPatch, tiny_digits: Splits
) -> None:
    monkeypatch.setattr(told, "probe", lambda device: Speed({("float32", "contiguous"): 10.0}))
    net = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
    cost = estimate(
        benchmark_plan(System("ours", net, purifier()), tiny_digits.test, eps=0.3, budget="standard", n=300)
    )
    assert 0 < cost.least_pflop < cost.pflop / 3
    assert 0 < cost.least_minutes < cost.minutes / 3
    assert re.fullmatch(r"\S+ to \S+ PFLOP, about \S+ to \S+ minutes: what falls early is cheap", str(cost))


def without_clock(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=["seconds_attack", "seconds_purify"])
