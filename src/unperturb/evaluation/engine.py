"""Where the cells of a plan are made: in this process, or on many machines as tasks of Ray.

Ray brings the machines, the queue and another try where a worker is lost. Here is what it is given: the parts of a plan
that can be made at the same time, and a function that makes one of them in the run folder, which all machines share.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unperturb import runs
from unperturb.config import EvaluationRecipe, resolve, snapshot
from unperturb.data import DataError
from unperturb.devices import set_threads
from unperturb.evaluation.cascade import cascading, is_whole
from unperturb.evaluation.grid import Each, Progress, Work, at_work, run_grid, run_named, shards
from unperturb.evaluation.identity import code, identify
from unperturb.evaluation.plan import Plan, plan_of
from unperturb.evaluation.surrogates import Retrained
from unperturb.mistakes import ModelError, sentence
from unperturb.registry import unknown

Make = Callable[[Plan, Path, Progress | None], None]  # writes the rows and samples that a run folder lacks
TRIES = 3  # more, where a worker is lost; an error of a model or of the program is raised at once


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Cells as tasks of Ray, which brings the machines.

    address: of a cluster, as `ray.init` takes it (default: the one that this process is connected to, else
    `$RAY_ADDRESS`, else one of this machine alone, for as long as it is needed). threads: of a worker; the driver,
    which looks at the models first, takes as many. On CUDA each worker has a GPU of its own.

    All machines must see the run folder, the models and the data under the same paths, and have the same code. With a
    cache that they share, no adversarial images are made twice.
    """

    address: str | None = None
    threads: int = 1


@contextlib.contextmanager
def engine_of(
    engine: Ray | str, recipe: EvaluationRecipe, models: Mapping[str, nn.Module] | None = None
) -> Iterator[Make]:
    """What makes the cells of `recipe`: `"local"`, `"ray"` or a `Ray`; inside, torch has its number of threads.

    models: in hand, for entries of the recipe. Raises `UnknownNameError`; for Ray `ValueError` where there are any,
    which no other process can make, and `ImportError` where it is not installed.
    """
    if engine == "local":
        yield local
        return
    if engine == "ray":
        engine = Ray()
    if not isinstance(engine, Ray):
        raise unknown("engine", engine, ("local", "ray"))
    _refuse(list(models or {}))
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ImportError("engine 'ray' needs Ray, which is not installed: pip install 'unperturb[ray]'") from error
    before = torch.get_num_threads()
    set_threads(engine.threads)
    try:
        yield functools.partial(on_ray, engine, recipe)
    finally:
        torch.set_num_threads(before)


def local(plan: Plan, out: Path, progress: Progress | None = None) -> None:
    """Every cell of `plan` in this process, one after the other; see `run_grid`."""
    run_grid(plan, out, progress, _each(plan))


def _each(plan: Plan) -> Each | None:
    return None if plan.cascade is None else cascading(plan.cascade)


# Parts --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one process makes in one go. shard: its number. cells: places in `plan.cells()`, made in this order. after:
    places, in the list that this part is in, of those that come first."""

    shard: int
    cells: tuple[int, ...]
    after: tuple[int, ...] = ()


def parts_of(work: Work) -> list[Part]:
    """What of a plan is not there yet, in parts that can be made at the same time; each shard has its own.

    Cells that share adversarial images are one part, so that nobody makes these twice. In a cascade all cells of one
    system are one part, for each attacker meets what those before have left; it comes after the attacks that are made
    on every image, which several systems share.
    """
    plan, cells = work.plan, work.plan.cells()
    sharing: dict[str, list[int]] = {}
    chains: dict[tuple[str, str], list[int]] = {}
    for place, cell in enumerate(cells):
        if plan.cascade is None or is_whole(cell, plan.cascade):
            sharing.setdefault(work.seen_by(cell)[1].key, []).append(place)
        else:
            chains[cell.names[:2]] = [k for k, other in enumerate(cells) if other.names[:2] == cell.names[:2]]
    whole = {place for group in sharing.values() for place in group}
    found: list[Part] = []
    for shard in shards(plan):
        lacks = ((place, *work.lacks(cell, shard)) for place, cell in enumerate(cells))
        lacking = {place for place, rows, samples in lacks if rows or len(samples)}
        first = len(found)
        found += [Part(shard.number, tuple(group)) for group in sharing.values() if lacking & {*group}]
        shared = list(enumerate(found))[first:]
        for chain in chains.values():
            if lacking & {*chain} - whole:
                after = tuple(place for place, part in shared if {*part.cells} & {*chain})
                found.append(Part(shard.number, tuple(chain), after))
    return found


# On Ray -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A run, as a worker is told of it: the recipe, as JSON, and what it must find there to make the same rows."""

    recipe: str
    out: str
    folder: str  # that the recipe's paths start from
    device: str
    threads: int
    expected: str


