"""Cells to rows: each cell of a plan, shard by shard, its adversarial images made once and measured."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unperturb import per_image_rng, runs
from unperturb.classifiers import fused_copy
from unperturb.evaluation.adversarials import COUNTS, Adversarials, AdversarialStore
from unperturb.evaluation.identity import Identity
from unperturb.evaluation.measure import Shard, measure, seed_of
from unperturb.evaluation.plan import Cell, Plan
from unperturb.mistakes import named
from unperturb.results import samples, schema

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int, str], None]


@dataclass
class Work:
    """A plan at work in the run folder `out`. stores: where adversarial images are kept, lasting or not. copies: of
    classifiers, unchanged in what they answer and faster to attack; images are judged on the originals. shown: the
    places of the images that are kept as samples."""

    plan: Plan
    out: Path
    stores: Mapping[bool, AdversarialStore]
    copies: Mapping[nn.Module, nn.Module]
    shown: Tensor
    # Alive until the end: the id of what has gone is given again.
    _seen: dict[Cell, tuple[nn.Module, nn.Module, Identity]] = field(default_factory=dict)

    def seen_by(self, cell: Cell) -> tuple[nn.Module, Identity]:
        """What the cell's attacker is given, and the identity of the attack on it."""
        if cell not in self._seen:
            target = cell.target()
            self._seen[cell] = cell.target(self.copies), target, cell.identity(target)
        function, _, identity = self._seen[cell]
        return function, identity

    def rows_path(self, cell: Cell, shard: Shard) -> Path:
        """Where the rows of a shard of `cell` lie."""
        return self.out / "rows" / cell.folder / f"{shard.number:04d}.parquet"

    def samples_path(self, cell: Cell) -> Path:
        """Where the samples of `cell` lie."""
        return self.out / "samples" / f"{cell.folder}.safetensors"

    def lacks(self, cell: Cell, shard: Shard) -> tuple[bool, Tensor]:
        """Whether the rows of a shard are still to be made, and the places `(M,)` of its samples that are.

        Raises `RunError` where the rows there are damaged, or of another cell.
        """
        path = self.rows_path(cell, shard)
        if path.exists():
            self.check_rows(cell, shard)
        here = self.shown[(self.shown >= shard.rows[0]) & (self.shown <= shard.rows[-1])]
        kept = self.samples_of(cell) if len(here) else {}
        there = set(kept["index"].tolist()) if kept else set()
        return not path.exists(), here if set(self.plan.data.index[here].tolist()) - there else here[:0]

    def check_rows(self, cell: Cell, shard: Shard) -> None:
        """Raise `RunError` unless the rows of a shard of `cell`, which are there, are whole and its own."""
        draws = self.plan.draws_of(cell.system)
        schema.check_rows(self.rows_path(cell, shard), self.plan.about(cell), shard.index.tolist(), draws)

    def samples_of(self, cell: Cell) -> dict[str, Tensor]:
        """The samples of `cell` so far; nothing where they are damaged or another's: they are then made again."""
        with contextlib.suppress(runs.RunError):
            about, tensors = samples.read_sample(self.samples_path(cell))
            if all(str(about[key]) == str(value) for key, value in self.plan.about(cell).items()):
                return tensors
        return {}


Each = Callable[[Work, Cell, Shard], None]


@contextlib.contextmanager
def at_work(plan: Plan, out: Path) -> Iterator[Work]:
    """`plan` at work in the run folder `out`: inside, its models are on its device in eval mode."""
    with plan.at_work(), tempfile.TemporaryDirectory() as own:
        example, _ = plan.data.batch(torch.arange(min(2, len(plan.data))), plan.device)
        # The layout is given, not probed: a resumed run must make the same rows.
        models = [*plan.classifiers.values(), *(s.classifier for s in plan.systems)]
        copies = {model: fused_copy(model, example, channels_last=True) for model in dict.fromkeys(models)}
        # What only this process can tell from other things is kept no longer than it.
        stores = {True: AdversarialStore(), False: AdversarialStore(Path(own))}
        yield Work(plan, out, stores, copies, shown_rows(plan.data.labels, plan.samples))


