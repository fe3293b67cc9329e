"""The one place that knows the keys of a row, a turn, a part of a content, and a call. Pure.

Each key is on one of three lists: it is read; it is harmless, because it cannot change what is learnt; or it has a
meaning that is not honoured, and a value under it is an error. Everything else is unread: no tool gives it a meaning,
and it is named in a warning once a source. A key without a value (null, empty) says nothing and is on no list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dist_ft.data.rows.record_kind import CHOSEN_KEYS, LABEL_KEYS, REJECTED_KEYS, preference_kind
from dist_ft.errors import DataError
from dist_ft.printable import excerpt

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Spellings of what an assistant thinks before it answers."""
FLAG_KEYS = (
    "weight", "loss", "loss_weight", "loss_scale", "loss_mask", "train", "training", "trainable", "is_trained",
    "train_on_turn",
)  # fmt: skip
"""Spellings of whether a turn is trained: of OpenAI and Mistral, ms-swift and xtuner, Axolotl, Tinker and others."""
INVERSE_FLAG_KEYS = ("masked",)
"""Spellings of whether a turn is left untrained: torchtune's."""
OTHER_SYSTEM_KEYS = ("system_prompt", "system_message")
"""Keys of a row that repeat its system prompt, and are refused where they do not."""
SPAN_KEYS = ("train_detail", "training_detail")
"""Axolotl's lists of spans of a content, each with a flag."""

_PROVENANCE = (
    "id", "_id", "uid", "uuid", "uuids", "idx", "index", "row_id", "sample_id", "example_id", "prompt_id",
    "question_id",
    "conversation_id", "conversation_hash", "session_id", "chat_id", "dialog_id", "message_id", "user_id", "hash",
    "source", "sources", "dataset", "dataset_name", "dataset_id", "data_source", "origin", "subset", "split", "config",
    "license", "url", "urls", "path", "file", "filename", "file_name", "author", "annotator", "generator", "model",
    "model_name", "models", "engine", "date", "time", "timestamp", "created", "created_at", "updated_at", "version",
    "meta", "metadata", "tags", "tag", "topic", "topics", "category", "subcategory", "categories", "domain", "subject",
    "task", "task_type", "task_name", "difficulty", "lang", "language", "languages", "country", "state", "header",
    "title", "length", "num_turns", "n_turns", "turns", "turn", "turn_id", "turn_identifier", "tokens", "num_tokens",
    "token_count", "usage", "quality", "rating", "score", "scores", "score_chosen", "score_rejected", "toxic",
    "toxicity", "redacted", "moderation", "openai_moderation", "detoxify_moderation", "hashed_ip", "openai_id",
    "temperature", "top_p", "finish_reason", "stop_reason", "logprobs", "system_fingerprint", "cache_control",
    "annotations", "citations", "prefix", "status", "created_by", "comment", "notes",
)  # fmt: skip
"""Keys that say where something comes from or how it was judged; harmless everywhere."""

