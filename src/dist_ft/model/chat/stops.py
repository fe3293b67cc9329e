"""Finds out how a chat template ends an answer where its text alone does not show it, by trying the template.

Two kinds of templates are told apart from the others:

- The token that stops stands in the head of the next turn (`<|user|>` in GLM 4.5). A model learns to stop only if that
  token is trained, so it counts as the end of the answer, and the last answer gets one.
- The text always ends with the prompt for the next answer, whether one is asked for or not (Command R7B). That prompt
  is no part of the answer before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_ft.records import Message

_ASKED, _ANSWER, _NEXT = "probe0word", "probe1word", "probe2word"
_QUESTION: Message = {"role": "user", "content": _ASKED}
_ANSWERED: Message = {"role": "assistant", "content": _ANSWER}
_FOLLOW_UP: Message = {"role": "user", "content": _NEXT}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "probe0000", "type": "function", "function": {"name": "probe", "arguments": {"word": _ANSWER}}}
    ],
}
_RESULT: Message = {"role": "tool", "content": _NEXT, "tool_call_id": "probe0000", "name": "probe"}

_OPENED_THOUGHT = re.compile(r"\s*<(think|thinking|thought)>\s*(</\1>\s*)?$")

Try = Callable[[Sequence[Message], bool], str | None]
"""Renders turns, with or without the prompt for an answer; None where the template refuses them."""


@dataclass(frozen=True)
class Endings:
    """What a template writes behind answers.

    Attributes:
        prompt: Prompt for the next answer that always stands at the end of the text; empty for most templates.
        before_turn: The token that stops, with the white space before it, where only the head of the next turn has it;
            empty where the answer ends with such a token itself, or where none follows.
        before_result: The same behind a tool call, where the result comes next.
    """

    prompt: str = ""
    before_turn: str = ""
    before_result: str = ""

    def closing(self, answer: Message, following: Message | None) -> str:
        """Return what must be trained behind an answer, so that the model learns to stop."""
        is_result_next = bool(answer.get("tool_calls")) if following is None else following["role"] == "tool"
        return self.before_result if is_result_next else self.before_turn


def find_endings(render: Try, stops: Sequence[str], marks: Sequence[str]) -> Endings:
    """Return how a template ends answers.

    Args:
        render: Renders the template.
        stops: Tokens at which generation stops.
        marks: All special tokens.
    """
    prompt = _trailing_prompt(render, stops, marks)

    def closing(answer: Message, following: Message) -> str:
        until, longer = render([_QUESTION, answer], False), render([_QUESTION, answer, following], False)
        if until is None or longer is None or _ANSWER not in until:
            return ""
        ended = until.removesuffix(prompt).rstrip()
        if ended.endswith(tuple(stops)) or not longer.startswith(ended):
            return ""
        found = _any_of(stops, r"\s*").match(longer, len(ended))
        return found[0] if found else ""

    return Endings(prompt, closing(_ANSWERED, _FOLLOW_UP), closing(_CALL, _RESULT))


def _trailing_prompt(render: Try, stops: Sequence[str], marks: Sequence[str]) -> str:
    """Return the prompt for another answer that a finished text ends with."""
    asked = render([_QUESTION], False)
    answered = render([_QUESTION, _ANSWERED], False)
    followed = render([_QUESTION, _ANSWERED, _FOLLOW_UP], False)
    if asked is None or answered is None or followed is None:
        return ""
    tail = answered.rpartition(_ANSWER)[2]
    if followed.partition(_ANSWER)[2].startswith(tail.rstrip()):
        return ""  # what stands there is the end of the answer: it stands before the next question, too
    shared = _shared_suffix(asked.rpartition(_ASKED)[2], tail)
    prompt = _without_end(shared, tail, stops, marks)
    before_answer = answered.partition(_ASKED)[2].partition(_ANSWER)[0]
    head = _OPENED_THOUGHT.sub("", prompt).strip()  # answers without thoughts need not have the mark
    return prompt if head and head in before_answer else ""


def _without_end(shared: str, tail: str, stops: Sequence[str], marks: Sequence[str]) -> str:
    """Return what is left of a shared end of the text without the token that ends the answer before it."""
    if found := list(_any_of(stops).finditer(tail)):
        behind = tail[found[-1].end() :]
        return behind if shared.endswith(behind) else shared
    if _any_of(marks).search(tail[: len(tail) - len(shared)]):
        return shared
    mark = _any_of(marks).search(shared)
    return shared[mark.end() :] if mark else shared


def _shared_suffix(a: str, b: str) -> str:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return a[len(a) - count :]


def _any_of(tokens: Sequence[str], before: str = "") -> re.Pattern[str]:
    """Return a pattern of any of some tokens, the longest first."""
    texts = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, texts))})" if texts else r"(?!)")
