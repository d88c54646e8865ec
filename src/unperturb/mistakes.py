"""What an error says to a user: a mistake, or a machine without room, in a sentence; a fault keeps its traceback."""

from __future__ import annotations

import contextlib
import errno
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
# Where the program lets a model work, and torch its gradient: an error that comes out of these is the model's.
_ASKING = {("unperturb.modules", "ask"), ("unperturb.attacks.context", "_input_gradient")}


class ModelError(RuntimeError):
    """A model that failed while it was attacked or judged; the message says which, where, and its own error, which is
    the `__cause__`."""


def sentence(error: BaseException) -> str | None:
    """What to tell the user of `error`; None for a fault of the program, which keeps its traceback."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)):
        cause = cause.__cause__ or cause.__context__
    kinds = ValueError | TypeError | OSError | RuntimeError | ImportError  # the last: an extra that is not installed
    if isinstance(error, kinds) and is_ours(error) and error.args != ():
        ours = not isinstance(error, OSError) or error.errno is None
        if ours and not _out_of_memory(error):
            return str(error)
    if cause is not None:
        place = f" ({cause.filename})" if isinstance(cause, OSError) and cause.filename else ""
        return f"the disk is full{place}: free some space, or write to another with --out or UNPERTURB_CACHE"
    if isinstance(error, OSError) and error.errno is not None:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{error.strerror or type(error).__name__}: {' to '.join(names) or 'a file or a connection'}"
    if _out_of_memory(error):
        return (
            "out of memory: ask for fewer images at once (--set training.batch=32 in a training, --set batch=50 in an "
            "evaluation) or for smaller ones (--set size=64)"
        )
    return None


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, of the machine or of the device: torch says it in a `RuntimeError`."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C began it: torch, stopped while it writes a checkpoint, ends in an error of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """What a model raises inside becomes a `ModelError` about `what`; all else, a lack of memory too, stays."""
    try:
        yield
    except Exception as error:  # a user's model may raise anything
        if is_ours(error) or interrupted(error) or _out_of_memory(error) or not _is_a_models(error):
            raise
        raise ModelError(f"{what} failed: {where(error)}{type(error).__name__}: {error}") from error


def _is_a_models(error: BaseException) -> bool:
    """Whether it came out of a model that was asked, or through code that is neither ours nor a library's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    asked = {(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame in frames}
    return bool(asked & _ASKING) or bool(where(error))


def where(error: BaseException) -> str:
    """The last line that it came through of code which is neither ours nor a library's, "net.py, line 3: ", or ""."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(("<", *_LIBRARIES))]
    own = [f for f in frames if not _in_here(f.filename)]
    return f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""


def is_ours(error: BaseException) -> bool:
    """Whether the program itself raised it: what a library raises unasked is a bug and keeps its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _in_here(frames[-1].filename)


def _in_here(file: str) -> bool:
    return Path(__file__).parent in Path(file).parents
