"""A folder of adversarial images on disk: the pictures, and the manifest that has a line on each."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unperturb import runs
from unperturb.data.pictures import Picture, decode
from unperturb.data.sets import DataError

MANIFEST, IMAGES = "manifest.csv", "images"


@dataclass(frozen=True)
class AttackedImage:
    """One line of the manifest. file: of the picture, in the folder. before, after: what the system says of the
    original, and of the picture as it was read back; -1 where its logits were not finite. l0: pixels that differ (all
    channels of a place are one). success: whether the system is wrong about the picture. pixels: a hash of its own."""

    index: int
    file: str
    label: int
    before: int
    after: int
    success: bool
    l0: int
    l2: float
    linf: float
    pixels: str


def picture_name(index: int) -> str:
    """The file of the image numbered `index`, in the folder."""
    return f"{IMAGES}/{index:06d}.png"


def write_picture(path: Path, pixels: Tensor) -> None:
    """`pixels` `(C, H, W)` uint8 as a PNG, atomically."""
    from PIL import Image

    array = pixels.squeeze(0).numpy() if pixels.shape[0] == 1 else pixels.permute(1, 2, 0).numpy()
    runs.write_atomically(path, lambda p: Image.fromarray(np.ascontiguousarray(array)).save(p, format="PNG"))


def read_picture(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """`(C, H, W)` uint8; raises `DataError`."""
    pixels, _ = decode(Picture(path, 0, str(path)), shape[1:], grey=shape[0] == 1)
    tensor = torch.from_numpy(np.array(pixels))
    return tensor[None] if shape[0] == 1 else tensor.permute(2, 0, 1)


def hash_of(pixels: Tensor) -> str:
    """16 hex digits of the SHA-256 of `pixels`."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:16]


def is_as_written(out: Path, line: AttackedImage, shape: tuple[int, int, int]) -> bool:
    """Whether the picture of a line is there and holds the pixels that the line is about."""
    try:
        return line.file == picture_name(line.index) and hash_of(read_picture(out / line.file, shape)) == line.pixels
    except (DataError, OSError):
        return False


def write_manifest(out: Path, lines: Sequence[AttackedImage]) -> None:
    """The manifest of the folder `out`, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(AttackedImage)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(line), "success": int(line.success)} for line in lines)
    runs.write_text(out / MANIFEST, text.getvalue())


def read_manifest(out: Path) -> list[AttackedImage]:
    """The lines of the manifest; none where there is none yet. Raises `RunError` where it is damaged."""
    path = out / MANIFEST
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                AttackedImage(
                    index=int(line["index"]),
                    file=line["file"],
                    label=int(line["label"]),
                    before=int(line["before"]),
                    after=int(line["after"]),
                    success=bool(int(line["success"])),
                    l0=int(line["l0"]),
                    l2=float(line["l2"]),
                    linf=float(line["linf"]),
                    pixels=line["pixels"],
                )
                for line in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise runs.RunError(f"{path} is damaged ({error}); delete it, and its pictures are made again") from None
