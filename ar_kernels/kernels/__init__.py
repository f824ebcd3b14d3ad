"""Triton kernels, a launcher each. Imported only when one of them is about to run."""
