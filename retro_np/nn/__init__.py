"""Differentiable functions, each of which returns its value and its pullback (vector–Jacobian product, VJP)."""
