"""Rows of pictures with labels: local Parquet files and streams of the hub."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unperturb.data.pictures import Picture
from unperturb.data.sets import DataError, some
from unperturb.data.sources import Found, choose_splits, split_of, stamp

MAX_CLASSES = 100_000
_IMAGES = ("image", "img", "picture", "photo")  # which column is meant where several hold pictures
_LABELS = ("label", "labels", "fine_label", "class", "target")
HUB_MARK = ".unperturb"  # in a folder for the hub that the program made
_SAMPLE = 512  # first pictures whose sizes are looked at
_MAX_BYTES = 256 * 1024**2  # of one picture
_ROWS = 64  # read at a time


@dataclass(frozen=True)
class Column:
    """kind: image, label (numbers with names), number, text, or the type that is none of these."""

    name: str
    kind: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """One Parquet file, or one split of a hub data set.

    read: the values of the named columns, row by row. follow: a picture that a row tells by its path: its bytes or its
    file; raises `ValueError` where it lies outside the data set. rows: how many, 0 where unknown.
    """

    where: str
    columns: list[Column]
    read: Callable[[list[str]], Iterator[tuple[Any, ...]]]
    follow: Callable[[str], bytes | Path]
    rows: int


def _found(tables: Mapping[str, list[Table]], label: str | None, where: str, state: tuple[Any, ...]) -> Found:
    """The source that `tables`, by split, make up. label: the column of labels, None finds out."""
    tables, notes = dict(tables), list[str]()
    image_of = {t.where: _image_column(t).name for part in tables.values() for t in part}
    label_of = {t.where: _label_column(t, label) for part in tables.values() for t in part}
    if "test" in tables and _withheld(tables["test"], label_of):
        del tables["test"]
        told = "the labels of its test split are kept back"
        if "val" in tables:
            tables["test"] = tables.pop("val")
            told += ", so its validation split is the test split"
        notes = [told]
    whole = [t for part in tables.values() for t in part]

    @functools.cache
    def names() -> list[str]:
        first = label_of[whole[0].where]
        for table in whole:
            other = label_of[table.where]
            renamed = other.names and first.names and other.names != first.names
            if renamed or (other.kind == "text") != (first.kind == "text"):
                raise DataError(
                    f"{table.where}: its labels are not those of {whole[0].where} ({other.kind} {some(other.names)}; "
                    f"{first.kind} {some(first.names)}); write both with the same names in the same order"
                )
        return list(first.names) or _names_in_use([(t, label_of[t.where].name) for t in tables["train"]])

    def pictures(split: str) -> Iterator[Picture]:
        place = {name: k for k, name in enumerate(names())}
        for table in tables[split]:
            columns = [image_of[table.where], label_of[table.where].name]
            for n, (image, value) in enumerate(_rows(table, columns)):
                where = f"{table.where}, row {n}"
                try:
                    picture = Picture(_data(image, table.follow), _place(value, place, len(names())), where)
                except ValueError as error:
                    picture = Picture(b"", 0, where, fault=str(error))
                yield picture

    return Found(
        {split: functools.partial(pictures, split) for split in tables},
        lambda: itertools.islice(pictures("train"), _SAMPLE),
        names,
        state,
        where,
        sum(t.rows for t in whole) if all(t.rows for t in whole) else 0,
        notes,
    )


def _image_column(table: Table) -> Column:
    there = [c for c in table.columns if c.kind == "image"]
    chosen = _by_name(there, _IMAGES)
    if chosen is None:
        raise _no_column(table, "several columns of pictures" if there else "no column of pictures")
    return chosen


def _label_column(table: Table, label: str | None) -> Column:
    wanted = [label, *_LABELS] if label else [*_LABELS]
    usual = [c for c in table.columns if c.kind in ("label", "number", "text") and c.name.casefold() in wanted]
    classes = [c for c in table.columns if c.kind == "label"]
    chosen = _by_name(usual, wanted) or _by_name(classes, ())
    if chosen is None:
        raise _no_column(table, "several columns of labels" if classes else "no column of labels")
    return chosen


def _by_name(columns: list[Column], names: Iterable[str]) -> Column | None:
    """The only one of `columns`, or the one with the first of `names` that one has."""
    if len(columns) == 1:
        return columns[0]
    by_name = {c.name.casefold(): c for c in columns}
    return next((by_name[name] for name in names if name in by_name), None)


def _no_column(table: Table, said: str) -> DataError:
    there = some([f"{c.name} ({c.kind})" for c in table.columns])
    return DataError(
        f"{table.where} has {said}: {there}. Expected an Image called image, and a ClassLabel, numbers or names called "
        "label"
    )


def _withheld(tables: list[Table], label_of: Mapping[str, Column]) -> bool:
    """Whether the labels are kept back (-1), as those of many test splits on the hub are."""
    rows = itertools.chain.from_iterable(_rows(t, [label_of[t.where].name]) for t in tables)
    looked_at = 0
    # Ends at the first label that is one: a single null is a fault, and told as such.
    for (value,) in itertools.islice(rows, _SAMPLE):
        if not (value is None or value == -1 or value != value):
            return False
        looked_at += 1
    return looked_at > 0


def _names_in_use(columns: list[tuple[Table, str]]) -> list[str]:
    """The classes of labels without names: the texts, sorted; or the numbers up to the highest."""
    count: collections.Counter[str] = collections.Counter()
    highest = n = 0
    for table, column in columns:
        for i, (value,) in enumerate(_rows(table, [column])):
            label = _label(value)
            n += 1
            if isinstance(label, str):
                count[label] += 1
            elif label is not None and not isinstance(label, int):
                raise DataError(f"{table.where}, row {i}: label {label}; expected whole numbers, or names of classes")
            elif label is not None and label >= MAX_CLASSES:
                raise DataError(
                    f"{table.where}, row {i}: label {label}; labels without names count from 0 to {MAX_CLASSES - 1:,}"
                )
            else:
                highest = max(highest, label or 0)
    if not count:
        return [str(i) for i in range(highest + 1)]
    if 2 * len(count) > n or len(count) > MAX_CLASSES:
        raise DataError(
            f"{columns[0][0].where}: its column {columns[0][1]} holds {len(count):,} texts in {n:,} rows "
            f"({some([name[:40] for name in count], 3)}); expected the names of classes, or numbers"
        )
    return sorted(count)


def _label(value: Any) -> int | str | None:
    """A label as it was meant: pandas makes 3.0 of 3, and NaN of none, where a column has gaps."""
    if value is None or value == "" or value != value:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _place(value: Any, place: Mapping[str, int], classes: int) -> int:
    """The number of the class that a label means; `ValueError` where it means none."""
    label = _label(value)
    if label is None:
        raise ValueError("no label")
    if isinstance(label, str):
        if label not in place:
            raise ValueError(f"label {label[:40]!r}, which train does not have ({some(list(place), 5)})")
        return place[label]
    if not isinstance(label, int) or not 0 <= label < classes:
        raise ValueError(f"label {label}, expected 0 to {classes - 1}")
    return int(label)


def _data(image: Any, follow: Callable[[str], bytes | Path]) -> bytes | Path:
    """The bytes that a row holds, or what the path in it leads to; `ValueError` where it has neither."""
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if isinstance(data, bytes):
        return data
    if not isinstance(path, str) or not path:
        raise ValueError("no picture")
    try:
        return follow(path)
    except Exception as error:  # see `_rows`
        raise ValueError(_reason(error)) from error


def _rows(table: Table, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """`table.read`; whatever breaks in it is a `DataError` with the row."""
    n = 0
    try:
        for row in table.read(columns):
            yield row
            n += 1
    except Exception as error:  # Arrow, `datasets` and the network below it raise a dozen kinds
        if isinstance(error, DataError):
            raise
        raise DataError(f"{table.where} breaks off at row {n} ({_reason(error)}); fetch it again") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


# Local Parquet ------------------------------------------------------------------------------------------------------


def parquet_files(name: str) -> tuple[Path | None, list[Path]]:
    """The folder looked at, `$UNPERTURB_DATA/<name>` (None without the variable), and its Parquet files."""
    root = os.environ.get("UNPERTURB_DATA")
    if not root:
        return None, []
    folder = Path(root).expanduser() / name
    return folder, sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def parquet_splits(files: list[Path], test: str | None) -> dict[str, list[Path]]:
    """Files by split, told apart by the first word of their names that means one."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[-_.]", file.name)
        by_split.setdefault(next((w for w in words if split_of(w)), words[0]), []).append(file)
    return choose_splits(by_split, str(files[0].parent), test)


