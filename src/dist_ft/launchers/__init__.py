"""Start runs elsewhere: as Ray jobs, on Kubernetes, with Slurm, in the background of this machine."""
