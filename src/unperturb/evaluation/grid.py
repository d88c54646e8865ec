"""Cells to rows: every classifier, defense, attack and knowledge crossed, a row an image, shard by shard."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unperturb import metrics, per_image_rng, runs, threats
from unperturb.attacks.base import Attack
from unperturb.classifiers import fused_copy
from unperturb.data import ImageSet
from unperturb.defenses.base import Defense
from unperturb.evaluation.adversarials import COUNTS, Adversarials, AdversarialStore, cache_limit
from unperturb.evaluation.checks import check_name
from unperturb.evaluation.identity import Identity, identify, is_known
from unperturb.modules import ask, check_logits, logits_of
from unperturb.results import samples, schema

Progress = Callable[[int, int, str], None]
WHOLE = ("white_box", "bpda", "black_box")  # the kinds of knowledge that see the purifier


@dataclass(frozen=True)
class Cell:
    """One (classifier, defense, attack, knowledge); `label` is the attack's short name in tables."""

    classifier: str
    defense: str
    label: str
    attack: Attack
    knowledge: str

    @property
    def folder(self) -> str:
        """A file name for the cell, its own."""
        return schema.cell_folder(self.classifier, self.defense, self.label, self.knowledge)

    def __str__(self) -> str:
        return f"{self.classifier} · {self.defense} · {self.label} · {self.knowledge}"


