"""Figures drawn from result files alone: `python -m paper_figures`."""
