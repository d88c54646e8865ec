"""Rows and what is made of them: results, robust accuracy, tables, figures and pages. No torch."""

from __future__ import annotations

from unperturb.results.results import Results as Results
from unperturb.results.robust import RobustAccuracy as RobustAccuracy
from unperturb.results.robust import paper_accuracy as paper_accuracy
from unperturb.results.robust import robust_accuracy as robust_accuracy
