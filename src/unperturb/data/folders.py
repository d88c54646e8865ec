"""Class folders of pictures: folder:PATH."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from unperturb.data.pictures import SUFFIXES, Picture
from unperturb.data.sets import DataError, some
from unperturb.data.sources import Found, Progress, choose_splits, split_of, stamp

_SAMPLE = 1_000  # pictures, evenly spread, whose sizes are looked at
_TYPES = ", ".join(sorted(s[1:] for s in SUFFIXES))


def find_folder(path: Path, progress: Progress | None = None) -> Found:
    """Class folders of pictures, under `path` itself or under its train, validation and test folders.

    What is hidden is passed over; links are followed. progress: called while folders are listed. Raises `DataError`
    where there are no classes to tell apart, or a folder cannot be read or is reached twice.
    """
    try:
        return _find(path, progress)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _find(path: Path, progress: Progress | None) -> Found:
    if not path.is_dir():
        raise DataError(f"folder:{path} is not a folder; expected one folder per class, with pictures inside")
    roots, notes = _roots(path)
    seen: dict[tuple[int, int], Path] = {}
    files: dict[str, list[Path]] = {}
    strangers: collections.Counter[str] = collections.Counter()
    n = 0
    for split, root in roots.items():
        files[split] = []
        for file in _walk(root, seen):
            n += 1
            if progress and n % 10_000 == 0:
                progress(n, n, "listing files")
            if file.suffix.lower() not in SUFFIXES:
                strangers[file.suffix.lower() or "without a suffix"] += 1
            elif file.parent == root:
                strangers["pictures outside the class folders"] += 1
            else:
                files[split].append(file)
        files[split].sort()
    depth = {split: len(root.parts) for split, root in roots.items()}  # where the class stands in a file's path
    names = sorted({f.parts[depth["train"]] for f in files["train"]})
    aside = [f"{n:,} {kind}" for kind, n in strangers.most_common()]
    if len(names) < 2:
        raise DataError(
            f"{roots['train']} holds pictures of {len(names)} classes; expected two or more class folders with pictures"
            f" ({_TYPES}) inside" + (f" (found {some(aside, 5)})" if aside else "")
        )
    number = {name: i for i, name in enumerate(names)}
    for split, found in files.items():
        for file in found:
            if file.parts[depth[split]] not in number:
                raise DataError(f"{file}: a class that {roots['train']} does not have ({some(names)})")
    if strangers:
        notes.append(f"files left aside: {some(aside, 5)}")
    empty = [folder.name for folder in _folders(roots["train"]) if folder.name not in names]
    if empty:
        notes.append(f"folders without a picture ({_TYPES}), which are no classes: {some(empty)}")

    def pictures(split: str, every: int = 1) -> Callable[[], Iterable[Picture]]:
        return lambda: (Picture(f, number[f.parts[depth[split]]], str(f)) for f in files[split][::every])

    return Found(
        {split: pictures(split) for split in files},
        pictures("train", -(-len(files["train"]) // _SAMPLE)),
        lambda: names,
        stamp((f for found in files.values() for f in found), path),
        str(path),
        sum(map(len, files.values())),
        notes,
    )


def _roots(path: Path) -> tuple[dict[str, Path], list[str]]:
    """Where the class folders of each split lie, and what is left aside.

    A folder called train that holds pictures, beside others that do, is a class of that name; one that holds folders is
    a split.
    """
    there = _folders(path)
    named = [folder for folder in there if split_of(folder.name)]
    splits = [folder for folder in named if _folders(folder)]
    if not splits:
        if named and named == there:
            raise DataError(f"{named[0]} holds no class folders; expected one folder per class inside, with pictures")
        return {"train": path}, []
    others = [folder.name for folder in there if folder not in splits]
    notes = [f"folders beside the splits, left aside: {some(others)}"] if others else []
    return choose_splits({folder.name: folder for folder in splits}, str(path)), notes


def _folders(path: Path) -> list[Path]:
    return [folder for folder in _visible(path) if _is_dir(folder)]


def _visible(path: Path) -> list[Path]:
    return sorted(path / name for name in os.listdir(path) if not name.startswith("."))


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _walk(root: Path, seen: dict[tuple[int, int], Path]) -> Iterator[Path]:
    """Every file below `root`; `seen` keeps the folders by device and number, so that no link leads in a circle."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder:
            raise DataError(f"{folder} is a link to {first}, which is read already; remove one of them")
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and _is_dir(path)):
                    waiting.append(path)
                elif entry.is_symlink() and not path.exists() and path.suffix.lower() not in SUFFIXES:
                    raise DataError(f"{path} is a broken link; mend or remove it")  # it may have been a class
                else:
                    yield path
