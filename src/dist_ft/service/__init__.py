"""The fine-tuning service: the control plane behind `dist-ft serve-api`."""
