"""One call, one verdict: what `benchmark` takes, what it says, and the card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import unperturb as up
from unperturb.benchmarking import benchmark_plan

EPS = 0.1


class Flat(nn.Module):
    """A linear net that tells two halves of an image apart by their brightness."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.ones(64)
        weight[32:] = -1
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1) @ self.weight
        return torch.stack([score, -score], 1)


class Gray(up.Defense):
    """Less contrast: no other decision."""

    def purify(self, images: Tensor) -> Tensor:
        return 0.5 + (images - 0.5) / 2


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """Forty images: one half is brighter, by 0.1 in some, which twice the budget turns, by 0.6 in others."""
    apart = torch.tensor([0.1, 0.6]).repeat(20)
    up_or_down = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(10)
    half = (0.5 * apart * up_or_down)[:, None, None, None].expand(-1, 1, 4, 8)
    x = ((0.5 + torch.cat([half, -half], 2)) * 255).round() / 255
    return x, (up_or_down < 0).long()


@pytest.fixture(scope="module")
def found(images: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> up.Benchmark:
    out = tmp_path_factory.mktemp("benchmark") / "run"
    return up.benchmark(up.Protected(Flat(), Gray()), images, eps=EPS, budget="quick", name="gray", out=out, quiet=True)


def test_the_verdict_is_what_no_perturbation_turns(found: up.Benchmark) -> None:
    assert (found.system, found.clean, found.robust.n) == ("gray", 1.0, 40)
    assert found.robust.accuracy == 0.5  # half of the images are safe by a wide margin, half fall to anyone
    assert 0.35 < found.robust.low < 0.5 < found.robust.high < 0.65
    assert found.robust.threat_model == up.ThreatModel("linf", EPS, "white_box")


def test_the_undefended_net_stands_beside_it(found: up.Benchmark) -> None:
    assert set(found.results.cells["system"]) == {"undefended", "gray"}
    assert up.robust_accuracy(found.results, up.ThreatModel("linf", EPS), system="undefended").accuracy == 0.5


def test_it_says_what_it_found(found: up.Benchmark) -> None:
    said = str(found)
    assert re.search(r"robust accuracy  50\.0 % \[.*\], attackers up to white box\n", said)
    assert "white box" in said
    assert "gray: 40 images of given" in said
    assert not [flag for flag in found.flags if flag.severity == "broken"], found.flags


def test_the_card_is_three_files(found: up.Benchmark, tmp_path: Path) -> None:
    written = found.write_card(tmp_path)
    data = json.loads(written["json"].read_text())
    assert data["result"]["robust"]["accuracy"] == 0.5
    assert data["settings"]["budget"] == "quick"
    assert "50.0 %" in written["html"].read_text()
    assert "50.0 %" in written["md"].read_text()
    assert "http" not in written["html"].read_text().replace("http://www.w3.org", "")


def test_a_benchmark_without_a_folder_still_has_its_card(images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    found = up.benchmark(Flat(), images, eps=EPS, budget="quick", quiet=True)
    assert found.robust.accuracy == 0.5
    assert found.write_card(tmp_path)["html"].exists()


def test_a_stopped_benchmark_goes_on(images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    def cards(out: Path, resume: bool) -> dict[str, object]:
        found = up.benchmark(Flat(), images, eps=EPS, budget="quick", out=out, resume=resume, quiet=True)
        return {key: value for key, value in found.card.data.items() if key != "times"}

    whole = cards(tmp_path / "run", False)
    for path in sorted((tmp_path / "run" / "rows").glob("*/*.parquet"))[::2]:
        path.unlink()
    assert cards(tmp_path / "run", True) == whole


def test_any_callable_is_taken(images: tuple[Tensor, Tensor]) -> None:
    net = Flat()
    found = up.benchmark(lambda x: net(x), images, eps=EPS, budget="quick", n=12, quiet=True)
    assert found.robust.n == 12


def test_a_net_in_anothers_place_is_judged_beside_it(images: tuple[Tensor, Tensor]) -> None:
    plan = benchmark_plan(Flat(), images, eps=EPS, budget="quick", base=Flat(), name="hardened")
    assert [(s.name, s.undefended) for s in plan.systems] == [("undefended", True), ("hardened", False)]


def test_what_gives_no_gradient_is_asked_by_queries(images: tuple[Tensor, Tensor]) -> None:
    class Hidden(Flat):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(images)

    plan = benchmark_plan(Hidden(), images, eps=EPS, budget="standard")
    sent = [a for attackers in plan.attackers.values() for a in attackers]
    assert {a.knowledge for a in sent} == {"none", "black_box"}
    assert not [a for a in sent if a.attack.needs_gradient and a.knowledge != "none"]
    found = up.benchmark(Hidden(), images, eps=EPS, budget="quick", n=12, quiet=True)
    assert found.robust.tried == ("black_box",)
    assert "attackers up to black box\n" in str(found)
    assert "white box" not in str(found)
    assert [(flag.name, flag.severity) for flag in found.flags][:1] == [("gradient-masked", "doubt")]
    assert "Linf 0.1, black box" in found.card.markdown()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "fast"}, "quick, standard, thorough"),
        ({"norm": "l1"}, "know the norms linf and l2, not 'l1'$"),
        ({"norm": "l0"}, "know the norms linf and l2, not 'l0'$"),
        ({"eps": "8"}, "at most 1"),
        ({"n": 41}, "holds 40 images"),
        ({"draws": 0}, "draws must be a whole number"),
        ({"surrogate_defense": Flat()}, "must be a purifier"),
    ],
)
def test_a_mistake_is_named(images: tuple[Tensor, Tensor], options: dict[str, object], said: str) -> None:
    with pytest.raises((TypeError, ValueError, KeyError), match=said):
        up.benchmark(Flat(), images, quiet=True, **options)  # type: ignore[arg-type]


