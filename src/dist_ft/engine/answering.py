"""Answers many requests at once: each step makes one token of every row; requests join and leave between steps.

An answer does not depend on who else is in the batch, but for ties that another order of float32 sums may break.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dist_ft.config import config_from_dict
from dist_ft.engine.batch import Batch, Row
from dist_ft.engine.protocol import Accepted, Ask, EngineSpec, Event, Refused
from dist_ft.engine.rendered import Rendering
from dist_ft.engine.transcript import Transcript
from dist_ft.errors import DataError, ModelError
from dist_ft.model.batch.served import ServedModel

DEFAULT_MAX_TOKENS = 1024
"""Longest answer when a request names no limit."""
_PROMPT_TOKENS = 1024
"""Tokens of prompts that are read between two steps, so that long ones do not hold up those who are answered."""
_GROUP_TOKENS = 256
"""Most tokens of prompts in one pass: more are no faster together, and the first would wait for the last."""
_MOST_PADDED = 1.5
"""Most tokens, padding included, that are read together, as a multiple of those of the prompts."""


@dataclass(frozen=True)
class _Waiting:
    ask: Ask
    tokens: list[int]
    limit: int

    @property
    def reach(self) -> int:
        """Places that each of its rows may take."""
        return len(self.tokens) + self.limit


class Engine:
    """A model with its adapters, and everybody who asks it.

    Args:
        spec: What it is made of.

    Raises:
        UserError: The model does not load.
    """

    def __init__(self, spec: EngineSpec) -> None:
        config = config_from_dict(spec.config)
        self._spec = spec
        self._model = ServedModel(config, Path(spec.merged) if spec.merged else None)
        text = self._model.config.get_text_config()
        self._rendering = Rendering(config, text.vocab_size)
        self._context = text.max_position_embeddings
        self._max_cells = max(1, spec.cache_bytes // _cell_bytes(self._model))
        self._batch = Batch(self._model, self._rendering)
        self._waiting: deque[_Waiting] = deque()
        self._used: OrderedDict[str, None] = OrderedDict()  # adapters, the one used longest ago first

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not (self._waiting or self._batch.rows)

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._rendering.stops

    def submit(self, ask: Ask) -> Event:
        """Take a request into the queue; return whether it was."""
        if len(self._waiting) >= self._spec.max_waiting:
            return Refused(ask.id, 429, "The engine is overloaded; try again later.", None, "engine_overloaded")
        try:
            waiting = self._prepared(ask)
        except (DataError, ModelError) as error:
            return Refused(ask.id, 400, str(error))
        if isinstance(waiting, Refused):
            return waiting
        self._waiting.append(waiting)
        return Accepted(ask.id, len(waiting.tokens))

    def cancel(self, ask_id: str) -> None:
        """Forget a request."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.ask.id != ask_id)
        self._batch.drop(ask_id)

    def step(self) -> Iterator[Event]:
        """Let requests join that fit, and make a token of each row."""
        read = 0
        while read < _PROMPT_TOKENS and (group := self._take_group()):
            read += sum(len(waiting.tokens) for waiting in group)
            yield from self._batch.join([(waiting.tokens, self._rows(waiting)) for waiting in group])
        if self._batch.rows:
            yield from self._batch.step()

    def _prepared(self, ask: Ask) -> _Waiting | Refused:
        if ask.adapter is not None and ask.adapter not in self._model.adapters:
            self._load(ask.adapter)
        try:
            tokens = self._rendering.tokens(ask.prompt)
        except DataError as error:
            return Refused(ask.id, 400, str(error), "messages" if ask.prompt.messages is not None else "prompt")
        room = self._context - len(tokens)
        if not tokens:
            return Refused(ask.id, 400, "The prompt is empty.", "prompt")
        asked = ask.sampling.max_tokens
        if room < 1 or (asked or 0) > room:
            return Refused(
                ask.id, 400, f"This model's maximum context length is {self._context} tokens. However, your prompt has "
                f"{len(tokens)} tokens" + (f" and the answer up to {asked}." if asked else "."),
                "messages", "context_length_exceeded",
            )  # fmt: skip
        if odd := [token for token, _ in ask.sampling.logit_bias if token >= self._rendering.num_logits]:
            return Refused(ask.id, 400, f"Invalid key in 'logit_bias': {odd[0]} is no token.", "logit_bias")
        if ask.grammar is not None:
            try:
                self._rendering.matcher(ask.grammar)  # refused now, not when its turn comes
            except DataError as error:
                return Refused(ask.id, 400, str(error), "response_format")
        waiting = _Waiting(ask, tokens, asked if asked is not None else min(room, DEFAULT_MAX_TOKENS))
        if ask.sampling.n > self._spec.max_rows or ask.sampling.n * waiting.reach > self._max_cells:
            return Refused(
                ask.id, 400, f"{ask.sampling.n} answers of up to {waiting.reach} tokens with the prompt are more than "
                f"the server has room for ({self._spec.max_rows} answers, {self._max_cells} tokens); ask for less.",
                "n" if ask.sampling.n > 1 else "max_tokens",
            )  # fmt: skip
        return waiting

    def _load(self, adapter: str) -> None:
        self._model.load(adapter)
        self._used[adapter] = None
        busy = {waiting.ask.adapter for waiting in self._waiting} | {row.ask.adapter for row in self._batch.rows}
        idle = [other for other in self._used if other not in busy and other != adapter]
        while len(self._used) > self._spec.max_adapters and idle:
            oldest = idle.pop(0)
            self._model.unload(oldest)
            del self._used[oldest]

    def _take_group(self) -> list[_Waiting]:
        """Take the next requests off the queue that fit and are read together: of much the same length."""
        group: list[_Waiting] = []
        while self._waiting and self._fits([*group, self._waiting[0]]):
            lengths = [len(waiting.tokens) for waiting in [*group, self._waiting[0]]]
            read = len(lengths) * max(lengths)
            if group and (read > _GROUP_TOKENS or read > _MOST_PADDED * sum(lengths)):
                break
            group.append(self._waiting.popleft())
        return group

    def _fits(self, group: list[_Waiting]) -> bool:
        rows = len(self._batch.rows) + sum(waiting.ask.sampling.n for waiting in group)
        reaches = [row.length - row.num_tokens + row.limit for row in self._batch.rows]
        longest = max([*reaches, *(waiting.reach for waiting in group)])
        return rows <= self._spec.max_rows and rows * longest <= self._max_cells

    def _rows(self, waiting: _Waiting) -> list[Row]:
        ask = waiting.ask
        if ask.adapter is not None:
            self._used.move_to_end(ask.adapter)
        decode = partial(self._rendering.text, keeps_marks=ask.keeps_marks)
        return [
            Row(
                ask, choice, waiting.limit, Transcript(decode, ask.sampling.stop),
                None if ask.grammar is None else self._rendering.matcher(ask.grammar), len(waiting.tokens),
            )
            for choice in range(ask.sampling.n)
        ]  # fmt: skip


def _cell_bytes(model: ServedModel) -> int:
    """Return the bytes of keys and values of one token."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads  # not all families have it
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * model.dtype.itemsize)
