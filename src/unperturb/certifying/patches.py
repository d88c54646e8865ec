"""Where no patch changes the answer: double masking, proved image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.modules import classes_of, evaluating, logits_of
from unperturb.validation import check_images, check_labels

if TYPE_CHECKING:
    import pandas as pd

    from unperturb.systems import System


def covering_masks(height: int, width: int, patch: int, per_axis: int) -> Tensor:
    """`(M, H, W)` bool, True where a mask covers: wherever a square of `patch` pixels lies, one of them covers it all.

    Raises `ValueError` where the patch does not fit into the image, or `per_axis` is not positive.

    Source: Xiang, Mahloujifar and Mittal 2022, "PatchCleanser", section 3.4, equations (4) and (5).
    """
    if not 1 <= patch <= min(height, width):
        raise ValueError(f"a patch of {patch} x {patch} pixels does not fit into images of {height} x {width}")
    if per_axis < 1:
        raise ValueError(f"masks, the number of masks along each axis, must be at least 1, not {per_axis}")
    axes = []
    for size in (height, width):
        stride = -(-(size - patch + 1) // per_axis)
        side = patch + stride - 1
        firsts = sorted({min(i * stride, size - side) for i in range(per_axis)})
        axes.append(torch.stack([(at := torch.arange(size)) >= first for first in firsts]))
        axes[-1] &= torch.stack([at < first + side for first in firsts])
    down, right = axes
    return (down[:, None, :, None] & right[None, :, None, :]).flatten(0, 1)


class DoubleMasking(nn.Module):
    """`model` asked under masks, so that a patch anywhere is covered at least once: an image whose answer is the same
    under every two masks keeps it whatever a patch shows (`certified`).

    One mask at a time: if all answers agree, that is the answer. Else each that differs from the majority is asked
    again under every second mask, and is taken if it then never wavers; if none is, the majority is taken.

    model: images `(N, C, H, W)` in [0, 1] to logits; a purifier in front that completes what is covered
    (`unperturb.Protected`) is what makes it worth much. patch: side in pixels. masks: along each axis, `masks**2` in
    all. fill: what a mask shows, in [0, 1]. batch: images asked at once.

    Called, it gives `(N, K)`: 1 for its answer, else 0; there is no gradient.

    Source: Xiang, Mahloujifar and Mittal 2022, "PatchCleanser", algorithm 1.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        patch: int,
        *,
        masks: int = 6,
        fill: float = 0.5,
        batch: int = 1000,
    ) -> None:
        super().__init__()
        if not 0 <= fill <= 1:
            raise ValueError(f"fill lies in [0, 1], not {fill}")
        self.model, self.patch, self.masks, self.fill, self.batch = model, patch, masks, fill, batch

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        found, classes = self._answered(check_images(images))
        return F.one_hot(found + 1, classes + 1)[:, 1:].to(images.dtype)

    @torch.no_grad()
    def certified(self, images: Tensor, labels: Tensor) -> Tensor:
        """`(N,)` bool: under every two masks the answer is the label, so that it is this module's answer, too, whatever
        a square patch of this size shows and wherever it lies (their theorem 1)."""
        images = check_images(images)
        check_labels(images, labels)
        covered = self._masks(images)
        stands = (self._asked(images, covered.expand(len(images), -1, -1, -1))[0] == labels[:, None]).all(1)
        for number in range(len(covered)):
            left = stands.nonzero()[:, 0]
            both = covered[number] | covered[number + 1 :]
            if not len(left) or not len(both):
                break
            answers, _ = self._asked(images[left], both.expand(len(left), -1, -1, -1))
            stands[left] = (answers == labels[left, None]).all(1)
        return stands

    def _answered(self, images: Tensor) -> tuple[Tensor, int]:
        """(the class of each image, how many classes there are)."""
        covered = self._masks(images)
        first, classes = self._asked(images, covered.expand(len(images), -1, -1, -1))
        votes = F.one_hot(first + 1, classes + 1)[..., 1:].sum(1)
        found = votes.argmax(1)
        image, mask = (first != found[:, None]).nonzero(as_tuple=True)
        taken = torch.full_like(found, len(covered))  # of the masks whose answer never wavers, the first
        for rows in torch.arange(len(image)).split(max(1, self.batch // len(covered))) if len(image) else ():
            second, _ = self._asked(images[image[rows]], covered[mask[rows], None] | covered)
            sure = rows[(second == first[image[rows], mask[rows], None]).all(1).cpu()]
            taken.scatter_reduce_(0, image[sure], mask[sure], "amin")
        other = taken < len(covered)
        found[other] = first[other].gather(1, taken[other, None])[:, 0]
        return found, classes

    def _masks(self, images: Tensor) -> Tensor:
        return covering_masks(images.shape[2], images.shape[3], self.patch, self.masks).to(images.device)

    def _asked(self, images: Tensor, covered: Tensor) -> tuple[Tensor, int]:
        """(classes `(N, M)` of `images` `(N, C, H, W)` under each of their own masks `(N, M, H, W)`, the number of
        classes); -1 where a logit is not finite."""
        count = covered.shape[1]
        each = torch.arange(len(images) * count, device=images.device)
        found, classes = [], 0
        with evaluating(self.modules()):
            for rows in each.split(self.batch):
                shown, mask = images[rows // count], covered[rows // count, rows % count, None]
                shown = torch.where(mask, torch.full_like(shown, self.fill), shown)
                logits = logits_of(self.model, shown.contiguous(memory_format=torch.channels_last))
                found.append(classes_of(logits))
                classes = logits.shape[1]
        return torch.cat(found).view(len(images), count), classes


@dataclass(frozen=True, eq=False)
class PatchCertificates:
    """What `certify_patch` found.

    rows: a line an image: index, label, prediction (of double masking, no patch there), certified. settings: what fixes
    the run.
    """

    system: str
    rows: pd.DataFrame
    settings: dict[str, Any]

    @property
    def accuracy(self) -> tuple[float, float, float]:
        """Certified accuracy with Wilson's 95 % interval: the share of images that are answered rightly whatever a
        patch shows. All in [0, 1]."""
        return self._share("certified")

    @property
    def clean(self) -> tuple[float, float, float]:
        """Accuracy where there is no patch, likewise."""
        return self._share("right")

    def _share(self, what: str) -> tuple[float, float, float]:
        from unperturb.intervals import wilson

        rows = self.rows.assign(right=self.rows["prediction"] == self.rows["label"])
        count = int(rows[what].sum())
        return (count / len(rows), *wilson(count, len(rows)))

    def table(self) -> str:
        """Clean and certified accuracy, as Markdown."""
        from unperturb.results.render import percent

        s = self.settings
        head = f"| patch | clean | certified accuracy |\n|---|---|---|\n| {s['patch']} x {s['patch']} pixels "
        return f"{head}| {percent(*self.clean)} | {percent(*self.accuracy)} |"

    def write(self, out: str | Path) -> dict[str, Path]:
        """Table and rows in the folder `out`: `certificates.md` and `.csv`; the paths by their kind."""
        from unperturb import runs

        out = Path(out)
        said = f"# {self.system}: patch certificates\n\n{self.conditions}\n\n{self.table()}\n"
        runs.write_text(out / "certificates.md", said)
        runs.write_text(out / "certificates.csv", self.rows.to_csv(index=False))
        return {kind: out / f"certificates.{kind}" for kind in ("md", "csv")}

    @property
    def conditions(self) -> str:
        """What the numbers hold for, in a sentence."""
        s = self.settings
        return (
            f"Double masking with {s['masks']} x {s['masks']} masks of {s['fill']:g}: {len(self.rows):,} images of "
            f"{s['data']} ({s['split']}); no square patch of {s['patch']} x {s['patch']} pixels, wherever it lies and "
            "whatever it shows, changes a certified answer."
        )

    def __str__(self) -> str:
        return f"{self.system}\n{self.conditions}\n\n{self.table()}"


def certify_patch(
    model: Callable[[Tensor], Any] | System,
    data: Any,
    *,
    patch: int,
    masks: int = 6,
    fill: float = 0.5,
    n: int | None = None,
    batch: int = 100,
    name: str = "model",
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    quiet: bool = False,
) -> PatchCertificates:
    """Certify `model` behind `DoubleMasking` against a square patch of `patch` pixels a side.

    model: as `benchmark` takes it. data: test images with labels. n: a fixed random subset of so many (500, or all of
    fewer). masks, fill: of `DoubleMasking`. batch: images of a file of rows. out: run folder, in which a stopped run
    goes on with `resume` (default: nothing is kept).

    Raises `ValueError` for a model that is random, for a patch that does not fit, and `RunError` where `out` holds
    another run.

    Source: Xiang, Mahloujifar and Mittal 2022, "PatchCleanser", algorithm 2.
    """
    import pandas as pd

    from unperturb.certifying.shards import in_shards, plan_for

    plan = plan_for(model, data, n, name, device)
    (system,), images = plan.systems, plan.data
    if system.random:
        raise ValueError(f"{system.name!r} is random: what its answers under masks prove holds for one draw alone")
    masked = DoubleMasking(system.model, patch, masks=masks, fill=fill)
    covering_masks(*images.shape[1:], patch, masks)  # refused before anything is asked
    settings = {
        "kind": "patch certificates", "data": images.source, "split": images.name, "n": len(images), "patch": patch,
        "masks": masks, "fill": fill, "batch": batch,
    }  # fmt: skip

    def certified(rows: Tensor) -> pd.DataFrame:
        shown, labels = images.batch(rows, plan.device)
        proved = masked.certified(shown, labels)
        answer = labels.clone()  # of a certified image
        if not bool(proved.all()):
            answer[~proved] = classes_of(masked(shown[~proved]))
        lines = {"index": images.index[rows], "label": labels, "prediction": answer, "certified": proved}
        return pd.DataFrame({k: v.tolist() for k, v in lines.items()})

    rows = in_shards(
        plan, certified, settings, batch=batch, out=out, resume=resume, progress=progress, quiet=quiet
    )  # fmt: skip
    return PatchCertificates(system.name, rows, settings)
