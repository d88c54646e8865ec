"""Models that are kept and come back the same: in a folder, and on a hub whose two calls are answered from a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
from torch import nn

import unperturb as up
from unperturb.defenses import Defense, create_defense, load_defense
from unperturb.defenses.base import Protected
from unperturb.runs import Outcome, RunError

ROOT = Path(__file__).resolve().parent.parent
IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def classifier() -> up.Classifier:
    torch.manual_seed(3)
    return up.create_classifier("convnet", channels=1, size=8, classes=4, mean=[0.3], std=[0.4]).eval()


def purifier() -> Defense:
    torch.manual_seed(4)
    made = create_defense("magnet", channels=1, structure=[3, "average", 3], detectors=[{"error": 1, "structure": [2]}])
    made.limits.fill_(0.25)
    made.outcome = Outcome(pflop=0.5, seconds=2.0, validation={"clean": 0.9})
    return made.eval()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was sent lies here; the calls must be such as the real ones take."""
    place = tmp_path / "hub"

    def upload(self: Any, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **_: Any) -> Any:
        assert (place / repo_id).is_dir(), "a repository is made before it is filled"
        files = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (place / repo_id / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / file, place / repo_id / file)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def create(self: Any, repo_id: str, **options: Any) -> None:
        assert options == {"private": True, "exist_ok": True}
        (place / repo_id).mkdir(parents=True)

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision == "abc"
        shutil.copytree(place / repo_id, tmp_path / "cache")
        for path in [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]:
            name = str(path.relative_to(tmp_path / "cache"))
            if not list(huggingface_hub.utils.filter_repo_objects([name], allow_patterns=allow_patterns)):
                path.unlink()
        return str(tmp_path / "cache")

    def like(real: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        return mock.create_autospec(real, side_effect=fake)

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", like(huggingface_hub.HfApi.upload_folder, upload))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", like(huggingface_hub.HfApi.create_repo, create))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", like(huggingface_hub.snapshot_download, download))
    return place


def test_a_classifier_comes_back(tmp_path: Path) -> None:
    made = classifier()
    assert made.save_pretrained(tmp_path / "net") == tmp_path / "net"
    assert {p.name for p in (tmp_path / "net").iterdir()} == {"classifier.json", "model.safetensors"}
    for again in (up.Classifier.from_pretrained(tmp_path / "net"), up.load_classifier(tmp_path / "net")):
        assert not again.training
        assert torch.equal(again(IMAGES), made(IMAGES))


def test_a_purifier_comes_back_with_its_thresholds_and_its_cost(tmp_path: Path) -> None:
    made = purifier()
    made.save_pretrained(str(tmp_path / "gan"))
    for again in (Defense.from_pretrained(tmp_path / "gan"), load_defense(tmp_path / "gan")):
        assert type(again) is type(made)
        assert torch.equal(again(IMAGES), made(IMAGES))
        assert torch.equal(again.thresholds, made.thresholds)
        assert again.outcome == made.outcome
    again.save_pretrained(tmp_path / "gan")  # over itself


def test_a_protected_model_comes_back(tmp_path: Path) -> None:
    made = Protected(classifier(), purifier())
    made.save_pretrained(tmp_path / "both")
    again = Protected.from_pretrained(tmp_path / "both")
    assert torch.equal(again(IMAGES), made(IMAGES))
    assert torch.equal(again.rejects(IMAGES), made.rejects(IMAGES))
    # Each half is a run folder.
    assert torch.equal(up.load_classifier(tmp_path / "both" / "classifier")(IMAGES), made.classifier(IMAGES))
    assert torch.equal(up.load_defense(tmp_path / "both" / "defense")(IMAGES), made.defense(IMAGES))


def test_the_zoo_and_run_folders_are_of_the_same_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    images = torch.rand(2, 1, 28, 28)
    found = up.Defense.from_pretrained("zoo:protect-mnist")
    assert torch.equal(found(images), load_defense("zoo:protect-mnist")(images))
    assert up.Classifier.from_pretrained("zoo/mnist-lenet5").spec == up.load_classifier("zoo:mnist-lenet5").spec


def test_damage_is_found(tmp_path: Path) -> None:
    Protected(classifier(), purifier()).save_pretrained(tmp_path)
    path = tmp_path / "classifier" / "model.safetensors"
    packed = bytearray(path.read_bytes())
    packed[-1] ^= 1
    path.write_bytes(packed)
    with pytest.raises(RunError, match="is damaged: its contents do not match their digest"):
        Protected.from_pretrained(tmp_path)


def test_what_is_not_there_or_is_something_else(tmp_path: Path) -> None:
    purifier().save_pretrained(tmp_path / "gan")
    for kind, source, said in (
        (up.Classifier, tmp_path / "gan", "holds a MagNet, not a Classifier"),
        (up.Protected, tmp_path / "gan", "holds a MagNet, not a Protected"),
        (up.Protected, tmp_path, "holds no classifier, no defense and no protected model"),
        (up.Protected, "nowhere", "nowhere is neither a folder here nor owner/name on the hub"),
        (up.Protected, "../a/b", "is neither a folder here nor owner/name on the hub"),
        (up.Protected, "no/where", "there is no folder no/where here, and it could not be fetched from the hub: "),
    ):
        with pytest.raises(RunError, match=said):
            kind.from_pretrained(source)


def test_what_no_folder_rebuilds(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(RunError, match="only a classifier of create_classifier rebuilds from a folder"):
        up.wrap(net).save_pretrained(tmp_path / "a")
    with pytest.raises(RunError, match="not Sequential: save the purifier alone"):
        Protected(net, purifier()).save_pretrained(tmp_path / "b")

    class Mine(up.Defense):
        pass

    with pytest.raises(ValueError, match="only a defense made by create_defense"):
        Mine().save_pretrained(tmp_path / "c")
    assert list(tmp_path.rglob("*.json")) == []


def test_no_folder_of_something_else_is_written_into(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path / "net")
    before = (tmp_path / "net" / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"already holds something else \(classifier.json\)"):
        purifier().save_pretrained(tmp_path / "net")
    with pytest.raises(RunError, match="already holds something else"):
        Protected(classifier(), purifier()).save_pretrained(tmp_path / "net")
    (tmp_path / "net" / "recipe.json").write_text("{}")  # a run: its weights are its own
    with pytest.raises(RunError, match=r"already holds something else \(recipe.json\)"):
        classifier().save_pretrained(tmp_path / "net")
    assert (tmp_path / "net" / "model.safetensors").read_bytes() == before


def test_to_the_hub_and_back(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = Protected(classifier(), purifier())
    assert made.push_to_hub("me/mine", private=True) == "https://hub/me/mine/commit/1"
    sent = sorted(str(p.relative_to(hub / "me" / "mine")) for p in (hub / "me" / "mine").rglob("*") if p.is_file())
    halves = [f"{part}/{file}" for part in ("classifier", "defense") for file in (f"{part}.json", "model.safetensors")]
    assert sent == sorted(["README.md", *halves])
    assert 'up.Protected.from_pretrained("me/mine")' in (hub / "me" / "mine" / "README.md").read_text()
    (hub / "me" / "mine" / "pytorch_model.bin").write_bytes(b"a pickle")
    again = up.Protected.from_pretrained("me/mine", revision="abc")
    assert torch.equal(again(IMAGES), made(IMAGES))
    assert not list((tmp_path / "cache").rglob("*.bin"))
    with pytest.raises(RunError, match="expected owner/name"):
        made.push_to_hub("mine")
