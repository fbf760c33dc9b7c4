"""Programs for CUDA devices."""
