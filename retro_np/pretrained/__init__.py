"""Models that are already trained: those bundled with the package."""
