"""The attacker who trains his own purifier: by the system's recipe, another seed, at a cost that is told."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import unperturb as up
from unperturb import cli, runs
from unperturb.benchmarking import benchmark_plan
from unperturb.classifiers import create_classifier, save_classifier
from unperturb.config import resolve
from unperturb.data import Splits
from unperturb.defenses import Defense, create_defense, load_defense, save_defense
from unperturb.devices import Speed
from unperturb.evaluation import adversarials
from unperturb.evaluation.costs import estimate
from unperturb.evaluation.run import run_evaluation
from unperturb.training import jobs

STEPS = 8  # of the system's own training


def _unprobed(patch: pytest.MonkeyPatch) -> None:
    known = functools.cache(lambda device="cpu": Speed({("float32", "contiguous"): 10.0}))
    for module in ("training.loop", "training.jobs", "evaluation.costs"):
        patch.setattr(f"unperturb.{module}.probe", known)
    for module in ("training.loop", "training.jobs"):
        patch.setattr(f"unperturb.{module}.flop_per_image", lambda _: 1e9)


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own cache of adversarial images; how quick this machine is, and what a step costs, is not asked."""
    monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "cache")
    _unprobed(monkeypatch)


def recipe(**changed: Any) -> Any:
    return resolve(
        {
            "kind": "defense",
            "dataset": "digits",
            "size": 8,
            "classifiers": ["unused"],
            "defense": {"name": "hgd", "denoiser": {"width": 4, "scales": 1, "blocks": 1, "squeeze": 1}},
            "adversarial_batches": {"attacks": [{"name": "fgsm", "eps": 0.1}]},
            "training": {
                "steps": STEPS,
                "batch": 16,
                "precision": "float32",
                "memory_format": "contiguous",
                "checkpoint_seconds": 0,
                "log_every": 2,
            },
            "seed": 4,
            **changed,
        }
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_digits: Splits) -> Path:
    """Run folders: of a classifier that knows digits a little, of a purifier, of one that began with its weights, and
    of a filter."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    net = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
    images, labels = tiny_digits.train.batch(torch.arange(len(tiny_digits.train)))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for rows in torch.randperm(len(labels)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    save_classifier(folder / "digits-convnet", net.eval())
    with pytest.MonkeyPatch.context() as patch:
        _unprobed(patch)
        options: dict[str, Any] = {"device": "cpu", "quiet": True}
        jobs.train_defense(recipe(), net, tiny_digits, out=folder / "ours", **options)
        later = recipe(start=str(folder / "ours"))
        jobs.train_defense(later, net, tiny_digits, out=folder / "later", **options)
        filtering = recipe(defense={"name": "median"})
        jobs.train_defense(filtering, net, tiny_digits, out=folder / "median", **options)
    return folder


@pytest.fixture
def classifier(made: Path) -> nn.Module:
    return up.load_classifier(made / "digits-convnet")


@pytest.fixture
def ours(made: Path, classifier: nn.Module) -> up.Protected:
    return up.Protected(classifier, up.load_defense(made / "ours"))


OPTIONS: dict[str, Any] = {"eps": 0.2, "budget": "quick", "n": 12, "name": "ours", "device": "cpu"}


def attacked(model: Any, data: Splits, out: Path, entry: Any = "retrain:4", **options: Any) -> pd.DataFrame:
    """The rows of one quick attack, oblivious and gray box."""
    options = {"n": 6, "device": "cpu", "quiet": "progress" not in options, **options}
    fgsm, kinds = up.create_attack("fgsm", eps=0.1), ["oblivious", "gray_box"]
    return up.evaluate(data.test, {"ours": model}, [fgsm], kinds, out=out, surrogate_defense=entry, **options)


def kept(out: Path, training: int = 0) -> dict[str, Tensor]:
    """The weights of the one purifier that was trained in the run folder `out`."""
    (folder,) = (out / "surrogates").iterdir()
    return load_defense(folder / str(training)).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_clock(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=["seconds_attack", "seconds_purify"])


# What it is ----------------------------------------------------------------------------------------------------------


def test_rows_verdict_and_card_say_how_long_the_surrogate_was_trained_and_it_counts(
    ours: up.Protected, tiny_digits: Splits, tmp_path: Path
) -> None:
    found = up.benchmark(
        ours, tiny_digits.test, out=tmp_path / "run", surrogate_defense="retrain:4", quiet=True, **OPTIONS
    )
    rows = up.read_rows(tmp_path / "run")
    gray = rows[rows["knowledge"] == "gray_box"]
    assert set(gray["surrogate"]) == {f"retrained, 4 of {STEPS} steps"}
    assert set(gray["system"]) == {"ours"}  # before the bare net nobody needs a purifier
    assert set(rows[rows["knowledge"] != "gray_box"]["surrogate"]) == {""}
    assert f"(retrained, 4 of {STEPS} steps)" in str(found)
    written = found.write_card(tmp_path / "card")
    for kind in ("html", "md", "json"):
        assert f"retrained, 4 of {STEPS} steps" in written[kind].read_text(), kind

    def left(*kinds: str) -> float:
        seen = rows[rows["knowledge"].isin(kinds) & (rows["system"] == "ours")]
        right = (seen["pred_pure_adv"] == seen["label"]) & (seen["pred_pure_clean"] == seen["label"])
        return float(right.groupby(seen["index"]).all().mean())

    below = ("none", "oblivious")
    for knowledge, kinds in (("oblivious", below), ("gray_box", (*below, "gray_box"))):
        threat = up.ThreatModel("linf", 0.2, knowledge)
        assert up.robust_accuracy(found.results, threat, system="ours").accuracy == pytest.approx(left(*kinds))
    assert left("gray_box") < left("none")
    assert found.robust.accuracy <= left(*below, "gray_box")


def test_it_is_the_systems_recipe_by_another_seed(
    ours: up.Protected, classifier: nn.Module, made: Path, tiny_digits: Splits, tmp_path: Path
) -> None:
    attacked(ours, tiny_digits, tmp_path / "run", "retrain")
    by_hand = jobs.train_defense(
        recipe(seed=5), classifier, tiny_digits, out=tmp_path / "by-hand", device="cpu", quiet=True
    )
    assert same(kept(tmp_path / "run"), by_hand.state_dict())
    assert not same(kept(tmp_path / "run"), load_defense(made / "ours").state_dict())
    assert set(up.read_rows(tmp_path / "run").query("knowledge == 'gray_box'")["surrogate"]) == {
        f"retrained, {STEPS} steps"
    }


def test_the_attacker_has_none_of_the_weights_that_a_training_began_with(
    made: Path, classifier: nn.Module, tiny_digits: Splits, tmp_path: Path
) -> None:
    later = up.Protected(classifier, up.load_defense(made / "later"))
    attacked(later, tiny_digits, tmp_path / "run", "retrain:12")
    (folder,) = (tmp_path / "run" / "surrogates").iterdir()
    first, second = (json.loads((folder / str(k) / "recipe.json").read_text()) for k in (0, 1))
    assert [first["start"], second["start"]] == [None, str(folder / "0")]
    assert [part["training"]["steps"] for part in (first, second)] == [6, 6]  # twelve in all
    assert not same(kept(tmp_path / "run"), load_defense(made / "ours").state_dict())
    assert set(up.read_rows(tmp_path / "run").query("knowledge == 'gray_box'")["surrogate"]) == {
        f"retrained, 12 of {2 * STEPS} steps"
    }


# What it costs -------------------------------------------------------------------------------------------------------


def test_its_cost_is_told_beforehand(ours: up.Protected, tiny_digits: Splits) -> None:
    training, whole = (
        estimate(benchmark_plan(ours, tiny_digits.test, surrogate_defense=entry, **OPTIONS))
        for entry in ("retrain:4", "retrain")
    )
    assert (training.training_steps, whole.training_steps) == (4, STEPS)
    assert training.training_pflop == pytest.approx(4 * 16 * 1e9 / 1e15)
    assert whole.pflop - training.pflop == pytest.approx(training.training_pflop, rel=0.02)
    without = estimate(benchmark_plan(ours, tiny_digits.test, **OPTIONS))
    assert without.training_steps == 0
    assert "trains" not in str(without)


def test_the_command_tells_it_and_a_run_shows_it(
    made: Path, ours: up.Protected, tiny_digits: Splits, tmp_path: Path
) -> None:
    words = ["benchmark", str(made / "digits-convnet"), "--defense", str(made / "ours"), "--data", "digits"]
    words += ["--size", "8", "--n", "2", "--budget", "quick", "--surrogate-defense", "retrain:4", "--dry-run"]
    done = CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path / "dry")])
    assert done.exit_code == 0, done.output
    assert "for 4 steps in which the attacker trains a purifier" in done.output
    assert not (tmp_path / "dry").exists()
    told: list[tuple[int, int, str]] = []
    attacked(ours, tiny_digits, tmp_path / "run", progress=lambda *said: told.append(said))
    training = [said for said in told if said[2].startswith("training")]
    assert [said[:2] for said in training] == [(k, 4) for k in range(1, 5)]
    assert training == told[:4]
    assert "ours: 4 steps, 6.4e-05 PFLOP" in training[0][2]


# Resumed -------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_trains_nothing_again(
    ours: up.Protected, tiny_digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    attacked(ours, tiny_digits, out)
    rows = up.read_rows(out)
    with pytest.raises(runs.RunError, match="already holds this run; go on with --resume"):
        attacked(ours, tiny_digits, out)
    with pytest.raises(runs.RunError, match=r"another run: .*steps"):
        attacked(ours, tiny_digits, out, "retrain:5", resume=True)
    gone = sorted(out.glob("rows/*gray_box*/*.parquet"))
    assert gone
    for path in gone:
        path.unlink()
    monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "another")
    monkeypatch.setattr(jobs, "train", lambda *_, **__: pytest.fail("it was trained again"))
    attacked(ours, tiny_digits, out, resume=True)
    pd.testing.assert_frame_equal(without_clock(up.read_rows(out)), without_clock(rows))


def test_a_stopped_training_goes_on_where_it_was(ours: up.Protected, tiny_digits: Splits, tmp_path: Path) -> None:
    attacked(ours, tiny_digits, tmp_path / "whole")

    def stop(done: int, total: int, said: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attacked(ours, tiny_digits, tmp_path / "run", progress=stop)
    assert not list((tmp_path / "run").glob("rows/*"))
    told: list[tuple[int, int, str]] = []
    attacked(ours, tiny_digits, tmp_path / "run", progress=lambda *said: told.append(said), resume=True)
    assert [said[0] for said in told if said[2].startswith("training")] == [3, 4]  # of step 3 nothing was kept yet
    assert same(kept(tmp_path / "run"), kept(tmp_path / "whole"))
    rows = [without_clock(up.read_rows(tmp_path / name)) for name in ("run", "whole")]
    pd.testing.assert_frame_equal(*rows)


def test_another_purifier_in_its_place_is_refused(ours: up.Protected, tiny_digits: Splits, tmp_path: Path) -> None:
    attacked(ours, tiny_digits, tmp_path / "run")
    (folder,) = (tmp_path / "run" / "surrogates").iterdir()
    other = load_defense(folder / "0")
    with torch.no_grad():
        next(other.parameters()).add_(0.5)
    save_defense(folder / "0", other, {})
    with pytest.raises(runs.RunError, match="other purifiers than those that rows of this run were made with"):
        attacked(ours, tiny_digits, tmp_path / "run", resume=True)


# Several systems, by a recipe ----------------------------------------------------------------------------------------


def evaluation(made: Path, *systems: str, **changed: Any) -> Any:
    return resolve(
        {
            "kind": "evaluation",
            "dataset": "digits",
            "size": 8,
            "n": 6,
            "classifiers": [str(made / "digits-convnet")],
            "systems": ["undefended", *(str(made / name) for name in systems)],
            "surrogate_defense": "retrain:4",
            "attacks": [{"name": "fgsm", "eps": 0.1}],
            "knowledge": ["oblivious", "gray_box"],
            **changed,
        }
    )


def test_each_system_of_a_recipe_meets_a_copy_of_its_own(made: Path, tmp_path: Path) -> None:
    rows = run_evaluation(evaluation(made, "ours", "later"), tmp_path / "run", device="cpu", quiet=True)
    gray = rows[rows["knowledge"] == "gray_box"]
    assert gray.groupby("system")["surrogate"].agg(set).to_dict() == {
        "ours": {f"retrained, 4 of {STEPS} steps"},
        "later": {f"retrained, 4 of {2 * STEPS} steps"},
    }
    assert len(list((tmp_path / "run" / "surrogates").iterdir())) == 2
    assert "gray box" in str(up.table(rows))


def test_nobody_trains_what_nobody_attacks_with(made: Path, tmp_path: Path) -> None:
    small = evaluation(made, "ours", knowledge=["oblivious"])
    run_evaluation(small, tmp_path / "run", device="cpu", quiet=True)
    assert not (tmp_path / "run" / "surrogates").exists()


def test_the_caller_draws_what_he_would_have_drawn(ours: up.Protected, tiny_digits: Splits, tmp_path: Path) -> None:
    fgsm = up.create_attack("fgsm", eps=0.1)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    options: dict[str, Any] = {"n": 2, "device": "cpu", "quiet": True, "surrogate_defense": "retrain:2"}
    up.evaluate(tiny_digits.test, {"ours": ours}, [fgsm], ["gray_box"], out=tmp_path / "run", **options)
    assert torch.equal(torch.rand(3), expected)


# Handed in -----------------------------------------------------------------------------------------------------------


def test_another_purifier_may_be_handed_in(
    made: Path, ours: up.Protected, classifier: nn.Module, tiny_digits: Splits
) -> None:
    """An attack through a purifier of another kind is transfer from it: the images are those that white-box PGD makes
    on that one, and the system's answers to them are its own."""
    pgd = up.create_attack("pgd", eps=0.1, steps=3)
    other = create_defense("gaussian_blur", kernel=3, sigma=1.0).eval()
    options: dict[str, Any] = {"n": 12, "device": "cpu", "quiet": True}
    rows = up.evaluate(tiny_digits.test, {"ours": ours}, [pgd], ["gray_box"], surrogate_defense=other, **options)
    data = tiny_digits.test.subset(12)
    images, labels = data.batch(torch.arange(12))
    x_adv = pgd(up.Protected(classifier, other), images, labels, index=data.index)
    with torch.no_grad():
        answers = ours((x_adv * 65535).round() / 65535).argmax(1)
    theirs = rows.set_index("index").loc[data.index.tolist(), "pred_pure_adv"].to_numpy()
    assert (theirs == answers.numpy()).sum() >= 11  # another order of sums may turn one that stands at the edge
    assert set(rows["surrogate"]) == {"surrogate"}
    options["surrogate_defense"] = str(made / "median")
    rows = up.evaluate(tiny_digits.test, {"ours": ours}, [pgd], ["gray_box"], **options)
    assert set(zip(rows["knowledge"], rows["surrogate"])) == {("gray_box", "median")}  # by the folder's name


