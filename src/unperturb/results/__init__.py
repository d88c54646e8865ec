"""Rows and what is made of them: results, robust accuracy, tables, figures and pages. No torch."""
