"""The public names: all there, documented, and loaded only when asked for."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import unperturb


@pytest.mark.parametrize("name", sorted(n for n in unperturb.__all__ if not n.startswith("_")))
def test_each_name_loads_and_says_what_it_is(name: str) -> None:
    thing = getattr(unperturb, name)
    assert (thing.__doc__ or "").strip()


def test_importing_unperturb_imports_nothing_heavy() -> None:
    check = (
        "import sys, unperturb; "
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'datasets', 'kornia') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_help_does_not_wait_for_torch() -> None:
    check = (
        "import sys; from typer.testing import CliRunner; from unperturb.cli import app; "
        "CliRunner().invoke(app, ['--help']); print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


@pytest.mark.parametrize("name", ["evaluate", "load_dataset", "run_evaluation", "train_classifier", "train_defense"])
def test_what_lasts_takes_a_progress_of_ones_own_or_none(name: str) -> None:
    takes = inspect.signature(getattr(unperturb, name)).parameters
    assert (takes["progress"].default, takes["quiet"].default) == (None, False)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'purify_everything'"):
        _ = unperturb.purify_everything
