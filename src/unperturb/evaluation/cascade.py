"""What still stands goes on: the attackers of a plan one after the other, each on the images that are left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unperturb.evaluation.grid import Each, Work, adversarials_of, rows_of, run_cell
from unperturb.evaluation.measure import Shard
from unperturb.evaluation.plan import Cascade, Cell
from unperturb.results.robust import TOLERANCE
from unperturb.threat_models import ThreatModel


@dataclass
class Standing:
    """What a cascade has left of the images of one shard for one system.

    active: `(N,)` bool, those that still stand. images: `(N, C, H, W)`, of each the adversarial image that broke it, or
    the last one that did not. made_by: whose that was, "" before any attack.
    """

    active: Tensor
    images: Tensor
    made_by: list[str]

    @classmethod
    def of(cls, shard: Shard) -> Standing:
        """Before any attack: everything stands."""
        count = len(shard.rows)
        return cls(torch.ones(count, dtype=torch.bool), shard.images.clone(), [""] * count)


def cascading(cascade: Cascade) -> Each:
    """What writes the cells of a plan one after the other, as `run_grid` asks it to: of each system every attacker on
    what those before have left."""
    left: dict[tuple[str, str], Standing] = {}
    now = [-1]

    def each(work: Work, cell: Cell, shard: Shard) -> None:
        if now[0] != shard.number:
            left.clear()
            now[0] = shard.number
        key = cell.classifier, cell.system.name
        if key not in left:
            left[key] = Standing.of(shard)
        _go_on(work, cell, shard, cascade, left[key])

    return each


def _go_on(work: Work, cell: Cell, shard: Shard, cascade: Cascade, standing: Standing) -> None:
    """Write one shard of `cell`, its attack made on what is `standing`, and take from that what it breaks."""
    doubted = shard.rows < cascade.doubted
    whole = cell.label in cascade.whole
    attacked = torch.ones_like(doubted) if whole else standing.active | doubted
    start = None
    if not whole and cell.attacker.attack.uses_start and any(standing.made_by):
        alone = doubted.to(shard.images.device)[:, None, None, None]
        start = torch.where(alone, shard.images, standing.images)
    before = None if attacked.all() else standing.images
    run_cell(work, cell, shard, attacked=attacked, before=before, made_by=standing.made_by, start=start)
    made = adversarials_of(work, cell, shard, attacked=attacked, before=before, start=start)
    tried = standing.active & attacked
    standing.images[tried.to(made.images.device)] = made.images[tried.to(made.images.device)]
    name = f"{cell.attacker.knowledge}: {cell.label}"
    standing.made_by = [name if new else old for new, old in zip(tried.tolist(), standing.made_by)]
    standing.active &= ~_broken(work, cell, shard, cascade.threat)


def _broken(work: Work, cell: Cell, shard: Shard, threat: ThreatModel) -> Tensor:
    """`(N,)` bool: wrong in every draw, under an adversarial image within the threat model."""
    rows = rows_of(work, cell, shard)
    within = rows[threat.norm] <= float(threat.eps) + TOLERANCE[threat.norm]
    stands = ((rows["pred_pure_adv"] == rows["label"]) | ~within).groupby(rows["index"]).any()
    return ~torch.tensor(stands.reindex(shard.index.tolist()).to_numpy(dtype=bool))
