"""Starts jaxlm under schedulers: `python -m launch.slurm --help`. Environment only."""
