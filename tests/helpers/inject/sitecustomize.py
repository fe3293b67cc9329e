"""Put on PYTHONPATH of a run, makes one rank go wrong in one step, once: what cannot be done from outside.

`DIST_FT_TEST_FAULT` is `{"kind", "rank", "step", "once"}` as JSON; `once` is a file that says it has happened.
Everything but the misfortune itself is the real thing.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path

MODULE = "dist_ft.train.loop"


class _Wrapper(importlib.abc.MetaPathFinder):
    """Wraps the step function when its module is imported, which only ranks and fork servers do."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module._step = _wrap(module._step)

        spec.loader.exec_module = exec_module
        return spec


def _wrap(step_function):
    def step(parts, link, step, recent_losses, is_saving):
        fault = json.loads(os.environ["DIST_FT_TEST_FAULT"])
        once = Path(fault["once"])
        if (parts.spec.rank, step + 1) == (fault["rank"], fault["step"]) and not once.exists():
            once.write_text("done")
            _KINDS[fault["kind"]](parts)
        return step_function(parts, link, step, recent_losses, is_saving)

    return step


def _raise(parts):
    raise RuntimeError("an exception that nobody foresaw")


def _exit(parts):
    os._exit(0)


def _allocate(parts):
    import torch

    torch.empty(1 << 46)


def _hang(parts):
    """The others wait for this rank in a collective."""
    threading.Event().wait()


def _flip(parts):
    """A fault of the hardware: numbers in this rank's memory are no numbers any more."""
    import torch

    with torch.no_grad():
        for parameter in parts.engine.module.parameters():
            getattr(parameter, "ds_tensor", parameter).fill_(float("nan"))


_KINDS = {"exception": _raise, "exit": _exit, "allocate": _allocate, "nan": _flip, "hang": _hang}

if "DIST_FT_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, _Wrapper())
