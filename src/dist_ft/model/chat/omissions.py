"""Refuses rows of which a chat template leaves something out: they would teach something else than they say.

Everything that is said must stand in the text as often as the row says it: the content of each turn, the name of each
call, and each value of its arguments. Templates trim, indent, quote and escape, so the comparison is of what is left
without white space and backslashes; and some put turns in another order. So the parts are first looked for one behind
the other, and only if that fails, counted: a part that stands within another one ("Rome" in "Rome or Oslo?") is
expected once more.

Templates may rewrite an answer later on, mostly to drop its reasoning. An earlier answer must therefore be whole in the
text of the conversation up to it, not in a later one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.errors import DataError
from dist_ft.records import Message

_THOUGHT = re.compile("</?think>")
_END_OF_THOUGHT = "</think>"
_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|[nrtbf])?|\x08")  # a backspace is written \b
_SURROGATE = re.compile("[\ud800-\udfff]")
_BETWEEN = "\ud800"  # half a character, which no row may hold
_ADVICE = "remove it from the row or set another data.chat_template"
_ADVICE_FOR_REASONING = "name its key in data.train[].ignore, or set another data.chat_template"


@dataclass(frozen=True)
class _Said:
    """Something that a row says.

    Attributes:
        text: The text.
        what: What it is, for messages.
        turn: Number of its turn.
        others: Other spellings of the same value, as Python writes it.
        advice: What to do if a template leaves it out.
    """

    text: str
    what: str
    turn: int
    others: tuple[str, ...] = ()
    advice: str = _ADVICE


def check_context(
    text: str,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    text_until: Callable[[int], str],
    has_reasoning: bool = False,
) -> None:
    """Check that the text holds every turn, every call and every tool.

    Args:
        text: The rendered conversation.
        messages: Its turns.
        tools: Its functions.
        text_until: Returns the text of the conversation up to a turn, that turn included.
        has_reasoning: Whether the reasoning of answers has to be there, too.

    Raises:
        DataError: Something is missing.
    """
    every = [said for number, message in enumerate(messages) for said in _said(number, message, has_reasoning)]
    rewritten = {said.turn for said in _missing(text, every) if messages[said.turn]["role"] == "assistant"}
    there = [said for said in every if said.turn not in rewritten]
    for number in sorted(rewritten):
        _check(text_until(number), [said for said in there if said.turn < number] + _of_turn(every, number))
    _check(text, there)
    functions = [str(tool.get("function", tool).get("name", "")) for tool in tools]
    said_text, bare = _BETWEEN.join([*functions, *(said.text for said in there)]), _bare(text) if tools else ""
    for name in functions:
        if max(text.count(name), bare.count(_bare(name))) < said_text.count(name):
            raise DataError(f"the chat template leaves out the tools: {name!r} is not in its text; {_ADVICE}")


def check_answer(text: str, number: int, message: Message) -> None:
    """Check that the trained text of an answer holds its content, its reasoning and its tool calls.

    Raises:
        DataError: Something is missing.
    """
    _check(text, list(_said(number, message, has_reasoning=True)))


def _said(number: int, message: Message, has_reasoning: bool) -> Iterator[_Said]:
    """Yield what a turn says, in the order in which templates write it."""
    role, content = message["role"], message["content"].strip()
    if role != "assistant":
        yield _Said(content, f"turn {number} ({role})", number)
        return
    if has_reasoning:
        what = f"the reasoning of the answer in turn {number}"
        yield _Said(message.get("reasoning_content", ""), what, number, advice=_ADVICE_FOR_REASONING)
    else:
        content = content.rpartition(_END_OF_THOUGHT)[2]
    for piece in _THOUGHT.split(content):
        yield _Said(piece.strip(), f"a part of the answer in turn {number}", number)
    for call in message.get("tool_calls") or ():
        name = call["function"]["name"]
        yield _Said(name, f"the call of {name!r} in turn {number}", number)
        for value in _values(call["function"]["arguments"]):
            what = f"an argument of the call of {name!r} in turn {number}"
            if isinstance(value, bool):
                yield _Said(str(value).lower(), what, number, (str(value),))
            else:
                yield _Said(str(value), what, number)


def _values(arguments: Any) -> Iterator[str | int | float]:
    """Yield the values in arguments; null says nothing, and some templates leave it out."""
    if isinstance(arguments, dict | list):
        for inner in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from _values(inner)
    elif arguments is not None:
        yield arguments


def _of_turn(every: Sequence[_Said], number: int) -> list[_Said]:
    return [said for said in every if said.turn == number]


def _check(text: str, every: Sequence[_Said]) -> None:
    missing = _missing(text, every)
    if not missing:
        return
    said = missing[0]
    how = "is in its text less often than in the row" if _bare(said.text) in _bare(text) else "is not in its text"
    raise DataError(f"the chat template leaves out {said.what}: {said.text.strip()[:60]!r} {how}; {said.advice}")


def _missing(text: str, every: Sequence[_Said]) -> list[_Said]:
    """Return what is less often in the text than it is said."""
    if _stand_in_order(text, every):
        return []
    bare, parts = _bare(text), [_bare(said.text) for said in every]
    bare_row = _BETWEEN.join(parts)
    found = []
    for said, part in zip(every, parts, strict=True):
        forms = (part, *said.others)
        if part and sum(map(bare.count, forms)) < sum(map(bare_row.count, forms)):
            found.append(said)
    return found


def _stand_in_order(text: str, every: Sequence[_Said]) -> bool:
    at = 0
    for said in every:
        starts = [(start, form) for form in (said.text, *said.others) if (start := text.find(form, at)) >= 0]
        if not starts:
            return False
        start, form = min(starts)
        at = start + len(form)
    return True


def _bare(text: str) -> str:
    """Return text without white space and escapes, so that quoted text equals the plain one."""
    bare = "".join(_ESCAPE.sub(lambda escape: chr(int(escape[1], 16)) if escape[1] else "", text).split())
    if _SURROGATE.search(bare):
        return bare.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return bare
