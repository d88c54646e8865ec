"""What tells one model from another: what it computes, as far as that can be read; else the object itself.

Classes of torch and of this package compute what their code, settings and tensors say: a key made of these holds in any
process. Anything else (a class, a lambda, a hook or a patched method of the user's) may compute anything: its key is
the object's own, and means nothing once the process has ended.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.Size)
_KNOWN = ("torch.nn.modules.", "torch.nn.functional.", "torch._C._nn.", "unperturb.")
_INTERNAL = frozenset(vars(nn.Module()))
_HOOKS = frozenset(k for k in _INTERNAL if k.endswith("hooks") and ("forward" in k or "backward" in k))
_BESIDE = frozenset({"outcome", "folder", "frozen", "called"})  # its training, place and name: not what is computed
_WRITERS = ("torch", "unperturb", "contextlib", "dataclasses", "reprlib")  # the last two: what a dataclass is given
_MAKERS = (
    *("attacks", "classifiers", "defenses"),
    *("attackers.py", "systems.py", "modules.py", "per_image_rng.py", "validation.py"),
)


@dataclass(frozen=True)
class Identity:
    """key: 16 hex digits. lasting: whether in any process the same key means the same function."""

    key: str
    lasting: bool


def identify(*things: object) -> Identity:
    """The identity of a module, an attack or any other function, or of several together: what differs in settings,
    weights or code shares no key."""
    reader = _Reader()
    keys = [reader.key(thing) for thing in things]
    return Identity(keys[0] if len(keys) == 1 else _hash([key.encode() for key in keys]), reader.lasting)


def is_known(kind: type) -> bool:
    """Whether `kind` is a class of torch or of this package, as its source has it."""
    return _importable(kind) and all(_as_written(base) for base in kind.__mro__ if base is not object)


@functools.cache
def code() -> str:
    """A hash of the source of attacks and of what they look at: what one version made, a mended one makes anew."""
    package = Path(__file__).parent.parent
    files = sorted(f for f in package.rglob("*.py") if f.relative_to(package).parts[0] in _MAKERS)
    return _hash([f.read_bytes() for f in files])


class _Reader:
    """One reading. Of what cannot be read the object itself is the key, and the reading is not `lasting`."""

    def __init__(self) -> None:
        self.lasting = True
        self.known: dict[int, str] = {}
        self.classes: dict[type, bool] = {}  # for no longer than one reading: a class may be patched at any time

    def key(self, value: object) -> str:
        if id(value) not in self.known:
            self.known[id(value)] = "itself"  # met again inside
            self.known[id(value)] = _hash(list(self._parts(value)))
        return self.known[id(value)]

    def _is_known(self, kind: type) -> bool:
        if kind not in self.classes:
            self.classes[kind] = is_known(kind)
        return self.classes[kind]

    def _parts(self, value: Any) -> Iterator[Any]:
        kind = type(value)
        if kind in _PLAIN:
            yield f"{kind.__name__} {value!r}".encode()
        elif kind in (list, tuple):  # JSON does not tell these apart
            yield b"list"
            yield from (self.key(v).encode() for v in value)
        elif kind is dict:
            yield b"dict"
            yield from sorted(f"{self.key(k)} {self.key(v)}".encode() for k, v in value.items())
        elif kind in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_quantized:
            yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        elif kind in (types.FunctionType, types.BuiltinFunctionType) and _importable(value):
            yield f"function {value.__module__} {value.__qualname__}".encode()
        elif kind is types.MethodType and getattr(type(value.__self__), value.__name__, None) is value.__func__:
            yield f"method {value.__name__} {self.key(value.__self__)}".encode()
        elif isinstance(value, nn.Module) and self._is_known(kind) and not _hooked(value):
            settings = {k: v for k, v in vars(value).items() if k not in _INTERNAL | _BESIDE}
            yield f"module {kind.__module__} {kind.__qualname__}".encode()
            yield from self._parts({**settings, **value._parameters, **value._buffers, **value._modules})
        elif dataclasses.is_dataclass(kind) and self._is_known(kind):  # an attack
            yield f"settings {kind.__module__} {kind.__qualname__}".encode()
            yield from self._parts(vars(value))
        else:
            self.lasting = False
            yield f"object {id(value)}".encode()


def _hash(parts: list[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def _importable(thing: Any) -> bool:
    """Whether the name of a class or function of torch or of this package still leads to it."""
    if not f"{thing.__module__}.".startswith(_KNOWN):
        return False
    found: Any = sys.modules.get(thing.__module__)
    for name in thing.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is thing


def _as_written(kind: type) -> bool:
    """Whether no method of a class was put there from elsewhere, whatever it was wrapped in."""
    for value in vars(kind).values():
        method = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
        while isinstance(method, types.FunctionType):
            if method.__globals__["__name__"].partition(".")[0] not in _WRITERS:
                return False
            method = getattr(method, "__wrapped__", None)
    return True


def _hooked(module: nn.Module) -> bool:
    """Whether something else than its class has a say in a module's call."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or any(vars(module)[k] for k in _HOOKS) or nn.modules.module._has_any_global_hook()
