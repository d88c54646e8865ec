"""What the verbs say, and how."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

console = Console(highlight=False, soft_wrap=True, emoji=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def say(text: object = "") -> None:
    """A line for people, once where several processes train together; what is in it from outside can neither style nor
    steer the terminal."""
    from unperturb.screen import clean, is_first

    if is_first():
        console.print(clean(text), markup=False)


def complain(text: object, style: str = "red") -> None:
    """The same on the standard error."""
    from unperturb.screen import clean

    errors.print(clean(text), style=style, markup=False)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar of one stage, under the lines that are said meanwhile."""
    from unperturb.screen import bar

    with bar(what, console) as update:
        update(0, 0)
        yield update


def show_recipe(recipe: Any) -> None:
    from unperturb.available import to_toml

    say(to_toml(recipe))
