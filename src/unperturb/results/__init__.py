"""Rows and what is made of them: results, robust accuracy, tables, figures and pages. No torch."""

from __future__ import annotations

from unperturb.results.results import Results as Results
