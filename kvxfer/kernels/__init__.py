"""Kernels; Triton is imported when one is first run."""
