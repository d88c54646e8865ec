"""`prepare`: fetch or convert a data set once, check it against what is known of it, and show what is in it."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from unperturb.data import store
from unperturb.data.load import file_name, open_dataset
from unperturb.data.sets import ImageSet, Splits
from unperturb.data.sources import Progress

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
    """What `prepare` made and found.

    counts: images of train, val, test. size: (H, W) and why it is that. classes: how many there are. class_counts: each
    class with its images of train, val, test. copy: what is known of this copy. sheet: the contact sheet. folder: the
    decoded pixels. notes: what a reader should know of how they were read.
    """

    name: str
    counts: dict[str, int]
    shape: tuple[int, int, int]
    size: str
    classes: int
    class_counts: list[tuple[str, list[int]]]
    fingerprints: dict[str, str]
    known: bool
    copy: str
    sheet: Path
    folder: Path
    notes: list[str]
    seconds: float

    def __str__(self) -> str:
        c, h, w = self.shape
        counts = " / ".join(f"{n:,} {split}" for split, n in self.counts.items())
        prints = "  ".join(f"{split} {value}" for split, value in self.fingerprints.items())
        lines = [
            f"{self.name}: {counts}, {c}x{h}x{w}, {self.classes} classes",
            f"size           {self.size}",
            *_class_table(self.class_counts),
            *(f"note           {note}" for note in self.notes if self.size not in note),
            f"fingerprint    {prints}",
            f"copy           {self.copy}",
            f"pixels         {self.folder}",
            f"contact sheet  {self.sheet}",
            f"in {self.seconds:.1f} s",
        ]
        return "\n".join(map(_printable, lines))


def _class_table(counts: list[tuple[str, list[int]]], most: int = 20) -> list[str]:
    """A line per class: images in train, val, test, and the name."""
    lines = [f"  {train:>9,} {val:>7,} {test:>7,}  {name}" for name, (train, val, test) in counts]
    if len(lines) > most:
        few, many = (f(of_class[0] for _, of_class in counts) for f in (min, max))
        lines[most:] = [f"  and {len(counts) - most:,} more; {few:,} to {many:,} train images a class"]
    return [f"classes  {'train':>2} {'val':>7} {'test':>7}", *lines]


def _printable(text: str) -> str:
    """`text` without what would move the cursor or cannot be written: names of folders may hold any bytes."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def prepare(
    name: str,
    *,
    size: int | None = None,
    skip_damaged: bool = False,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Fetch or convert the data set `name` into the cache, check its counts and its fingerprint, save a contact sheet.

    size, skip_damaged, cache, progress: as for `load_dataset`. out: the folder for the contact sheet; None means the
    decoded set's own. Cached pixels are read through, and made anew where they are not what they were. Raises as
    `load_dataset` does, and `DataError` where `out` cannot be written.
    """
    start = time.perf_counter()
    folder, why, splits = open_dataset(
        name, size=size, skip_damaged=skip_damaged, cache=cache, progress=progress, whole=True
    )
    sheet = (Path(out) if out else folder) / f"{file_name(name)}.png"
    store.write_file(sheet, contact_sheet(splits.train))
    parts = (splits.train, splits.val, splits.test)
    of_class = torch.stack([torch.bincount(one.labels, minlength=one.classes) for one in parts], 1).tolist()
    return Prepared(
        name=name,
        counts={one.split: len(one) for one in parts},
        shape=splits.train.shape,
        size=why,
        classes=splits.train.classes,
        class_counts=list(zip(splits.class_names, of_class)),
        fingerprints=splits.fingerprints,
        known=_copy(splits) is not None,
        copy=(_copy(splits) or (_unknown(splits),))[0],
        sheet=sheet,
        folder=folder,
        notes=splits.notes,
        seconds=time.perf_counter() - start,
    )


def known_copy_note(splits: Splits) -> str:
    """What must stand beside a figure made on this copy, such as "JPEG quality 90 copy"; "" where it is exact."""
    copy = _copy(splits)
    note = copy[1] if copy else _unknown(splits) if splits.source in CHECKED else ""
    left_out = f"{splits.left_out:,} pictures that cannot be used left out" if splits.left_out else ""
    return "; ".join(filter(None, (note, left_out)))


def _copy(splits: Splits) -> tuple[str, str] | None:
    return COPIES.get((splits.fingerprints["train"], splits.fingerprints.get("test", "")))


def _unknown(splits: Splits) -> str:
    if splits.source in CHECKED:
        return f"not a copy known here (fingerprint of train {splits.fingerprints['train']})"
    return "of this data set no copy is known here to compare it with"


def contact_sheet(images: ImageSet, *, rows: int = 10, columns: int = 10) -> bytes:
    """Ten images of each of ten classes, by name, as a PNG. Where there are more classes, ten from first to last."""
    from PIL import Image, ImageDraw, ImageFont

    c, h, w = images.shape
    zoom = max(1, round(72 / max(h, w)))  # whole, so that a pixel stays a square
    shrink = max(1, max(h, w) / 160)
    cell_h, cell_w = (max(1, round(side * zoom / shrink)) for side in (h, w))
    gap, margin = 4, 12
    classes = torch.linspace(0, images.classes - 1, min(rows, images.classes)).round().long().tolist()
    font = ImageFont.load_default(size=15)
    names = [_printable(images.class_names[k]) for k in classes]
    texts = [name if len(name) <= 28 else name[:27] + "…" for name in names]
    left = margin * 2 + max(int(font.getlength(text)) for text in texts)
    size = (left + columns * (cell_w + gap) - gap + margin, margin * 2 + len(classes) * (cell_h + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    how = Image.Resampling.NEAREST if shrink == 1 else Image.Resampling.BICUBIC
    for i, (k, text) in enumerate(zip(classes, texts)):
        top = margin + i * (cell_h + gap)
        draw.text((left - margin, top + cell_h // 2), text, fill="black", font=font, anchor="rm")
        for j, pixels in enumerate(images.pixels((images.labels == k).nonzero()[:columns, 0])):
            one = Image.fromarray(pixels[0].numpy() if c == 1 else pixels.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(one.resize((cell_w, cell_h), how), (left + j * (cell_w + gap), top))
    written = io.BytesIO()
    sheet.save(written, "PNG")
    return written.getvalue()
