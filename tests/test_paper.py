"""The paper from recipes: what is planned, what runs and what is only read, and what the tables and figures say."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from made_runs import make_run
from unperturb import cli
from unperturb.defenses.networks import discriminators, generators
from unperturb.devices import Speed
from unperturb.paper import steps
from unperturb.paper.architecture import architecture_figure, boxes
from unperturb.paper.figures import curves_figure, distributions_figure, training_logs
from unperturb.paper.parts import chosen, parts
from unperturb.paper.reproduce import Plan, reproduce
from unperturb.paper.steps import Step, Steps
from unperturb.paper.tables import Judged, accuracy_by_attack, accuracy_by_system, likeness
from unperturb.recipe_files import read_recipe
from unperturb.registry import UnknownNameError
from unperturb.results.sheet import as_latex, as_markdown
from unperturb.results.tables import accuracy_table, quality_table
from unperturb.runs import read_json

# What makes the digits' part a matter of seconds: one classifier, one purifier, a few images, hardly any step.
QUICK = {
    "classifier": ["training.epochs=0.2"],
    "defense": [
        'classifiers=["runs/small_convnet-digits"]',
        'adversarial_batches.attacks=[{ name = "fgsm", eps = 0.3 }]',
        "training.epochs=0.1",
        "training.validate_every=9",
        "training.log_every=1",
        "training.batch=8",
    ],
    "evaluation": [
        'classifiers=["runs/small_convnet-digits"]',
        'systems=["undefended", "runs/small_paper-digits"]',
        'attacks=[{ name = "fgsm", eps = 0.3 }, { name = "deepfool", steps = 2 }]',
        'ladder={ eps = 0.3, budget = "quick", knowledge = "oblivious", doubted = 0 }',
        "n=4",
        "batch=4",
    ],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, without a zoo, on a machine whose speed is known."""
    monkeypatch.setattr("unperturb.zoo.folders", dict)
    monkeypatch.chdir(tmp_path)
    speed = Speed({("float32", "contiguous"): 10.0})
    for module in ("training.jobs", "training.loop", "evaluation.costs", "paper.steps"):
        monkeypatch.setattr(f"unperturb.{module}.probe", functools.cache(lambda *_: speed))
    return tmp_path


