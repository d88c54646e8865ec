"""Adversarial images, made once per (data, attacked function, attack, seed) and kept for every defense."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from unperturb import runs
from unperturb.attacks.base import Attack
from unperturb.data import ImageSet

LEVELS = 65_535  # 16-bit fixed point: an 8-bit picture is kept exactly, a perturbation to 8e-6


def cache_folder() -> Path:
    """`$UNPERTURB_CACHE`, or `.cache/unperturb` in the home folder."""
    return Path(os.environ.get("UNPERTURB_CACHE") or Path.home() / ".cache" / "unperturb")


def fingerprint(module: nn.Module) -> str:
    """A hash of a module's structure, options and weights."""
    digest = hashlib.sha256(str(module).encode())
    for part in module.modules():  # options that show in no layer and no weight, such as a filter's strength
        digest.update(json.dumps(getattr(part, "spec", None), sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def to_16_bit(images: Tensor) -> Tensor:
    """Images in [0, 1] as 16-bit fixed point."""
    return (images * LEVELS).round().to(torch.int32).to(torch.uint16)


def from_16_bit(stored: Tensor) -> Tensor:
    """The float32 images that `to_16_bit` kept."""
    return stored.to(torch.int32).to(torch.float32) / LEVELS


class AdversarialStore:
    """Adversarial images on disk, the least recently used leaving first when `limit_gb` is passed.

    folder: default `adversarials` in the cache folder. limit_gb: default `$UNPERTURB_CACHE_GB` or 8.
    """

    def __init__(self, folder: Path | None = None, limit_gb: float | None = None) -> None:
        self.folder = folder or cache_folder() / "adversarials"
        self.limit = (limit_gb if limit_gb is not None else float(os.environ.get("UNPERTURB_CACHE_GB", "8"))) * 1e9

    def get(
        self,
        attack: Attack,
        function: nn.Module,
        function_key: str,
        data: ImageSet,
        rows: Tensor,
        *,
        seed: int,
        batch: int,
        device: torch.device,
    ) -> tuple[Tensor, float]:
        """Adversarial images for `rows` of `data`, `(len(rows), C, H, W)` on `device`, and seconds spent per image when
        they were made. The images are always those that were kept: what is read again is what was used first."""
        key = hashlib.sha256(f"{data.fingerprint}|{function_key}|{attack!r}|{seed}|{batch}".encode()).hexdigest()[:24]
        path = self.folder / key / f"{int(rows[0]):06d}-{len(rows):05d}.safetensors"
        if path.exists():
            try:
                kept = runs.load_tensors(path)
                os.utime(path.parent)
                return from_16_bit(kept["images"]).to(device), float(kept["seconds"])
            except runs.RunError:
                path.unlink()  # a damaged entry is only a cache miss
        start = time.perf_counter()
        parts = []
        for part in rows.split(batch):
            images, labels = data.batch(part, device)
            parts.append(to_16_bit(attack(function, images, labels, index=data.index[part], seed=seed)).cpu())
        stored = torch.cat(parts)
        seconds = (time.perf_counter() - start) / len(rows)
        runs.save_tensors(path, {"images": stored, "seconds": torch.tensor(seconds)}, {"attack": repr(attack)})
        self._prune(path.parent)
        return from_16_bit(stored).to(device), seconds

    def _prune(self, current: Path) -> None:
        sizes = {d: sum(f.stat().st_size for f in d.glob("*")) for d in self.folder.iterdir() if d.is_dir()}
        total = sum(sizes.values())
        for entry in sorted(sizes, key=lambda d: d.stat().st_mtime):
            if total <= self.limit:
                return
            if entry != current:
                shutil.rmtree(entry, ignore_errors=True)
                total -= sizes[entry]
