"""Turns prompts into tokens, exactly as in training, and tokens into text."""

from __future__ import annotations

from functools import cached_property

from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from dist_ft.config import Config
from dist_ft.engine.protocol import Likely, Prompt
from dist_ft.engine.transcript import BROKEN
from dist_ft.errors import DataError
from dist_ft.model.base import Tokenizer, load_generation_config, load_tokenizer, stop_tokens
from dist_ft.model.chat.render import Renderer


class Rendering:
    """The tokenizer of a model, its template, its stops.

    Args:
        config: Names the model.
        num_logits: Tokens that the model gives a logit for, which may be more than the tokenizer has.
    """

    def __init__(self, config: Config, num_logits: int) -> None:
        self._tokenizer: Tokenizer = load_tokenizer(config)
        self.stops = frozenset(stop_tokens(self._tokenizer, load_generation_config(config)))
        self._renderer = Renderer(self._tokenizer, stops=self.stops)
        self.num_logits = num_logits

    def tokens(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            DataError: The template refuses the turns, has no place for tools, or a token does not exist.
            ModelError: There is no template.
        """
        if prompt.tokens is not None:
            if odd := [token for token in prompt.tokens if not 0 <= token < self.num_logits]:
                raise DataError(f"token {odd[0]} does not exist; the model has tokens 0 to {self.num_logits - 1}")
            return list(prompt.tokens)
        if prompt.messages is None:
            text = self._renderer.continued(prompt.text or "")
        else:
            if prompt.tools and not self._mentions_tools:
                raise DataError("the chat template of the model has no place for tools")
            text = self._renderer.text(prompt.messages, prompt.tools, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def _mentions_tools(self) -> bool:
        return "tools" in str(self._tokenizer.get_chat_template(tools=[]))

    def text(self, tokens: list[int], keeps_marks: bool = False) -> str:
        """Return the text of tokens."""
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=not keeps_marks, clean_up_tokenization_spaces=False)
        )

    def likely(self, token: int, logprob: float) -> Likely:
        """Return how a token is told."""
        text = self.text([token], keeps_marks=True)
        return Likely(text, logprob, tuple(text.encode() if BROKEN not in text else self._bytes(token)))

    def _bytes(self, token: int) -> bytes:
        """Return the bytes of a token that is no whole text."""
        return bytes(self._guide.decode_bytes([token]))

    def matcher(self, schema: str) -> LLMatcher:
        """Return what allows the next tokens of an answer that has to fit a JSON schema.

        Raises:
            DataError: The schema is not understood.
        """
        grammar = LLMatcher.grammar_from_json_schema(schema)
        if problem := LLMatcher.validate_grammar(grammar, self._guide):
            raise DataError(f"the JSON schema is not understood: {problem[:300]}")
        return LLMatcher(self._guide, grammar)

    @cached_property
    def _guide(self) -> LLTokenizer:
        return from_tokenizer(self._tokenizer, n_vocab=self.num_logits, eos_token=sorted(self.stops) or None)
