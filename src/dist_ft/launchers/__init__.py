"""How a run is started elsewhere: Ray jobs, Kubernetes, Slurm. Empty until those launchers are built."""
