"""Converts a row of any format, a dict with a file's keys, to a `records.Record`. Pure.

| format | keys | becomes |
|---|---|---|
| messages | `messages` | conversation |
| sharegpt | `conversations` with `from` and `value` | conversation |
| prompt_completion | `prompt`, `completion`: both text, or both turns | completion, or conversation |
| alpaca | `instruction`, `output`; optional `input`, `history` | conversation |
| text | `text` | completion without a prompt |
| preference | two answers to a prompt; see `preferences.py` | preference |
| labelled | an answer to a prompt, and `label` or `kto_tag` | labelled answer |

A conversation may have `system` and `tools` (or `functions`) besides. `keys.py` knows all other keys, and what becomes
of a row with them; `conversation.py` reads turns, `preferences.py` the last two formats; `scan.py` knows the location
of a row and what happens to a refused one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from dist_ft.config.data_sections import PromptFormat
from dist_ft.data.rows.conversation import assistant_turns, check_values, read_turns, with_system
from dist_ft.data.rows.keys import OTHER_SYSTEM_KEYS, ROW, is_empty, refuse_beside_text
from dist_ft.data.rows.opened import opened, unread_in
from dist_ft.data.rows.preferences import read_labelled, read_preference
from dist_ft.data.rows.prompts import read_prompted
from dist_ft.data.rows.record_kind import preference_keys, preference_kind
from dist_ft.data.rows.tool_calls import tools_of
from dist_ft.errors import DataError
from dist_ft.printable import excerpt
from dist_ft.records import Completion, Conversation, Message, Record

READING_VERSION = 3
"""Part of the keys of token shards whose rows may have turns; raised when the same row would give another record."""
_MAX_SHOWN_KEYS = 12


def read_record(
    row: Any,
    row_format: str = "auto",
    columns: Mapping[Any, str] | None = None,
    ignored: Collection[str] = (),
    prompt: str | PromptFormat | None = None,
) -> Record:
    """Read one row.

    Args:
        row: The row as the file has it; anything but an object is refused.
        row_format: `data.train[].format`.
        columns: `data.train[].columns`: maps the keys of the table above to those of the file.
        ignored: `data.train[].ignore`: keys that are not looked at.
        prompt: `data.train[].prompt`.

    Raises:
        DataError: The row is not understood. The message leaves out the location, which the caller knows.
    """
    if not isinstance(row, dict):
        raise DataError(f"found {type(row).__name__} {excerpt(row)}, expected an object with {_expected()}")
    renamed = opened(_rename(row, columns or {}), ignored)
    if row_format not in ("auto", "preference", "labelled"):
        _refuse_preferences(renamed, row_format)
    name = recognise(renamed) if row_format == "auto" else row_format
    missing = [key for key in _NEEDED[name] if renamed.get(key) is None]
    if missing:
        hint = f" (columns is {excerpt(dict(columns))})" if columns else ""
        raise DataError(f"found {_found(row)}, but format {name} needs {_names(missing)}{hint}")
    ROW.check(renamed)
    if name != "alpaca" and not is_empty(renamed.get("history")):
        raise DataError(
            "`history` is only read beside `instruction` and `output`; put its turns in front of the others"
        )
    if prompt is not None and name != "alpaca":
        raise DataError(
            f"the row is of format {name}, but its source has a prompt, which is for format alpaca; remove the prompt"
        )
    record = _READERS[name](renamed) if prompt is None else read_prompted(renamed, prompt)
    if name != "text":
        _check_other_system(renamed, record)
    check_values(list(vars(record).values()))
    return record


def unread_keys(row: Mapping[str, Any], columns: Mapping[Any, str], ignored: Collection[str]) -> frozenset[str]:
    """Return the keys of a row that could be read, and of what is in it, to which nothing gives a meaning.

    Args:
        row: As for `read_record`, and so the others.
        columns: See there.
        ignored: See there.
    """
    return unread_in(opened(_rename(row, columns), ignored))


def _refuse_preferences(row: Mapping[str, Any], row_format: str) -> None:
    """Refuses a row of preference data as another format: one answer would be trained as if it were simply right."""
    kind = preference_kind(row)
    if kind is None:
        return
    what = "a pair of answers" if kind == "preference" else "an answer with a label"
    raise DataError(
        f"the row is {what} ({_names(preference_keys(row, kind))}), but its format is given as {row_format}; set "
        f"data.train[].format={kind}, or name keys in data.train[].ignore to train what is left as a conversation"
    )


def _check_other_system(row: Mapping[str, Any], record: Record) -> None:
    """Refuses a system prompt under a key that is not read, unless the record has it from somewhere else."""
    for key in OTHER_SYSTEM_KEYS:
        if is_empty(row.get(key)):
            continue
        said = {text.strip() for role, text in record.role_texts() if role == "system"}
        if str(row[key]).strip() not in said:
            raise DataError(
                f"`{key}` is {excerpt(row[key])}, which no system turn says; set data.train[].columns to "
                f"{{system: {key}}} to read it, or name it in data.train[].ignore"
            )


def recognise(row: Mapping[str, Any]) -> str:
    """Return the format that a row's keys fit.

    Raises:
        DataError: No format fits, or several do. `text` beside another format is its rendered form and is ignored.
            A row of preference data fits no other format, because its answers are not all to be imitated.
    """
    if (form := preference_kind(row)) is not None:
        return form
    plain = {name: needed for name, needed in _NEEDED.items() if needed}
    fitting = [name for name, needed in plain.items() if all(row.get(key) is not None for key in needed)]
    if len(fitting) > 1:
        fitting = [name for name in fitting if name != "text"]
    if not fitting:
        ROW.check(row)  # a key that is refused, such as tokens in place of text, says more than its absence
        raise DataError(f"found {_found(row)}, expected {_expected()}; name them with data.train[].columns")
    if len(fitting) > 1:
        raise DataError(f"found {_found(row)}, which fits {' and '.join(fitting)}; set data.train[].format to one")
    return fitting[0]


def _messages(row: Mapping[str, Any]) -> Conversation:
    return _conversation(row, read_turns("messages", row["messages"]))


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    return _conversation(row, read_turns("conversations", row["conversations"]))


def _prompt_completion(row: Mapping[str, Any]) -> Record:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        refuse_beside_text(row)
        return Completion(prompt, completion)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        found = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise DataError(f"`prompt` and `completion` are {found}, expected both text or both lists of turns")
    asked = read_turns("prompt", prompt)
    for turn in asked:
        if turn["role"] == "assistant":
            turn["weight"] = 0  # only the completion is learned
    return replace(_conversation(row, [*asked, *read_turns("completion", completion)]), is_completion=True)


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    texts = {key: "" if row.get(key) is None else row[key] for key in ("instruction", "input", "output")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"`{key}` is {excerpt(value)}, expected text")
    # LLaMA-Factory joins them with one line break, too.
    asked = f"{texts['instruction']}\n{texts['input']}" if texts["input"] else texts["instruction"]
    turns = [*_history(row.get("history")), *_exchange(asked, texts["output"])]
    return _conversation(row, turns)


def _history(history: Any) -> list[Message]:
    turns: list[Message] = []
    if not isinstance(history or [], list):
        raise DataError(f"`history` is {excerpt(history)}, expected a list of [question, answer]")
    for number, pair in enumerate(history or []):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"`history` {number} is {excerpt(pair)}, expected [question, answer]")
        turns += _exchange(*pair)
    return turns


def _exchange(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _text(row: Mapping[str, Any]) -> Completion:
    if not isinstance(row["text"], str):
        raise DataError(f"`text` is {excerpt(row['text'])}, expected text")
    if not any(row.get(key) is not None for key in ("messages", "conversations")):  # else it is their rendered form
        refuse_beside_text(row)
    return Completion("", row["text"])


def _conversation(row: Mapping[str, Any], turns: list[Message]) -> Conversation:
    """Return the conversation of a row, with the system prompt and the functions that stand beside its turns."""
    if not assistant_turns(turns):
        raise DataError("no assistant turn, so nothing to learn from; remove the row or add the answer")
    return Conversation(with_system(row.get("system"), turns), tools_of(row))


def _rename(row: Mapping[str, Any], columns: Mapping[Any, str]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    return kept | {name: row[column] for name, column in columns.items() if column in row}


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
    "preference": read_preference,
    "labelled": read_labelled,
}
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "preference": (),  # the reader names what is missing, because each key has several spellings
    "labelled": (),
}


def _expected() -> str:
    pairs = "`chosen` and `rejected` with a prompt (preference), `label` with prompt and answer (labelled)"
    return ", ".join([*(f"{_names(keys)} ({name})" for name, keys in _NEEDED.items() if keys), pairs])


def _names(keys: tuple[str, ...] | list[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _found(row: Mapping[str, Any]) -> str:
    keys = sorted(map(str, row))
    more = f" and {len(keys) - _MAX_SHOWN_KEYS} more" if len(keys) > _MAX_SHOWN_KEYS else ""
    return f"keys [{', '.join(map(excerpt, keys[:_MAX_SHOWN_KEYS]))}]{more}"
