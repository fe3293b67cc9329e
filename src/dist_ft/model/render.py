"""Conversation → tokens and loss mask, for any chat template.

The whole conversation is rendered and tokenised once; which characters belong to assistant turns is found by
rendering prefixes as text, and carried to tokens by offsets. So the tokens are exactly those that the model
sees in use, and no template needs generation markers (few have them). A template that rewrites earlier turns
(Qwen 3 strips their reasoning) makes the row one sample an assistant turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_ft.errors import DataError
from dist_ft.records import Conversation, Message, Record, Sample

_NO_ANSWER = "\u2063"
"""An invisible separator, with which no answer begins."""


class Renderer:
    """Renders conversations with one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, record: Record) -> list[Sample]:
        """Returns the training samples of a record; usually one.

        Raises:
            DataError: The template refuses the conversation.
        """
        assert isinstance(record, Conversation)
        messages: Sequence[Message] = record.messages
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return []
        # What follows the last answer can teach nothing.
        messages = messages[: answers[-1] + 1]
        whole = self.text(messages)
        spans = [self._span(messages, answer, whole) for answer in answers]
        if None not in spans:
            return [self._tokenise(whole, [span for span in spans if span])]
        samples = []
        for answer in answers:
            part = messages[: answer + 1]
            text = self.text(part)
            span = self._span(part, answer, text)
            if span is None:
                raise DataError("the chat template rewrites the turn that it has just rendered; use another template")
            samples.append(self._tokenise(text, [span]))
        return samples

    def prompt(self, messages: Sequence[Message]) -> str:
        """Returns the text before the last assistant turn, ready for the model to continue."""
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return self.text(messages[:last], add_generation_prompt=True)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Renders the template (transformers runs it in Jinja's immutable sandbox)."""
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program: it can raise anything
            roles = [message["role"] for message in messages]
            raise DataError(f"the chat template refuses turns {roles}: {error}") from error
        return str(rendered)

    def _span(self, messages: Sequence[Message], answer: int, whole: str) -> tuple[int, int] | None:
        """Returns the characters of an assistant turn in `whole`; None when its prefix is not a prefix."""
        until = self.text(messages[: answer + 1])
        if not whole.startswith(until):
            return None
        before = self.text(messages[:answer], add_generation_prompt=True) if answer else None
        if before is not None and until.startswith(before):
            start = len(before)
        else:
            # The prompt holds more than the template writes for a finished turn (an empty <think>), or nothing
            # stands before the answer: another answer in its place shows where answers begin.
            other = [*messages[:answer], {**messages[answer], "content": _NO_ANSWER}]
            start = _common_length(until, self.text(other))
        # The newline after the end-of-turn token is the template's, not the model's.
        return start, len(until.rstrip())

    def _tokenise(self, text: str, spans: Sequence[tuple[int, int]]) -> Sample:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        trained = [
            any(start <= at and at < end for start, end in spans) and until > at
            for at, until in encoded["offset_mapping"]
        ]
        return Sample(list(encoded["input_ids"]), trained)


def _common_length(a: str, b: str) -> int:
    """Returns how many characters two texts share at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