def shards(plan: Plan) -> Iterator[Shard]:
    """The images of `plan`, `plan.shard` at once."""
    for number, rows in enumerate(torch.arange(len(plan.data)).split(plan.shard)):
        yield Shard(plan, number, rows)


def run_grid(plan: Plan, out: Path, progress: Progress | None = None, each: Each | None = None) -> None:
    """Write the rows and samples of every cell of `plan` under `out`; what is already there is not made again.

    each: what writes one shard of one cell (default: `run_cell`, the attack made on every image).

    Raises `RunError` where what is there is damaged, or of another cell; `ModelError` where a model fails.
    """
    cells = plan.cells()
    total, done = len(cells) * len(list(shards(plan))), 0
    with at_work(plan, out) as work:
        for shard in shards(plan):
            for cell in cells:
                run_named(work, cell, shard, each)
                done += 1
                if progress:
                    progress(done, total, str(cell))


def run_named(work: Work, cell: Cell, shard: Shard, each: Each | None = None) -> None:
    """Write one shard of `cell` as `each` does (default: `run_cell`); a `ModelError` says of which cell it is."""
    with named(f"{cell.system.name!r}, under {cell.label} with knowledge {cell.attacker.knowledge},"):
        (each or run_cell)(work, cell, shard)


def run_cell(
    work: Work,
    cell: Cell,
    shard: Shard,
    *,
    attacked: Tensor | None = None,
    before: Tensor | None = None,
    made_by: Sequence[tuple[str, str]] | None = None,
    start: Tensor | None = None,
    alone: Tensor | None = None,
) -> None:
    """Write the rows and samples of one shard of `cell`, each file whole or not at all; nothing where they are there.

    attacked: `(N,)` bool, the images of the shard that are attacked (default: all). The others, which earlier stages
    of a cascade have broken, keep the adversarial images that those made: before: `(N, C, H, W)`, used there. made_by:
    N times (attack, knowledge) of those stages. start: `(N, C, H, W)`, images that the attack begins at, alone: `(N,)`
    bool, but for these, where it begins by itself.

    Raises `RunError` where what is there is damaged, or of another cell.
    """
    lacks_rows, lacking = work.lacks(cell, shard)
    if not lacks_rows and not len(lacking):
        return
    made = adversarials_of(work, cell, shard, attacked=attacked, before=before, start=start, alone=alone)
    plain = attacked is None and start is None
    own = ("", "")
    kept = torch.zeros(len(shard.rows), dtype=torch.bool) if attacked is None else ~attacked.cpu()
    columns, views = measure(
        cell,
        shard,
        made,
        key=work.seen_by(cell)[1].key if plain else object(),
        made_by=[m if inherited else own for m, inherited in zip(made_by or [own] * len(kept), kept.tolist())],
    )
    if len(lacking):  # before the rows: where these are there, so are its samples
        plan = work.plan
        shown = _shown(lacking - int(shard.rows[0]), views, columns)
        about = plan.about(cell) | {"class_names": plan.data.class_names}
        with runs.lock(work.out, ".samples.lock", wait=True):  # all shards of a cell share a file
            tensors = _in_order(work.samples_of(cell), shown, plan.data.index[work.shown])
            samples.write_samples(work.samples_path(cell), tensors, about)
    schema.write_rows(work.rows_path(cell, shard), columns)


