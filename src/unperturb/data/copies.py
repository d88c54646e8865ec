"""`prepare`: fetch or convert a data set once, check it against what is known of it, and show what is in it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from unperturb.data import store
from unperturb.data.load import Progress, open_dataset
from unperturb.data.sets import ImageSet, Splits

# Copies that somebody looked at, by the fingerprints of train (before validation is split off) and test: what they are,
# and what a reader of a figure made on them must know ("": nothing).
EXACT = "exact, in the official order"
COPIES: dict[tuple[str, str], tuple[str, str]] = {
    ("7b46e8a134ade0dc", "7932264fcc11545a"): ("scikit-learn's digits, enlarged from 8x8", ""),
    ("17e018a699dc8e4c", "c7ea42a72a37a449"): (EXACT, ""),
    ("8becfcc18e5455b8", "7c6161450e15e27c"): (EXACT, ""),
    ("a39c6bba82447dfb", "0c97c849c91d513f"): (
        "exact but for 98 images (93 ships, 5 horses; 77 train, 21 test) that are JPEG copies",
        "98 images are JPEG copies (21 of the test split)",
    ),
    ("da74f8d8a46c7856", "1aff3c95f4d2ef79"): ("JPEG quality 90, 4:4:4, mean error 3/255", "JPEG quality 90 copy"),
    ("960fe19ee2710ebd", "03963ccf791442c8"): (
        "JPEG quality 88; whole images squashed to a square; 2,000 of the 3,925 validation images, 200 a class",
        "JPEG quality 88 copy, whole images squashed to a square, 2,000 test images",
    ),
}
CHECKED = {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagenette"}


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made and found. counts: images of train, val, test. copy: what is known of this copy. sheet: the
    contact sheet. folder: the decoded pixels."""

    name: str
    counts: dict[str, int]
    shape: tuple[int, int, int]
    classes: int
    fingerprints: dict[str, str]
    known: bool
    copy: str
    sheet: Path
    folder: Path
    seconds: float

    def __str__(self) -> str:
        c, h, w = self.shape
        counts = " / ".join(f"{n:,} {split}" for split, n in self.counts.items())
        prints = "  ".join(f"{split} {value}" for split, value in self.fingerprints.items())
        return (
            f"{self.name}: {counts}, {c}x{h}x{w}, {self.classes} classes\n"
            f"fingerprint    {prints}\n"
            f"copy           {self.copy}\n"
            f"pixels         {self.folder}\n"
            f"contact sheet  {self.sheet}\n"
            f"in {self.seconds:.1f} s"
        )


def prepare(
    name: str,
    *,
    size: int | None = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Fetch or convert the data set `name` into the cache, check its counts and its fingerprint, save a contact sheet.

    size, cache, progress: as for `load_dataset`. out: the folder for the contact sheet; None means the decoded set's
    own. Cached pixels are read through, and made anew where they are not what they were. Raises as `load_dataset` does.
    """
    start = time.perf_counter()
    folder, splits = open_dataset(name, size=size, cache=cache, progress=progress)
    if not store.intact(folder):
        shutil.rmtree(folder)
        folder, splits = open_dataset(name, size=size, cache=cache, progress=progress)
    sheet = (Path(out) if out else folder) / f"{name.replace(':', '-').replace('/', '-')}.png"
    contact_sheet(splits.train, sheet)
    known = _copy(splits) is not None
    return Prepared(
        name=name,
        counts={one.split: len(one) for one in (splits.train, splits.val, splits.test)},
        shape=splits.train.shape,
        classes=splits.train.classes,
        fingerprints=splits.fingerprints,
        known=known,
        copy=(_copy(splits) or (_unknown(splits),))[0],
        sheet=sheet,
        folder=folder,
        seconds=time.perf_counter() - start,
    )


def known_copy_note(splits: Splits) -> str:
    """What must stand beside a figure made on this copy, such as "JPEG quality 90 copy"; "" where it is exact."""
    copy = _copy(splits)
    if copy:
        return copy[1]
    return _unknown(splits) if splits.source in CHECKED else ""


def _copy(splits: Splits) -> tuple[str, str] | None:
    return COPIES.get((splits.fingerprints["train"], splits.fingerprints.get("test", "")))


def _unknown(splits: Splits) -> str:
    if splits.source in CHECKED:
        return f"not a copy known here (fingerprint of train {splits.fingerprints['train']})"
    return "of this data set no copy is known here to compare it with"


def contact_sheet(images: ImageSet, path: Path, *, rows: int = 10, columns: int = 10) -> None:
    """Ten images of each of ten classes, by name, as a PNG. Where there are more classes, ten from first to last."""
    from PIL import Image, ImageDraw, ImageFont

    c, h, w = images.shape
    zoom = max(1, round(72 / max(h, w)))  # whole, so that a pixel stays a square
    cell_h, cell_w, gap, margin = h * zoom, w * zoom, 4, 12
    classes = torch.linspace(0, images.classes - 1, min(rows, images.classes)).round().long().tolist()
    font = ImageFont.load_default(size=15)
    texts = [
        images.class_names[k] if len(images.class_names[k]) <= 28 else images.class_names[k][:27] + "…" for k in classes
    ]
    left = margin * 2 + max(int(font.getlength(text)) for text in texts)
    size = (left + columns * (cell_w + gap) - gap + margin, margin * 2 + len(classes) * (cell_h + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (k, text) in enumerate(zip(classes, texts)):
        top = margin + i * (cell_h + gap)
        draw.text((left - margin, top + cell_h // 2), text, fill="black", font=font, anchor="rm")
        for j, pixels in enumerate(images.pixels((images.labels == k).nonzero()[:columns, 0])):
            one = Image.fromarray(pixels[0].numpy() if c == 1 else pixels.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(one.resize((cell_w, cell_h), Image.Resampling.NEAREST), (left + j * (cell_w + gap), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    sheet.save(temporary)
    temporary.replace(path)
