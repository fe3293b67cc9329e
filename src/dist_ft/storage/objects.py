"""Opens a store by its address."""
from __future__ import annotations

from pathlib import Path

from dist_ft.storage.store import LocalStore, Store


def open_store(address: str) -> Store:
    """Returns the store at a path or a URL."""
    return LocalStore(Path(address))
