"""One thread (UNPERTURB_TEST_THREADS asks for more), no network, a home folder that is thrown away: Ray and ART write
into it."""

from __future__ import annotations

import os
import tempfile

_threads = os.environ.get("UNPERTURB_TEST_THREADS", "1")
_home = tempfile.TemporaryDirectory(prefix="unperturb-tests-")
os.environ.update(
    {
        "HOME": _home.name,
        "UNPERTURB_CACHE": os.path.join(_home.name, "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": _threads,
        "COLUMNS": "100",  # of a terminal: what is printed must not hang on the one that the tests run in
    }
)
os.environ.pop("UNPERTURB_ZOO", None)  # the tests' zoo is that of the clone

import functools

import pytest
import torch

from unperturb.data import Splits, load_dataset
from unperturb.devices import Speed

torch.set_num_threads(int(_threads))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast a large convolution is on this machine, and what a step costs, is beside the point of most tests, and
    takes longer than their trainings."""
    from unperturb.training import loop

    known = functools.cache(lambda device="cpu": Speed({("float32", "contiguous"): 10.0}))
    monkeypatch.setattr(loop, "probe", known)
    monkeypatch.setattr(loop, "flop_per_image", lambda _: 1e6)


@pytest.fixture(scope="session")
def tiny_digits() -> Splits:
    """The embedded digits at 8x8."""
    return load_dataset("digits", size=8)
