"""One thread, no network, and a home folder that is thrown away: Ray and ART write into it."""

from __future__ import annotations

import os
import tempfile

_home = tempfile.TemporaryDirectory(prefix="unperturb-tests-")
os.environ.update(
    {
        "HOME": _home.name,
        "UNPERTURB_CACHE": os.path.join(_home.name, "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
    }
)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
