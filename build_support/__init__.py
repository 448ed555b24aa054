"""Finds out what a build needs to know: which torch, which CUDA toolkit, how many jobs."""
