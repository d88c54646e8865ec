"""Images of a user's own: each kind of data gives the same set, or is refused in a sentence that says what to pass."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import unperturb as up
from unperturb.data import DataError, ImageSet, Splits, as_image_set

N = 300  # more than are read at once
PIXELS = torch.randint(0, 256, (N, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
FLOATS = PIXELS.float() / 255
LABELS = torch.arange(N) % 4
PICTURES = PIXELS.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
SET = ImageSet(
    images=PIXELS,
    labels=LABELS,
    index=torch.arange(N),
    class_names=["0", "1", "2", "3"],
    source="given",
    split="given",
)


class Mine(Dataset[Any]):
    """A data set whose items are `item(k)`."""

    def __init__(self, item: Callable[[int], Any], count: int = N) -> None:
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> Any:
        if not 0 <= k < self.count:
            raise IndexError(k)
        return self.item(k)


class Many(Mine):
    """One that is asked for many items at once, as those of Hugging Face are."""

    asked: int = 0

    def __getitems__(self, ks: list[int]) -> list[Any]:
        self.asked += 1
        return [self.item(k) for k in ks]


class Stream(IterableDataset[Any]):
    def __init__(self, items: Callable[[], Iterator[Any]]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return self.items()


class StreamOfKnownLength(Stream):
    def __len__(self) -> int:
        return N


def endless() -> Iterator[Any]:
    return ((FLOATS[k % N], k % N % 4) for k in itertools.count())


def ending() -> Iterator[Any]:
    return itertools.islice(endless(), N)


def picture(k: int) -> Image.Image:
    return Image.fromarray(PICTURES[k])


def in_a_batch(samples: list[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    images, labels = zip(*samples)
    return images, labels


def as_floats(k: int) -> tuple[Tensor, int]:
    return FLOATS[k], int(LABELS[k])


DATA: dict[str, Callable[[], Any]] = {
    "tensors of bytes": lambda: (PIXELS, LABELS),
    "tensors in a list": lambda: [PIXELS, LABELS.to(torch.uint8)],
    "tensors of floats": lambda: (FLOATS, LABELS.to(torch.int32)),
    "tensors that are learned": lambda: (FLOATS.clone().requires_grad_(), LABELS),
    "doubles": lambda: (PIXELS.double() / 255, LABELS),
    "1/255 multiplied": lambda: (PIXELS * torch.tensor(1 / 255), LABELS),
    "normalized and back": lambda: ((((FLOATS - 0.45) / 0.22) * 0.22 + 0.45).clamp(0, 1), LABELS),
    "arrays": lambda: (PIXELS.numpy(), LABELS.numpy()),
    "arrays with channels last": lambda: (PICTURES, LABELS.numpy().astype(np.uint8)),
    "arrays of floats": lambda: (PICTURES.astype(np.float32) / 255, LABELS.numpy()),
    "arrays of another byte order": lambda: ((PICTURES / 255).astype(">f8"), LABELS.numpy()),
    "arrays that cannot be written": lambda: (read_only(PICTURES), read_only(LABELS.numpy())),
    "an array and a tensor": lambda: (PICTURES, LABELS),
    "a TensorDataset": lambda: TensorDataset(FLOATS, LABELS),
    "a Dataset": lambda: Mine(as_floats),
    "a Dataset of pictures": lambda: Mine(lambda k: (picture(k), int(LABELS[k]))),
    "a Dataset of arrays": lambda: Mine(lambda k: (PICTURES[k], LABELS.numpy()[k])),
    "a Dataset of dicts": lambda: Mine(lambda k: {"image": picture(k), "label": k % 4, "id": "x"}),
    "a Dataset that gives many": lambda: Many(as_floats),
    "a Subset": lambda: Subset(Mine(lambda k: as_floats(N - 1 - k)), list(range(N))[::-1]),
    "a ConcatDataset": lambda: ConcatDataset([Mine(as_floats, 100), Mine(lambda k: as_floats(k + 100), 200)]),
    "a list of pairs": lambda: [as_floats(k) for k in range(N)],
    "what has items and a length": lambda: SimpleItems(),
    "a DataLoader": lambda: DataLoader(Mine(as_floats), batch_size=7),
    "a DataLoader of tensors": lambda: DataLoader(TensorDataset(PIXELS, LABELS), batch_size=N),
    "a DataLoader of pictures": lambda: DataLoader(
        Mine(lambda k: (picture(k), k % 4)), batch_size=7, collate_fn=in_a_batch
    ),
    "a DataLoader of dicts": lambda: DataLoader(
        Mine(lambda k: {"pixel_values": FLOATS[k], "labels": k % 4}), batch_size=64
    ),
    "a DataLoader without batches": lambda: DataLoader(Mine(as_floats), batch_size=None),
    "a DataLoader of batches of the data's own": lambda: DataLoader(
        Mine(lambda k: (FLOATS[50 * k : 50 * k + 50], LABELS[50 * k : 50 * k + 50]), 6), batch_size=None
    ),
    "a stream that has a length": lambda: StreamOfKnownLength(ending),
    "a DataLoader of a stream": lambda: DataLoader(StreamOfKnownLength(ending), batch_size=9),
    "an ImageSet": lambda: SET,
}


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    array = array.copy()
    array.setflags(write=False)
    return array


class SimpleItems:
    def __len__(self) -> int:
        return N

    def __getitem__(self, k: int) -> Any:
        return as_floats(range(N)[k])


@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data_gives_the_same_set(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = as_image_set(DATA[kind]())
    assert torch.equal(found.images, PIXELS)
    assert found.images.is_contiguous()
    assert torch.equal(found.labels, LABELS)
    assert found.labels.dtype == torch.int64
    assert found.index.tolist() == list(range(N))
    assert (found.source, found.split, found.name) == ("given", "given", "given")
    assert found.class_names == ["0", "1", "2", "3"]
    assert found.fingerprint == SET.fingerprint


def test_it_is_public() -> None:
    assert up.as_image_set is as_image_set


@pytest.mark.parametrize("kind", [kind for kind in DATA if kind != "a DataLoader of batches of the data's own"])
@pytest.mark.parametrize("n", [1, 10, 256, 257, N, N + 5])
def test_the_first_n(kind: str, n: int) -> None:
    found = as_image_set(DATA[kind](), n=n)
    assert torch.equal(found.images, PIXELS[:n])
    assert found.labels.tolist() == LABELS[:n].tolist()
    assert found.index.tolist() == list(range(min(n, N)))


def test_no_more_is_read_than_is_asked_for() -> None:
    read = []
    as_image_set(Mine(lambda k: (read.append(k), as_floats(k))[1]), n=5)
    assert set(read) == {0, 1, 2, 3, 4, 5, 6, 7}  # 8 are read twice to see that they do not change
    read.clear()
    as_image_set(Stream(lambda: (read.append(1) or item for item in endless())), n=5)
    assert len(read) == 5


def test_what_gives_many_at_once_is_asked_for_many() -> None:
    data = Many(as_floats)
    as_image_set(data)
    assert data.asked == 2


def test_a_stream_needs_n_where_it_may_never_end() -> None:
    for data in (Stream(endless), Stream(ending), DataLoader(Stream(endless), batch_size=8)):
        with pytest.raises(DataError, match=r"no length and may never end: say how many images to take, n=1000"):
            as_image_set(data)
    for n in (20, 299):
        for data in (Stream(endless), Stream(ending), DataLoader(Stream(endless), batch_size=8)):
            assert torch.equal(as_image_set(data, n=n).images, PIXELS[:n])
    assert len(as_image_set(Stream(ending), n=1000)) == N


def test_the_set_is_a_copy() -> None:
    images, labels = PIXELS.clone(), LABELS.clone()
    found = as_image_set((images, labels), n=10)
    arrays = PICTURES.copy()
    of_arrays = as_image_set((arrays, labels.numpy()), n=10)
    images.zero_()
    labels.zero_()
    arrays[:] = 0
    for kept in (found, of_arrays):
        assert torch.equal(kept.images, PIXELS[:10])
        assert torch.equal(kept.labels, LABELS[:10])


@pytest.mark.parametrize("kind", ["tensor", "array", "picture"])
def test_gray_images_may_have_no_channel(kind: str) -> None:
    gray = PIXELS[:, 0]
    data: dict[str, Any] = {
        "tensor": (gray, LABELS),
        "array": (gray.numpy(), LABELS.numpy()),
        "picture": Mine(lambda k: (Image.fromarray(gray[k].numpy()), int(LABELS[k]))),
    }
    assert torch.equal(as_image_set(data[kind]).images, gray[:, None])
    assert torch.equal(as_image_set((gray[..., None].numpy(), LABELS)).images, gray[:, None])


# 8 bits --------------------------------------------------------------------------------------------------------------


def test_every_level_of_8_bits_is_kept() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for images in (levels, levels.float() / 255, levels.double() / 255, levels.float().mul(1 / 255)):
        found = as_image_set((images, torch.zeros(1, dtype=torch.int64)))
        assert torch.equal(found.images, levels)
        assert found.source == "given"


@pytest.mark.parametrize("off", [0.1 / 255, 0.49 / 255, -0.3 / 255])
def test_images_between_levels_are_refused_or_rounded_and_it_is_said(off: float) -> None:
    images = FLOATS.clamp(2 / 255, 253 / 255)
    images[260] += off  # one image, in the second part
    expected = PIXELS.clamp(2, 253)
    with pytest.raises(DataError, match=r"images from 256 on are not 8-bit: 2\.3% .* or quantize=True to round them"):
        as_image_set((images, LABELS))
    found = as_image_set((images, LABELS), quantize=True)
    assert torch.equal(found.images, expected)
    assert found.source == "given (rounded to 8 bits)"
    assert as_image_set(DataLoader(TensorDataset(images, LABELS)), name="mine", quantize=True).source == (
        "mine (rounded to 8 bits)"
    )
    exact = as_image_set((FLOATS, LABELS), name="mine", quantize=True)
    assert exact.source == "mine"  # nothing was rounded
    assert torch.equal(exact.images, PIXELS)


# What is refused -----------------------------------------------------------------------------------------------------


def one_off(images: Tensor, value: float) -> Tensor:
    images = images.clone()
    images[299, 0, 0, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((FLOATS - 0.45) / 0.22, "normalization belongs in the classifier's first layer"),
        (FLOATS * 255, "images from 0 on: images must lie in .* divide pixels of 0 to 255 by 255"),
        (one_off(FLOATS, float("nan")), "images from 256 on: images hold NaN pixels"),
        (one_off(FLOATS, float("inf")), "images from 256 on: images must lie in"),
        (FLOATS.half(), r"images from 0 on are torch.float16; expected uint8, or float32 in \[0, 1\]"),
        (FLOATS.bfloat16(), "torch.bfloat16; expected uint8"),
        (PIXELS.long(), "torch.int64; expected uint8"),
        (PIXELS > 100, "torch.bool; expected uint8"),
        (PIXELS.numpy().astype(np.int32), "int32; expected uint8"),
        (FLOATS.numpy().astype(np.float16), "float16; expected uint8"),
        (np.array([["a"] * 5] * N)[:, None], "<U1; expected uint8"),
        (
            PIXELS.permute(0, 2, 3, 1),
            r"shape \(256, 6, 5, 3\); expected \(N, C, H, W\): .* images.permute\(0, 3, 1, 2\)",
        ),
        (PIXELS.flatten(1), r"shape \(256, 90\); expected \(N, C, H, W\)"),
        (PIXELS[:, None], r"shape \(256, 1, 3, 6, 5\); expected \(N, C, H, W\)"),
    ],
)
@pytest.mark.parametrize("how", ["pair", "loader"])
def test_images_of_another_kind(images: Any, message: str, how: str) -> None:
    if how == "pair":
        with pytest.raises(DataError, match=message):
            as_image_set((images, LABELS))
    else:
        loader = DataLoader(Mine(lambda k: (images[k], int(LABELS[k]))), 256, collate_fn=gathered)
        with pytest.raises(DataError, match=message):
            as_image_set(loader)


def gathered(samples: list[Any]) -> tuple[Any, Any]:
    images, labels = zip(*samples)
    return (torch.stack if isinstance(images[0], Tensor) else np.stack)(images), torch.tensor(labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS.float(), r"integer tensor of class numbers; these are torch.float32 \(256,\)"),
        (LABELS[:, None], r"labels of images from 0 on have shape \(256, 1\).* labels.squeeze\(1\)"),
        (torch.eye(4)[LABELS], r"have shape \(256, 4\).* labels.argmax\(1\), if they are one-hot"),
        (LABELS > 1, "integer tensor of class numbers; these are torch.bool"),
        (LABELS - 1, "label -1 is out of range: classes count from 0"),
        (LABELS[:-1], r"images \(300, 3, 6, 5\) and labels \(299,\); expected a label for each image"),
        (torch.tensor(1), r"and labels \(\); expected a label for each image"),
        (np.array(["cat", "dog"] * (N // 2)), r"the labels of images from 0 on are no numbers"),
    ],
)
def test_labels_of_another_kind(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_image_set((PIXELS, labels))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda k: FLOATS[k], "images without labels; expected pairs"),
        (lambda k: (FLOATS[k],), "images without labels"),
        (picture, "images without labels"),
        (lambda k: (FLOATS[k], 1, k), r"an item of the data holds 3 things; expected two, \(image, label\)"),
        (lambda k: (FLOATS[k], None), r"the labels of images from 0 on are no numbers \(None\)"),
        (lambda k: (FLOATS[k], "cat"), r"are no numbers \('cat'\); expected the numbers of classes"),
        (lambda k: {"image": FLOATS[k]}, "a dict of image; expected one image .* and one label"),
        (lambda k: {"image": FLOATS[k], "img": FLOATS[k], "label": 1}, "a dict of image, img, label; expected one"),
        (lambda k: ("path.png", 1), "an image is a str; expected a tensor, an array or a picture"),
        (lambda k: (picture(k).convert("RGBA"), 1), "mode RGBA; convert it to RGB or L"),
        (lambda k: (picture(k).convert("P"), 1), "mode P; convert it to RGB or L"),
        (
            lambda k: (picture(k).resize((5, 7)) if k == 40 else picture(k), 1),
            r"\(6, 5, 3\), the 41th of .* \(7, 5, 3\)",
        ),
        (
            lambda k: (FLOATS[k, :, :4] if k > 255 else FLOATS[k], 1),
            r"the first is \(3, 6, 5\), images from 256 on \(3, 4, 5\)",
        ),
    ],
)
def test_items_of_another_kind(item: Callable[[int], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_image_set(Mine(item))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PIXELS, "images without labels"),
        (PICTURES, "images without labels"),
        (TensorDataset(PIXELS), "images without labels"),
        (TensorDataset(PIXELS, LABELS, LABELS), "holds 3 things"),
        ((PIXELS[:0], LABELS[:0]), "holds no images"),
        (Mine(as_floats, 0), "holds no images"),
        (DataLoader(Mine(lambda k: FLOATS[k]), 8), "images without labels"),
    ],
)
def test_data_without_labels_or_images(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_image_set(data)


@pytest.mark.parametrize("data", ["mnist", None, 3, {"train": 1}, SimpleNamespace(), endless()])
def test_what_is_no_data(data: Any) -> None:
    with pytest.raises(TypeError, match=r"a pair .* a torch Dataset or DataLoader, or an ImageSet"):
        as_image_set(data)
    whole = Splits(train=SET, val=SET, test=SET, class_names=SET.class_names, source="x")
    with pytest.raises(TypeError, match=r"pass one of its splits, such as data\.test"):
        as_image_set(whole)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3"])
def test_n_is_a_number_of_images(n: Any) -> None:
    with pytest.raises(DataError, match="expected a whole number, 1 or more"):
        as_image_set((PIXELS, LABELS), n=n)


MINE = Mine(as_floats)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(MINE, 8, shuffle=True),
        DataLoader(MINE, 8, sampler=SubsetRandomSampler(range(20))),
        DataLoader(MINE, 8, sampler=WeightedRandomSampler([1.0] * N, 20)),
        DataLoader(MINE, batch_sampler=BatchSampler(RandomSampler(MINE), 8, False)),
    ],
)
def test_a_loader_that_shuffles_is_refused(loader: DataLoader[Any]) -> None:
    with pytest.raises(DataError, match="shuffle=False, or its dataset"):
        as_image_set(loader)


@pytest.mark.parametrize("make", [Mine, lambda item: DataLoader(Mine(item), 8)])
def test_images_that_change_are_told(make: Callable[[Any], Any]) -> None:
    def turned(k: int) -> tuple[Tensor, int]:
        return FLOATS[k].flip(-1) if next(counter) % 2 else FLOATS[k], k % 4

    counter = itertools.count()
    with pytest.warns(UserWarning, match="change from one reading to the next .* Use the transform for testing"):
        found = as_image_set(make(turned))
    assert len(found) == N


# Names of classes ----------------------------------------------------------------------------------------------------


def test_names_of_classes() -> None:
    names = ["cat", "dog", "owl", "fly", "none of these"]
    assert as_image_set((PIXELS, LABELS), class_names=names).class_names == names
    data = Mine(as_floats)
    data.classes = tuple(names)  # type: ignore[attr-defined]
    for own in (data, Subset(data, range(20)), DataLoader(data, 8), DataLoader(Subset(data, range(20)), 8)):
        assert as_image_set(own).class_names == names
    assert as_image_set(data, class_names=list("abcd")).class_names == list("abcd")
    for unusable in (["cat"], 4, [0, 1, 2, 3]):
        data.classes = unusable  # type: ignore[attr-defined]
        assert as_image_set(data).class_names == ["0", "1", "2", "3"]
    with pytest.raises(DataError, match="3 class_names, and a label 3; expected one name for each class"):
        as_image_set((PIXELS, LABELS), class_names=list("abc"))
    for wrong in ("abcd", [1, 2, 3, 4]):
        with pytest.raises(DataError, match="expected a list of names"):
            as_image_set((PIXELS, LABELS), class_names=wrong)  # type: ignore[arg-type]
    renumbered = as_image_set(SET, class_names=["3", "2", "1", "0"])
    assert torch.equal(renumbered.labels, 3 - LABELS)


# In use --------------------------------------------------------------------------------------------------------------


def test_a_set_of_a_loader_is_attacked_as_any_other() -> None:
    data = as_image_set(DataLoader(TensorDataset(FLOATS, LABELS), 32), name="mine")
    images, labels = data.batch(torch.arange(4))
    assert torch.equal(images, FLOATS[:4])
    model = up.wrap(functools.partial(linear, torch.linspace(-1, 1, 360).view(90, 4)))
    adversarial = up.create_attack("pgd", eps="8/255", steps=2)(model, images, labels)
    assert float((adversarial - images).abs().max()) <= 8 / 255 + 1e-6
    assert data.subset(20).name == "given:20@0"


def linear(weights: Tensor, images: Tensor) -> Tensor:
    return images.flatten(1) @ weights


def test_a_split_is_what_the_user_says_it_is() -> None:
    images, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0])
    assert as_image_set((images, labels)).split == "given"
    assert as_image_set((images, labels), split="train").split == "train"
    with pytest.raises(DataError, match="split 'training'; expected train, val, test or given"):
        as_image_set((images, labels), split="training")
