"""How a run is started elsewhere: Ray jobs, Kubernetes, Slurm, this machine."""
