"""A user's own images as an image set: tensors, arrays, a torch `Dataset` or `DataLoader`."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from unperturb.data.sets import DataError, ImageSet, Splits, some
from unperturb.validation import check_images, check_labels

_TOGETHER = 256  # images that are read, and looked at, at once
_READ_TWICE = 8  # images by which a random transform is found out
_OFF = 1e-3  # of one of 255 levels: what float32 leaves of k/255, and no more
_IMAGES = ("image", "images", "img", "pixel_values")
_LABELS = ("label", "labels", "fine_label")
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def as_image_set(
    data: Any,
    *,
    class_names: Sequence[str] | None = None,
    name: str = "given",
    split: str = "given",
    n: int | None = None,
    quantize: bool = False,
) -> ImageSet:
    """Images and labels of yours as an `ImageSet`, numbered in the order in which they come.

    data: a pair (images, labels) of tensors or NumPy arrays; a torch `Dataset` (or anything with a length whose items
    are pairs, or dicts such as {"image": ..., "label": ...}); a `DataLoader` that does not shuffle, whose batches are
    taken as they are; or an `ImageSet`. Images are `(N, C, H, W)`, uint8 or float in [0, 1]; NumPy arrays and pictures
    may also have their channels last, gray ones none. Labels are whole numbers `(N,)`.
    class_names: class k is the k-th, as the classifier's k-th logit (an `ImageSet` is renumbered by name). By default
    the `classes` of a data set that has them, else the numbers up to the highest label.
    name: what tables call the data. split: what they are for, "train", "val" or "test"; a training takes
    "train" alone, and "given" is none of them. n: take the first n images only; needed where an `IterableDataset` has
    no length.
    quantize: round images that are not 8-bit, which moves a pixel by 1/510 at most; `source` then says so.

    All is kept in memory, a byte per pixel and channel. Raises `TypeError` for what holds no images, `DataError` where
    labels are missing, and for images that are normalized, NaN, not 8-bit, of another dtype or of several sizes. Warns
    where images change from one reading to the next.
    """
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise DataError(f"n {n!r}; expected a whole number, 1 or more")
    if split not in ("given", "train", "val", "test"):
        raise DataError(f"split {split!r}; expected train, val, test or given")
    if isinstance(data, ImageSet):
        kept = data if n is None or n >= len(data) else data.take(torch.arange(n))
        return kept if class_names is None else kept.with_class_names(class_names)
    images, labels, count, rounded = list[Tensor](), list[Tensor](), 0, False
    for some_images, some_labels in _batches(data, n):
        where = f"images from {count} on"
        pixels = _pixels(some_images, where)
        labels.append(_numbers(some_labels, pixels, where))
        pixels, inexact = _quantized(pixels, where, quantize)
        if images and pixels.shape[1:] != images[0].shape[1:]:
            raise _of_two_sizes(images[0].shape[1:], pixels.shape[1:], where)
        images.append(pixels)
        count, rounded = count + len(pixels), rounded or inexact
        if n is not None and count >= n:
            break
    if not count:
        raise DataError("the data holds no images")
    numbers = torch.cat(labels)[:n]
    return ImageSet(
        images=torch.cat(images)[:n],
        labels=numbers,
        index=torch.arange(len(numbers)),
        class_names=_names(class_names, data, int(numbers.max())),
        source=f"{name} (rounded to 8 bits)" if rounded else name,
        split=split,
    )


# Reading ------------------------------------------------------------------------------------------------------------


def _batches(data: Any, n: int | None) -> Iterator[tuple[Any, Any]]:
    """(images, labels) of the data, part by part, each as it comes."""
    if isinstance(data, TensorDataset):
        data = data.tensors
    if _is_arrays(data):
        images, labels = _pair(data)
        if images.shape[:1] != labels.shape[:1] or not images.ndim:
            shapes = f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
            raise DataError(f"{shapes}; expected a label for each image")
        yield from ((images[i : i + _TOGETHER], labels[i : i + _TOGETHER]) for i in range(0, len(images), _TOGETHER))
    elif isinstance(data, DataLoader):
        _check_loader(data, n)
        for item in data:
            images, labels = _pair(item)
            alone = data.batch_size is None and np.ndim(labels) == 0
            yield ([images], [labels]) if alone else (images, labels)
    elif isinstance(data, IterableDataset) or _has_items(data):
        _check_length(data, n)
        if not isinstance(data, IterableDataset):
            _warn_if_random(data)
        # The loader asks a data set that can for many items at once (`__getitems__`).
        for samples in DataLoader(data, batch_size=min(n or _TOGETHER, _TOGETHER), collate_fn=list):
            pairs = [_pair(sample) for sample in samples]
            yield [image for image, _ in pairs], [label for _, label in pairs]
    elif isinstance(data, Splits):
        raise TypeError("data is a whole data set: pass one of its splits, such as data.test")
    else:
        raise TypeError(
            "data must be images with labels: a pair (images, labels) of tensors or arrays, a torch Dataset or "
            f"DataLoader, or an ImageSet, such as load_dataset('folder:PATH').test; not {type(data).__name__}"
        )


def _is_array(thing: object) -> bool:
    return isinstance(thing, Tensor | np.ndarray)


def _is_arrays(data: object) -> bool:
    return _is_array(data) or (isinstance(data, tuple | list) and 0 < len(data) <= 3 and all(map(_is_array, data)))


def _has_items(data: object) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping | str | bytes)


def _pair(item: Any) -> tuple[Any, Any]:
    """(image, label), or (images, labels), of one item of a data set."""
    if isinstance(item, Mapping):
        images, labels = ([k for k in item if k in keys] for keys in (_IMAGES, _LABELS))
        if len(images) == len(labels) == 1:
            return item[images[0]], item[labels[0]]
        raise DataError(
            f"an item of the data is a dict of {some([str(k) for k in item])}; expected one image "
            f"({some(_IMAGES)}) and one label ({some(_LABELS)})"
        )
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, tuple | list) and len(item) > 2:
        raise DataError(f"an item of the data holds {len(item)} things; expected two, (image, label)")
    raise DataError("the data holds images without labels; expected pairs (image, label)")


def _check_loader(loader: DataLoader[Any], n: int | None) -> None:
    if isinstance(loader.dataset, IterableDataset):
        _check_length(loader.dataset, n)
        return
    samplers = loader.sampler, getattr(loader.batch_sampler, "sampler", None)
    if any(isinstance(sampler, _RANDOM) for sampler in samplers):
        raise DataError(
            "the DataLoader draws its images at random: two runs would not see the same ones in the same order. Pass "
            "one with shuffle=False, or its dataset"
        )
    if loader.batch_sampler is not None:
        _warn_if_random(loader.dataset)


def _check_length(data: Any, n: int | None) -> None:
    if n is None and not hasattr(data, "__len__"):
        raise DataError("the data has no length and may never end: say how many images to take, n=1000")


def _warn_if_random(data: Any) -> None:
    """Warn where the first images are others when they are read again."""
    if not _has_items(data):
        return
    for i in range(min(_READ_TWICE, len(data))):
        first, again = (_image(_pair(data[i])[0]) for _ in range(2))
        if first.shape != again.shape or not bool((first == again).all()):
            warnings.warn(
                "the images change from one reading to the next (a random transform, as for training?): this set keeps "
                "what it read now, and a set made anew will not be the same. Use the transform for testing",
                stacklevel=4,
            )
            return


# Images -------------------------------------------------------------------------------------------------------------


def _image(image: Any) -> Any:
    """One image as a tensor or an array; a picture of Pillow has `(H, W)` or `(H, W, 3)`."""
    if _is_array(image):
        return image
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise DataError(f"an image is a {type(image).__name__}; expected a tensor, an array or a picture of Pillow")
    if image.mode not in ("L", "RGB"):
        raise DataError(f"a picture has mode {image.mode}; convert it to RGB or L in the data set's transform")
    return np.asarray(image)


def _pixels(given: Any, where: str) -> Tensor:
    """One part's images as a tensor `(M, C, H, W)` of the dtype that they came in."""
    if isinstance(given, tuple | list):
        images = [_image(image) for image in given]
        shapes = [tuple(image.shape) for image in images]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise _of_two_sizes(shapes[0], shape, f"the {i + 1}th of the {where}")
        given = torch.stack(images) if isinstance(images[0], Tensor) else np.stack(images)
    if not _is_array(given):
        raise DataError(f"{where} are a {type(given).__name__}; expected a tensor or an array (N, C, H, W)")
    shape = tuple(given.shape)
    last = len(shape) == 4 and shape[1] > 4 and shape[3] <= 4  # of so few channels pictures are made
    if len(shape) not in (3, 4) or (last and isinstance(given, Tensor)):
        advice = ": move the channels, images.permute(0, 3, 1, 2)" if last else ""
        raise DataError(f"{where} have shape {shape}; expected (N, C, H, W){advice}")
    if isinstance(given, np.ndarray):
        dtype = given.dtype.newbyteorder("=")  # torch knows the machine's own only
        fits = dtype in (np.uint8, np.float32, np.float64)
    else:
        fits = given.dtype in (torch.uint8, torch.float32, torch.float64)
    if not fits:
        raise DataError(f"{where} are {given.dtype}; expected uint8, or float32 in [0, 1]")
    pixels = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.array(given, dtype))
    if len(shape) == 3:
        return pixels[:, None]
    return pixels.permute(0, 3, 1, 2) if last else pixels


