"""Types of the file that setup.py writes."""

TORCH_VERSION: str
CUDA_VERSION: str | None
CUDA_ARCHITECTURES: str | None
REASON: str