def find_parquet(name: str, splits: Mapping[str, list[Path]], label: str | None) -> Found:
    """The source that local Parquet files make up."""
    tables = {split: [_parquet_table(file, name) for file in files] for split, files in splits.items()}
    folder = splits["train"][0].parent
    return _found(tables, label, str(folder), parquet_stamp(splits))


def parquet_stamp(splits: Mapping[str, list[Path]]) -> tuple[Any, ...]:
    """What changes when the files do."""
    return stamp((f for part in splits.values() for f in part), splits["train"][0].parent)


def _parquet_table(file: Path, name: str) -> Table:
    """One file; raises `DataError` where it is not a whole Parquet file, by its footer.

    It is read as it lies, without `datasets`, which would follow a path in it to any file and any address.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            columns, rows = _columns(opened.schema_arrow), opened.metadata.num_rows
    except Exception as error:  # see `_rows`
        raise DataError(
            f"{file} is truncated or not a Parquet file ({_reason(error)}); fetch it again, or move its folder away "
            f"and run: unperturb prepare {name}"
        ) from error

    def read(columns: list[str]) -> Iterator[tuple[Any, ...]]:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(_ROWS, columns=columns):
                yield from zip(*(batch.column(c).to_pylist() for c in columns))

    def follow(path: str) -> Path:
        inside = (file.parent / path).resolve()
        if not inside.is_relative_to(file.parent.resolve()):
            raise ValueError(f"its picture is {path[:100]}, outside the data set")
        return inside

    return Table(str(file), columns, read, follow, rows)


def _columns(schema: Any) -> list[Column]:
    """The columns of an Arrow schema, with what the hub's own metadata says of them."""
    import pyarrow.types as types

    said: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    for step in ("info", "features"):
        said = said.get(step) or {}
    columns = []
    for field in schema:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        feature = said.get(field.name) or {}
        names = tuple(map(str, feature.get("names") or ())) if isinstance(feature, dict) else ()
        if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
            columns.append(Column(field.name, "label" if names else "number", names))
        elif types.is_string(kind) or types.is_large_string(kind):
            columns.append(Column(field.name, "text"))
        elif _is_bytes(kind) or (types.is_struct(kind) and any(f.name == "bytes" and _is_bytes(f.type) for f in kind)):
            columns.append(Column(field.name, "image"))
        else:
            columns.append(Column(field.name, str(kind)))
    return columns


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


