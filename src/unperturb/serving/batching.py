"""Many who ask, one model: a bounded queue, and one thread that answers it in batches."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """As many questions are being answered as there are places."""


@dataclass(frozen=True)
class _Asked(Generic[Question, Answer]):
    question: Question
    since: float
    future: Future[Answer] = field(default_factory=Future)


class Batcher(Generic[Question, Answer]):
    """Answers questions in batches, each by its own future.

    answer: a list of questions -> their answers in the same order; called by one thread alone. Where it fails on
    several, each is asked again by itself, so that one question fails no other. batch: the most at once. wait: the
    seconds that the first of a batch waits for others. places: the questions that may be under way.
    """

    def __init__(
        self, answer: Callable[[list[Question]], Sequence[Answer]], *, batch: int, wait: float, places: int
    ) -> None:
        self._answer, self._batch, self._wait = answer, batch, wait
        self._places = threading.BoundedSemaphore(places)
        # As long as there are places; who gave up waiting has left his, but is cleared from here only in his turn.
        self._queue: queue.Queue[_Asked[Question, Answer] | None] = queue.Queue(places)
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="unperturb-batches", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place, to be had before a question is read and given back once it is answered; raises `QueueFullError`."""
        if not self._places.acquire(blocking=False):
            raise QueueFullError
        try:
            yield
        finally:
            self._places.release()

    def ask(self, question: Question) -> Future[Answer]:
        """The future answer; a cancelled one is skipped. Raises `QueueFullError`."""
        asked: _Asked[Question, Answer] = _Asked(question, time.monotonic())
        try:
            self._queue.put_nowait(asked)
        except queue.Full:
            raise QueueFullError from None
        return asked.future

    def close(self) -> None:
        """Answer all that was asked, then end the thread. Nothing may be asked afterwards."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while not self._ended:
            batch = self._collect()
            self._settle([asked for asked in batch if asked.future.set_running_or_notify_cancel()])

    def _collect(self) -> list[_Asked[Question, Answer]]:
        found: list[_Asked[Question, Answer]] = []
        until: float | None = None
        while len(found) < self._batch:
            left = None if until is None else until - time.monotonic()
            try:
                # What waits already is taken without waiting on.
                asked = self._queue.get(timeout=left) if left is None or left > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if asked is None:
                self._ended = True
                break
            found.append(asked)
            until = found[0].since + self._wait
        return found

    def _settle(self, batch: list[_Asked[Question, Answer]]) -> None:
        if not batch:
            return
        try:
            answers = list(zip(batch, self._answer([asked.question for asked in batch]), strict=True))
        except Exception as error:  # a model may raise anything
            if len(batch) == 1:
                _log.exception("the model failed")
                batch[0].future.set_exception(error)
            for asked in batch if len(batch) > 1 else ():
                self._settle([asked])
        else:
            for asked, answer in answers:
                asked.future.set_result(answer)
