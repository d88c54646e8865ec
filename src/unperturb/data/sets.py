"""Image sets: 8-bit pixels with labels, their batches, their subsets, and their augmentation as tensors."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unperturb import per_image_rng

IN_MEMORY = 2 * 1024**3  # bytes of pixels up to which a set's rows are copied into memory
_AUGMENT = 0x617567  # keeps augmentation's draws apart from those of an attack with the same seed


class DataError(ValueError):
    """A source that is missing, broken or not what it should be; the message says what to do."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet:
    """Images with labels.

    images: `(N, C, H, W)` uint8, in memory or memory-mapped. labels: `(N,)` int64. index: `(N,)` int64, each image's
    number in its official split, so that the rows of a subset keep their identity. split: train, val or test. name: the
    split, or the subset of it.
    mapped: None but for a set too large for memory; there it is the memory map of the whole official split, whose
    fingerprint `mapped_fingerprint` is, the set's own images are its rows `index`, and `images` is empty. `batch` hides
    the difference. Raises `DataError` where these do not fit together.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    index: Tensor = field(repr=False)
    class_names: list[str] = field(repr=False)
    source: str
    split: str
    name: str = ""
    mapped: Tensor | None = field(default=None, repr=False)
    mapped_fingerprint: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(f"images are {self.images.dtype} {tuple(self.images.shape)}; expected uint8 (N, C, H, W)")
        if len(self.index) != n or len(self.images) != (n if self.mapped is None else 0):
            raise DataError(
                f"{len(self.images)} images, {n} labels, {len(self.index)} index numbers; expected the same"
            )
        if n and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.classes:
            found = f"{int(self.labels.min())} to {int(self.labels.max())}"
            raise DataError(f"{self.source} {self.split}: labels {found}; expected 0 to {self.classes - 1}")
        if not self.name:
            object.__setattr__(self, "name", self.split)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, c, h, w = self.images.shape
        return c, h, w

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 of pixels and labels (of a mapped set: of its whole's and its rows)."""
        if self.mapped is not None:
            return digest([self.mapped_fingerprint.encode(), self.index.contiguous().numpy()])
        return digest([repr(self.shape).encode(), self.images.contiguous().numpy(), self.labels.contiguous().numpy()])

    def pixels(self, rows: Tensor) -> Tensor:
        """The uint8 images at `rows` `(M,)`, a copy `(M, C, H, W)`."""
        rows = torch.as_tensor(rows, dtype=torch.int64, device="cpu")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a set of {len(self)} images")
        return self.images[rows] if self.mapped is None else self.mapped[self.index[rows]]

    def batch(self, rows: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Images `(M, C, H, W)` float32 in [0, 1] and labels `(M,)` at `rows` `(M,)`, on `device`.

        The pixels travel as bytes and become floats there.
        """
        images = self.pixels(rows).to(device, non_blocking=True)
        return images.to(torch.float32).div_(255), self.labels[rows].to(device)

    def take(self, rows: Tensor, *, split: str | None = None, name: str = "") -> ImageSet:
        """The images at `rows` `(M,)`, in that order: a copy, unless the set is mapped and they are too many for it."""
        small = len(rows) * math.prod(self.shape) <= IN_MEMORY
        return replace(
            self,
            images=self.pixels(rows) if small or self.mapped is None else self.images,
            labels=self.labels[rows],
            index=self.index[rows],
            split=split or self.split,
            name=name or split or f"{self.name}[{len(rows)}]",
            mapped=None if small else self.mapped,
        )

    def subset(self, n: int | None, seed: int = 0) -> ImageSet:
        """A random subset of `n` images, fixed by `seed` and named after both ("test:1000@0"), in the set's own order.

        Smaller ones lie within larger ones. All of the set where `n` is None or at least its size.
        """
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise DataError(f"a subset of {n} images; expected 1 or more")
        rows = per_image_rng.permutation(seed, 0, len(self))[:n].sort().values
        return self.take(rows, name=f"{self.name}:{n}@{seed}")

    def with_class_names(self, names: Sequence[str]) -> ImageSet:
        """The same images, their labels renumbered by name: class k is `names[k]`, the classifier's k-th logit.

        names: may hold classes of which there are no images here, such as the rest of the classifier's. Raises
        `DataError` where a class of these images is not among them.
        """
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise DataError(f"class_names {names!r}; expected a list of names, in the order of the classifier's logits")
        place = {name: k for k, name in enumerate(names)}
        if len(place) < len(names):
            raise DataError(f"class_names names twice: {some(sorted({n for n in names if list(names).count(n) > 1}))}")
        here = torch.bincount(self.labels, minlength=self.classes).tolist()
        missing = [name for name, n in zip(self.class_names, here) if n and name not in place]
        if missing:
            others = [name for name in names if name not in self.class_names]
            raise DataError(
                f"{self.source} {self.split} has classes that class_names lacks: {some(missing)}; "
                f"class_names has, and {self.source} lacks: {some(others)}. Call each class by one name"
            )
        if list(names) == self.class_names:
            return self
        new = torch.tensor([place.get(name, -1) for name in self.class_names])
        whole = digest([self.mapped_fingerprint.encode(), repr(new.tolist()).encode()])
        return replace(self, labels=new[self.labels], class_names=list(names), mapped_fingerprint=whole)


@dataclass(frozen=True, eq=False, kw_only=True)
class Splits:
    """A data set: what is trained on, what is tuned on, what is tested on.

    fingerprints: of the official splits as they were read, before validation was split off. notes: what a reader should
    know of how it was read, a sentence each. left_out: how many pictures were, because they cannot be used.
    options: what `load_dataset` was asked for besides the name; empty for splits made by hand.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    class_names: list[str] = field(repr=False)
    source: str
    fingerprints: dict[str, str] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list, repr=False)
    left_out: int = 0
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def with_class_names(self, names: Sequence[str]) -> Splits:
        """The same splits, their labels renumbered by name; see `ImageSet.with_class_names`."""
        parts = {split: getattr(self, split).with_class_names(names) for split in ("train", "val", "test")}
        options = {**self.options, "class_names": list(names)} if self.options else {}
        return replace(self, **parts, class_names=list(names), options=options)