def _quantized(images: Tensor, where: str, quantize: bool) -> tuple[Tensor, bool]:
    """The images as uint8, and whether that changed them by more than float32 does."""
    if images.dtype == torch.uint8:
        return images.contiguous(), False
    try:
        levels = check_images(images) * 255
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    rounded = levels.round()
    between = (levels - rounded).abs() > _OFF
    inexact = bool(between.any())
    if inexact and not quantize:
        raise DataError(
            f"{where} are not 8-bit: {float(between.float().mean()):.1%} of their values are no k/255, as after "
            "resizing floats. Pass 8-bit images, or quantize=True to round them, which moves a pixel by 1/510 at most"
        )
    return rounded.to(torch.uint8).contiguous(), inexact


def _of_two_sizes(first: Sequence[int], other: Sequence[int], where: str) -> DataError:
    return DataError(
        f"images of several sizes: the first is {tuple(first)}, {where} {tuple(other)}; resize and crop them to one in "
        "the data set's transform"
    )


# Labels -------------------------------------------------------------------------------------------------------------


def _numbers(given: Any, images: Tensor, where: str) -> Tensor:
    """One part's labels as int64 `(M,)`."""
    try:
        labels = torch.as_tensor(np.array(given) if isinstance(given, np.ndarray) else given).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        first = given[0] if isinstance(given, Sequence) and len(given) else given
        raise DataError(
            f"the labels of {where} are no numbers ({first!r:.60}); expected the numbers of classes"
        ) from None
    if labels.ndim == 2:
        advice = "labels.squeeze(1)" if labels.shape[1] == 1 else "labels.argmax(1), if they are one-hot"
        raise DataError(f"the labels of {where} have shape {tuple(labels.shape)}; expected (N,): pass {advice}")
    try:
        check_labels(images, labels)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}; these are {labels.dtype} {tuple(labels.shape)}") from None
    return labels.to(torch.int64)


def _names(given: Sequence[str] | None, data: Any, highest: int) -> list[str]:
    if given is not None:
        if isinstance(given, str) or not all(isinstance(name, str) for name in given):
            raise DataError(f"class_names {given!r}; expected a list of names, in the order of the classifier's logits")
        if len(given) <= highest:
            raise DataError(f"{len(given)} class_names, and a label {highest}; expected one name for each class")
        return list(given)
    for thing in itertools.islice(_inside(data), 5):
        names = getattr(thing, "classes", None)
        if isinstance(names, list | tuple) and len(names) > highest and all(isinstance(name, str) for name in names):
            return list(names)
    return [str(k) for k in range(highest + 1)]


def _inside(data: Any) -> Iterable[Any]:
    """The data set, and the one that a loader or a subset is of."""
    while data is not None:
        yield data
        data = getattr(data, "dataset", None)
