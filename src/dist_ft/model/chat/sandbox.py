"""Renders chat templates in a sandbox: they are programs that strangers wrote.

The text equals that of transformers' `apply_chat_template` (a test compares them), with three exceptions. The date is
fixed, so that the same data gives the same tokens tomorrow. Nothing is random. Loops, powers, products, memory and the
length of the text have limits.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TODAY = datetime(2024, 7, 26)
"""What `strftime_now` tells every template; Llama 3.1's own default."""

_MAX_ITERATIONS = 250_000
"""Most iterations of loops and calls of macros in one rendering: about a second."""
_MAX_BULK = 1 << 20
"""Elements of a repeated sequence, or bits of a product or power."""
_MAX_MEMORY = 512 << 20
"""Bytes that one rendering may add to the process."""
_MAX_GROWTH = 64
"""Longest text, as a multiple of what the template was given; a megabyte is always allowed."""


class Template:
    """A compiled chat template.

    Args:
        source: Jinja text.
        variables: What it sees beside the conversation, such as `bos_token`.

    Raises:
        TemplateError: It is no Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self._environment = _Environment()
        self._variables = dict(variables)
        tree = self._environment.parse(source)
        repeated: Iterable[Any] = tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))
        for node in list(repeated):
            count = nodes.Filter(nodes.Const(None), "count_iteration", [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        with _bounded_memory():  # constants are worked out here
            self._template = self._environment.from_string(tree)

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], add_generation_prompt: bool
    ) -> str:
        """Return the text of a conversation.

        Raises:
            Exception: Of any kind; a template is a program.
        """
        self._environment.iterations_left = _MAX_ITERATIONS
        with _bounded_memory():
            text = self._template.render(
                **self._variables, messages=list(messages), tools=list(tools) or None, documents=None,
                add_generation_prompt=add_generation_prompt,
            )  # fmt: skip
        if len(text) > 1 << 20 and len(text) > _MAX_GROWTH * len(str((messages, tools))):
            raise SecurityError(f"it makes {len(text)} characters of a far shorter conversation")
        return text


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with transformers' settings and functions, and with limits."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.iterations_left = 0
        self.filters |= {"tojson": _tojson, "count_iteration": self.count_iteration}
        self.globals |= {
            "raise_exception": _raise_exception, "strftime_now": TODAY.strftime, "dict": _dict, "namespace": _Namespace,
        }  # fmt: skip
        # Not the same twice, or endless with a large argument; no stock template has a use for them.
        del self.filters["random"], self.filters["slice"], self.globals["lipsum"]

    @pass_context  # so that Jinja does not work it out while compiling
    def count_iteration(self, _context: Context, _value: None) -> None:
        """Count an iteration; every body of a loop or macro begins with this filter."""
        self.iterations_left -= 1
        if self.iterations_left < 0:
            raise SecurityError(f"it goes through more than {_MAX_ITERATIONS} turns of loops")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuses products and powers that would keep the machine busy."""
        bulk = 0
        if isinstance(left, int) and isinstance(right, int):
            is_power = operator == "**"
            bulk = left.bit_length() * abs(right) if is_power else left.bit_length() + right.bit_length()
        else:
            repeated, times = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                bulk = len(repeated) * times
        if bulk > _MAX_BULK:
            raise SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """Accepts `{% generation %}`, by which templates mark answers for trainers; the text is the same without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """A namespace that refuses names which mean something to Python."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"access to {name!r} of a namespace is unsafe")
        super().__setitem__(name, value)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Limits the growth of the process while a template runs: one short filter can ask for any amount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:  # noqa: PTH123 - half the time of Path
            used = int(file.read(100).split()[5]) * resource.getpagesize()  # what RLIMIT_DATA counts
    except OSError:  # macOS, where no limit holds
        used = 1 << 40
    limit = used + _MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)
