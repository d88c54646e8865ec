"""What people see: text from outside made harmless, lines of a log, a progress bar."""

from __future__ import annotations

import contextlib
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Marks that turn the direction of the text after them: they can make one name read as another.
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def clean(text: object) -> str:
    """`text` for a terminal: what would move its cursor, color it or turn its direction is written out, as `\\x1b`.

    So are half characters, which come from file names that are no text. New lines and tabs stay.
    """
    return "".join(c if _harmless(c) else c.encode("unicode_escape").decode("ascii") for c in str(text))


def _harmless(c: str) -> bool:
    return c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c not in _TURNS)


def is_first() -> bool:
    """Whether this is the first of the processes that train together: it speaks, keeps the folder, and decides for
    all."""
    return not int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def log_line(record: Mapping[str, Any]) -> str:
    """A record of a training's log for people; `log.jsonl` keeps the whole."""
    if "validation" in record:
        return f"step {record['step']:>6}  validation  " + "  ".join(
            f"{name} {100 * share:.2f} %" for name, share in record["validation"].items()
        )
    known = {"step", "epoch", "lr", "images_per_second", "gflops", "pflop", "seconds"}
    terms = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name not in known)
    return (
        f"step {record['step']:>6}  epoch {record['epoch']:.2f}  {terms}  "
        f"lr {record['lr']:.3g}  {record['images_per_second']:,.0f} images/s"
    )


@contextlib.contextmanager
def bar(what: str, console: Console | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar with time left, drawn from the first call on and gone at the end.

    Calls take (done, total) and an optional text; a total of 0 is not known yet. console: default stderr. Nothing is
    drawn where that is no terminal, nor by any but the first of several processes.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    console = console or Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,
        disable=not (is_first() and console.is_terminal),
    )
    task = progress.add_task(clean(what), total=None)

    def update(done: int, total: int, text: str = "") -> None:
        progress.start()
        said = clean(f"{what}: {text}" if text else what)
        progress.update(task, completed=done, total=total or None, description=said)

    try:
        yield update
    finally:
        progress.stop()


@contextlib.contextmanager
def shown(
    what: str, progress: Callable[..., None] | None = None, quiet: bool = False
) -> Iterator[Callable[..., None] | None]:
    """What a long call reports to: the caller's own `progress`, else a `bar`, else nothing where `quiet`."""
    if progress is not None or quiet:
        yield progress
        return
    with bar(what) as update:
        yield update


def width() -> int:
    """Columns of the terminal; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns
