"""Put on PYTHONPATH of a run, makes a process of it go wrong: what cannot be done from outside.

- `DIST_FT_TEST_FAULT` is `{"kind", "rank", "step", "once"}` as JSON: one rank goes wrong in one step, once; `once` is a
  file that says it has happened.
- `DIST_FT_TEST_MUTE` is `module:function` or `module:Class.method`: every process ends where that would be called,
  before it has said a word.

Everything but the misfortune itself is the real thing.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path

MUTE_STATUS = 7


class _Changed(importlib.abc.MetaPathFinder):
    """Changes a module when it is imported, which only the processes that need it do."""

    def __init__(self, name, change):
        self._name, self._change = name, change

    def find_spec(self, name, path=None, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            self._change(module)

        spec.loader.exec_module = exec_module
        return spec


def _wrap_step(module):
    module._step = _wrap(module._step)


def _mute(where):
    """Returns a change after which the function at `where` ends the process."""
    *owners, function = where.split(".")

    def end(*arguments, **settings):
        os._exit(MUTE_STATUS)

    return lambda module: setattr(getattr(module, owners[0]) if owners else module, function, end)


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
    sys.meta_path.insert(0, _Changed("dist_ft.train.loop", _wrap_step))
if "DIST_FT_TEST_MUTE" in os.environ:
    name, _, where = os.environ["DIST_FT_TEST_MUTE"].partition(":")
    sys.meta_path.insert(0, _Changed(name, _mute(where)))