@dataclass
class Grid:
    """What is crossed with what, and on which images.

    classifiers, defenses: by the name they have in tables. attacks: by label, each with the kinds of knowledge it is
    given. instead: classifiers that are defenses themselves, such as an adversarially trained one, by the name of their
    defense, whose purifier is the identity: they stand in every classifier's place. surrogate: name and classifier of a
    transfer attack. eot_samples: draws that the gradient of a random defense is averaged over. batch: images attacked
    at once. shard: rows a file. samples: images of each cell that are kept to be looked at. note: what is wrong
    with this copy of the data, if anything.
    """

    data: ImageSet
    classifiers: Mapping[str, nn.Module]
    defenses: Mapping[str, Defense]
    attacks: Mapping[str, tuple[Attack, Sequence[str]]]
    instead: Mapping[str, nn.Module] = field(default_factory=dict)
    surrogate: tuple[str, nn.Module] | None = None
    eot_samples: int = 20
    seed: int = 0
    batch: int = 200
    shard: int = 1000
    samples: int = 10
    note: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def cells(self) -> list[Cell]:
        """Every cell; cells that share adversarial images are neighbors. With no defense, oblivious, white box and BPDA
        are one and the same, kept once as oblivious; with a classifier in the bare one's place, which has no purifier
        to stand in for, BPDA is white box. Where the attacker sees a random defense, one success is a draw, not a fall:
        no attack stops at its first there."""
        found = []
        for classifier in self.classifiers:
            for label, (attack, kinds) in self.attacks.items():
                for knowledge in kinds:
                    for defense in self.defenses:
                        seen = knowledge
                        if defense == "none" and knowledge in ("white_box", "bpda"):
                            seen = "oblivious"
                        elif defense in self.instead and knowledge == "bpda":
                            seen = "white_box"
                        random = self.defenses[defense].random and seen in ("white_box", "bpda", "black_box")
                        asked = (
                            attack.for_random_model(eot_samples=1) if random else attack
                        )  # `threats.EOT` averages already
                        cell = Cell(classifier, defense, label, asked, seen)
                        if cell not in found:
                            found.append(cell)
        return found

    def behind(self, cell: Cell) -> nn.Module:
        """The classifier behind the cell's purifier: the bare one, or the one that stands in its place."""
        return self.instead.get(cell.defense, self.classifiers[cell.classifier])

    def target(self, cell: Cell, fast: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
        """The function that the cell's attacker sees; `fast` gives the copies of classifiers that it is built on."""
        bare, surrogate = self.classifiers[cell.classifier], self.surrogate[1] if self.surrogate else None
        # Who knows nothing of a defense attacks the bare classifier, also where another one stands in its place.
        seen = bare if cell.knowledge in ("none", "transfer", "oblivious") else self.behind(cell)
        function = (fast or {}).get(seen, seen)
        return threats.target(
            function, self.defenses[cell.defense], cell.knowledge, surrogate, eot_samples=self.eot_samples
        )

    def identity(self, cell: Cell, target: nn.Module) -> Identity:
        """Of the cell's attacker: cells of one identity share adversarial images. target: its `target`, which must live
        as long as the identity is used."""
        function = identify(target)
        kind = type(cell.attack)
        # An attack of another's, or one with a loss of another's, may hold what its repr does not tell.
        known = is_known(kind) and not cell.attack.holds_own
        key = function.key if known else f"{function.key} {kind.__qualname__} {id(cell.attack)}"
        return Identity(key, function.lasting and known)

    def about(self, cell: Cell) -> dict[str, Any]:
        """What its rows say of the cell, by `schema.CELL_KEYS`."""
        return {
            "dataset": self.data.source,
            "split": self.data.name,
            "classifier": cell.classifier,
            "defense": cell.defense,
            "attack": cell.label,
            "attack_repr": repr(cell.attack),
            "eps": float("nan") if (eps := getattr(cell.attack, "eps", None)) is None else eps,
            "knowledge": cell.knowledge,
            "surrogate": self.surrogate[0] if self.surrogate and cell.knowledge == "transfer" else "",
            "seed": self.seed,
        }

    def models(self) -> dict[str, nn.Module]:
        """Everything that is asked, by what it is called in an error."""
        found: dict[str, nn.Module] = {f"classifier {k!r}": v for k, v in self.classifiers.items()}
        found |= {f"defense {k!r}": self.instead.get(k, v) for k, v in self.defenses.items()}
        return found | ({"the surrogate": self.surrogate[1]} if self.surrogate else {})

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, every model is in eval mode on the grid's device; after, mode and place are as they were."""
        with contextlib.ExitStack() as stack:
            for model in {id(m): m for m in (*self.models().values(), *self.defenses.values())}.values():
                stack.enter_context(_at_work(model, self.device))
            yield

    def check(self) -> None:
        """Raise `ValueError` where a cell cannot be asked: before anything is computed or written."""
        cache_limit()
        for what, names in (("classifier", self.classifiers), ("defense", self.defenses), ("attack", self.attacks)):
            for name in names:
                check_name(what, name)
        channels, height, width = self.data.shape
        for name, defense in self.defenses.items():
            if defense.size is not None and (height, width) != (defense.size, defense.size):
                raise ValueError(
                    f"{name} purifies {defense.size}x{defense.size} images, but those of {self.data.source} are "
                    f"{height}x{width}; leave it out of the recipe's defenses, or train one for that size"
                )
            if defense.channels not in (None, channels):
                raise ValueError(
                    f"{name} purifies images of {defense.channels} channels, but those of {self.data.source} have "
                    f"{channels}; leave it out, or train one for such images"
                )
        for cell in self.cells():
            threats.check_attacker(cell.attack, cell.knowledge)
            self.target(cell)
        with self.at_work():
            for name, model in self.models().items():
                if not isinstance(model, Defense) or model.spec is None:  # ours are tested; some take long
                    self._try(name, model)

    @torch.no_grad()
    def _try(self, name: str, model: nn.Module) -> None:
        """Ask a model about two images, which takes no time beside an attack and tells much."""
        images, _ = self.data.batch(torch.arange(min(2, len(self.data))), self.device)
        shape, source = tuple(images.shape), self.data.source
        try:
            out = ask(model, images)
        except Exception as error:
            raise ValueError(
                f"{name} fails on images of {source}, float32 {shape} in [0, 1]: is it for images of other channels or "
                f"another size? It said: {error}"
            ) from error
        if isinstance(model, Defense):
            if not isinstance(out, Tensor) or out.shape != images.shape:
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(f"{name} must give images of the shape that it gets, {shape}; it gave {got}")
            return
        try:
            check_logits(out, len(images))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        worst = int(self.data.labels.max())
        if worst >= out.shape[1]:
            raise ValueError(
                f"{name} gives {out.shape[1]} logits, but {source} has images of class {worst} "
                f"({self.data.class_names[worst]!r}): take a model for {self.data.classes} classes, or load the data "
                "with class_names= in the model's order"
            )


def run_grid(grid: Grid, out: Path, progress: Progress | None = None) -> None:
    """Write the rows and samples of every cell of `grid` under `out`; what is already there is not made again.

    Raises `RunError` where what is there is damaged, or of another cell.
    """
    with grid.at_work(), tempfile.TemporaryDirectory() as own:
        # What only this process can tell from other things is kept no longer than it.
        stores = {True: AdversarialStore(), False: AdversarialStore(Path(own))}
        _fill(grid, out, stores, progress)


def _fill(grid: Grid, out: Path, stores: Mapping[bool, AdversarialStore], progress: Progress | None) -> None:
    # Unchanged in what they answer, faster to attack; images are judged on the originals. The layout is given, not
    # probed: a resumed run must make the same rows.
    example, _ = grid.data.batch(torch.arange(min(2, len(grid.data))), grid.device)
    fused = {
        c: fused_copy(c, example, channels_last=True) for c in (*grid.classifiers.values(), *grid.instead.values())
    }
    cells = grid.cells()
    functions = {cell: grid.target(cell, fused) for cell in cells}
    asked = {cell: grid.target(cell) for cell in cells}  # alive until the end: the id of what has gone is given again
    identities = {cell: grid.identity(cell, asked[cell]) for cell in cells}
    shards = torch.arange(len(grid.data)).split(grid.shard)
    shown = shown_rows(grid.data.labels, grid.samples)
    done = 0
    for number, rows in enumerate(shards):
        known: dict[Any, Any] = {}  # what several cells of a shard share is computed once
        here = shown[(shown >= rows[0]) & (shown <= rows[-1])]
        for cell in cells:
            path = out / "rows" / cell.folder / f"{number:04d}.parquet"
            samples = out / "samples" / f"{cell.folder}.safetensors"
            before = _samples(samples, grid.about(cell)) if len(here) else {}
            missing = set(grid.data.index[here].tolist()) - set(before["index"].tolist() if before else ())
            if path.exists():
                schema.check_rows(path, grid.about(cell), grid.data.index[rows].tolist())
            if missing or not path.exists():
                identity = identities[cell]
                with drawing(_seed(grid, cell, number), grid.device):
                    made = stores[identity.lasting].get(
                        cell.attack,
                        functions[cell],
                        identity.key,
                        grid.data,
                        rows,
                        seed=grid.seed,
                        batch=grid.batch,
                        device=grid.device,
                    )
                columns, views = _judge(grid, cell, rows, made, (identity.key, cell.attack), known)
                if missing:  # before the rows: where these are there, so are its samples
                    tensors = _in_order(before, _shown(here - int(rows[0]), views, columns), grid.data.index[shown])
                    samples.write_samples(samples, tensors, grid.about(cell) | {"class_names": grid.data.class_names})
                schema.write_rows(path, columns)
            done += 1
            if progress:
                progress(done, len(cells) * len(shards), str(cell))


def _seed(grid: Grid, cell: Cell, shard: int) -> int:
    """Of what a random model draws while it is attacked: one for all cells that see the same model."""
    seen = [cell.classifier, cell.defense if cell.knowledge in WHOLE else "", cell.label, cell.knowledge in WHOLE]
    return int(hashlib.sha256(repr(seen).encode()).hexdigest()[:8], 16) + 1_000_003 * grid.seed + shard


@contextlib.contextmanager
def _at_work(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, `model` is in eval mode, and on `device` unless its parts are on several: then its owner knows best."""
    modes = [(part, part.training) for part in model.modules() if hasattr(part, "training")]
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    model.eval()
    if len(places) == 1:
        model.to(device)
    try:
        yield
    finally:
        if len(places) == 1:
            model.to(places.pop())
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, a random defense draws what `seed` gives: a resumed run makes the same rows. The caller's draws stay."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def answers_of(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """(predictions, confidence in the label), `(N,)` each; -1 and 0 where an answer is not finite: it is wrong."""
    logits = torch.cat([logits_of(model, x) for x in images.split(batch)])
    broken = ~logits.isfinite().all(1)
    confidence = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    return logits.argmax(1).masked_fill(broken, -1).cpu(), confidence.masked_fill(broken, 0).cpu()


@dataclass(frozen=True)
class _Seen:
    """What a defense makes of images: `(N, C, H, W)` purified, `(N, detectors)` scores, `(N,)` whether it rejects them,
    and seconds per image: of purifying, and of scoring too where it has detectors (often one and the same work)."""

    purified: Tensor
    scores: Tensor
    rejected: Tensor
    seconds: float


@torch.no_grad()
def _seen(defense: Defense, classifier: nn.Module, images: Tensor, batch: int, seed: int) -> _Seen:
    start = time.perf_counter()
    with drawing(seed, images.device):
        parts = [defense.purify_and_score(x.clone(), lambda seen: ask(classifier, seen)) for x in images.split(batch)]
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    seconds = (time.perf_counter() - start) / len(images)
    purified, scores = (torch.cat(part) for part in zip(*parts))
    return _Seen(purified, scores, (scores > defense.thresholds.to(scores)).any(1), seconds)


def _judge(
    grid: Grid,
    cell: Cell,
    rows: Tensor,
    attacked_images: Adversarials,
    made: tuple[str, Attack],
    known: dict[Any, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Columns and images of one shard. `made`: what the adversarial images are; `known`: the shard's memory."""
    x, labels = grid.data.batch(rows, grid.device)
    x_adv = attacked_images.images
    bare, classifier, defense = grid.classifiers[cell.classifier], grid.behind(cell), grid.defenses[cell.defense]
    draw = grid.seed * 1_000_003 + int(rows[0])

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = make()
        return known[key]

    def quality(images: Tensor) -> tuple[Tensor, Tensor]:
        return metrics.psnr(images, x).cpu(), metrics.ssim(images, x).cpu()

    def answers(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        return answers_of(model, images, labels, grid.batch)

    at, by = cell.classifier, cell.defense
    # Detectors may ask the classifier; where there are none, what is purified is the same in front of every one.
    watched = (at,) if len(defense.thresholds) else ()
    clean = once(("seen", by, *watched), lambda: _seen(defense, classifier, x, grid.batch, draw))
    pred_clean, conf_clean = once(("clean", at), lambda: answers(bare, x))
    pred_pure_clean, conf_pure_clean = once(("clean", at, by), lambda: answers(classifier, clean.purified))
    quality_clean = once(("clean quality", by), lambda: quality(clean.purified))
    pred_adv, conf_adv = once(("adv", at, made), lambda: answers(bare, x_adv))
    quality_adv = once(("adv quality", made), lambda: quality(x_adv))
    far = once(("distances", made), lambda: metrics.distances(x_adv, x))
    attacked = _seen(defense, classifier, x_adv, grid.batch, draw + 1)
    undefended = by == "none"
    pred_pure, conf_pure = (pred_adv, conf_adv) if undefended else answers(classifier, attacked.purified)
    quality_pure = quality_adv if undefended else quality(attacked.purified)
    columns = {
        "schema": schema.SCHEMA_VERSION,
        **grid.about(cell),
        "draw": 0,
        "index": grid.data.index[rows].numpy(),
        "label": labels.cpu().numpy(),
        "pred_clean": pred_clean.numpy(),
        "pred_adv": pred_adv.numpy(),
        "pred_pure_clean": pred_pure_clean.numpy(),
        "pred_pure_adv": pred_pure.numpy(),
        "conf_clean": conf_clean.numpy(),
        "conf_adv": conf_adv.numpy(),
        "conf_pure_clean": conf_pure_clean.numpy(),
        "conf_pure_adv": conf_pure.numpy(),
        **{k: v.cpu().numpy() for k, v in far.items()},
        "psnr_adv": quality_adv[0].numpy(),
        "psnr_pure_adv": quality_pure[0].numpy(),
        "psnr_pure_clean": quality_clean[0].numpy(),
        "ssim_adv": quality_adv[1].numpy(),
        "ssim_pure_adv": quality_pure[1].numpy(),
        "ssim_pure_clean": quality_clean[1].numpy(),
        "rejected_clean": clean.rejected.cpu().numpy(),
        "rejected_adv": attacked.rejected.cpu().numpy(),
        "scores_clean": clean.scores.cpu().tolist(),
        "scores_adv": attacked.scores.cpu().tolist(),
        "seconds_attack": attacked_images.seconds,
        "seconds_purify": attacked.seconds,
        **{count: getattr(attacked_images, count).numpy() for count in COUNTS},
    }
    return columns, {"clean": x, "adversarial": x_adv, "restored": attacked.purified, "restored_clean": clean.purified}


def shown_rows(labels: Tensor, count: int) -> Tensor:
    """The places of `count` images to look at `(M,)`: a fixed random choice in which each class comes once before any
    comes again, and so on."""
    order = per_image_rng.permutation(0, 0, len(labels))
    turn = torch.empty_like(order)
    for label in labels.unique():
        mine = labels[order] == label
        turn[mine] = torch.arange(int(mine.sum()))
    return order[turn.argsort(stable=True)][:count]


def _samples(path: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """The samples of a cell so far; nothing where they are damaged or another's: they are then made again."""
    with contextlib.suppress(runs.RunError):
        cell, tensors = samples.read_sample(path)
        if all(str(cell[key]) == str(value) for key, value in about.items()):
            return tensors
    return {}


def _shown(m: Tensor, views: Mapping[str, Tensor], columns: Mapping[str, Any]) -> dict[str, Tensor]:
    """The images at the places `m` of a shard, with what was thought of them."""
    order = ("clean", "adv", "pure_clean", "pure_adv")
    tensors = {k: (v[m.to(v.device)] * 255).round().to(torch.uint8).cpu() for k, v in views.items()}
    tensors["index"] = torch.as_tensor(columns["index"])[m]
    tensors["label"] = torch.as_tensor(columns["label"])[m]
    tensors["confidence"] = torch.stack([torch.as_tensor(columns[f"conf_{k}"])[m] for k in order], 1)
    tensors["prediction"] = torch.stack([torch.as_tensor(columns[f"pred_{k}"])[m] for k in order], 1)
    return tensors


def _in_order(before: Mapping[str, Tensor], new: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Both together, what is new first, in the order of `index`."""
    both = {k: torch.cat([v, before[k]]) if before else v for k, v in new.items()}
    places = [(both["index"] == number).nonzero()[0] for number in index if (both["index"] == number).any()]
    return {k: v[torch.cat(places)] for k, v in both.items()}
