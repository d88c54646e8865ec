"""How much a service takes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from unperturb.data.pictures import MAX_PIXELS


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a service takes on; above it, it refuses.

    batch: images that the model sees at once. wait_ms: the longest that the first of them waits for others. queue:
    requests that are taken and not yet answered. timeout: seconds from taking one to its answer. max_bytes: of a
    request's body. max_pixels: of a picture, as its header has them. Raises `ValueError` for what is no limit.
    """

    batch: int = 32
    wait_ms: float = 5.0
    queue: int = 128
    timeout: float = 10.0
    max_bytes: int = 8_000_000
    max_pixels: int = 16_000_000

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "max_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.wait_ms < 60_000:
            raise ValueError(f"wait_ms must be from 0 to 60,000 milliseconds, not {self.wait_ms}")
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ValueError(f"timeout must be a number of seconds above 0, not {self.timeout}")
        if self.max_pixels > MAX_PIXELS:
            raise ValueError(f"max_pixels must be at most {MAX_PIXELS:,}, not {self.max_pixels:,}")
