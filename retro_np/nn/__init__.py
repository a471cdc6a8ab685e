"""Differentiable pieces: each returns its value and its pullback (vector–Jacobian product)."""
