"""What still stands goes on: the attackers of a plan one after the other, each on the images that are left."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unperturb.evaluation.grid import Each, Work, adversarials_of, rows_of, run_cell
from unperturb.evaluation.measure import Shard
from unperturb.evaluation.plan import Cascade, Cell
from unperturb.results.robust import TOLERANCE
from unperturb.threat_models import KNOWLEDGE, ThreatModel

# Sent against nothing that anybody has broken: so many queries are dear. All others meet what nobody has broken who
# knows no more than they do, so that what each kind of knowledge is worth is known of all images.
LAST = "black_box"

# Who does not look at a defended system brings the same images to all: made on every image, from the attack's own
# start, they are made once.
SHARED = ("transfer", "oblivious")


@dataclass
class Broken:
    """What the attackers of one kind of knowledge have broken: `(N,)` bool, by which images `(N, C, H, W)`, and by
    which attacks."""

    which: Tensor
    images: Tensor
    attacks: list[str]


@dataclass
class Standing:
    """What a cascade has left of the images of one shard, of one system. latest: by kind of knowledge, the last to come
    at the end, `(N, C, H, W)`, the last adversarial image of each. broken: by kind of knowledge, in the order in which
    these came."""

    latest: dict[str, Tensor] = field(default_factory=dict)
    broken: dict[str, Broken] = field(default_factory=dict)

    def below(self, knowledge: str) -> dict[str, Broken]:
        """What of `broken` is not to be attacked again by `knowledge`."""
        included = KNOWLEDGE[knowledge].includes
        return {kind: of for kind, of in self.broken.items() if knowledge == LAST or kind in included}

    def start(self, knowledge: str) -> Tensor | None:
        """Where an attacker of `knowledge` may begin, `(N, C, H, W)`: never at what he could not have found himself."""
        found = [images for kind, images in self.latest.items() if kind in KNOWLEDGE[knowledge].includes]
        return found[-1] if found else None

    def keep(self, knowledge: str, attack: str, which: Tensor, images: Tensor) -> None:
        """Note that an attacker came last, and has broken `which` `(N,)` by `images`."""
        self.latest.pop(knowledge, None)
        self.latest[knowledge] = images
        nothing = Broken(torch.zeros_like(which), images.clone(), [""] * len(which))
        mine = self.broken.setdefault(knowledge, nothing)
        new = which & ~mine.which
        mine.images[new.to(images.device)] = images[new.to(images.device)]
        mine.attacks = [attack if now else old for now, old in zip(new.tolist(), mine.attacks)]
        mine.which = mine.which | new


def is_whole(cell: Cell, cascade: Cascade) -> bool:
    """Whether the attack of `cell` is made on every image, whatever others have broken."""
    shared = cell.attacker.knowledge in SHARED and not cell.system.undefended
    return shared or cell.label in cascade.whole


def cascading(cascade: Cascade) -> Each:
    """What writes the cells of a plan one after the other, as `run_grid` asks it to: of each system every attacker on
    what those before have left."""
    left: dict[tuple[int, str, str], Standing] = {}

    def each(work: Work, cell: Cell, shard: Shard) -> None:
        key = shard.number, cell.classifier, cell.system.name
        if key not in left:
            for old in [k for k in left if k[0] != shard.number]:
                del left[old]
            left[key] = Standing()
        _go_on(work, cell, shard, cascade, left[key])

    return each


def _go_on(work: Work, cell: Cell, shard: Shard, cascade: Cascade, standing: Standing) -> None:
    """Write one shard of `cell`, its attack made on what is `standing`, and take from that what it breaks."""
    knowledge = cell.attacker.knowledge
    whole = is_whole(cell, cascade)
    doubted = shard.rows < cascade.doubted
    attacked = torch.ones_like(doubted)
    before, made_by = shard.images.clone(), [("", "")] * len(doubted)
    for kind, of in reversed(standing.below(knowledge).items()) if not whole else ():
        attacked &= ~of.which
        before[of.which.to(before.device)] = of.images[of.which.to(before.device)]
        made_by = [(a, kind) if hit else old for hit, a, old in zip(of.which.tolist(), of.attacks, made_by)]
    attacked |= doubted
    start = None if whole else standing.start(knowledge)
    run_cell(work, cell, shard, attacked=attacked, before=before, made_by=made_by, start=start, alone=doubted)
    made = adversarials_of(work, cell, shard, attacked=attacked, before=before, start=start, alone=doubted).images
    standing.keep(knowledge, cell.label, attacked & _broken(work, cell, shard, cascade.threat), made)


def _broken(work: Work, cell: Cell, shard: Shard, threat: ThreatModel) -> Tensor:
    """`(N,)` bool: wrong in every draw, under an adversarial image within the threat model."""
    rows = rows_of(work, cell, shard)
    within = rows[threat.norm] <= float(threat.eps) + TOLERANCE[threat.norm]
    stands = ((rows["pred_pure_adv"] == rows["label"]) | ~within).groupby(rows["index"]).any()
    return ~torch.tensor(stands.reindex(shard.index.tolist()).to_numpy(dtype=bool))
