"""Record → tokens and loss mask, for any chat template.

A conversation is rendered and tokenised as a whole; which characters belong to assistant turns is found by rendering
prefixes as text (`turns.py`), and carried to tokens by offsets. So the tokens are exactly those that the model sees in
use, and no template needs generation markers (few have them). Answers whose text a template rewrites later on (Qwen 3
strips the reasoning of earlier turns) go into samples of their own, each as it stands when the model gives it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.config.data_sections import CHAT_TEMPLATES
from dist_ft.errors import DataError, ModelError
from dist_ft.model.chat.answers import Span, find_answer
from dist_ft.model.chat.omissions import check_answer, check_context
from dist_ft.model.chat.sandbox import Template
from dist_ft.model.chat.style import Dialect, find_dialect
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
        self._marks = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)

    def __call__(self, record: Record) -> list[Sample]:
        """Returns the training samples of a record; usually one, none when nothing of it is to be trained.

        Raises:
            DataError: The template refuses the conversation or leaves something of it out.
            ModelError: The tokenizer has no chat template.
        """
        return self._tokenise(self._spell(record))

    def render_many(self, records: Sequence[Record]) -> list[list[Sample] | DataError]:
        """Does the same for many records with one call of the tokenizer, which is faster than a call for each.

        Returns:
            Of each record its samples, or the error that `__call__` raises.

        Raises:
            ModelError: As `__call__`.
        """
        spelled = [self._try_to_spell(record) for record in records]
        samples = iter(self._tokenise([text for texts in spelled if isinstance(texts, list) for text in texts]))
        return [[next(samples) for _ in texts] if isinstance(texts, list) else texts for texts in spelled]

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

    def _try_to_spell(self, record: Record) -> list[_Text] | DataError:
        try:
            return self._spell(record)
        except DataError as error:
            return error

    def _spell(self, record: Record) -> list[_Text]:
        """Returns the texts of a record, each of which becomes a sample."""
        if isinstance(record, Completion):
            return [self._complete(record)]
        if self._train_on == "all":
            text = self.text(record.messages, record.tools)
            check_context(text, record.messages, record.tools)
            return [_Text(text, ((0, len(text)),))]
        return self._converse(record)

    def _converse(self, record: Conversation) -> list[_Text]:
        def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            return self.text(messages, record.tools, add_generation_prompt)

        answers = {number: find_answer(record.messages, number, render) for number in self._trained_turns(record)}
        if answers:
            last = max(answers)
            check_context(answers[last].until, record.messages[:last], record.tools)
        texts = []
        while answers:
            # What follows the last answer can teach nothing; every answer that its text leaves as it was goes along.
            text = answers[max(answers)].until
            spans = {number: answer.span_in(text, self._eos, self._marks) for number, answer in answers.items()}
            found = {number: span for number, span in spans.items() if span}
            for number, (start, end) in found.items():
                check_answer(text[start:end], number, record.messages[number])
            texts.append(_Text(text, tuple(found.values())))
            answers = {number: answer for number, answer in answers.items() if number not in found}
        return texts[::-1]

    def _trained_turns(self, record: Conversation) -> list[int]:
        answers = [number for number, message in enumerate(record.messages) if message["role"] == "assistant"]
        if self._train_on == "last":
            answers = answers[-1:]
        return [number for number in answers if record.messages[number].get("weight") != 0]

    def _complete(self, record: Completion) -> _Text:
        text = record.prompt + record.completion
        opening = [] if text.startswith(self._bos) else [self._tokenizer.bos_token_id]
        if not text.endswith(self._eos):
            text += self._eos
        start = 0 if self._train_on == "all" else len(record.prompt)
        return _Text(text, ((start, len(text)),), tuple(opening))

    def _tokenise(self, texts: Sequence[_Text]) -> list[Sample]:
        backend = self._tokenizer.backend_tokenizer
        # Whoever used it before may have left them on. Beyond this, transformers adds nothing but time.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        encodings = backend.encode_batch([text.text for text in texts], add_special_tokens=False)
        return [_sample(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]


@dataclass(frozen=True, slots=True)
class _Text:
    """What becomes one sample.

    Attributes:
        text: To be tokenised as a whole.
        spans: Its characters that are trained, in order.
        opening: Tokens before it.
    """

    text: str
    spans: tuple[Span, ...]
    opening: tuple[int, ...] = ()


def _sample(text: _Text, encoding: Any) -> Sample:
    trained = [False] * len(text.opening) + find_trained(text.text, text.spans, encoding)
    trained[:1] = [False for _ in trained[:1]]
    return Sample([*text.opening, *encoding.ids], trained)


def find_trained(text: str, spans: Sequence[Span], encoding: Any) -> list[bool]:
    """Says of each token whether it is of a span.

    A token that begins before its span counts when it brings nothing along but white space: " yes" behind "Answer:"
    is the answer, wherever the space was written. Tokens are found by bisection: a tokenizer goes from left to right,
    and a list of all offsets would take longer to make than the tokens themselves.

    Args:
        text: What was tokenised.
        spans: Characters, in order and apart from one another.
        encoding: Of the library `tokenizers`.
    """
    count = len(encoding)
    trained = [False] * count
    first_free = 0
    for start, end in spans:
        if start >= end:
            continue
        first, behind = (_first_token(encoding, count, at) for at in (start, end))
        trained[first:behind] = [True] * (behind - first)
        if first > first_free:
            at, until = encoding.token_to_chars(first - 1)
            brings_space_along = until > start and text[at:start].isspace()
            trained[first - 1] = brings_space_along and any(a < until <= b for a, b in spans)
        first_free = behind
    return trained


def _first_token(encoding: Any, count: int, at: int) -> int:
    """Returns the first token that begins at a character or behind it."""
    return bisect_left(range(count), at, key=lambda token: encoding.token_to_chars(token)[0])
