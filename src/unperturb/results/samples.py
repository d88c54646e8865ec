"""Samples: a few fixed images of each cell, as they were, attacked and restored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.results.schema import AGAIN, CELL_KEYS, of_today
from unperturb.runs import RunError, load_tensors, read_metadata, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

# Of each image of a sample: its last dimensions and their type.
SAMPLE_TENSORS = {
    **dict.fromkeys(("clean", "adversarial", "restored", "restored_clean"), ("uint8", (None, None, None, None))),
    **dict.fromkeys(("index", "label"), ("int64", (None,))),
    "confidence": ("float32", (None, 4)),
    "prediction": ("int64", (None, 4)),
}


def write_samples(path: Path, tensors: Mapping[str, Tensor], cell: Mapping[str, Any]) -> None:
    """A few fixed images of one cell for the figures.

    clean, adversarial, restored, restored_clean: `(M, C, H, W)` uint8. index, label: `(M,)`. confidence, prediction:
    `(M, 4)`, of the true label and the winner (-1: none), for f(x), f(x_adv), f(G(x)), f(G(x_adv)). cell: the values of
    `CELL_KEYS` and "class_names".
    """
    save_tensors(path, {k: tensors[k] for k in SAMPLE_TENSORS}, {"cell": json.dumps(dict(cell))})


def read_sample(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`(cell, tensors)` of one file of samples (see `write_samples`); raises `RunError` where it is anything else."""
    tensors = load_tensors(path, expect=SAMPLE_TENSORS)
    try:
        cell = of_today(json.loads(read_metadata(path).get("cell", "")))
        lacking = [k for k in (*CELL_KEYS, "class_names") if k not in cell]
    except (ValueError, TypeError, LookupError, AttributeError):
        lacking = ["cell"]
    if lacking:
        raise RunError(f"{path} does not say of which {lacking[0]} its images are; delete it and {AGAIN}")
    if len({len(tensor) for tensor in tensors.values()} | {len(tensors["clean"])}) > 1:
        raise RunError(f"{path} holds more of one thing than of another; delete it and {AGAIN}")
    return cell, tensors


def read_samples(run: str | Path) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """`(cell, tensors)` of every cell of a run folder that has samples (see `write_samples`); raises `RunError` for a
    file that is damaged, or of a cell that the folder has no rows of."""
    found = []
    for file in sorted(Path(run).glob("samples/*.safetensors")):
        if (Path(run) / "rows").is_dir() and not (Path(run) / "rows" / file.stem).is_dir():
            raise RunError(f"{file} is of a cell that {run} has no rows of; delete it")
        found.append(read_sample(file))
    return found
