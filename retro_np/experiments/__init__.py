"""What is run with the library: comparisons, and the demo."""
