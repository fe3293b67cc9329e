"""Keeps the records of a run: commits, ledger, watchdog. Torch-free."""
