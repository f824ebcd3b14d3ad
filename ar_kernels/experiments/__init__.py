"""What a reader of the paper wants to run: python -m ar_kernels.experiments --help. docs/experiments.md explains."""
