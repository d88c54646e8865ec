"""What is known of the named sets, what a source is once it is found, and by which names its splits go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from unperturb.data.pictures import Picture
from unperturb.data.sets import DataError, some

T = TypeVar("T")
Progress = Callable[[int, int, str], None]
# By any of these names, in any case, a split is meant.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Source:
    """What is known of a named source. counts: sets of (train, test) sizes that are whole. size: None keeps its own."""

    hub: str
    counts: tuple[tuple[int, int], ...]
    grey: bool = False
    size: int | None = None
    config: str | None = None
    test: str = "test"
    label: str = "label"
    names: tuple[str, ...] = ()  # where a copy names its classes by number


SOURCES = {
    "mnist": Source("ylecun/mnist", ((60_000, 10_000),), grey=True),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", ((60_000, 10_000),), grey=True),
    "cifar10": Source("uoft-cs/cifar10", ((50_000, 10_000),)),
    "cifar100": Source("uoft-cs/cifar100", ((50_000, 10_000),), label="fine_label"),
    "imagenette": Source(
        "frgfm/imagenette",
        ((9_469, 3_925), (9_469, 2_000)),
        size=128,
        config="160px",
        test="val",
        names=(
            "tench",
            "English springer",
            "cassette player",
            "chain saw",
            "church",
            "French horn",
            "garbage truck",
            "gas pump",
            "golf ball",
            "parachute",
        ),
    ),
    "imagenet": Source("ILSVRC/imagenet-1k", ((1_281_167, 50_000),), size=128, test="val"),
}


@dataclass(frozen=True)
class Found:
    """A source that is there.

    splits: for each of train, val, test that it has, a function that goes through its pictures. sample: the pictures
    whose most common size is taken where none is asked for. stamp: what changes when its files do. where: for messages.
    total: how many pictures, 0 where unknown. notes: what a reader should know of how it is read.
    """

    splits: dict[str, Callable[[], Iterable[Picture]]]
    sample: Callable[[], Iterable[Picture]]
    class_names: Callable[[], list[str]]
    stamp: tuple[Any, ...]
    where: str
    total: int = 0
    notes: list[str] = field(default_factory=list)


def split_of(name: str) -> str | None:
    """train, val or test, where `name` means one of them."""
    return SPLITS.get(name.casefold())


def choose_splits(there: Mapping[str, T], where: str, test: str | None = None) -> dict[str, T]:
    """train, and val and test where `there` has them, by any of their names; `test` says which is the test split.

    Without a test split the validation split is it: the labeled one that people report on. Raises `DataError`.
    """
    found: dict[str, str] = {}
    for name in there:
        split = split_of(name)
        if split in found:
            raise DataError(f"{where} has two {split} splits, {found[split]} and {name}; keep one of them")
        if split:
            found[split] = name
    test = test or ("test" if "test" in found else "val")
    if "train" not in found or (test not in found and test != "val"):
        missing = "train" if "train" not in found else test
        raise DataError(f"{where} has no {missing} split; it has: {some(sorted(there))}")
    chosen = {"train": there[found["train"]]}
    if "val" in found and test != "val":
        chosen["val"] = there[found["val"]]
    if test in found:
        chosen["test"] = there[found[test]]
    return chosen


def stamp(files: Iterable[Path], root: Path) -> tuple[Any, ...]:
    """Names, sizes and times of files: what a cached copy of their content is valid for."""

    def state(file: Path) -> tuple[int, int]:
        try:
            status = file.stat()
        except OSError:  # a broken link: it is named where the pictures are read
            return 0, 0
        return status.st_size, status.st_mtime_ns

    return tuple((str(f).removeprefix(f"{root}/"), *state(f)) for f in files)
