"""Cells to rows: every classifier, defense, attack and knowledge crossed, a row an image, shard by shard."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unperturb import metrics, runs, threats
from unperturb.attacks.base import Attack
from unperturb.classifiers import twin
from unperturb.data import ImageSet
from unperturb.defenses.base import Defense, Protected
from unperturb.evaluation.adversarials import AdversarialStore, fingerprint

Progress = Callable[[int, int, str], None]


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
        """A file name for the cell."""
        return re.sub(r"[^A-Za-z0-9._-]+", "_", f"{self.classifier}.{self.defense}.{self.label}.{self.knowledge}")


@dataclass
class Grid:
    """What is crossed with what, and on which images.

    classifiers, defenses: by the name they have in tables. attacks: by label, each with the kinds of knowledge it is
    given. instead: classifiers that are defenses themselves, such as an adversarially trained one, by the name of their
    defense, whose purifier is the identity: they stand in every classifier's place. surrogate: name and classifier of a
    transfer attack. eot: draws that the gradient of a random defense is averaged
    over. batch: images attacked at once. shard: rows a file. note: what is wrong with this copy of the data,
    if anything.
    """

    data: ImageSet
    classifiers: Mapping[str, nn.Module]
    defenses: Mapping[str, Defense]
    attacks: Mapping[str, tuple[Attack, Sequence[str]]]
    instead: Mapping[str, nn.Module] = field(default_factory=dict)
    surrogate: tuple[str, nn.Module] | None = None
    eot: int = 20
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
                        asked = attack.for_random_model(eot=1) if random else attack  # `threats.EOT` averages already
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
        return threats.target(function, self.defenses[cell.defense], cell.knowledge, surrogate, eot=self.eot)

    def check(self) -> None:
        """Raise `ValueError` where a cell cannot be asked: before anything is computed or written."""
        height, width = self.data.shape[1:]
        for name, defense in self.defenses.items():
            if defense.size is not None and (height, width) != (defense.size, defense.size):
                raise ValueError(
                    f"{name} purifies {defense.size}x{defense.size} images, but those of {self.data.source} are "
                    f"{height}x{width}; leave it out of the recipe's defenses, or train one for that size"
                )
        for cell in self.cells():
            threats.check_attacker(cell.attack, cell.knowledge)
            self.target(cell)


def run_grid(grid: Grid, out: Path, progress: Progress | None = None) -> None:
    """Write the rows and samples of every cell of `grid` under `out`; what is already there is not made again."""
    store = AdversarialStore()
    # Unchanged in what they answer, faster to attack; images are judged on the originals. The layout is given, not
    # probed: a resumed run must make the same rows.
    example, _ = grid.data.batch(torch.arange(min(2, len(grid.data))), grid.device)
    originals = (*grid.classifiers.values(), *grid.instead.values())
    twins = {c: twin(c.to(grid.device), example, channels_last=True) for c in originals}
    for model in (*originals, *grid.defenses.values()):
        model.to(grid.device).eval()
    cells = grid.cells()
    functions = {cell: grid.target(cell, twins) for cell in cells}
    keys = {cell: fingerprint(grid.target(cell)) for cell in cells}
    shards = torch.arange(len(grid.data)).split(grid.shard)
    done = 0
    for number, rows in enumerate(shards):
        known: dict[Any, Any] = {}  # what several cells of a shard share is computed once
        for cell in cells:
            path = out / "rows" / cell.folder / f"{number:04d}.parquet"
            sampled = out / "samples" / f"{cell.folder}.safetensors"
            if not path.exists() or (number == 0 and grid.samples and not sampled.exists()):
                made = (keys[cell], cell.attack)
                with _drawing(int(keys[cell][:8], 16) + 1_000_003 * grid.seed + number, grid.device):
                    x_adv, seconds = store.get(
                        cell.attack,
                        functions[cell],
                        keys[cell],
                        grid.data,
                        rows,
                        seed=grid.seed,
                        batch=grid.batch,
                        device=grid.device,
                    )
                columns, views = _judge(grid, cell, rows, x_adv, seconds, made, known)
                if number == 0 and grid.samples:
                    _keep_samples(grid, cell, sampled, views, columns)
                runs.write_rows(path, columns)
            done += 1
            if progress:
                what = f"{cell.classifier} · {cell.defense} · {cell.label} · {cell.knowledge}"
                progress(done, len(cells) * len(shards), what)


@contextlib.contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, a random defense draws what `seed` gives: a resumed run makes the same rows. The caller's draws stay."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _answers(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """(predictions, confidence in the label), `(N,)` each."""
    logits = torch.cat([model(x) for x in images.split(batch)]).float()
    return logits.argmax(1).cpu(), logits.softmax(1).gather(1, labels[:, None]).squeeze(1).cpu()


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
    with _drawing(seed, images.device):
        parts = [defense.judge(x, classifier) for x in images.split(batch)]
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    seconds = (time.perf_counter() - start) / len(images)
    purified, scores = (torch.cat(part) for part in zip(*parts))
    return _Seen(purified, scores, (scores > defense.thresholds.to(scores)).any(1), seconds)


def _judge(
    grid: Grid,
    cell: Cell,
    rows: Tensor,
    x_adv: Tensor,
    seconds: float,
    made: tuple[str, Attack],
    known: dict[Any, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Columns and images of one shard. `made`: what the adversarial images are; `known`: the shard's memory."""
    x, labels = grid.data.batch(rows, grid.device)
    bare, classifier, defense = grid.classifiers[cell.classifier], grid.behind(cell), grid.defenses[cell.defense]
    draw = grid.seed * 1_000_003 + int(rows[0])

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = make()
        return known[key]

    def quality(images: Tensor) -> tuple[Tensor, Tensor]:
        return metrics.psnr(images, x).cpu(), metrics.ssim(images, x).cpu()

    def answers(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        return _answers(model, images, labels, grid.batch)

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
        "schema": runs.SCHEMA_VERSION,
        "dataset": grid.data.source,
        "split": grid.data.name,
        "classifier": cell.classifier,
        "defense": cell.defense,
        "attack": cell.label,
        "attack_repr": repr(cell.attack),
        "eps": float("nan") if (eps := getattr(cell.attack, "eps", None)) is None else eps,
        "knowledge": cell.knowledge,
        "surrogate": grid.surrogate[0] if grid.surrogate and cell.knowledge == "transfer" else "",
        "seed": grid.seed,
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
        "seconds_attack": seconds,
        "seconds_purify": attacked.seconds,
    }
    return columns, {"clean": x, "adversarial": x_adv, "restored": attacked.purified, "restored_clean": clean.purified}


def _keep_samples(grid: Grid, cell: Cell, path: Path, views: Mapping[str, Tensor], columns: Mapping[str, Any]) -> None:
    """The first few images of the first shard, with what was thought of them."""
    m = slice(0, grid.samples)
    order = ("clean", "adv", "pure_clean", "pure_adv")
    tensors = {k: (v[m] * 255).round().to(torch.uint8) for k, v in views.items()}
    tensors["index"] = torch.as_tensor(columns["index"][m])
    tensors["label"] = torch.as_tensor(columns["label"][m])
    tensors["confidence"] = torch.stack([torch.as_tensor(columns[f"conf_{k}"][m]) for k in order], 1)
    tensors["prediction"] = torch.stack([torch.as_tensor(columns[f"pred_{k}"][m]) for k in order], 1)
    about = {k: columns[k] for k in runs.CELL_KEYS} | {"class_names": grid.data.class_names}
    runs.write_samples(path, tensors, about)


def protected(classifier: nn.Module, defense: Defense) -> nn.Module:
    """The model that a user runs: the classifier itself where there is no defense."""
    return classifier if defense.spec and defense.spec["name"] == "none" else Protected(classifier, defense)
