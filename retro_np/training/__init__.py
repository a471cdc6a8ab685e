"""Batches, AdamW, the schedule, checkpoints and the loop."""
