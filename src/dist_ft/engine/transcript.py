"""Turns the tokens of an answer into text, piece by piece: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
"""What a decoder writes for half a character."""


class Transcript:
    """The text of one answer.

    Args:
        decode: Returns the text of tokens.
        stops: Texts before which the answer ends; they may span tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._tokens: list[int] = []
        self._told, self._context = 0, 0  # tokens that are text already; where decoding begins
        self._held = ""
        self.is_stopped = False
        """Whether a stop text was found."""

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now."""
        self._tokens.append(token)
        self._read(is_last=False)
        return self._release(is_last=False)

    def finish(self) -> str:
        """Return what was held back, if no stop text was found."""
        self._read(is_last=True)
        return self._release(is_last=True)

    def _read(self, is_last: bool) -> None:
        # A token's text depends on the one before it (spaces), so decoding begins a piece earlier.
        before = self._decode(self._tokens[self._context : self._told])
        text = self._decode(self._tokens[self._context :])
        if (text.endswith(BROKEN) and not is_last) or len(text) <= len(before):
            return
        self._held += text[len(before) :]
        self._context, self._told = self._told, len(self._tokens)

    def _release(self, is_last: bool) -> str:
        if self.is_stopped:
            return ""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return self._held[: min(found)]
        kept = 0 if is_last else num_held(self._held, self._stops)
        free = len(self._held) - kept
        text, self._held = self._held[:free], self._held[free:]
        return text


def num_held(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop text."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
