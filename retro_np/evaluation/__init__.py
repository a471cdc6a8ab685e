"""Bits per byte and leakage."""