# The hub ------------------------------------------------------------------------------------------------------------


def find_hub(name: str, config: str | None, test: str | None, label: str | None, hub_cache: Path, advice: str) -> Found:
    """The splits of a data set on the hub, streamed."""
    if not hub_cache.exists():  # then it is ours, and `unperturb cache` may clear it
        with contextlib.suppress(OSError):
            hub_cache.mkdir(parents=True)
            (hub_cache / HUB_MARK).touch()
    try:
        streams = dict(_open_hub(name, config, hub_cache))
        tables = {split: _hub_table(stream, name, split) for split, stream in streams.items()}
    except Exception as error:  # `datasets` raises a dozen kinds: no network, no such name, gated, no such config
        raise DataError(f"{advice} ({_reason(error)})") from error
    chosen = choose_splits(tables, f"hub:{name}", test)
    return _found({split: [table] for split, table in chosen.items()}, label, f"hub:{name}", (name, config))


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


def _hub_table(stream: Any, name: str, split: str) -> Table:
    from datasets import Image
    from datasets.utils.file_utils import xopen

    columns = [_hub_column(column, feature) for column, feature in (stream.features or {}).items()]

    def read(wanted: list[str]) -> Iterator[tuple[Any, ...]]:
        chosen = stream.select_columns(wanted)
        for column in wanted:
            if isinstance(stream.features[column], Image):
                chosen = chosen.cast_column(column, Image(decode=False))
        for row in chosen:
            yield tuple(row[c] for c in wanted)

    def follow(path: str) -> bytes:
        if not _is_of(path, name):
            raise ValueError(f"its picture is {path[:100]}, outside the data set")
        with xopen(path, "rb") as file:
            data = bytes(file.read(_MAX_BYTES + 1))
        if len(data) > _MAX_BYTES:
            raise ValueError(f"its picture has more than {_MAX_BYTES:,} bytes")
        return data

    known = getattr(stream.info, "splits", None) or {}
    rows = known[split].num_examples if split in known else 0
    return Table(f"hub:{name} {split}", columns, read, follow, rows or 0)


def _hub_column(name: str, feature: Any) -> Column:
    from datasets import ClassLabel, Image

    if isinstance(feature, ClassLabel):
        return Column(name, "label", tuple(feature.names or ()))
    kind = str(getattr(feature, "dtype", type(feature).__name__))
    # Files without the hub's metadata hold pictures as plain {bytes, path}.
    if isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature) or kind == "binary":
        return Column(name, "image")
    if kind.startswith(("int", "uint", "float", "bool")):
        return Column(name, "number")
    return Column(name, "text" if kind in ("string", "large_string") else kind)


def _is_of(path: str, name: str) -> bool:
    """Whether `path` lies in the hub's data set `name`, or in the local folder of that name; also in an archive."""
    *members, last = path.split("::")
    if not all(re.match(r"(zip|tar|gzip|bz2|xz)://", member) for member in members) or ".." in last.split("/"):
        return False
    if Path(name).is_dir():
        return Path(last).resolve().is_relative_to(Path(name).resolve())
    owner = "" if "/" in name else "(?:[^/@]+/)?"  # "mnist" is short for "ylecun/mnist"
    return re.match(rf"hf://datasets/{owner}{re.escape(name)}[@/]", last) is not None
