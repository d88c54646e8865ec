"""`save_pretrained`, `from_pretrained` and `push_to_hub`: run folders, here or on the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from abc import abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

from unperturb import zoo
from unperturb.runs import RunError, write_text

FILES = ["*.json", "*.safetensors", "README.md"]  # all that is sent or fetched: nothing in it is ever run
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# By name, as the public names are: what reads these folders stands above, and is a room each.
_READ_BY = {"classifier.json": ("classifiers", "load_classifier"), "defense.json": ("defenses", "load_defense")}
CARD = """\
---
library_name: unperturb
tags: [image-classification, adversarial-robustness]
---

Made with unperturb: weights (safetensors) and what rebuilds the model (JSON), checked by a digest.

```python
import unperturb as up

model = up.{kind}.from_pretrained("{repo}")
```
"""


class Pretrained:
    """What a folder rebuilds, in the format of run folders.

    A class of this kind writes `_save`, and names in `_written` the files that it makes. kind: its public name.
    """

    kind: ClassVar[str]
    _written: ClassVar[tuple[str, ...]]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write what `from_pretrained` rebuilds this from, and return the folder: weights as safetensors and JSON with
        their digest. A `Protected` is two such folders in one, `classifier` and `defense`.

        Raises `RunError` or `ValueError` where only the code that made it rebuilds it, such as a wrapped model, and
        where the folder holds anything else.
        """
        folder = Path(folder)
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if strangers := sorted(there - {*self._written, "README.md"}):
            raise RunError(f"{folder} already holds something else ({', '.join(strangers[:3])}); choose another folder")
        self._save(folder)
        return folder

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Self:
        """What `save_pretrained` or a training wrote, in eval mode, on the CPU.

        source: a folder, `zoo:NAME`, or `owner/name` on the hub. revision: a branch, a tag or a commit there; only a
        commit stays the same. Nothing but JSON and safetensors is fetched, and nothing in it is run.

        Raises `RunError` where there is no such thing, or it is of another kind or damaged.
        """
        found = _rebuilt(_fetched(source, revision), str(source))
        if not isinstance(found, cls):
            raise RunError(f"{source} holds a {type(found).__name__}, not a {cls.__name__}")
        return found

    def push_to_hub(self, repo: str, *, private: bool = False, message: str = "Upload by unperturb") -> str:
        """Send what `save_pretrained` writes, and a short card, to `owner/name` on the hub, which is made if it is not
        there; returns the commit's address. The hub knows you by `hf auth login` or $HF_TOKEN."""
        from huggingface_hub import HfApi

        if not _HUB_ID.fullmatch(repo):
            raise RunError(f"{repo!r} is no repository of the hub; expected owner/name")
        with tempfile.TemporaryDirectory() as place:
            folder = self.save_pretrained(Path(place) / "model")
            write_text(folder / "README.md", CARD.format(kind=self.kind, repo=repo))
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            sent = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, allow_patterns=FILES)
        return str(sent.commit_url)

    @abstractmethod
    def _save(self, folder: Path) -> None:
        """Write the files that `_written` names; each kind of model does."""


def _fetched(source: str | Path, revision: str | None) -> Path:
    """The folder that `source` means; from the hub, its files in that library's cache."""
    folder = Path(zoo.find(source))
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(str(source)):
        raise RunError(f"{source} is neither a folder here nor owner/name on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"there is no folder {source} here, and it could not be fetched from the hub: {said}") from error


def _rebuilt(folder: Path, source: str) -> Any:
    parts = [folder / "classifier", folder / "defense"]
    if all(part.is_dir() for part in parts):
        protected = import_module("unperturb.defenses").Protected
        return protected(*(_rebuilt(part, f"{source}/{part.name}") for part in parts)).eval()
    for file, (room, load) in _READ_BY.items():
        if (folder / file).is_file():
            return getattr(import_module(f"unperturb.{room}"), load)(folder)
    raise RunError(f"{source} holds no classifier, no defense and no protected model: none of {', '.join(_READ_BY)}")