def on_ray(engine: Ray, recipe: EvaluationRecipe, plan: Plan, out: Path, progress: Progress | None = None) -> None:
    """Every cell of `plan`, which is that of `recipe`, by workers that make it anew.

    Raises `ValueError` for code of the user's own; `RunError` where a worker sees another folder, code, model or data,
    or is lost again and again; and what a worker raises.
    """
    strangers = [name for name, model in plan.models().items() if not identify(model).lasting]
    _refuse(strangers + [k for k, sent in plan.attackers.items() if not all(identify(a.attack).lasting for a in sent)])
    with at_work(plan, out) as work:
        parts = parts_of(work)
    cells = plan.cells()
    missing = {(part.shard, place) for part in parts for place in part.cells}
    total = len(cells) * len(list(shards(plan)))
    written, folder = json.dumps(snapshot(recipe)), os.getcwd()
    job = _Job(written, str(out.resolve()), folder, plan.device.type, engine.threads, _expected(plan))
    with _connected(engine.address):
        for made in _tasks(job, parts):
            if made in missing and progress:
                progress(total - len(missing) + 1, total, str(cells[made[1]]))
            missing.discard(made)


def _refuse(strangers: list[str]) -> None:
    if strangers:
        raise ValueError(
            f"engine 'ray' makes its models anew on each worker, and cannot make {', '.join(strangers)}: code of your "
            "own. Name run folders or the zoo's in the recipe, or leave the engine local"
        )


def _expected(plan: Plan) -> str:
    """What two processes must have in common to make the same rows, as JSON."""
    models = {name: identify(model).key for name, model in plan.models().items()}
    return json.dumps({"code": code(), "torch": torch.__version__, "data": plan.data.fingerprint, **models})


def _tasks(job: _Job, parts: list[Part]) -> Iterator[tuple[int, int]]:
    """(shard, place of the cell) of each that is made, as it comes."""
    import ray

    given = {k: v for k, v in os.environ.items() if k.startswith("UNPERTURB_")}
    make = ray.remote(
        num_cpus=job.threads,
        num_gpus=1 if job.device == "cuda" else 0,
        max_retries=TRIES,
        num_returns="streaming",
        runtime_env={"env_vars": given | {"OMP_NUM_THREADS": str(job.threads)}},
    )(_make)
    started: list[Any] = []
    for part in parts:
        started.append(make.remote(job, part, *(started[place].completed() for place in part.after)))
    of, running = dict(zip(started, parts)), list(started)
    try:
        while running:
            ready, running = ray.wait(running)
            stream: Any = ready[0]
            try:
                place: int = ray.get(next(stream))
            except StopIteration:
                continue
            running.append(stream)
            yield of[stream].shard, place
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, runs.RunError | ModelError | DataError) or sentence(cause):
            raise cause from None
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        raise runs.RunError(
            f"a worker was lost {TRIES + 1} times at the same part: {runs.shortened(str(error), 200)} What was "
            "finished is kept; go on with --resume, with fewer images at once (--set batch=50) if memory ran out"
        ) from error
    finally:
        for stream in started:
            ray.cancel(stream, force=True)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Inside, Ray is there; a connection that was there before stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of every start
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        with _own_signals():
            ray.init(address, logging_level=logging.WARNING)
    except Exception as error:  # Ray has no class of its own for this
        ray.shutdown()
        raise runs.RunError(
            f"Ray did not start, or was not reached: {runs.shortened(str(error), 200)} The run folder is kept; go on "
            "with --resume, here without --engine ray"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """What SIGTERM does here is as it was after Ray has put its own in its place."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


# In a worker --------------------------------------------------------------------------------------------------------


def _make(job: _Job, part: Part, *after: object) -> Iterator[int]:
    """Make the cells of `part`, and yield the place of each."""
    plan = _plan(job)
    cells, each = plan.cells(), _each(plan)
    (shard,) = (one for one in shards(plan) if one.number == part.shard)
    with at_work(plan, Path(job.out)) as work:
        for place in part.cells:
            run_named(work, cells[place], shard, each)
            yield place


@functools.lru_cache(maxsize=1)
def _plan(job: _Job) -> Plan:
    """The plan of a run, its models and data loaded once a process."""
    out, here = Path(job.out), socket.gethostname()
    if not (out / "recipe.json").exists() or not Path(job.folder).is_dir():
        raise runs.RunError(f"{here} sees no {out}: runs and models must lie in a folder that all machines share")
    os.chdir(job.folder)
    set_threads(job.threads)
    recipe = resolve(json.loads(job.recipe))
    assert isinstance(recipe, EvaluationRecipe)
    plan = plan_of(recipe, job.device)
    trained = {k: s.in_run(out) if isinstance(s, Retrained) else s for k, s in plan.retrained.items()}
    plan = replace(plan, retrained=trained)
    wanted, found = json.loads(job.expected), json.loads(_expected(plan))
    if others := [name for name in wanted | found if wanted.get(name) != found.get(name)]:
        raise runs.RunError(f"{here} would make other rows: it has another {', '.join(others)}. Install the same there")
    return plan
