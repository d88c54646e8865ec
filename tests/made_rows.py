"""Rows for tests: made by hand, or drawn from a seeded generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from unperturb.results import schema


def columns(n: int, **given: Any) -> dict[str, Any]:
    """Every column of `n` rows, dull where not given: of an undefended system under an oblivious attacker."""
    blank: dict[str, Any] = {
        k: {"string": "", "list<float32>": [[]] * n, "bool": False}.get(v, 0) for k, v in schema.ROW_COLUMNS.items()
    }
    blank |= {"split": "test", "system": "undefended", "knowledge": "oblivious", "norm": "linf", "eps": 0.3}
    unrecorded = {k: unknown for k, (_, unknown) in schema.ADDED.items()}
    return blank | unrecorded | {"schema": schema.SCHEMA_VERSION, "index": np.arange(n), "linf": 0.3} | given


def frame(*cells: dict[str, Any]) -> pd.DataFrame:
    """Rows from cells; `right_clean` and `right_adv` say which images the system gets right."""
    parts = []
    for cell in cells:
        cell = {"attack": "fgsm", "attack_repr": "FGSM()", "dataset": "digits", "classifier": "a"} | cell
        cell["defended"] = cell.get("defended", cell.get("system", "undefended") != "undefended")
        if np.isnan(cell.get("eps", 0.3)):
            cell["norm"] = cell.get("norm", "")
        right = {k: np.array(cell.pop(f"right_{k}"), bool) for k in ("clean", "adv")}
        seen = {f"pred_{v}{k}": np.where(right[k], 1, 2) for v in ("", "pure_") for k in right}
        parts.append(pd.DataFrame(columns(len(right["adv"]), label=1, **seen) | cell))
    return pd.concat(parts, ignore_index=True).astype({"eps": "float32", "linf": "float32", "l2": "float32"})


def only(table: pd.DataFrame, **where: Any) -> Any:
    """The one line of `table` that has these values."""
    found = table[(table[list(where)] == list(where.values())).all(axis=1)]
    assert len(found) == 1, found
    return found.iloc[0]