_MEDIA = re.compile(
    r"((chosen|rejected|prompt|input)_)?(image|img|video|audio|picture|photo)s?(_(id|path|url|uri|file|byte|data|feature)s?)?"
    r"|media_(path|url|uri|file)s?|(mm|multi_?modal)_(data|input)s?|pixel_values|jpe?g|png|webp|gif|wav|mp3|mp4|flac"
)
_FLAG = re.compile(
    r"(^|_)(train\w*|untrain\w*|loss|losses|mask|masks|masked|weight|weights|supervised?|learn|learned|learnt|learnable"
    r"|grads?|targets?|ignored?|skip|skipped|excluded?)(_|$)"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ONLY_TEXT = "only text can be trained"
_TEMPLATE_SETTINGS = dict.fromkeys(
    (
        "chat_template_kwargs", "template_kwargs", "chat_template", "enable_thinking", "thinking_mode",
        "reasoning_effort", "documents",
    ),
    "settings of a chat template are not passed on",
)  # fmt: skip
_PRETOKENISED = "rows that are already tokens are not read"
_THOUGHTS = "thoughts are read from `reasoning_content`; move them there"
_CALLS = "a call is written as `tool_calls`"
_END_IS_TRAINED = "the end of an answer is always trained"
_MARKS_OF_TRAINING = "what is trained is said by `weight`, 0 or 1, on turns of the assistant"


@dataclass(frozen=True)
class KeyTable:
    """The keys of one kind of object.

    Attributes:
        name: What it is called in messages.
        read: Keys that the readers look at.
        harmless: Keys that cannot change what is learnt, besides those that say where something comes from.
        refused: Keys with a meaning that is not honoured, with the reason.
        harmless_values: Values of refused keys that say nothing.
        refuses_flags: Whether a key that is not known, but looks like a mark of what is trained, is refused. Rows have
            too many other keys with `loss` or `weight` in their names.
    """

    name: str
    read: frozenset[str]
    harmless: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    harmless_values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    refuses_flags: bool = True

    @cached_property
    def known(self) -> frozenset[str]:
        """Keys that are read or harmless."""
        return self.read | self.harmless | _HARMLESS

    def check(self, given: Mapping[str, Any]) -> None:
        """Refuses an object with a key whose meaning is not honoured.

        Raises:
            DataError: Names the key, its value and the ways out.
        """
        for key in given.keys() - self.read:
            reason = self._reason(key)
            if reason is not None and not is_empty(given[key]) and given[key] not in self.harmless_values.get(key, ()):
                raise DataError(
                    f"`{key}` of a {self.name} is {excerpt(given[key])}: {reason}; remove it, or name it in "
                    "data.train[].ignore"
                )

    def unread(self, given: Mapping[str, Any]) -> Iterator[str]:
        """Yield the keys that are on no list."""
        for key in given.keys() - self.known:
            if not is_empty(given[key]) and self._reason(key) is None:
                yield f"{key} of a {self.name}"

    def _reason(self, key: str) -> str | None:
        """Return why a value under a key is refused; None if it is not."""
        if key in self.refused or key in self.known:
            return self.refused.get(key)
        snake = _CAMEL.sub("_", key).lower()
        if _MEDIA.fullmatch(snake):
            return _ONLY_TEXT
        return _MARKS_OF_TRAINING if self.refuses_flags and _FLAG.search(snake) else None


_HARMLESS = frozenset(_PROVENANCE)
_ALPACA_KEYS = ("instruction", "input", "output")
_PREFERENCE_KEYS = (*CHOSEN_KEYS, *REJECTED_KEYS, *LABEL_KEYS, "question", "response")
_MAIN_KEYS = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "history", "system",
    "tools", "functions",
)  # fmt: skip
ROW = KeyTable(
    "row",
    read=frozenset((*_MAIN_KEYS, *OTHER_SYSTEM_KEYS, *_PREFERENCE_KEYS)),
    harmless=frozenset(("parallel_tool_calls", "channel", "margin")),
    refused={
        **_TEMPLATE_SETTINGS,
        **dict.fromkeys((*FLAG_KEYS, *INVERSE_FLAG_KEYS, *SPAN_KEYS, "sample_weight"), _MARKS_OF_TRAINING),
        "objects": _ONLY_TEXT, "attachments": _ONLY_TEXT,
        "input_ids": _PRETOKENISED, "attention_mask": _PRETOKENISED, "labels": _PRETOKENISED,
        "assistant_masks": _PRETOKENISED, "completion_mask": _PRETOKENISED,
        "mask": "the side that is trained is always the assistant's",
        **dict.fromkeys(
            ("available_tools", "tool_definitions", "function_definitions", "tool_schemas", "tools_list", "tool_list"),
            "functions are read from `tools`; map it with data.train[].columns",
        ),
    },
    harmless_values={
        **dict.fromkeys((*FLAG_KEYS, "sample_weight"), (True, 1, "1", "1.0", "true", "True")),
        "masked": (False,), "mask": ("User", "user", "human"),
    },
    refuses_flags=False,
)  # fmt: skip
TURN = KeyTable(
    "turn",
    read=frozenset(
        (
            "role", "from", "content", "value", "name", "tool_call_id", "tool_calls", "function_call",
            "reasoning_details", *REASONING_KEYS, *FLAG_KEYS, *INVERSE_FLAG_KEYS, *SPAN_KEYS,
        )
    ),
    refused={
        **_TEMPLATE_SETTINGS,
        "tools": "functions belong to the row; move them to its `tools`",
        "functions": "functions belong to the row; move them to its `tools`",
        "refusal": "a refusal is said in the content; move it there",
        "channel": "only what is said to the user is content; write thoughts as `reasoning_content`",
        "parts": "what is said is read from `content`; move it there",
        **dict.fromkeys(
            ("recipient", "tool_call", "tool_use", "tool_uses", "calls", "function_calls", "functionCall"), _CALLS
        ),
        **dict.fromkeys(
            (
                "thought", "thoughts", "think", "think_content", "thinking_content", "thinking_blocks",
                "reasoning_text", "chain_of_thought", "cot", "rationale", "analysis", "tool_plan",
            ),
            _THOUGHTS,
        ),
        **dict.fromkeys(("eot", "end_turn"), _END_IS_TRAINED),
        "ipython": _CALLS,
        "label": "attributes of an answer are not trained",
        "attachments": _ONLY_TEXT, "files": _ONLY_TEXT,
    },
    harmless_values={
        "channel": ("final",), "recipient": ("all",), "eot": (True,), "end_turn": (True,), "ipython": (False,),
    },
)  # fmt: skip
PART = KeyTable(
    "part of a content",
    read=frozenset(("type", "text", *FLAG_KEYS, *INVERSE_FLAG_KEYS)),
    refused={"thought": _THOUGHTS},
    harmless_values={"thought": (False,)},
)
CALL = KeyTable(
    "call",
    read=frozenset(("id", "type", "function", "name", "arguments", "parameters")),
    harmless=frozenset(("call_id",)),
)
FUNCTION = KeyTable(
    "called function",
    read=frozenset(("name", "arguments", "parameters")),
    harmless=frozenset(("strict", "description")),
)


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: null, empty text, or a list or object of nothing else, also as JSON."""
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def refuse_beside_text(row: Mapping[str, Any]) -> None:
    """Refuses keys that only a template could put into the text, in a row of raw text.

    Raises:
        DataError: Names the key.
    """
    for key in ("system", "tools", "functions", "history"):
        if not is_empty(row.get(key)):
            raise DataError(
                f"`{key}` stands beside raw text, which no template touches, so that it would be lost; write the row "
                "as turns, or name the key in data.train[].ignore"
            )


def lost_keys(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield keys of a row that some format reads, but not the one that the row has.

    What stands beside turns, or in a text, is their other form: many files keep the columns that turns were made of.
    """
    lost: list[str] = []
    kind = preference_kind(row)
    if kind == "preference":
        lost += LABEL_KEYS
    if kind is None:
        lost += _PREFERENCE_KEYS
        if row.get("prompt") is not None and row.get("completion") is not None:
            lost += () if any(row.get(key) is not None for key in ("messages", "conversations")) else _ALPACA_KEYS
    for key in lost:
        if not is_empty(row.get(key)):
            yield f"{key} of a {ROW.name}"