def some(names: Sequence[str], most: int = 10) -> str:
    """Up to `most` of `names`, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def shape_words(shape: Sequence[int | None]) -> str:
    """(C, H, W) of images in words, "3 channels, 32x32 pixels"; None: any."""
    channels, height, width = shape
    many = "any channels" if channels is None else f"{channels} channel{'' if channels == 1 else 's'}"
    return f"{many}, " + ("any size" if None in (height, width) else f"{height}x{width} pixels")


def digest(parts: Iterable[object]) -> str:
    """16 hex digits of the SHA-256 of byte buffers."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)  # type: ignore[arg-type]
    return sha.hexdigest()[:16]


def augment(
    images: Tensor, index: Tensor, *, seed: int, step: int, pad: int = 0, flip: bool = False, cutout: int = 0
) -> Tensor:
    """Randomly shifted, flipped and cut images, drawn per image by counter from (seed, index, step).

    images: `(N, C, H, W)`, float or uint8, on any device. index: `(N,)`, the images' numbers. Returns the same shape.
    pad: shift by up to this many pixels in each direction, the border reflected (a crop after padding). flip: mirror
    left to right with probability 1/2. cutout: blacken a square of this side, its center anywhere in the image (DeVries
    and Taylor 2017). Raises `ValueError` where `pad` does not fit into the image.
    """
    n, c, h, w = images.shape
    if not 0 <= pad < min(h, w):
        raise ValueError(f"pad {pad} with images of {h}x{w}; expected 0 to {min(h, w) - 1}")
    if not (pad or flip or cutout):
        return images
    u = per_image_rng.uniform(seed ^ _AUGMENT, index.to(images.device), step, (5,))
    if pad or flip:
        shift = (u[:, :2] * (2 * pad + 1)).long() - pad
        y = _reflect(torch.arange(h, device=images.device) + shift[:, :1], h)
        x = _reflect(torch.arange(w, device=images.device) + shift[:, 1:], w)
        if flip:
            x = torch.where(u[:, 2:3] < 0.5, x.flip(1), x)
        # One gather over flattened places, the same for every channel.
        places = (y[:, :, None] * w + x[:, None, :]).reshape(n, 1, h * w).expand(n, c, h * w)
        images = images.reshape(n, c, h * w).gather(2, places).reshape(n, c, h, w)
    if cutout:
        center = (u[:, 3:] * torch.tensor([h, w], device=images.device)).long()
        rows = _inside(torch.arange(h, device=images.device), center[:, :1], cutout)
        columns = _inside(torch.arange(w, device=images.device), center[:, 1:], cutout)
        images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
    return images


def _reflect(places: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - places.abs()).abs()


def _inside(places: Tensor, center: Tensor, side: int) -> Tensor:
    start = center - side // 2
    return (places >= start) & (places < start + side)
