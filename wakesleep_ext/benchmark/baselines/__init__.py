"""The baselines of the benchmark. Each module contains one implementation."""
