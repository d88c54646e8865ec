"""How certificates are made: shard by shard, each kept, so that a stopped run goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unperturb import runs, screen
from unperturb.data import as_image_set
from unperturb.devices import pick_device
from unperturb.evaluation.behavior import recognize
from unperturb.evaluation.checks import check_number, subset, system_of
from unperturb.evaluation.plan import Plan
from unperturb.evaluation.run import fingerprints

if TYPE_CHECKING:
    import pandas as pd

IMAGES = 500  # that are certified where nobody says how many
ROWS = "certificates"  # the folder of a run that holds them, a file a shard

# Rows of the data, and what is left to do for them -> a line an image.
Certify = Callable[[Tensor], "pd.DataFrame"]


def plan_for(model: Any, data: Any, n: int | None, name: str, device: str) -> Plan:
    """One system and the images that it is to be certified on; raises `ValueError` for what does not fit."""
    images = as_image_set(data)
    images = subset(images, min(IMAGES, len(images)) if n is None else n)
    plan = Plan(images, [system_of(model, name)], {}, device=pick_device(device))
    plan.check()
    return plan


def in_shards(
    plan: Plan,
    certified: Certify,
    settings: Mapping[str, Any],
    *,
    batch: int,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """What `certified` says of all images of `plan`, `batch` at once; kept in the run folder `out`, if there is one.

    settings: what fixes the run. Raises `RunError` where `out` holds another one.
    """
    import pandas as pd

    check_number("batch", batch, 1)
    check_number("seed", seed, 0)
    found, parts = [], torch.arange(len(plan.data)).split(batch)
    with contextlib.ExitStack() as stack:
        stack.enter_context(plan.at_work())
        if out is not None:
            out = Path(out)
            stack.enter_context(runs.lock(out))
            runs.open_run(out, {**settings, "fingerprints": fingerprints(plan)}, resume=resume)
            recognize(plan, out)
        update = stack.enter_context(screen.shown("certifying", progress, quiet))
        for number, rows in enumerate(parts):
            path = None if out is None else out / ROWS / f"{number:04d}.parquet"
            if path is not None and path.exists():
                found.append(pd.read_parquet(path))
            else:
                with plan.drawing(seed * 1_000_003 + number):
                    found.append(certified(rows))
                if path is not None:
                    runs.write_atomically(path, found[-1].to_parquet)
            if update is not None:
                update(number + 1, len(parts))
    return pd.concat(found, ignore_index=True)
