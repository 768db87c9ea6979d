"""Starts a run on a machine, a SLURM allocation or a Ray cluster, and checks the nodes before it does."""
