"""Lets `python -m dist_ft.cli` be the command, where no script `dist-ft` need be on PATH."""

from dist_ft.cli.app import main

if __name__ == "__main__":
    main()
