"""Names to things: one decorator, and an error that lists the choices when a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class UnknownNameError(ValueError):
    """A name or an option that nothing answers to; the message lists the choices and the nearest."""


def unknown(kind: str, name: object, choices: Iterable[str]) -> UnknownNameError:
    """The error for `name`, which is not among `choices`."""
    known = sorted(choices)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}.{hint} Choices: {', '.join(known) or 'none'}.")


class Registry(Generic[T]):
    """The things of one kind, by name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator that files a class or function under `name`; a double name is an error."""

        def decorate(thing: Any) -> Any:
            if name in self._things:
                raise ValueError(f"two {self.kind}s are called {name!r}: {self._things[name]} and {thing}")
            self._things[name] = thing
            return thing

        return decorate

    def __getitem__(self, name: str) -> Callable[..., T]:
        if name not in self._things:
            raise unknown(self.kind, name, self._things)
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._things))

    def create(self, name: str, *args: Any, **options: Any) -> T:
        """The thing called `name`, made with `options`; raises `UnknownNameError` for a name or an option it lacks."""
        make = self[name]
        accepted = signature(make).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            for option in options:
                if option not in accepted:
                    raise unknown(f"option of {self.kind} {name!r},", option, list(accepted)[len(args) :])
        return make(*args, **options)
