"""The image that is attacked: from a test set, drawn, or uploaded; and how pixels are shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unperturb.data import ImageSet
from unperturb.data.pictures import Picture, decode, stored_size
from unperturb.data.sets import DataError
from unperturb.serving.limits import Limits

LIMITS = Limits()  # those of `unperturb serve`
SHOWN = 224  # pixels of a side that an image is enlarged to, at least
_DRAWN = 20 / 28  # of the side: what MNIST's digits fill


@dataclass(frozen=True, eq=False)
class Chosen:
    """One image. pixels: uint8 `(C, H, W)`. label: its class, None where nobody knows. index: its number in its data
    set, which random draws depend on. title: what it is, in words."""

    pixels: Tensor
    label: int | None
    index: int
    title: str

    @property
    def batch(self) -> Tensor:
        """`(1, C, H, W)` in [0, 1]."""
        return self.pixels[None].float() / 255


def from_set(data: ImageSet, row: int) -> Chosen:
    """The image at `row` of a set."""
    index, label = int(data.index[row]), int(data.labels[row])
    title = f"{data.split} image {index:,} of {data.source}, class {data.class_names[label]}"
    return Chosen(data.pixels(torch.tensor([row]))[0], label, index, title)


def from_file(path: str | Path, data: ImageSet, limits: Limits = LIMITS) -> Chosen:
    """An uploaded PNG or JPEG, resized and cropped to the size of `data`'s images.

    Raises `DataError` for another format, a damaged picture, or one above `limits` (bytes; pixels, as the header has
    them, before anything is decoded).
    """
    size = Path(path).stat().st_size
    if size > limits.max_bytes:
        raise DataError(f"the picture has {size:,} bytes, more than {limits.max_bytes:,}: send a smaller one")
    picture = Picture(Path(path), 0, "the picture", formats=("PNG", "JPEG"))
    try:
        height, width = stored_size(picture)
    except DataError as error:
        raise DataError(f"{error}; send a whole PNG or JPEG of at most {limits.max_pixels:,} pixels") from error
    if height * width > limits.max_pixels:
        raise DataError(f"the picture has {height}x{width} pixels, more than {limits.max_pixels:,}: send it smaller")
    channels, *side = data.shape
    pixels, _ = decode(picture, (side[0], side[1]), grey=channels == 1)
    image = torch.tensor(pixels)
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    resized = "" if [height, width] == side else f", resized from {width}x{height} to {side[1]}x{side[0]} pixels"
    return Chosen(image, None, 0, f"your picture{resized}")


def from_drawing(drawn: NDArray[np.uint8], data: ImageSet) -> Chosen:
    """Dark ink on white, `(H, W)` or `(H, W, 3)`, as a white shape on black that lies as MNIST's digits do: its longer
    side 20/28 of the image's, its center of mass in the middle.

    Raises `DataError` where nothing is drawn, or the set's images are not grey.
    """
    from PIL import Image

    channels, height, width = data.shape
    if channels != 1:
        raise DataError(f"{data.source} has color images, and a drawing is grey: choose mnist or digits, or upload one")
    ink = 255 - (drawn if drawn.ndim == 2 else drawn[..., :3].mean(2))
    rows, columns = (np.flatnonzero((ink > 32).any(1 - axis)) for axis in (0, 1))
    if not len(rows):
        raise DataError("nothing is drawn yet: draw a digit, then use it")
    shape = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
    scale = _DRAWN * min(height, width) / max(shape.shape)
    size = [max(1, round(side * scale)) for side in shape.shape]
    small = np.asarray(Image.fromarray(shape).resize((size[1], size[0]), Image.Resampling.BOX), np.float64)
    corner = []
    for axis, whole in enumerate((height, width)):
        center = (small.sum(1 - axis) * np.arange(size[axis])).sum() / max(small.sum(), 1)
        corner.append(int(np.clip(round((whole - 1) / 2 - center), 0, whole - size[axis])))
    canvas = np.zeros((height, width), np.uint8)
    canvas[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]] = small.round()
    return Chosen(torch.from_numpy(canvas)[None], None, 0, "your drawing")


# Shown --------------------------------------------------------------------------------------------------------------


def enlarged(image: Tensor) -> NDArray[Any]:
    """`(C, H, W)` in [0, 1] -> uint8 `(H', W')` or `(H', W', 3)`, whole pixels enlarged to `SHOWN` or more."""
    times = -(-SHOWN // max(image.shape[1:]))
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(times, 1).repeat_interleave(times, 2)
    return (pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy()


def amplified(adversarial: Tensor, clean: Tensor) -> tuple[Tensor, float]:
    """The difference of two images `(C, H, W)` as an image in which grey is none, and what it was multiplied by: the
    largest whole number (below 2: tenth) that cuts nothing off; 1 where there is no difference."""
    difference = (adversarial - clean).detach().cpu()
    most = float(difference.abs().max())
    times = 0.5 / most if most else 1.0
    times = float(int(times)) if times >= 2 else int(10 * times + 1e-6) / 10
    return 0.5 + times * difference, times
