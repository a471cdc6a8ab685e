"""Plots, coloured samples, the HTML page."""
