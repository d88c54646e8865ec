"""Named sources of real images, and how their pictures are found: local Parquet, the hub, class folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unperturb.data.sets import DataError
from unperturb.data.store import Picture

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


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
        test="validation",
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
    "imagenet": Source("ILSVRC/imagenet-1k", ((1_281_167, 50_000),), size=128, test="validation"),
}


@dataclass(frozen=True)
class Found:
    """A source that is there.

    splits: for each of train, val, test that it has, a function that goes through its pictures. stamp: what changes
    when its files do. where: for messages. sample: how many pictures tell the most common size, None: all. check:
    raises `DataError` where a file is broken, before the work begins. total: how many pictures, 0 where unknown.
    """

    splits: dict[str, Callable[[], Iterable[Picture]]]
    class_names: Callable[[], list[str]]
    stamp: tuple[Any, ...]
    where: str
    sample: int | None = 512
    check: Callable[[], None] = lambda: None
    total: int = 0

    def labeled_splits(self) -> dict[str, Callable[[], Iterable[Picture]]]:
        """`splits`, with val in the place of a test split whose labels are withheld, as many on the hub are (-1)."""
        splits = dict(self.splits)
        if "test" in splits and next(iter(splits["test"]())).label < 0:
            del splits["test"]
            if "val" in splits:
                splits["test"] = splits.pop("val")
        return splits


def stamp(files: Iterable[Path], root: Path) -> tuple[Any, ...]:
    """Names, sizes and times of files: what a cached copy of their content is valid for."""
    return tuple((str(f.relative_to(root)), (s := f.stat()).st_size, s.st_mtime_ns) for f in files)


# Class folders ------------------------------------------------------------------------------------------------------


def find_folder(path: Path) -> Found:
    """Class folders of pictures, under `path` itself or under its train, val | validation and test.

    As on the hub, validation pictures are the test split where there is no other.
    """
    if not path.is_dir():
        raise DataError(f"folder:{path} is not a folder; expected one folder per class, with pictures inside")
    roots = {"train": path / "train", "val": path / "val", "test": path / "test"}
    if not roots["val"].is_dir():
        roots["val"] = path / "validation"
    roots = {k: v for k, v in roots.items() if v.is_dir()} if roots["train"].is_dir() else {"train": path}
    if "val" in roots and "test" not in roots:
        roots["test"] = roots.pop("val")
    files = {k: sorted(f for f in v.glob("*/**/*") if _is_picture(f)) for k, v in roots.items()}
    names = sorted({f.relative_to(roots["train"]).parts[0] for f in files["train"]})
    if len(names) < 2:
        raise DataError(
            f"{roots['train']} holds pictures of {len(names)} classes; expected two or more class folders with pictures"
            f" ({', '.join(sorted(s[1:] for s in SUFFIXES))}) inside"
        )
    for split, some in files.items():
        for file in some:
            if file.relative_to(roots[split]).parts[0] not in names:
                raise DataError(f"{file}: a class that {roots['train']} does not have ({', '.join(names[:10])})")

    def pictures(split: str) -> Callable[[], Iterable[Picture]]:
        number = {name: i for i, name in enumerate(names)}
        return lambda: (Picture(f, number[f.relative_to(roots[split]).parts[0]], str(f)) for f in files[split])

    return Found(
        {k: pictures(k) for k in files},
        lambda: names,
        stamp((f for some in files.values() for f in some), path),
        str(path),
        sample=None,
        total=sum(map(len, files.values())),
    )


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


# Parquet and the hub ------------------------------------------------------------------------------------------------


def parquet_files(name: str) -> tuple[Path | None, list[Path]]:
    """The folder looked at, `$UNPERTURB_DATA/<name>` (None without the variable), and its Parquet files."""
    root = os.environ.get("UNPERTURB_DATA")
    if not root:
        return None, []
    folder = Path(root).expanduser() / name
    return folder, sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def find_parquet(name: str, files: list[Path], test: str | None, label: str | None, hub_cache: Path) -> Found:
    """The splits of local Parquet files, told apart by the first word of their names."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(re.split(r"[-_.]", file.name)[0], []).append(file)
    chosen = choose_splits(by_split, test, str(files[0].parent))

    def check() -> None:
        for file in (f for some in chosen.values() for f in some):
            check_parquet(file, name)

    def load(file: Path) -> Any:
        from datasets import load_dataset

        # Streaming reads the file where it lies; otherwise `datasets` keeps a copy of it.
        return load_dataset("parquet", data_files=[str(file)], split="train", streaming=True, cache_dir=str(hub_cache))

    def pictures(split: str) -> Callable[[], Iterable[Picture]]:
        return lambda: (p for file in chosen[split] for p in rows(load(file), label, str(file)))

    return Found(
        {k: pictures(k) for k in chosen},
        lambda: class_names(load(chosen["train"][0]), label, str(chosen["train"][0])),
        stamp((f for some in chosen.values() for f in some), files[0].parent),
        str(files[0].parent),
        check=check,
    )


