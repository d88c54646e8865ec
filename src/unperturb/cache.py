"""What the program keeps to be quicker the next time: how large it is, and how to be rid of it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kept:
    """One kind of what is kept: where, how many files and how many bytes on disk; what: what it is for."""

    kind: str
    what: str
    folder: Path
    files: int
    size: int


# What each kind is for, where it lies, and the names that the program gives: a folder of somebody else's that happens
# to be called `data` loses nothing.
KINDS = {
    "data": ("decoded data sets", "data", r"\.?.+-[0-9a-f]{12}(\.lock|-.*)?"),
    "hub": ("downloads from the hub", "data/hub", r".*"),
    "adversarials": ("adversarial images, for the next evaluation", "adversarials", r"\.?[0-9a-f]{24}.*|.*\.lock"),
}


def cache_contents() -> list[Kept]:
    """What lies in the cache ($UNPERTURB_CACHE, or ~/.cache/unperturb) by kind."""
    from unperturb.data.store import cache_root

    root = cache_root(None)
    found = []
    for kind, (what, folder, _) in KINDS.items():
        sizes = [s for place in _places(kind, root / folder) for s in _sizes(place)]
        found.append(Kept(kind, what, root / folder, len(sizes), sum(sizes)))
    return found


def clear_cache(kinds: Iterable[str] = KINDS) -> None:
    """Delete what the cache holds of `kinds`, and nothing that is not the program's own. Raises `UnknownNameError`."""
    from unperturb.registry import unknown

    kinds = list(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of cache", kind, KINDS)
    for kept in cache_contents():
        for place in _places(kept.kind, kept.folder) if kept.kind in kinds else ():
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)


def _places(kind: str, folder: Path) -> list[Path]:
    """What the program has put into `folder`."""
    if not folder.is_dir():
        return []
    from unperturb.data.tables import HUB_MARK

    if kind == "hub" and not (folder / HUB_MARK).exists():
        return []
    named = [place for place in folder.iterdir() if re.fullmatch(KINDS[kind][2], place.name)]
    visible = {place for place in named if kind == "data" and place.name[0] != "." and place.suffix != ".lock"}
    return sorted(place for place in named if place not in visible or (place / "meta.json").is_file())


def _sizes(place: Path) -> list[int]:
    """Bytes of every file in or at `place`; one that leaves meanwhile is not counted. Links are not followed."""
    found = []
    walk = os.walk(place) if place.is_dir() and not place.is_symlink() else [(str(place.parent), [], [place.name])]
    for folder, _, names in walk:
        for name in names:
            try:
                found.append(os.lstat(os.path.join(folder, name)).st_size)
            except FileNotFoundError:
                continue
    return found
