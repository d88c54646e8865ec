"""Tables, figures and one page from rows and samples, remade from files at any time."""

from __future__ import annotations

from unperturb.report.comparison import comparison_table as comparison_table
from unperturb.report.cost import cost_figure as cost_figure
from unperturb.report.detectors import detector_table as detector_table
from unperturb.report.detectors import rejection_table as rejection_table
from unperturb.report.figures import accuracy_figure as accuracy_figure
from unperturb.report.figures import confidence_figure as confidence_figure
from unperturb.report.figures import restored_figure as restored_figure
from unperturb.report.figures import save as save
from unperturb.report.page import write_report as write_report
from unperturb.report.tables import accuracy_table as accuracy_table
from unperturb.report.tables import conditions as conditions
from unperturb.report.tables import quality_table as quality_table
from unperturb.report.tables import wide_table as wide_table
from unperturb.report.tables import worst_case as worst_case
from unperturb.report.text import compare as compare
from unperturb.report.text import table as table
from unperturb.report.text import to_markdown as to_markdown
