"""What an error says to a user: a mistake, or a machine without room, in a sentence; a fault keeps its traceback."""

from __future__ import annotations

import errno
from pathlib import Path


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


def is_ours(error: BaseException) -> bool:
    """Whether the program itself raised it: what a library raises unasked is a bug and keeps its traceback."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and "unperturb" in Path(traceback.tb_frame.f_code.co_filename).parts
