"""What a reader of the paper wants to run: python -m ar_kernels.experiments demo."""
