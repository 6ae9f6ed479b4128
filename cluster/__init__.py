"""Where tasks run: this process, local workers, a Dask scheduler, or SLURM jobs."""
