"""The implementations that the benchmark compares the package with; one module each."""
