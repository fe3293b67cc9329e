"""Turns records into tokens and loss masks, for any chat template.

The renderer renders and tokenises a conversation as a whole. It finds the characters of assistant turns by rendering
prefixes as text (`answers.py`) and maps them to tokens by offsets. So the tokens are exactly those that the model sees
in use, and no template needs generation markers (few have them). A template may rewrite an answer later on (Qwen 3
strips the reasoning of earlier turns); such an answer gets a sample of its own, as it stands when the model gives it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from jinja2 import TemplateSyntaxError
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from dist_ft.config.data_sections import CHAT_TEMPLATES
from dist_ft.errors import DataError, ModelError
from dist_ft.model.chat.answers import Span, find_answer
from dist_ft.model.chat.omissions import check_answer, check_context
from dist_ft.model.chat.sandbox import Template
from dist_ft.model.chat.stops import Endings, find_endings
from dist_ft.model.chat.style import TemplateStyle, find_style
from dist_ft.printable import printable
from dist_ft.records import Completion, Conversation, Message, Record, Sample

RENDERING_VERSION = 2
"""Part of every cache key; raised when the same record would give other tokens."""

_WITH_BREAKS = ("turns", "last_turn", "completion")
"""Values of `data.train_on` that train the white space behind the token that ends an answer, too."""


class Renderer:
    """Renders records with one tokenizer and its chat template.

    Args:
        tokenizer: One that gives character offsets.
        train_on: `data.train_on`.
        stops: Tokens at which generation stops, besides the tokenizer's EOS token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, train_on: str = "assistant", stops: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._templates: dict[bool, tuple[Template, TemplateStyle, Endings]] = {}
        self._stop_ids = frozenset({*stops, tokenizer.eos_token_id} - {None})
        self._stops = tuple(map(str, tokenizer.convert_ids_to_tokens(sorted(self._stop_ids))))
        self._eos: str = tokenizer.eos_token or ""
        adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._bos: str = tokenizer.bos_token if adds_bos else ""
        self._marks = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)

    def __call__(self, record: Record) -> list[Sample]:
        """Return the training samples of a record; usually one, none when nothing of it is to be trained.

        Raises:
            DataError: The template refuses the conversation or leaves something of it out.
            ModelError: The tokenizer has no chat template.
        """
        return self._tokenise(self._texts(record))

    def render_many(self, records: Sequence[Record]) -> list[list[Sample] | DataError]:
        """Render many records with one call of the tokenizer, which is faster than a call for each.

        Returns:
            For each record its samples, or the DataError that `__call__` would raise.

        Raises:
            ModelError: As `__call__`.
        """
        found: list[list[_Text] | DataError] = []
        for record in records:
            try:
                found.append(self._texts(record))
            except DataError as error:
                found.append(error)
        samples = iter(self._tokenise([text for texts in found if isinstance(texts, list) for text in texts]))
        return [[next(samples) for _ in texts] if isinstance(texts, list) else texts for texts in found]

    def answers(self, records: Sequence[Conversation | Completion]) -> list[Sample | DataError]:
        """Render records of which only the answers are trained, whatever `train_on` says, each as one sample.

        The border between prompt and answer is where the answer's characters begin, not where tokens of two answers
        first differ.

        Returns:
            For each record its sample, or why it has none.
        """
        found: list[Sample | DataError] = []
        for samples in self._of_answers.render_many(records):
            if isinstance(samples, DataError):
                found.append(samples)
            elif len(samples) == 1:
                found.append(samples[0])
            else:
                found.append(
                    DataError(
                        f"the chat template makes {len(samples)} texts of the answer, as it rewrites earlier turns; "
                        "give one assistant turn as the answer, or set another data.chat_template"
                        if samples
                        else "nothing of the answer is trained; see the weight of its turns"
                    )
                )
        return found

    @cached_property
    def _of_answers(self) -> Renderer:
        """The renderer that trains no prompt: this one, or one like it."""
        which = {"all": "assistant", "completion": "turns"}.get(self._train_on)
        return Renderer(self._tokenizer, which, self._stop_ids) if which else self

    def prompt(self, record: Conversation | Completion) -> str:
        """Return the text before the last assistant turn, or the prompt, ready for the model to continue."""
        if isinstance(record, Completion):
            return self.continued(record.prompt)
        last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        return self.text(record.messages[:last], record.tools, add_generation_prompt=True)

    def continued(self, text: str) -> str:
        """Return raw text, ready for the model to continue."""
        return text if text.startswith(self._bos) else self._bos + text

    def text(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = False
    ) -> str:
        """Render the template.

        Raises:
            DataError: It refuses.
            ModelError: There is none.
        """
        try:
            template, style, _ = self._template(bool(tools))
            return template.render([style.format(message) for message in messages], tools, add_generation_prompt)
        except ModelError:
            raise
        except Exception as error:  # a template is a program: it can raise anything
            roles = ", ".join(message["role"] for message in messages[:8]) + (", ..." if len(messages) > 8 else "")
            reason = printable(str(error) or type(error).__name__, 300)
            raise DataError(
                f"the chat template refuses turns ({roles}): {reason}; change the row or set another data.chat_template"
            ) from error

    @property
    def endings_key(self) -> str:
        """What the tokens of a conversation depend on besides the tokenizer; empty for most templates."""
        if not self._tokenizer.chat_template:
            return ""
        found = {self._template(has_tools)[2] for has_tools in (False, True)} - {Endings()}
        return f" {sorted(map(str, found))}" if found else ""

    def _template(self, has_tools: bool) -> tuple[Template, TemplateStyle, Endings]:
        """Return the template, its style and its endings; some models have another template for rows with tools."""
        if has_tools not in self._templates:
            if not self._tokenizer.chat_template:
                raise ModelError(
                    "the model's tokenizer has no chat template, which conversations need; set data.chat_template to a "
                    f"name ({', '.join(CHAT_TEMPLATES)}) or a Jinja file"
                )
            source = self._tokenizer.get_chat_template(tools=[] if has_tools else None)
            template = _compiled(source, self._tokenizer.special_tokens_map)
            style = find_style(template)
            endings = find_endings(partial(_try, template, style), self._stops, self._marks)
            self._templates[has_tools] = template, style, endings
        return self._templates[has_tools]

    def _texts(self, record: Record) -> list[_Text]:
        """Return the texts of a record, each of which becomes a sample."""
        if isinstance(record, Completion):
            return [self._whole_text(record)]
        if not isinstance(record, Conversation):
            raise DataError(
                f"the row is {record.kind}, which supervised fine-tuning cannot learn from; set objective.kind "
                f"({record.objectives}), or use rows with the good answers alone"
            )
        if self._trains_all(record.is_completion):
            text = self._finished_text(record)
            check_context(
                text,
                record.messages,
                record.tools,
                text_until=lambda number: self.text(record.messages[: number + 1], record.tools),
                has_reasoning=True,
            )
            return [_Text(text, ((0, len(text)),))]
        return self._texts_of_answers(record)

    def _trains_all(self, has_prompt: bool) -> bool:
        """Return whether every token of a record is trained."""
        return self._train_on == "all" or (self._train_on == "completion" and not has_prompt)

    def _finished_text(self, conversation: Conversation) -> str:
        """Return the text of a conversation, without a prompt behind it and with the token that ends its answer."""
        last, (_, _, endings) = conversation.messages[-1], self._template(bool(conversation.tools))
        text = self.text(conversation.messages, conversation.tools).removesuffix(endings.prompt)
        return text + (endings.closing(last, None) if last["role"] == "assistant" else "")

    def _texts_of_answers(self, conversation: Conversation) -> list[_Text]:
        """Return as few texts as hold every trained answer just as the model gives it."""
        turns = conversation.messages

        def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            return self.text(messages, conversation.tools, add_generation_prompt)

        numbers = [number for number, message in enumerate(turns) if message["role"] == "assistant"]
        if self._train_on in ("last", "last_turn"):
            numbers = numbers[-1:]
        trained = [number for number in numbers if turns[number].get("weight") != 0]
        endings = self._template(bool(conversation.tools))[2]
        answers = {number: find_answer(turns, number, render, endings) for number in trained}
        if answers:
            last = max(answers)
            check_context(
                answers[last].until,
                turns[:last],
                conversation.tools,
                text_until=lambda n: answers[n].until if n in answers else render(turns[: n + 1], False),
            )
        texts = []
        while answers:
            # The text ends with the last answer that is left. It also trains those before it that it did not rewrite.
            text = answers[max(answers)].until
            spans = {number: answer.span_in(text, self._eos, self._marks) for number, answer in answers.items()}
            found = {number: span for number, span in spans.items() if span}
            for number, (start, end) in found.items():
                check_answer(text[start:end], number, turns[number])
                if self._train_on in _WITH_BREAKS:
                    found[number] = start, len(text) - len(text[end:].lstrip())
            texts.append(_Text(text, tuple(found.values())))
            answers = {number: answer for number, answer in answers.items() if number not in found}
        return texts[::-1]

    def _whole_text(self, record: Completion) -> _Text:
        if record.is_apart:
            return self._joined_texts(record)
        text = record.prompt + record.completion
        opening = [] if text.startswith(self._bos) else [self._tokenizer.bos_token_id]
        if not text.endswith(self._eos):
            text += self._eos
        start = 0 if self._trains_all(bool(record.prompt)) else len(record.prompt)
        return _Text(text, ((start, len(text)),), tuple(opening))

    def _joined_texts(self, record: Completion) -> _Text:
        """Return the completion behind the tokens of its prompt."""
        opening = [] if record.prompt.startswith(self._bos) else [self._tokenizer.bos_token_id]
        opening += self._backend().encode(record.prompt, add_special_tokens=False).ids
        text = record.completion if record.completion.endswith(self._eos) else record.completion + self._eos
        return _Text(text, ((0, len(text)),), tuple(opening), is_opening_trained=self._trains_all(True))

    def _tokenise(self, texts: Sequence[_Text]) -> list[Sample]:
        encodings = self._backend().encode_batch([text.text for text in texts], add_special_tokens=False)
        samples = []
        for text, encoding in zip(texts, encodings, strict=True):
            trained = [text.is_opening_trained] * len(text.opening) + find_trained(text.text, text.spans, encoding)
            trained[:1] = [False for _ in trained[:1]]  # nothing precedes the first token
            ends = (text.text[start:end].rstrip() for start, end in text.spans)
            num_unended = sum(not end.endswith(self._stops) for end in ends)
            samples.append(Sample([*text.opening, *encoding.ids], trained, num_unended=num_unended))
        return samples

    def _backend(self) -> Tokenizer:
        """Return the tokenizer below, without truncation and padding, which others may have left on."""
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        return backend


