"""Put on PYTHONPATH of a run, ends every process of one kind when it is about to do its work: it never says a word.

`DIST_FT_TEST_MUTE` is `module:function` or `module:Class.method`; the process ends where that would be called.
"""

import importlib.abc
import importlib.util
import os
import sys

MODULE, _, WHERE = os.environ.get("DIST_FT_TEST_MUTE", "").partition(":")
EXIT_STATUS = 7


class _Wrapper(importlib.abc.MetaPathFinder):
    """Replaces the function when its module is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            *owners, function = WHERE.split(".")
            owner = getattr(module, owners[0]) if owners else module
            setattr(owner, function, _end)

        spec.loader.exec_module = exec_module
        return spec


def _end(*arguments, **settings):
    os._exit(EXIT_STATUS)


if MODULE:
    sys.meta_path.insert(0, _Wrapper())