def adversarials_of(
    work: Work,
    cell: Cell,
    shard: Shard,
    *,
    attacked: Tensor | None = None,
    before: Tensor | None = None,
    start: Tensor | None = None,
    alone: Tensor | None = None,
) -> Adversarials:
    """The adversarial images of one shard of `cell`, kept or made; see `run_cell`. An image that is not attacked has
    cost nothing."""
    every = torch.ones(len(shard.rows), dtype=torch.bool)
    attacked = every if attacked is None else attacked.cpu()
    if not attacked.all() and before is None:
        raise ValueError("where some images are not attacked, pass `before`: the adversarial images that they keep")
    begun = every & False if start is None or not cell.attacker.attack.uses_start else attacked
    begun = begun if alone is None else begun & ~alone.cpu()
    parts = [(which, at) for which, at in ((attacked & ~begun, None), (begun, start)) if which.any()]
    if len(parts) == 1 and attacked.all():
        return _made(work, cell, shard, *parts[0])
    images = (shard.images if before is None else before).to(work.plan.device, copy=True)
    of_image = _zeros(len(attacked))
    for which, at in parts:
        made = _made(work, cell, shard, which, at)
        images[which.to(images.device)] = made.images
        for values, name in zip(of_image, ("seconds", *COUNTS)):
            values[which] = getattr(made, name)
    return Adversarials(images, *of_image)


def _made(work: Work, cell: Cell, shard: Shard, which: Tensor, start: Tensor | None) -> Adversarials:
    """Of those images of a shard that are `which` `(N,)`; start: `(N, C, H, W)`."""
    function, identity = work.seen_by(cell)
    with work.plan.drawing(_seed(work.plan, cell, shard.number)):
        return work.stores[identity.lasting].get(
            cell.attacker.attack,
            function,
            identity.key,
            work.plan.data,
            shard.rows[which],
            seed=work.plan.seed,
            batch=work.plan.batch,
            device=work.plan.device,
            start=None if start is None else start[which.to(start.device)],
        )


def _zeros(count: int) -> list[Tensor]:
    """seconds and `COUNTS` of images that were not attacked."""
    return [torch.zeros(count), *(torch.zeros(count, dtype=torch.int32) for _ in COUNTS)]


def rows_of(work: Work, cell: Cell, shard: Shard) -> pd.DataFrame:
    """The rows of one shard of `cell`, which are there (`schema.ROW_COLUMNS`). Raises `RunError` for damaged ones."""
    import pandas as pd

    work.check_rows(cell, shard)
    return pd.read_parquet(work.rows_path(cell, shard))


def _seed(plan: Plan, cell: Cell, shard: int) -> int:
    """Of what a random model draws while it is attacked: one for all cells that see the same model."""
    whole = cell.attacker.attacked == "system"
    return seed_of(cell.classifier, cell.system.name if whole else "", cell.label, whole, plan.seed, shard)


def shown_rows(labels: Tensor, count: int) -> Tensor:
    """The places of `count` images to look at `(M,)`: a fixed random choice in which each class comes once before any
    comes again, and so on."""
    order = per_image_rng.permutation(0, 0, len(labels))
    turn = torch.empty_like(order)
    for label in labels.unique():
        mine = labels[order] == label
        turn[mine] = torch.arange(int(mine.sum()))
    return order[turn.argsort(stable=True)][:count]


def _shown(places: Tensor, views: Mapping[str, Tensor], columns: Mapping[str, Any]) -> dict[str, Tensor]:
    """The images at `places` of a shard, with what was thought of them in the first draw, which stands first."""
    order = ("clean", "adv", "pure_clean", "pure_adv")
    tensors = {k: (v[places.to(v.device)] * 255).round().to(torch.uint8).cpu() for k, v in views.items()}
    tensors["index"] = torch.as_tensor(columns["index"])[places]
    tensors["label"] = torch.as_tensor(columns["label"])[places]
    tensors["confidence"] = torch.stack([torch.as_tensor(columns[f"conf_{k}"])[places] for k in order], 1)
    tensors["prediction"] = torch.stack([torch.as_tensor(columns[f"pred_{k}"])[places] for k in order], 1)
    return tensors


def _in_order(before: Mapping[str, Tensor], new: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Both together, what is new first, in the order of `index`."""
    both = {k: torch.cat([v, before[k]]) if before else v for k, v in new.items()}
    places = [(both["index"] == number).nonzero()[0] for number in index if (both["index"] == number).any()]
    return {k: v[torch.cat(places)] for k, v in both.items()}
