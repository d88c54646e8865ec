"""Randomness that belongs to the image: draws by counter from (seed, index, step).

A draw depends on nothing but its own three numbers, so batch size, sharding and resuming change nothing
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the mixer is splitmix64's finalizer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _mix(z: Tensor) -> Tensor:
    # Torch shifts signed integers arithmetically, hence the masks.
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _bits(seed: int, index: Tensor, step: int, count: int) -> Tensor:
    """`(N, count)` int64 with all 64 bits mixed."""
    start = _mix(torch.tensor([seed, step], dtype=torch.int64, device=index.device) + _GOLDEN)
    key = _mix(_mix(index.to(torch.int64) * _GOLDEN + start[0]) ^ start[1])
    return _mix(key[:, None] + torch.arange(1, count + 1, device=index.device) * _GOLDEN)


def uniform(seed: int, index: Tensor, step: int, shape: Sequence[int]) -> Tensor:
    """`(N, *shape)` float32 in [0, 1), drawn for each image of `index` `(N,)`."""
    bits = _bits(seed, index, step, math.prod(shape))
    return (((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24).reshape(len(index), *shape)


def normal(seed: int, index: Tensor, step: int, shape: Sequence[int]) -> Tensor:
    """`(N, *shape)` standard normal float32, drawn for each image of `index` `(N,)` (Box and Muller 1958)."""
    bits = _bits(seed, index, step, math.prod(shape))
    radius = ((((bits >> 40) & 0xFFFFFF) + 1).to(torch.float32) * 2.0**-24).log().mul(-2).sqrt()
    angle = ((bits >> 16) & 0xFFFFFF).to(torch.float32) * (2.0**-24 * 2 * math.pi)
    return (radius * angle.cos()).reshape(len(index), *shape)


def integers(seed: int, index: Tensor, step: int, high: int, count: int = 1) -> Tensor:
    """`(N, count)` int64 in [0, high), drawn for each image of `index` `(N,)`."""
    return ((_bits(seed, index, step, count) >> 16) & 0xFFFFFFFFFF) % high


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """A permutation of `range(n)` `(n,)` on the CPU, fixed by (seed, epoch)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator)
