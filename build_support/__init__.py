"""Chooses the torch, the CUDA toolkit and the number of parallel jobs for a build."""
