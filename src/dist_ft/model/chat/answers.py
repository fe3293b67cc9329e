"""Finds the characters of an answer in the rendered text by rendering prefixes of the conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_ft.errors import DataError
from dist_ft.model.chat.stops import Endings
from dist_ft.records import Message

_MARK = "\u2063"
"""An invisible separator: no template writes one, and no answer begins with one."""

Render = Callable[[Sequence[Message], bool], str]
"""Renders turns; the flag says whether the text is to end where an answer begins."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """An assistant turn in the text of the conversation up to it.

    Attributes:
        until: The text of the conversation, this turn included.
        start: Index of the first character that the model writes.
        end: Index behind the last one, which belongs to the token that ends the turn.
    """

    until: str
    start: int
    end: int

    def span_in(self, text: str, eos: str, marks: tuple[str, ...]) -> Span | None:
        """Return the span of the answer in a longer text; None when that text differs before the answer ends.

        Args:
            text: The text of the conversation up to a later turn.
            eos: The token that ends a text; empty for none.
            marks: Special tokens, one of which ends a turn.
        """
        if text.startswith(self.until):
            return self.start, self.end
        # Phi 3 writes an end of text behind the last turn, besides the mark that ends every turn.
        shorter = self.until.removesuffix(eos).rstrip()
        return (self.start, len(shorter)) if shorter.endswith(marks) and text.startswith(shorter) else None


def find_answer(messages: Sequence[Message], answer: int, render: Render, endings: Endings) -> Answer:
    """Return the assistant turn number `answer` (from 0).

    Args:
        messages: The conversation.
        answer: Number of the turn.
        render: Renders the template.
        endings: What the template writes behind answers.

    Raises:
        DataError: The template refuses the turns up to it.
    """
    before, turn = messages[:answer], messages[answer]

    def finished(turns: Sequence[Message]) -> str:
        return render(turns, False).removesuffix(endings.prompt)

    until = finished(messages[: answer + 1])
    try:
        prompt = render(before, True)
    except DataError:  # nothing stands before the answer, or only what the template wants an answer to
        prompt = None
    if prompt is not None and until.startswith(prompt):
        start = len(prompt)
    else:
        # The prompt holds more than the template writes for a finished turn (an empty <think>). Another answer in
        # its place shows where answers begin.
        other = finished([*before, {"role": "assistant", "content": _MARK}])
        shared = zip(until, other, strict=False)
        start = next((i for i, (a, b) in enumerate(shared) if a != b), min(len(until), len(other)))
    # White space behind the mark that ends the turn is the template's, not the model's.
    end = len(until.rstrip())
    content: str = turn["content"]
    if content[-1:].isspace():
        # White space of the answer itself: a template without such a mark may end with it.
        longer = finished([*before, {**turn, "content": content + _MARK}])
        end = max(end, len(until) - len(longer.rpartition(_MARK)[2]))
    end = max(start, end)
    if closing := endings.closing(turn, messages[answer + 1] if answer + 1 < len(messages) else None):
        until = until[:end] + closing
        end = len(until)
    return Answer(until, start, end)
