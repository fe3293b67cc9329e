"""The records of a run: commits, ledger, watchdog; torch-free."""
