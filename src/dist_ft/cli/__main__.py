"""Runs the command line as `python -m dist_ft.cli`, without a script `dist-ft` on PATH."""

from dist_ft.cli.app import main

if __name__ == "__main__":
    main()
