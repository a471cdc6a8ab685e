"""Plots, coloured samples and HTML pages."""
