"""Training: which sequences a step sees, the curriculum, and a resumable loop."""
