"""Adversarial images, made once per (data, attacked function, attack, seed) and kept for every defense."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unperturb import runs
from unperturb.attacks.base import Attack
from unperturb.data import ImageSet
from unperturb.evaluation.identity import code

LEVELS = 65_535  # 16-bit fixed point: an 8-bit picture is kept exactly, a perturbation to 8e-6
COUNTS = ("zero_gradients", "gradients", "nonfinite")


def cache_folder() -> Path:
    """`$UNPERTURB_CACHE`, or `.cache/unperturb` in the home folder."""
    return Path(os.environ.get("UNPERTURB_CACHE") or Path.home() / ".cache" / "unperturb")


def cache_limit() -> float:
    """How many bytes of adversarial images are kept: `$UNPERTURB_CACHE_GB` or 8 gigabytes; raises `ValueError`."""
    text = os.environ.get("UNPERTURB_CACHE_GB") or "8"
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise ValueError(f"UNPERTURB_CACHE_GB is {text!r}; expected gigabytes, a number of 0 or more such as 8")
    return limit * 1e9


def to_16_bit(images: Tensor) -> Tensor:
    """Images in [0, 1] as 16-bit fixed point."""
    return (images * LEVELS).round().to(torch.int32).to(torch.uint16)


def from_16_bit(stored: Tensor) -> Tensor:
    """The float32 images that `to_16_bit` kept."""
    return stored.to(torch.int32).to(torch.float32) / LEVELS


@dataclass(frozen=True)
class Adversarials:
    """images: `(N, C, H, W)` in [0, 1]. The rest `(N,)` on the CPU: seconds: float32, what an image took when it was
    made. zero_gradients, gradients, nonfinite: int32, how often an image's gradient was exactly zero, was asked for,
    and its logits were not finite."""

    images: Tensor
    seconds: Tensor
    zero_gradients: Tensor
    gradients: Tensor
    nonfinite: Tensor


class AdversarialStore:
    """Adversarial images on disk, the least recently used leaving first when `limit_gb` is passed.

    Any number of processes may use one folder: what another has cleared away is made again. folder: default
    `adversarials` in the cache folder. limit_gb: default `cache_limit()`.
    """

    def __init__(self, folder: Path | None = None, limit_gb: float | None = None) -> None:
        self.folder = folder or cache_folder() / "adversarials"
        self.limit = cache_limit() if limit_gb is None else limit_gb * 1e9

    def get(
        self,
        attack: Attack,
        function: nn.Module,
        key: str,
        data: ImageSet,
        rows: Tensor,
        *,
        seed: int,
        batch: int,
        device: torch.device,
        start: Tensor | None = None,
    ) -> Adversarials:
        """Adversarial images for `rows` of `data`, on `device`; always those that were kept: what is read again is what
        was used first. key: of the attack and the function together (`identity.identify`). start: `(len(rows), C, H,
        W)` in [0, 1], images that the attack is to begin at (default: where it begins by itself)."""
        parts = f"{code()}|{data.fingerprint}|{key}|{attack!r}|{seed}|{batch}"
        index = _digest(data.index[rows])
        about = {"key": hashlib.sha256(parts.encode()).hexdigest()[:24], "index": index, "attack": repr(attack)}
        name = f"{int(rows[0]):06d}-{len(rows):05d}-{index[:8]}"
        if start is not None:
            about["start"] = _digest(to_16_bit(start).cpu())
            name += f"-{about['start'][:8]}"
        path = self.folder / about["key"] / f"{name}.safetensors"
        expect = {"images": ("uint16", (len(rows), *data.shape)), "seconds": ("float32", ())}
        expect |= {count: ("int32", (len(rows),)) for count in COUNTS}
        try:
            kept = runs.load_tensors(path, require_digest=True, expect=expect, metadata=about)
            with contextlib.suppress(OSError):  # cleared away since by another process
                os.utime(path.parent)
        except runs.RunError:  # not there, damaged, or another's
            kept = _make(attack, function, data, rows, seed, batch, device, start)
            self._keep(path, kept, about)
            self._prune(path.parent)
        counts = {count: kept[count] for count in COUNTS}
        return Adversarials(from_16_bit(kept["images"]).to(device), kept["seconds"].expand(len(rows)), **counts)

    def entries(self) -> list[tuple[Path, int, float]]:
        """(folder, bytes, when it was last used) of each attack that is kept."""
        found = []
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):  # cleared away meanwhile
                size = sum(file.stat().st_size for file in folder.iterdir())
                found.append((folder, size, folder.stat().st_mtime))
        return found

    def _keep(self, path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        for last in (False, False, True):  # another process may clear the folder away between its making and the file
            try:
                runs.save_tensors(path, tensors, about)
                return
            except (runs.RunError, OSError) as error:
                if last:
                    warnings.warn(f"adversarial images are not kept for another time: {error}", stacklevel=4)

    def _prune(self, current: Path) -> None:
        entries = sorted(self.entries(), key=lambda entry: entry[2])
        total = sum(size for _, size, _ in entries)
        for folder, size, _ in entries:
            if total <= self.limit:
                return
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:24]


def _make(
    attack: Attack,
    function: nn.Module,
    data: ImageSet,
    rows: Tensor,
    seed: int,
    batch: int,
    device: torch.device,
    start: Tensor | None,
) -> dict[str, Tensor]:
    began = time.perf_counter()
    found: dict[str, list[Tensor]] = {name: [] for name in ("images", *COUNTS)}
    starts = [None] * len(rows) if start is None else start.split(batch)
    for part, begin in zip(rows.split(batch), starts):
        images, labels = data.batch(part, device)
        more: dict[str, Any] = {} if begin is None else {"start": begin.to(device)}
        adversarial, counter = attack.solve(function, images, labels, index=data.index[part], seed=seed, **more)
        found["images"].append(to_16_bit(adversarial).cpu())
        for count in COUNTS:
            found[count].append(getattr(counter, count).to(torch.int32).cpu())
    seconds = (time.perf_counter() - began) / len(rows)
    return {name: torch.cat(parts) for name, parts in found.items()} | {"seconds": torch.tensor(seconds)}
