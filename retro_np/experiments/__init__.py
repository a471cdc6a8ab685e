"""Experiments at small scale, one file for each figure or table of the paper, and the demo."""
