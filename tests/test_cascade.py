"""Random systems judged over their draws, answers in 8 bits, and cells that go on with what an earlier stage left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from toy import Linear, purifier, toy
from unperturb import runs
from unperturb.attackers import Attacker
from unperturb.attacks import Attack, create_attack
from unperturb.attacks.context import AttackContext
from unperturb.defenses import Defense
from unperturb.evaluation import adversarials
from unperturb.evaluation.grid import Work, adversarials_of, at_work, rows_of, run_cell, run_grid, shards
from unperturb.evaluation.measure import Shard
from unperturb.evaluation.plan import Cell, Plan
from unperturb.results import schema
from unperturb.systems import System

CLOCK = ["seconds_attack", "seconds_purify"]
OF_A_DRAW = [c for c in schema.ROW_COLUMNS if "pure" in c or c.startswith(("rejected", "scores"))]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "cache")


class Noisy(Defense):
    random = True

    def purify(self, images: Tensor) -> Tensor:
        return images + 0.3 * torch.randn_like(images)


PGD = create_attack("pgd", eps=0.02, steps=3)


def plan(protects: Defense, kinds: tuple[str, ...] = ("oblivious", "white_box"), **changed: Any) -> Plan:
    bare = Linear()
    options: dict[str, Any] = {
        "data": toy(),
        "systems": [System("bare", bare), System("ours", bare, protects)],
        "attackers": {"pgd": [Attacker(PGD, kind, eot_samples=2) for kind in kinds]},
        "shard": 4,
        "samples": 3,
        **changed,
    }
    return Plan(**options)


def rows_in(out: Path) -> pd.DataFrame:
    return schema.read_rows(out).drop(columns=CLOCK)


# Draws ---------------------------------------------------------------------------------------------------------------


def test_a_random_system_is_shown_each_image_as_often_as_the_plan_says(tmp_path: Path) -> None:
    run_grid(plan(Noisy(), draws=5), tmp_path / "five")
    rows = rows_in(tmp_path / "five")
    counts = rows.groupby(["system", "knowledge", "draw"])["index"].nunique().to_dict()
    assert counts == {("bare", "oblivious", 0): 10} | {
        ("ours", kind, draw): 10 for kind in ("oblivious", "white_box") for draw in range(5)
    }
    noisy = rows[rows["system"] == "ours"]
    for _, image in noisy.groupby(["knowledge", "index"]):
        one = image.drop(columns=[*OF_A_DRAW, "draw"])
        assert len(one.drop_duplicates()) == 1  # one adversarial image, in five draws
        assert image["psnr_pure_adv"].nunique() == image["psnr_pure_clean"].nunique() == 5
        assert not set(image["psnr_pure_adv"]) & set(image["psnr_pure_clean"])
    assert any(len(set(image["pred_pure_adv"])) > 1 for _, image in noisy.groupby(["knowledge", "index"]))
    # Clean images are the same in every cell; more draws are more of them, not others.
    clean = [part.sort_values(["draw", "index"])["psnr_pure_clean"] for _, part in noisy.groupby("knowledge")]
    np.testing.assert_array_equal(*clean)
    run_grid(plan(Noisy(), draws=3), tmp_path / "three")
    three = rows_in(tmp_path / "three").reset_index(drop=True)
    pd.testing.assert_frame_equal(three, rows[rows["draw"] < 3].reset_index(drop=True))


def test_what_is_kept_in_other_draws_is_refused(tmp_path: Path) -> None:
    run_grid(plan(Noisy(), draws=2), tmp_path)
    with pytest.raises(runs.RunError, match=r"rows of other images than its 4 in 3 draws; delete it"):
        run_grid(plan(Noisy(), draws=3), tmp_path)


def test_the_answer_to_8_bits_is_the_systems_own_in_the_same_draw(tmp_path: Path) -> None:
    class Bright(nn.Module):
        """Class 1 where any pixel of the upper row is not a whole level of 255, else class 0."""

        def forward(self, images: Tensor) -> Tensor:
            level = images[:, 0, 0] * 255
            between = ((level - level.round()).abs() > 0.01).any(1).float()
            return torch.stack([1 - between, between, 0 * between, 0 * between], 1) + 0 * images.sum()

    @dataclass(frozen=True, kw_only=True)
    class Between(Attack):
        def perturb(self, context: AttackContext) -> Tensor:
            return (context.images + 0.4 / 255).clamp(0, 1)

    class Same(Defense):
        def purify(self, images: Tensor) -> Tensor:
            return images.clone()

    net = Bright()
    systems = [System("bare", net), System("ours", net, Same())]
    attackers = {"between": [Attacker(Between(), "oblivious")]}
    run_grid(Plan(data=toy(), systems=systems, attackers=attackers), tmp_path)
    rows = rows_in(tmp_path)
    assert set(rows["pred_clean"]) == set(rows["pred_pure_clean"]) == {0}
    assert set(rows["pred_adv"]) == set(rows["pred_pure_adv"]) == {1}
    assert set(rows["pred_pure_adv_8bit"]) == {0}
    # Where the rounding changes nothing, neither does the draw.
    run_grid(plan(Noisy(), ("oblivious",), attackers={"still": [Attacker(Still(), "oblivious")]}), tmp_path / "noisy")
    still = rows_in(tmp_path / "noisy")
    assert len(still) == 10 * (1 + 10)
    assert (still["pred_pure_adv"] == still["pred_pure_adv_8bit"]).all()
    assert (still["pred_pure_adv"] != still["pred_pure_clean"]).any()  # other draws than those of clean images


@dataclass(frozen=True, kw_only=True)
class Still(Attack):
    """Changes nothing."""

    def perturb(self, context: AttackContext) -> Tensor:
        return context.images.clone()


# Cells that go on with what is left ----------------------------------------------------------------------------------


@contextmanager
def stages(out: Path, **changed: Any) -> Iterator[tuple[Work, Cell, Cell, list[Shard]]]:
    """(the work, the oblivious cell and the white-box one of the protected system, the shards)."""
    crossed = plan(purifier(), **changed)
    with at_work(crossed, out) as work:
        first, second = (cell for cell in crossed.cells() if cell.system.name == "ours")
        yield work, first, second, list(shards(crossed))


def cascade(out: Path) -> None:
    """The white-box attack, made on those images alone that stood against the oblivious one."""
    with stages(out) as (work, first, second, parts):
        for shard in parts:
            run_cell(work, first, shard)
            rows = rows_of(work, first, shard)
            right = torch.tensor((rows["pred_pure_adv"] == rows["label"]).to_numpy())
            before = adversarials_of(work, first, shard).images
            run_cell(work, second, shard, attacked=right, before=before, made_by=[("pgd", "oblivious")] * len(right))


def test_a_cascade_attacks_what_still_stands_alone(tmp_path: Path) -> None:
    run_grid(plan(purifier()), tmp_path / "plain")
    plain = rows_in(tmp_path / "plain").query("system == 'ours'")
    cascade(tmp_path / "cascade")
    rows = rows_in(tmp_path / "cascade")
    first, second = (rows[rows["knowledge"] == kind].sort_values("index") for kind in ("oblivious", "white_box"))
    alone = plain[plain["knowledge"] == "white_box"].sort_values("index")
    stood = (first["pred_pure_adv"] == first["label"]).to_numpy()
    assert 0 < stood.sum() < 10
    assert second["made_by"].tolist() == ["" if right else "pgd" for right in stood]
    assert second["made_with"].tolist() == ["" if right else "oblivious" for right in stood]
    seen = ["l2", "linf", "psnr_adv", "conf_adv", "conf_pure_adv", "pred_pure_adv", "psnr_pure_adv"]
    pd.testing.assert_frame_equal(
        second[seen][~stood].reset_index(drop=True), first[seen][~stood].reset_index(drop=True), rtol=1e-5
    )
    pd.testing.assert_frame_equal(  # other batches change the last bits, and these a few levels of 65,535
        second[seen][stood].reset_index(drop=True), alone[seen][stood].reset_index(drop=True), rtol=1e-2
    )
    assert not np.allclose(first["l2"][stood], second["l2"][stood], rtol=1e-3)
    assert set(second["gradients"][stood]) == {3}
    assert set(second["gradients"][~stood]) == {0}
    assert set(schema.read_rows(tmp_path / "cascade")["seconds_attack"][second.index[~stood]]) == {0.0}


def test_a_cascade_that_was_killed_goes_on_to_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cascade(tmp_path / "out")
    whole = rows_in(tmp_path / "out")
    files = sorted(tmp_path.glob("out/rows/*/*"))
    assert len(files) == 2 * 3
    assert 0 < (whole["made_by"] != "").sum() < 10
    for lost in (files[1:2], files[4:5], files[:1] + files[-2:], files[3:]):
        times = {file: file.stat().st_mtime_ns for file in files if file not in lost}
        for file in lost:
            file.unlink()
        cascade(tmp_path / "out")
        pd.testing.assert_frame_equal(rows_in(tmp_path / "out"), whole)
        assert {file: file.stat().st_mtime_ns for file in times} == times
        monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "new")  # and where the cache is lost too


def test_where_nothing_stands_nothing_is_attacked(tmp_path: Path) -> None:
    class Unable(Attack):
        def perturb(self, context: AttackContext) -> Tensor:
            raise AssertionError("asked to attack")

    unable = {"it": [Attacker(Unable(), kind) for kind in ("oblivious", "white_box")]}
    with stages(tmp_path, attackers=unable) as (work, _, second, parts):
        shard = parts[0]
        nobody = torch.zeros(4, dtype=torch.bool)
        names = [("x", "none"), ("y", "oblivious"), ("x", "none"), ("y", "oblivious")]
        run_cell(work, second, shard, attacked=nobody, before=shard.images * 0.5, made_by=names)
        rows = rows_of(work, second, shard)
        assert list(zip(rows["made_by"], rows["made_with"])) == names
        assert rows["linf"].tolist() == pytest.approx((shard.images * 0.5).flatten(1).amax(1).tolist())
        with pytest.raises(ValueError, match="pass `before`"):
            run_cell(work, second, parts[1], attacked=nobody)


def test_a_cell_may_begin_at_the_images_of_another(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Begun(Attack):
        """Halfway from where it begins to white."""

        uses_start = True

        def perturb(self, context: AttackContext) -> Tensor:
            assert context.start is not None
            return (context.start + 1) / 2

    begun = {"it": [Attacker(Begun(), kind) for kind in ("oblivious", "white_box")]}
    with stages(tmp_path, attackers=begun) as (work, _, second, parts):
        for shard in parts:
            attacked = torch.arange(len(shard.rows)) % 2 == 0
            start = torch.full_like(shard.images, 0.5)
            run_cell(work, second, shard, attacked=attacked, before=shard.images, start=start)
            rows = rows_of(work, second, shard)
            expected = torch.where(attacked[:, None, None, None], torch.full_like(start, 0.75), shard.images)
            far = (expected - shard.images).flatten(1).norm(dim=1)
            assert rows["l2"].tolist() == pytest.approx(far.tolist(), abs=1e-3)
