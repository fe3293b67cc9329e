"""Serves a store with the stand-in for training, and dies before a given change of the index: STORE PORT CHANGE.

0 is never. It dies as SIGKILL does, without a word.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import uvicorn

from dist_ft.launchers.local import LocalLauncher
from dist_ft.service.api_server import Settings, build_app, open_index, uvicorn_config
from dist_ft.service.index import Index
from dist_ft.service.tuning.dispatcher import Place
from tests.helpers.paths import ROOT


def main() -> None:
    """Serve until a signal, or the change."""
    store, port, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    index = open_index(Settings(store))
    changes, writing = itertools.count(1), Index.writing

    def counted(self: Index) -> object:
        if next(changes) == last:
            os._exit(9)
        return writing(self)

    Index.writing = counted  # type: ignore[method-assign, assignment]
    launcher = LocalLauncher(store / "launched", [sys.executable, str(ROOT / "tests/helpers/fake_train.py")], 0.05)
    app = build_app(Settings(store), index, Place(launcher, 4))
    uvicorn.Server(uvicorn_config(app, "127.0.0.1", port)).run()


if __name__ == "__main__":
    main()