def find_hub(name: str, config: str | None, test: str | None, label: str | None, hub_cache: Path, advice: str) -> Found:
    """The splits of a data set on the hub, streamed."""
    try:
        streams = _open_hub(name, config, hub_cache)
    except Exception as error:  # `datasets` raises a dozen kinds: no network, no such name, gated, no such config
        raise DataError(f"{advice} ({type(error).__name__}: {str(error).splitlines()[0][:300]})") from error
    chosen = choose_splits(dict(streams), test, f"hub:{name}")
    return Found(
        {k: (lambda k=k: rows(chosen[k], label, f"hub:{name} {k}")) for k in chosen},  # type: ignore[misc]
        lambda: class_names(chosen["train"], label, f"hub:{name}"),
        (name, config),
        f"hub:{name}",
    )


def _open_hub(name: str, config: str | None, hub_cache: Path) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, config, streaming=True, cache_dir=str(hub_cache))
    except (RuntimeError, ValueError) as error:
        if "script" not in str(error) and "trust_remote_code" not in str(error):
            raise
        # The repository is a program, which is not run; the hub keeps its output as Parquet, a folder per config.
        return load_dataset(
            name, data_dir=config, revision="refs/convert/parquet", streaming=True, cache_dir=str(hub_cache)
        )


def choose_splits(there: dict[str, Any], test: str | None, where: str) -> dict[str, Any]:
    """train, and val and test where `there` has them, by their usual names; `test` names the test split.

    Without a split of that name the validation split is the test split: it is the labeled one that people report on.
    """
    validation = next((k for k in ("validation", "val", "valid", "dev") if k in there), None)
    test = test or ("test" if "test" in there else validation)
    if "train" not in there or (test is not None and test not in there):
        missing = "train" if "train" not in there else test
        raise DataError(f"{where} has no {missing} split; it has: {', '.join(sorted(there)) or 'nothing'}")
    chosen = {"train": there["train"]}
    if validation and validation != test:
        chosen["val"] = there[validation]
    if test:
        chosen["test"] = there[test]
    return chosen


def check_parquet(file: Path, name: str) -> None:
    """Raise `DataError` where `file` is not a whole Parquet file, by its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.ParquetFile(file).close()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is truncated or not a Parquet file ({str(error).splitlines()[0][:200]}); fetch it again, or move "
            f"its folder away and run: unperturb prepare {name}"
        ) from error


def columns(stream: Any, label: str | None, where: str) -> tuple[str, str, list[str] | None]:
    """The names of the image and the label column, and the class names where the file tells them."""
    from datasets import ClassLabel, Image

    features = stream.features or {}
    # Files without the hub's metadata hold pictures as plain {bytes, path}.
    images = [k for k, v in features.items() if isinstance(v, Image) or (isinstance(v, dict) and "bytes" in v)]
    labels = [k for k, v in features.items() if isinstance(v, ClassLabel)]
    plain = [k for k, v in features.items() if str(getattr(v, "dtype", "")).startswith(("int", "uint"))]
    for candidate in (label, "label", "labels", "fine_label"):
        if candidate in labels or candidate in plain:
            found = candidate
            break
    else:
        found = next(iter(labels), None)
    if not images or found is None:
        raise DataError(f"{where} has the columns {', '.join(features) or 'none'}; expected an Image and a ClassLabel")
    return images[0], found, list(features[found].names) if found in labels else None


def class_names(stream: Any, label: str | None, where: str) -> list[str]:
    """The class names that the features tell; without them the numbers up to the highest label."""
    _, column, names = columns(stream, label, where)
    if names is None:
        highest = max(int(row[column]) for row in stream.select_columns([column]))
        names = [str(i) for i in range(highest + 1)]
    return names


def rows(stream: Any, label: str | None, where: str) -> Iterator[Picture]:
    """The encoded pictures of one stream, in order; raises `DataError` with the row where it breaks."""
    from datasets import Image
    from datasets.utils.file_utils import xopen

    image, column, _ = columns(stream, label, where)
    stream = stream.select_columns([image, column]).cast_column(image, Image(decode=False))
    n = 0
    try:
        for n, row in enumerate(stream):
            data = row[image]["bytes"]
            if data is None:  # a picture of its own, on the hub or in an archive there
                with xopen(row[image]["path"], "rb") as file:
                    data = file.read()
            yield Picture(data, int(row[column]), f"{where}, row {n}")
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).splitlines()[0][:200]
        raise DataError(f"{where} breaks off after row {n} ({reason}); fetch it again") from error
