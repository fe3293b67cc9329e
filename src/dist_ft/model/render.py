"""Record → tokens and loss mask, for any chat template.

A conversation is rendered and tokenised as a whole; which characters belong to assistant turns is found by rendering
prefixes as text (`turns.py`), and carried to tokens by offsets. So the tokens are exactly those that the model sees in
use, and no template needs generation markers (few have them). Answers whose text a template rewrites later on (Qwen 3
strips the reasoning of earlier turns) go into samples of their own, each as it stands when the model gives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dist_ft.config.schema import CHAT_TEMPLATES
from dist_ft.errors import DataError, ModelError
from dist_ft.model.dialect import Dialect, find_dialect
from dist_ft.model.dropped import check_answer, check_context
from dist_ft.model.sandbox import Template
from dist_ft.model.turns import Span, find_answer
from dist_ft.printable import printable
from dist_ft.records import Completion, Conversation, Message, Record, Sample

RENDERING_VERSION = 2
"""Part of every cache key; raised when the same record would give other tokens."""


class Renderer:
    """Renders records with one tokenizer and its chat template.

    Args:
        tokenizer: One that gives character offsets.
        train_on: `data.train_on`.
    """

    def __init__(self, tokenizer: Any, train_on: str = "assistant") -> None:
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._languages: dict[bool, tuple[Template, Dialect]] = {}
        self._eos: str = tokenizer.eos_token or ""
        adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._bos: str = tokenizer.bos_token if adds_bos else ""
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids, self._marks = frozenset(special), tuple(special.values())

    def __call__(self, record: Record) -> list[Sample]:
        """Returns the training samples of a record; usually one, none when nothing of it is to be trained.

        Raises:
            DataError: The template refuses the conversation or leaves something of it out.
            ModelError: The tokenizer has no chat template.
        """
        if isinstance(record, Completion):
            return [self._complete(record)]
        if self._train_on == "all":
            text = self.text(record.messages, record.tools)
            check_context(text, record.messages, record.tools)
            return [self._tokenise(text, [(0, len(text))])]
        return self._converse(record)

    def prompt(self, record: Record) -> str:
        """Returns the text before the last assistant turn, or the prompt, ready for the model to continue."""
        if isinstance(record, Completion):
            return record.prompt if record.prompt.startswith(self._bos) else self._bos + record.prompt
        last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        return self.text(record.messages[:last], record.tools, add_generation_prompt=True)

    def text(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = False
    ) -> str:
        """Renders the template.

        Raises:
            DataError: It refuses.
            ModelError: There is none.
        """
        try:
            template, dialect = self._language(bool(tools))
            return template.render([dialect.spell(message) for message in messages], tools, add_generation_prompt)
        except ModelError:
            raise
        except Exception as error:  # a template is a program: it can raise anything
            roles = ", ".join(message["role"] for message in messages[:8]) + (", ..." if len(messages) > 8 else "")
            reason = printable(str(error) or type(error).__name__, 300)
            raise DataError(
                f"the chat template refuses turns ({roles}): {reason}; change the row or set another data.chat_template"
            ) from error

    def ends_with_eos(self, sample: Sample) -> bool:
        """Whether the last trained token is EOS or another special one; without, a model never learns to stop."""
        trained = [token for token, is_trained in zip(sample.input_ids, sample.trained, strict=True) if is_trained]
        return bool(trained) and trained[-1] in self._special_ids

    def _language(self, has_tools: bool) -> tuple[Template, Dialect]:
        """Returns the template and how it wants its messages; some models have one of their own for tools."""
        if has_tools not in self._languages:
            if not self._tokenizer.chat_template:
                raise ModelError(
                    "the model's tokenizer has no chat template, which conversations need; set data.chat_template to a "
                    f"name ({', '.join(CHAT_TEMPLATES)}) or a Jinja file"
                )
            source = self._tokenizer.get_chat_template(tools=[] if has_tools else None)
            template = Template(source, self._tokenizer.special_tokens_map)
            self._languages[has_tools] = template, find_dialect(template)
        return self._languages[has_tools]

    def _converse(self, record: Conversation) -> list[Sample]:
        def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            return self.text(messages, record.tools, add_generation_prompt)

        answers = {number: find_answer(record.messages, number, render) for number in self._trained_turns(record)}
        if answers:
            last = max(answers)
            check_context(answers[last].until, record.messages[:last], record.tools)
        samples = []
        while answers:
            # What follows the last answer can teach nothing; every answer that its text leaves as it was goes along.
            text = answers[max(answers)].until
            spans = {number: answer.span_in(text, self._eos, self._marks) for number, answer in answers.items()}
            found = {number: span for number, span in spans.items() if span}
            for number, (start, end) in found.items():
                check_answer(text[start:end], number, record.messages[number])
            samples.append(self._tokenise(text, list(found.values())))
            answers = {number: answer for number, answer in answers.items() if number not in found}
        return samples[::-1]

    def _trained_turns(self, record: Conversation) -> list[int]:
        answers = [number for number, message in enumerate(record.messages) if message["role"] == "assistant"]
        if self._train_on == "last":
            answers = answers[-1:]
        return [number for number in answers if record.messages[number].get("weight") != 0]

    def _complete(self, record: Completion) -> Sample:
        text = record.prompt + record.completion
        opening = [] if text.startswith(self._bos) else [self._tokenizer.bos_token_id]
        if not text.endswith(self._eos):
            text += self._eos
        start = 0 if self._train_on == "all" else len(record.prompt)
        return self._tokenise(text, [(start, len(text))], opening)

    def _tokenise(self, text: str, spans: Sequence[Span], opening: Sequence[int] = ()) -> Sample:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        trained = [False for _ in opening] + list(_trained(text, spans, encoded["offset_mapping"]))
        trained[:1] = [False for _ in trained[:1]]
        return Sample([*opening, *encoded["input_ids"]], trained)


def _trained(text: str, spans: Sequence[Span], offsets: Sequence[Span]) -> Iterator[bool]:
    """Says of each token whether it is of a span.

    A token that begins before its span counts when it brings nothing along but white space: " yes" behind "Answer:"
    is the answer, wherever the space was written.
    """
    inside = bytearray(len(text) + 1)
    for start, end in spans:
        inside[start:end] = b"\1" * (end - start)
    for at, until in offsets:
        if inside[at] or at >= until - 1 or not inside[until - 1]:
            yield bool(inside[at])
        else:
            yield text[at : inside.index(1, at)].isspace()
