"""One encoded picture to 8-bit pixels: the only place where picture files are opened."""

from __future__ import annotations

import contextlib
import io
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unperturb.data.sets import DataError

if TYPE_CHECKING:
    from PIL import Image

# What may be opened, whatever a file calls itself: Pillow would hand EPS to Ghostscript, a program of its own.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_PIXELS = 64_000_000  # of one picture as it is decoded, and of all that are decoded at once: some 700 MB
_SMALL = 1_000_000  # pixels that are no matter, however many threads decode them
_ORIENTATION = 0x0112
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """One encoded picture with its label. data: PNG, JPEG, ... bytes or the file that holds them. where: for errors.

    fault: why it cannot be used ("": it can), found before it was opened. formats: what it may be, of `FORMATS`.
    """

    data: bytes | Path
    label: int
    where: str
    fault: str = ""
    formats: tuple[str, ...] = FORMATS


def decode(picture: Picture, size: tuple[int, int], grey: bool) -> tuple[Pixels, bool]:
    """`(H, W, 3)` uint8 (`(H, W)` where `grey`), and whether the picture itself is grey.

    size: (H, W); a picture of another size is resized until it covers it, then center-cropped. It is turned as its EXIF
    says. 16 bits are those of the full range, floats lie in [0, 1].
    Raises `DataError` that names the picture where it is damaged, too large, or its scale is not known.
    """
    from PIL import Image

    with _open(picture) as opened:
        whole = opened.size
        if opened.format in ("JPEG", "MPO") and min(whole) > 2 * max(size):
            # A large photograph is decoded at a half, a quarter or an eighth, at least twice what is wanted.
            opened.draft(opened.mode, (2 * max(size), 2 * max(size)))
        # A progressive one holds all of its coefficients at once, however small it is decoded.
        with _room_for(whole if opened.info.get("progressive") else opened.size):
            image = _eight_bits(_upright(opened), str(opened.format))
            if "A" in image.getbands() or "transparency" in image.info:  # else what is drawn in alpha alone is black
                color = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", color.size, "white"), color)
                grey_too = "L" if opened.mode in ("L", "LA", "1") else "RGB"
                image = image.convert(grey_too)
            was_grey = image.mode in ("L", "1")
            wanted = "L" if grey else "RGB"
            image = image if image.mode == wanted else image.convert(wanted)
            if image.size != (size[1], size[0]):
                scale = max(size[0] / image.height, size[1] / image.width)
                covering = (max(size[1], round(image.width * scale)), max(size[0], round(image.height * scale)))
                if covering[0] * covering[1] > min(MAX_PIXELS, 16 * size[0] * size[1]):  # it would grow without end
                    raise ValueError(f"{image.width}x{image.height} pixels: too thin a strip for {size[1]}x{size[0]}")
                image = image.resize(covering, Image.Resampling.BICUBIC, reducing_gap=3.0)
                left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
                image = image.crop((left, top, left + size[1], top + size[0]))
            return np.asarray(image), was_grey


def stored_size(picture: Picture) -> tuple[int, int]:
    """(H, W) as the header has it, however the picture is to be turned; nothing is decoded. Raises `DataError`."""
    with _open(picture) as image:
        return image.height, image.width


def picture_size(picture: Picture) -> tuple[int, int]:
    """(H, W) of the picture as it stands upright; raises `DataError` as `decode` does."""
    with _open(picture) as image:
        width, height = image.size
        if width != height:
            if image.format in ("JPEG", "MPO"):
                return (width, height) if _orientation(image) >= 5 else (height, width)
            # PNG may keep its EXIF behind the pixels, and TIFF is turned by Pillow itself: known when it is loaded.
            with _room_for(image.size):
                width, height = _upright(image).size
        return height, width


@contextlib.contextmanager
def _open(picture: Picture) -> Iterator[Image.Image]:
    """The picture, opened but not decoded; whatever goes wrong with it is a `DataError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        if picture.fault:
            raise ValueError(picture.fault)
        data = picture.data
        length = len(data) if isinstance(data, bytes) else _length(data)
        if not length:
            raise ValueError("empty")
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=picture.formats) as image:
            yield image
    except UnidentifiedImageError:
        raise DataError(f"{picture.where}: not a whole picture (of no format that is read)") from None
    except Exception as error:  # Pillow's readers raise a dozen kinds, struct.error and IndexError among them
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = (reason.splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{picture.where}: not a whole picture ({reason})") from error


def _length(file: Path) -> int:
    status = file.stat()  # a pipe or a device would be waited for, or read without end
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    return status.st_size


class _Budget:
    """`MAX_PIXELS` for all threads together."""

    def __init__(self) -> None:
        self.free = MAX_PIXELS
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.free += pixels
                self.changed.notify_all()


_budget = _Budget()


def _room_for(size: tuple[int, int]) -> contextlib.AbstractContextManager[None]:
    """A turn among the pictures that are decoded at once; `ValueError` where one of (W, H) is too large for any."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, more than the {MAX_PIXELS:,} that are decoded; export it smaller")
    return _budget.take(width * height) if width * height > _SMALL else contextlib.nullcontext()


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF has it; 1 (upright) where that says nothing or is damaged, as every viewer has it."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # see `_open`
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _upright(image: Image.Image) -> Image.Image:
    from PIL.Image import Transpose

    image.load()
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image, kind: str) -> Image.Image:
    """`image`, its pixels scaled to 8 bits where they are wider; `ValueError` where no scale is agreed on.

    Pillow itself would cut every value at 255.
    """
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values: NDArray[Any] = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also where one is NaN
            raise ValueError(f"floats from {low:.4g} to {high:.4g}, expected 0 to 1; export it as 8 bits")
        scaled = values * 255.0
    elif image.mode == "I" and kind not in ("PNG", "PPM"):
        raise ValueError("32-bit integers, whose white is not known; export it as 8 or 16 bits")
    else:
        if 0 < high < 4096:  # 8, 10 or 12 bits in wider ones
            raise ValueError(f"16 bits, but no value above {high} of 65535; export it as 8 bits")
        scaled = values / 257.0
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))
