"""Evaluation: adversarial images made once, cells to rows."""
