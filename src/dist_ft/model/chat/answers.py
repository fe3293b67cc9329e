"""Where in the rendered text an answer stands, found by rendering prefixes of the conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_ft.errors import DataError
from dist_ft.records import Message

_MARK = "\u2063"
"""An invisible separator: no template writes one, and no answer begins with one."""

Render = Callable[[Sequence[Message], bool], str]
"""Turns, and whether the text is to end where an answer begins."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """An assistant turn in the text of the conversation up to it.

    Attributes:
        until: That text.
        start: Its first character that the model writes.
        end: Behind the last, which belongs to the mark that ends the turn.
    """

    until: str
    start: int
    end: int

    def span_in(self, text: str, eos: str, marks: tuple[str, ...]) -> Span | None:
        """Returns where the answer stands in a longer text; None when that text has other words up to here.

        Args:
            text: The text of the conversation up to a later turn.
            eos: The token that ends a text, or nothing.
            marks: Special tokens, one of which ends a turn.
        """
        if text.startswith(self.until):
            return self.start, self.end
        # Phi 3 writes an end of text behind the last turn, besides the mark that ends every turn.
        shorter = self.until.removesuffix(eos).rstrip()
        return (self.start, len(shorter)) if shorter.endswith(marks) and text.startswith(shorter) else None


def find_answer(messages: Sequence[Message], answer: int, render: Render) -> Answer:
    """Returns the assistant turn number `answer` (from 0).

    Raises:
        DataError: The template refuses the turns up to it.
    """
    until = render(messages[: answer + 1], False)
    start = _start(messages, answer, render, until)
    return Answer(until, start, max(start, _end(messages, answer, render, until)))


def _start(messages: Sequence[Message], answer: int, render: Render, until: str) -> int:
    try:
        before = render(messages[:answer], True)
    except DataError:  # nothing stands before the answer, or only what the template wants an answer to
        before = None
    if before is not None and until.startswith(before):
        return len(before)
    # Or the prompt holds more than the template writes for a finished turn (an empty <think>). Another answer in its
    # place shows where answers begin.
    other = render([*messages[:answer], {"role": "assistant", "content": _MARK}], False)
    return _common_length(until, other)


def _end(messages: Sequence[Message], answer: int, render: Render, until: str) -> int:
    # White space behind the mark that ends the turn is the template's, not the model's.
    end = len(until.rstrip())
    content: str = messages[answer]["content"]
    if not content[-1:].isspace():
        return end
    # White space of the answer itself: a template without such a mark may end with it.
    longer = render([*messages[:answer], {**messages[answer], "content": content + _MARK}], False)
    return max(end, len(until) - len(longer.rpartition(_MARK)[2]))


def _common_length(a: str, b: str) -> int:
    """Returns how many characters two texts share at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
