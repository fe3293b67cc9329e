"""The books of a run: commits, ledger, watchdog; torch-free."""