@pytest.fixture
def quick(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where the recipes of the digits are cut to a few steps and images."""

    def read(name: str, overrides: Any = (), kind: str | None = None) -> Any:
        plain = ["training.precision=float32", "training.memory_format=contiguous"]
        of = read_recipe(name).kind
        return read_recipe(name, [*QUICK[of], *(plain if of != "evaluation" else []), *overrides], kind)

    monkeypatch.setattr(steps, "read_recipe", read)
    return here


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Parts --------------------------------------------------------------------------------------------------------------


def test_a_part_a_piece_and_a_piece_of_a_part_are_named() -> None:
    assert list(chosen([])) == list(parts())
    assert {
        name: pieces for name, (_, pieces) in chosen(["table1-mnist", "figure2-mnist", "table1-mnist"]).items()
    } == {"mnist": ["table1", "figure2"]}
    assert {name for name, (_, pieces) in chosen(["figure1"]).items() if pieces == ["figure1"]} == set(parts())
    assert "figure3" in chosen(["mnist"])["mnist"][1]
    with pytest.raises(UnknownNameError, match="Did you mean 'table1-mnist'"):
        chosen(["table1-mnits"])


@pytest.mark.parametrize("part", list(parts()))
def test_everything_that_a_part_needs_can_be_made_or_is_there(part: str, here: Path) -> None:
    plan = Plan.of([part])
    unmade = [step.folder for step in plan.needed() if step.recipe is None and step.folder != "runs/mnist-surrogate"]
    assert unmade == []  # the surrogate is the zoo's, and its recipe has no name of its own
    protocol = plan.steps.evaluation(parts()[part].protocol)
    families = {plan.steps.by_folder[c].recipe.classifier.name for c in protocol.recipe.classifiers}
    assert len(families) == 3
    kinds = {entry.attack.name for entry in protocol.recipe.attacks}
    assert kinds == {"fgsm", "pgd", "mim", "jsma", "cw", "deepfool"}


# Steps --------------------------------------------------------------------------------------------------------------


def test_a_whole_run_folder_comes_before_the_zoo_and_the_zoo_before_training(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("mnist-lenet5", "mnist-convnet", "protect-mnist")
    monkeypatch.setattr("unperturb.zoo.folders", lambda: {name: here / "zoo" / name for name in names})
    for folder, file in (("mnist-lenet5", "classifier.json"), ("mnist-convnet", "checkpoint.safetensors")):
        (here / "runs" / folder).mkdir(parents=True)
        (here / "runs" / folder / file).touch()
    plan = Steps()
    protocol = plan.evaluation("table1-mnist")
    assert protocol.recipe.classifiers == ["runs/mnist-lenet5", "zoo:mnist-convnet", "runs/mnist-resnet8"]
    assert protocol.recipe.systems == ["undefended", "runs/paper-mnist", "zoo:protect-mnist", "runs/finetune-mnist"]
    assert plan.by_folder["runs/mnist-resnet8"].command == "unperturb train-classifier classifier-mnist"
    tuned = plan.by_folder["runs/finetune-mnist"]
    assert tuned.recipe.start == "zoo:protect-mnist"
    assert tuned.recipe.classifiers == ["runs/mnist-lenet5", "zoo:mnist-convnet", "runs/mnist-resnet8"]
    order = [step.folder for step in plan.before(protocol.folder)]
    assert all(order.index(need) < order.index(step.folder) for step in plan.before(order[-1]) for need in step.needs)


def test_n_goes_into_a_folder_of_its_own(here: Path) -> None:
    step = Steps().evaluation("table1-mnist", 50)
    assert (step.recipe.n, step.folder) == (50, "runs/table1-mnist-n50")
    assert step.command == "unperturb evaluate table1-mnist --n 50 --out runs/table1-mnist-n50"


def test_a_dry_run_tells_each_step_with_its_cost_and_writes_nothing(quick: Path) -> None:
    lines = list(Plan.of(["table1-digits"]).told("cpu"))
    heads = [line.split()[:2] for line in lines]
    assert heads[:3] == [
        ["train", "runs/small_convnet-digits:"],
        ["train", "runs/small_paper-digits:"],
        ["evaluate", "runs/table1-digits:"],
    ]
    assert all("PFLOP, about" in line for line in lines[:3])
    assert "in all    3 steps" in lines[-1]
    assert list(quick.iterdir()) == []


def test_what_fails_is_told_and_the_rest_still_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(self: Step, **_: object) -> None:
        if self.folder == "runs/small_convnet-digits":
            read_json(Path("nothing.json"))
        ran.append(self.folder)

    monkeypatch.setattr(Step, "done", lambda self: False)
    monkeypatch.setattr(Step, "run", run)
    said: list[str] = []
    done = reproduce(["digits"], out="out", show=said.append)
    assert ran == ["runs/small_lenet5-digits", "runs/small_resnet8-digits"]
    assert done.failed["runs/small_convnet-digits"].startswith("nothing.json is not there")
    assert "runs/small_convnet-digits failed" in done.failed["runs/small_paper-digits"]
    assert any(line.startswith("left out  runs/table1-digits: runs/small_convnet-digits, ") for line in said)
    monkeypatch.setattr("sys.argv", ["unperturb", "reproduce", "table1-digits", "--out", "out"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "not everything could be made; failed: runs/small_convnet-digits" in capsys.readouterr().err


def test_ctrl_c_passes_and_its_time_is_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Step, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Step, "run", run)
    with pytest.raises(KeyboardInterrupt):
        reproduce(["digits"], out="out")
    assert list(json.loads((here / "out" / "steps.json").read_text())) == ["runs/small_lenet5-digits"]


# From nothing to pages ----------------------------------------------------------------------------------------------


def test_the_digits_are_made_once_and_then_only_read(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    done = reproduce(["digits"], out="out", device="cpu", show=said.append)
    assert done.failed == {}, said
    made = {one.piece for one in done.made["digits"]}
    assert made == {"table1", "table2", "table3", "table4", "figure1", "figure2", "figure3"} | {
        "distributions",
        "eps",
        "curves",
        "report",
    }
    first = files(quick / "out")
    for name in ("table1.md", "table1.tex", "table1.csv", "figure1-small_paper.png", "figure2-small_paper-digits.png"):
        assert len(first[f"digits/{name}"]) > 200, name
    page = first["digits/index.html"].decode()
    assert "../../runs/table1-digits/rows/small_convnet.small_paper.fgsm.oblivious-" in page
    assert "unperturb train small_paper-digits" in page
    assert "digits/index.html" in first["index.html"].decode()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained or attacked again")

    monkeypatch.setattr(steps.jobs, "train_classifier", never)
    monkeypatch.setattr(steps.jobs, "train_defense", never)
    monkeypatch.setattr(steps, "run_evaluation", never)
    monkeypatch.setattr("unperturb.attacks.base.Attack.__call__", never)
    said.clear()
    assert reproduce(["digits"], out="out", device="cpu", show=said.append).failed == {}
    assert [line for line in said if not line.startswith(("done ", "drew "))] == []
    assert files(quick / "out") == first
    told = list(Plan.of(["digits"]).told("cpu"))
    assert [line.split()[0] for line in told] == ["done", "done", "done", "then", "in"]

    # A part's page keeps the pieces that were not asked for again.
    assert reproduce(["table1-digits"], out="out", device="cpu").failed == {}
    assert files(quick / "out") == first

    # Another model under the same name is another evaluation, and what lacks rows is not done.
    plan = Plan.of(["table1-digits"])
    evaluation = plan.needed()[-1]
    assert evaluation.done()
    next((quick / "runs" / "table1-digits" / "rows").rglob("*.parquet")).unlink()
    assert not evaluation.done()


# Tables -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    run = make_run(tmp_path_factory.mktemp("made") / "run", classifiers=("conv", "lenet"))
    return Judged.read(run, ["fgsm", "pgd-40", "cw"])


def test_table_1_holds_the_numbers_of_the_rows_and_leads_to_them(judged: Judged) -> None:
    table = accuracy_by_attack([judged], "Table 1")
    counted = accuracy_table(judged.results)
    assert table.sheet.heads == ["classifier", "attack", "base", "ours"]
    lines = [line[1] for line in table.sheet.lines if line[0] == "lenet"]
    attacks = ["clean", "fgsm, eps 0.3", "pgd-40, eps 0.3", "cw"]
    assert lines == [*attacks, "robust, oblivious, eps 0.3", "robust, adaptive, eps 0.3"]
    for line, sources in zip(table.sheet.lines, table.sources):
        for system, entry, source in zip(("undefended", "ours"), line[2:], sources[2:]):
            if source is not None:
                assert list(source.glob("*.parquet"))
                named = [line[0], system, line[1].partition(",")[0], "oblivious"]
                same = counted[(counted[["classifier", "system", "attack", "knowledge"]] == named).all(axis=1)]
                assert entry.startswith(f"{100 * same['accuracy'].item():.1f} [")
    assert sum(source is not None for sources in table.sources for source in sources) == 2 * 3 * 2
    assert set(table.frame["n"]) == {30}
    assert "noise" not in set(table.frame["attack"])  # the recipe's attacks alone, not the ladder's
    assert as_markdown(table.sheet).count("\n| ") == 2 + 12
    assert r"\midrule" in as_latex(table.sheet)


def test_table_2_puts_runs_together_and_says_whose_n_differs(judged: Judged, tmp_path: Path) -> None:
    margins = {"undefended": {"oblivious": 0.06}, "search": {"oblivious": 0.9}}
    attacks = (("fgsm", "FGSM", 0.3, ("oblivious",)),)
    other = Judged.read(make_run(tmp_path / "few", systems=margins, attacks=attacks, n=10), ["fgsm"])
    table = accuracy_by_system([judged, other], "Table 2")
    lines = {(line[0], line[1]): line for line in table.sheet.lines}
    assert list(lines) == [("conv", "base"), ("conv", "ours"), ("lenet", "base"), ("lenet", "ours"), ("conv", "search")]
    assert "n 10" in lines["conv", "search"][3]
    assert "n 10" not in "".join(lines["conv", "base"])  # the first run's
    place = table.sheet.heads.index("fgsm, eps 0.3")
    assert table.sources[-1][place].parts[-3] == "few"


def test_tables_3_and_4_are_before_and_after(judged: Judged) -> None:
    quality = quality_table(judged.results)
    for what in ("psnr", "ssim"):
        table = likeness([judged], what, "Table")
        assert table.sheet.heads == ["classifier", "attack", "base", "ours"]
        assert [line[1] for line in table.sheet.lines] == ["fgsm, eps 0.3", "pgd-40, eps 0.3", "cw"] * 2
        same = quality.query("classifier == 'conv' and attack == 'fgsm' and knowledge == 'oblivious'").iloc[0]
        digits = 1 if what == "psnr" else 3
        shown = [f"{same[f'{what}_{when}']:.{digits}f}" for when in ("before", "after")]
        assert [entry.partition(" ")[0] for entry in table.sheet.lines[0][2:]] == shown
        assert table.frame[f"{what}_after"].notna().all()


# Figures ------------------------------------------------------------------------------------------------------------


def test_the_architecture_is_that_of_the_modules() -> None:
    generator = generators.create(name="ape", channels=1).train()
    found = boxes(generator, (1, 28, 28))
    assert [box.shape for box in found[1:-1]] == [(64, 14, 14), (128, 7, 7), (64, 14, 14), (1, 28, 28)]
    assert [box.kind for box in found] == ["end", "down", "down", "up", "up", "end"]
    assert found[2].lines == ["", "conv 4x4, stride 2", "batch norm", "leaky ReLU"]
    assert found[-1].lines == ["tanh", "output"]
    assert generator.training  # left as it was
    discriminator = discriminators.create(name="ape", channels=1)
    assert boxes(discriminator, (1, 28, 28))[-1].shape == (1,)
    figure = architecture_figure("both", (1, 28, 28), {"generator": generator, "discriminator": discriminator})
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "128 x 7 x 7" in texts
    assert f"generator, {sum(p.numel() for p in generator.parameters()):,} parameters" in texts


def test_skips_are_found_where_the_code_adds() -> None:
    found = boxes(generators.create(name="unet", channels=3, width=8, scales=2, squeeze=2), (3, 32, 32))
    assert found[-1].sources == {0, len(found) - 2}  # image + d
    (joined,) = [box for box in found[1:-1] if len(box.sources) > 1]
    assert [found[source].shape for source in sorted(joined.sources)] == [(8, 16, 16), (32, 8, 8)]
    assert joined.lines[0] == "pixel shuffle"

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    assert [box.sources for box in boxes(Plain(), (1, 8, 8))] == [set(), {0}, {1}, {2}]


def test_distributions_have_a_panel_per_attack_and_measure(judged: Judged) -> None:
    figure = distributions_figure(judged)
    assert len(figure.axes) == 3 * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["adversarial, before", "after ours"]
    before, after = figure.axes[0].patches
    assert before.get_data().values.sum() == pytest.approx(1)
    assert after.get_data().values.sum() == pytest.approx(1)


def test_curves_show_each_training_that_kept_a_log(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 10 * i, "epoch": i / 2, "lr": 0.1, "repair": 1 / i, "seconds": 1.0} for i in (1, 2, 3)
    ]
    lines += [{"step": 10 * i, "validation": {"clean": 0.5, "score": i / 10}} for i in (1, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"step": 40, "epo']))
    logs = training_logs([("ours", tmp_path), ("from the zoo", tmp_path / "none")])
    assert list(logs) == ["ours"]
    losses, scores = curves_figure(logs).axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[1, 0.5, 1 / 3]]
    assert [list(line.get_xdata()) for line in scores.lines] == [[0.5, 1.5]]
    assert list(scores.lines[0].get_ydata()) == [10, 30]