class Tired(Flat):
    """Fails at its call number `last`, and ever after."""

    calls, last = 0, 10**9

    def forward(self, images: Tensor) -> Tensor:
        Tired.calls += 1
        if Tired.calls >= Tired.last:
            raise KeyError("tired")
        return super().forward(images)


def test_a_model_that_fails_at_work_is_named_and_what_was_finished_is_kept(
    images: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(progress: Any = None) -> up.Benchmark:
        return up.benchmark(Tired(), images, eps=EPS, budget="quick", n=8, name="tired", out=tmp_path, resume=True,
                            quiet=True, progress=progress)  # fmt: skip

    def until_the_third(done: int, total: int, cell: str) -> None:
        if done == 2:
            monkeypatch.setattr(Tired, "last", Tired.calls + 3)

    where = r"KeyError: 'tired'(\n|$)"
    with pytest.raises(
        up.ModelError, match=rf"^'tired', under \S+ with knowledge \w+, failed: .*\.py, line \d+: {where}"
    ) as error:
        judged(until_the_third)
    assert isinstance(error.value.__cause__, KeyError)
    assert "resume=True" in error.value.__notes__[0]
    finished = {f: f.stat().st_mtime_ns for f in tmp_path.glob("rows/*/*.parquet")}
    assert len(finished) == 2
    with pytest.raises(up.ModelError, match=rf"^'tired', at a first look, failed: .*{where}"):
        judged()
    monkeypatch.setattr(Tired, "last", 10**9)
    assert judged().robust.n == 8
    assert {f: f.stat().st_mtime_ns for f in finished} == finished


def test_what_is_no_models_fault_stays_as_it_is(images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unperturb.evaluation.grid.measure", Mock(side_effect=LookupError))
    with pytest.raises(LookupError):
        up.benchmark(Flat(), images, eps=EPS, budget="quick", n=2, quiet=True)