# Refused -------------------------------------------------------------------------------------------------------------


class Own(Defense):
    def purify(self, images: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("bare", "no system has a purifier that an attacker could train"),
        ("own", "train ours again: its purifier comes from no run folder that holds its recipe"),
        ("in place", "train ours again: it is a classifier, without a purifier"),
        ("filter", r"train ours again: it has nothing to learn, so that who knows it has it whole \(white_box\)"),
        ("pipeline", "train ours again: its purifier comes from no run folder"),
        ("larger", r"trained on digits.*judged on images of another shape \(\[1, 8, 8\] and \[1, 28, 28\]\)"),
        ("lost", r"train ours again: .*recipe\.json is not there"),
        ("renamed", "judged on images of another class_names"),
    ],
)
def test_what_cannot_be_trained_again(
    which: str, said: str, made: Path, classifier: nn.Module, tiny_digits: Splits, tmp_path: Path
) -> None:
    data, lost = tiny_digits.test, up.load_defense(made / "ours")
    lost.folder = tmp_path / "lost"
    another = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
    models: dict[str, Any] = {
        "bare": classifier,
        "own": up.Protected(classifier, Own()),
        "in place": up.System("ours", another, base=classifier),
        "filter": up.Protected(classifier, up.load_defense(made / "median")),
        "pipeline": up.Protected(classifier, up.load_defense(f"{made / 'ours'}+median")),
        "larger": up.Protected(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), up.load_defense(made / "ours")),
        "lost": up.Protected(classifier, lost),
        "renamed": up.Protected(classifier, up.load_defense(made / "ours")),
    }
    if which == "larger":
        data = up.load_dataset("digits").test
    if which == "renamed":
        images, labels = data.batch(torch.arange(20))
        data = up.as_image_set((images, labels), class_names=[f"digit {k}" for k in range(10)], name="mine")
    with pytest.raises(ValueError, match=said):
        benchmark_plan(models[which], data, surrogate_defense="retrain", **OPTIONS)


