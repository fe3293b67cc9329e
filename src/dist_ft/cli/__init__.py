"""The command line: `main` is what the script `dist-ft` calls."""

from dist_ft.cli.app import main

__all__ = ["main"]