def _compiled(source: str, variables: Mapping[str, str]) -> Template:
    """Compile a template.

    Raises:
        ModelError: It is no Jinja, or asks for what is not allowed.
    """
    try:
        return Template(source, variables)
    except Exception as error:  # constants are worked out meanwhile, which can raise anything
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise ModelError(
            f"the chat template cannot be compiled: {printable(str(error) or type(error).__name__, 300)}{line}; "
            "mend it (chat_template.jinja of the model), or set data.chat_template to a name "
            f"({', '.join(CHAT_TEMPLATES)}) or a Jinja file"
        ) from error


def _try(template: Template, style: TemplateStyle, turns: Sequence[Message], add_generation_prompt: bool) -> str | None:
    try:
        return template.render([style.format(turn) for turn in turns], [], add_generation_prompt)
    except Exception:  # a template is a program: it can raise anything
        return None


@dataclass(frozen=True, slots=True)
class _Text:
    """What becomes one sample.

    Attributes:
        text: To be tokenised as a whole.
        spans: Its characters that are trained, in order.
        opening: Tokens before it.
        is_opening_trained: Whether they are trained.
    """

    text: str
    spans: tuple[Span, ...]
    opening: tuple[int, ...] = ()
    is_opening_trained: bool = False


def find_trained(text: str, spans: Sequence[Span], encoding: Encoding) -> list[bool]:
    """Return for each token whether it belongs to a span.

    A token that begins before its span counts when it brings nothing along but white space: " yes" behind "Answer:"
    is the answer, wherever the space was written. Tokens are found by bisection: a tokenizer goes from left to right,
    and a list of all offsets would take longer to make than the tokens themselves.

    Args:
        text: What was tokenised.
        spans: Characters, in order and apart from one another.
        encoding: Of the library `tokenizers`.
    """
    count = len(encoding)

    def characters(token: int) -> Span:
        found = encoding.token_to_chars(token)
        assert found is not None, "tokens of the text itself have characters"
        return found

    def first_token(at: int) -> int:
        """Return the first token that begins at a character or behind it."""
        return bisect_left(range(count), at, key=lambda token: characters(token)[0])

    trained = [False] * count
    first_free = 0
    for start, end in spans:
        if start >= end:
            continue
        first, behind = first_token(start), first_token(end)
        trained[first:behind] = [True] * (behind - first)
        if first > first_free:
            at, until = characters(first - 1)
            brings_space_along = until > start and text[at:start].isspace()
            trained[first - 1] = brings_space_along and any(a < until <= b for a, b in spans)
        first_free = behind
    return trained
