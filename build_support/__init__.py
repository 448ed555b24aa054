"""What building the package needs to find out: which torch, which CUDA toolkit, how many jobs."""
