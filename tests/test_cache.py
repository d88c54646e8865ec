"""The cache: its size by kind, and that clearing it takes nothing else along."""

from __future__ import annotations

from pathlib import Path

import pytest

from unperturb.cache import KINDS, cache_contents, clear_cache
from unperturb.data import load_dataset
from unperturb.registry import UnknownNameError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with something of each kind, in a folder that holds a thesis too."""
    monkeypatch.setenv("UNPERTURB_CACHE", str(tmp_path))
    load_dataset("digits", size=8)
    for name, size in (
        ("data/hub/.unperturb", 0),
        ("data/hub/parquet/a.arrow", 300),
        ("data/backup-202511271530/thesis.txt", 7),
        (f"adversarials/{'0a' * 12}/000000-00010.safetensors", 5000),
        ("data/thesis/chapter.tex", 7),
        ("adversarials/photos/me.png", 7),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    return tmp_path


def test_sizes_by_kind(root: Path) -> None:
    found = {kept.kind: kept for kept in cache_contents()}
    assert list(found) == list(KINDS)
    assert found["hub"].size == 300
    assert (found["adversarials"].files, found["adversarials"].size) == (1, 5000)
    pixels = 1797 * (64 + 8)  # a byte a value, and the labels
    assert pixels < found["data"].size < pixels + 2000
    clear_cache(["adversarials"])
    assert {kept.kind: kept.size > 0 for kept in cache_contents()} == {"data": True, "hub": True, "adversarials": False}


def test_clearing_takes_what_is_ours_and_nothing_else(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "kept.txt").write_text("mine")
    (root / "data" / "linked-0123456789ab").symlink_to(elsewhere)
    clear_cache()
    assert not sum(kept.files for kept in cache_contents())
    assert (root / "data/thesis/chapter.tex").exists()
    assert (root / "data/backup-202511271530/thesis.txt").exists()  # with nothing of ours in it
    (root / "data/hub/of-others").mkdir(parents=True)
    clear_cache(["hub"])
    assert (root / "data/hub/of-others").exists()  # a hub folder that we did not make
    assert (root / "adversarials/photos/me.png").exists()
    assert (elsewhere / "kept.txt").read_text() == "mine"
    assert len(load_dataset("digits", size=8).test) == 360  # made again


def test_an_unknown_kind_and_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_CACHE", str(tmp_path / "nothing"))
    assert [kept.size for kept in cache_contents()] == [0, 0, 0]
    with pytest.raises(UnknownNameError, match="Did you mean 'data'"):
        clear_cache(["dat"])
