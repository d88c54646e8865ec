"""A protected model over HTTP: pictures in, answers and restored pictures out."""

from __future__ import annotations

from unperturb.serving.inference import load_protected
from unperturb.serving.limits import Limits
from unperturb.serving.server import running, serve

__all__ = ["Limits", "load_protected", "running", "serve"]
