"""The playground: one image, one attacker, one purifier, on a page in the browser."""

from __future__ import annotations

from unperturb.app.server import run_app, running

__all__ = ["run_app", "running"]
