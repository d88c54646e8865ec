"""Rows and what is made of them: results, robust accuracy, tables, figures and pages. No torch."""

from __future__ import annotations

from unperturb.results.comparison import comparison_table as comparison_table
from unperturb.results.comparison import paired_table as paired_table
from unperturb.results.render import compare as compare
from unperturb.results.render import compare_pair as compare_pair
from unperturb.results.render import table as table
from unperturb.results.results import Results as Results
from unperturb.results.robust import RobustAccuracy as RobustAccuracy
from unperturb.results.robust import paper_accuracy as paper_accuracy
from unperturb.results.robust import robust_accuracy as robust_accuracy
from unperturb.results.tables import accuracy_table as accuracy_table
from unperturb.results.tables import detector_table as detector_table
from unperturb.results.tables import quality_table as quality_table
from unperturb.results.tables import rejection_table as rejection_table
from unperturb.results.tables import robust_table as robust_table
