"""Bits per byte, leakage, and the methods that RETRO is compared with."""
