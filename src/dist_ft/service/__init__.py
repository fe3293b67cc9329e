"""The fine-tuning service: the control plane behind `dist-ft serve-api`."""

DATABASE_ENV = "DIST_FT_DATABASE"
"""Variable with the URL of the index: a URL may hold a password, and everybody sees a command line."""