@pytest.mark.parametrize("entry", ["retrain:", "retrain:0", "retrain:few", "retrain:-3"])
def test_steps_that_are_none(entry: str, ours: up.Protected, made: Path, tiny_digits: Splits, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected retrain, or retrain:500 for 500 steps"):
        attacked(ours, tiny_digits, tmp_path / "run", entry)
    with pytest.raises(ValueError, match="expected retrain, or retrain:500"):
        run_evaluation(evaluation(made, "ours", surrogate_defense=entry), tmp_path / "run", device="cpu")


def test_a_net_that_gives_no_gradient_trains_nothing(
    ours: up.Protected, classifier: nn.Module, tiny_digits: Splits, tmp_path: Path
) -> None:
    hidden = up.Protected(up.wrap(torch.no_grad()(classifier.forward), size=8, channels=1), ours.defense)
    with pytest.raises(ValueError, match="gives no gradient to train with"):
        benchmark_plan(hidden, tiny_digits.test, surrogate_defense="retrain", **OPTIONS)
    fgsm = up.create_attack("fgsm", eps=0.1)
    options: dict[str, Any] = {"n": 2, "device": "cpu", "quiet": True, "surrogate_defense": "retrain"}
    with pytest.raises(ValueError, match="gives no gradient"):
        up.evaluate(tiny_digits.test, {"ours": hidden}, [fgsm], ["gray_box"], out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
