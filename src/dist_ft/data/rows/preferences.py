"""Reads rows of preference data, in the spellings of TRL, OpenAI, LLaMA-Factory, ms-swift and Axolotl. Pure.

| a row of | prompt | answers |
|---|---|---|
| TRL | `prompt`, or what both answers begin with | `chosen`, `rejected` |
| OpenAI | `input` with `messages`, `tools` | `preferred_output`, `non_preferred_output` (or `…_completion`) |
| LLaMA-Factory | `instruction`, `input`; or `conversations` | `chosen`, `rejected` |
| ms-swift | `messages` up to the last answer | that answer; `rejected_response` or `rejected_messages` |
| Axolotl | `system`; `instruction`, `question`, `prompt` or `input` | `chosen`, `rejected` (or `…_response`) |

An answer is text, a turn or turns. Rows with a label (KTO) have one answer, as a row for supervised fine-tuning has it,
and `label` or `kto_tag`. A prompt and answers that are all text, without `system`, are raw text; everything else is a
conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from dist_ft.data.rows.conversation import assistant_turns, read_turns, with_system
from dist_ft.data.rows.keys import ROW, is_empty, refuse_beside_text
from dist_ft.data.rows.record_kind import CHOSEN_KEYS, LABEL_KEYS, REJECTED_KEYS, truth_of
from dist_ft.data.rows.tool_calls import tools_of
from dist_ft.errors import DataError
from dist_ft.printable import excerpt
from dist_ft.records import Labelled, Message, Preference, Side

_TURNS = ("messages", "conversations")
_ASKED = ("instruction", "question", "prompt", "input")
_ANSWERED = ("completion", "response", "output")


def read_preference(row: Mapping[str, Any]) -> Preference:
    """Read a pair of answers.

    Raises:
        DataError: An answer is missing, both are equal, or a turn is not understood.
    """
    asked = _asked(row)
    worse_key = _required(row, REJECTED_KEYS, "rejected answer")
    better: Side
    worse: Side = _side(worse_key, row[worse_key])
    prompt: Side | None = asked.prompt
    if asked.turns is not None and _key(row, CHOSEN_KEYS) is None:  # ms-swift
        better_key = asked.turns
        prompt, better = _cut_last_answer(asked.turns, prompt)
        worse = _without(prompt, worse)
    else:
        better_key = _required(row, CHOSEN_KEYS, "chosen answer")
        better = _side(better_key, row[better_key])
        if asked.turns is not None and _is_copy(prompt, better):  # UltraFeedback
            assert isinstance(prompt, list)
            before = prompt[: -len(better)]
            prompt, better, worse = _implicit(better, worse)
            prompt = [*before, *_turns_of(prompt, "user")]
        elif prompt is not None and _is_prefix(prompt, better) and _is_prefix(prompt, worse):
            better, worse = _without(prompt, better), _without(prompt, worse)
        elif prompt is None or (isinstance(prompt, str) and _has_prompt(better) and _has_prompt(worse)):
            prompt, better, worse = _implicit(better, worse)
    if asked.system or asked.is_chat or not all(isinstance(side, str) for side in (prompt, better, worse)):
        prompt = with_system(asked.system, _turns_of(prompt, "user"))
        better, worse = _answer(better_key, better, prompt), _answer(worse_key, worse, prompt)
    else:
        refuse_beside_text(row)
    for key, side in ((better_key, better), (worse_key, worse)):
        if not (side.strip() if isinstance(side, str) else side):
            raise DataError(f"`{key}` holds no answer; remove the row or add the answer")
    if better == worse:
        raise DataError(f"`{better_key}` and `{worse_key}` are equal, so there is nothing to prefer; remove the row")
    assert prompt is not None
    return Preference(prompt, better, worse, asked.tools)


def read_labelled(row: Mapping[str, Any]) -> Labelled:
    """Read an answer with a label.

    Raises:
        DataError: Answer or label is missing, or a turn is not understood.
    """
    label_key = _required(row, LABEL_KEYS, "label")
    label = truth_of(row[label_key])
    if label is None:
        raise DataError(f"`{label_key}` is {excerpt(row[label_key])}, expected true or false")
    asked = _asked(row)
    prompt: Side | None
    answer: Side
    if asked.turns is not None:
        prompt, answer = _cut_last_answer(asked.turns, asked.prompt)
    else:
        key = _required(row, _ANSWERED, "answer")
        prompt, answer = asked.prompt, _side(key, row[key])
        if prompt is None and _has_prompt(answer):
            prompt, answer = _cut_last_answer(key, answer)
        if prompt is None:
            raise DataError(f"there is no prompt; add one of {_names(_ASKED)}, which may be empty")
        if asked.system or asked.is_chat or not (isinstance(prompt, str) and isinstance(answer, str)):
            prompt = with_system(asked.system, _turns_of(prompt, "user"))
            answer = _answer(key, answer, prompt)
        else:
            refuse_beside_text(row)
        if not (answer.strip() if isinstance(answer, str) else answer):
            raise DataError(f"`{key}` holds no answer; remove the row or add the answer")
    return Labelled(prompt, answer, label, asked.tools)


class _Asked(NamedTuple):
    """What stands before the answers.

    Attributes:
        prompt: Turns or text; None if the row has none of its own.
        system: The row's system prompt.
        tools: See `Conversation`.
        turns: The key of a whole conversation, the last answer of which may belong to the pair.
        is_chat: Whether a prompt of text stands for a turn of the user.
    """

    prompt: Side | None
    system: Any = None
    tools: tuple[dict[str, Any], ...] = ()
    turns: str | None = None
    is_chat: bool = False


def _asked(row: Mapping[str, Any]) -> _Asked:
    tools = tools_of(row)
    given = row.get("input")
    if isinstance(given, dict):  # OpenAI
        ROW.check(given)
        turns_before = read_turns("input.messages", given.get("messages"))
        return _Asked(turns_before, tools=tools_of(given) or tools)
    if (turns := _key(row, _TURNS)) is not None:
        return _Asked(with_system(row.get("system"), read_turns(turns, row[turns])), tools=tools, turns=turns)
    if (key := _key(row, _ASKED if is_empty(row.get("instruction")) else _ASKED[:-1])) is None:
        return _Asked(None, row.get("system"), tools)
    prompt: Side = _side(key, row[key])
    if key == "instruction" and given:
        prompt = f"{prompt}\n{given}"  # as LLaMA-Factory joins them
    return _Asked(prompt, row.get("system"), tools, is_chat=key != "prompt")


def _side(key: str, value: Any) -> Side:
    """Return an answer or a prompt as the row has it: text, or turn."""
    if isinstance(value, dict):
        return read_turns(key, [value])
    if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith('[{"')):
        return read_turns(key, value)
    if not isinstance(value, str):
        raise DataError(f"`{key}` is {excerpt(value)}, expected text or turns")
    return value


def _turns_of(side: Side | None, role: str) -> list[Message]:
    """Return turns; text becomes one turn of a role, and empty text none."""
    if isinstance(side, list):
        return side
    return [{"role": role, "content": side}] if side else []


def _answer(key: str, side: Side, prompt: list[Message]) -> list[Message]:
    """Return an answer as turns, which stand behind a prompt and end with what an assistant says."""
    turns = _turns_of(side, "assistant")
    if not turns:
        return turns
    if not assistant_turns(turns):
        raise DataError(f"`{key}` has no assistant turn; remove the row or add the answer")
    if turns[-1]["role"] != "assistant":
        raise DataError(f"`{key}` does not end with an answer; remove what follows it")
    if turns[0]["role"] not in ("assistant", "tool"):
        raise DataError(
            f"`{key}` begins with a turn of role {turns[0]['role']} that the prompt, or the other answer, does not "
            "have; answers to different questions cannot be compared"
        )
    if prompt and prompt[-1]["role"] == turns[0]["role"] == "assistant":
        raise DataError(f"the prompt ends with an answer, before the one of `{key}`; remove it from the prompt")
    return turns


def _cut_last_answer(key: str, side: Side | None) -> tuple[list[Message], list[Message]]:
    """Return a conversation up to its last assistant turn, and that turn."""
    turns = _turns_of(side, "user")
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError(f"`{key}` does not end with an answer; remove the row or add the answer")
    return turns[:-1], turns[-1:]


def _is_prefix(prompt: Side, side: Side) -> bool:
    return isinstance(prompt, list) and isinstance(side, list) and side[: len(prompt)] == prompt


def _is_copy(prompt: Side | None, side: Side) -> bool:
    """Return whether a whole conversation stands beside an answer that is the same conversation."""
    return isinstance(prompt, list) and _has_prompt(side) and prompt[-len(side) :] == side


def _without(prompt: Side, side: Side) -> Side:
    return side[len(prompt) :] if _is_prefix(prompt, side) else side


def _has_prompt(side: Side) -> bool:
    return isinstance(side, list) and side[0]["role"] != "assistant"


def _implicit(better: Side, worse: Side) -> tuple[Side, Side, Side]:
    """Take what both answers begin with as the prompt, as TRL does: turns or characters."""
    if isinstance(better, str) and isinstance(worse, str):
        end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(better, worse, strict=False)))
        end -= better[end - 1 : end] == " "  # the space belongs to the answers
        return better[:end], better[end:], worse[end:]
    turns, others = _turns_of(better, "assistant"), _turns_of(worse, "assistant")
    end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(turns, others, strict=False)))
    return turns[:end], turns[end:], others[end:]


def _key(row: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return the key that a row has of several with one meaning; one that says something goes before an empty one."""
    given = [key for key in keys if row.get(key) is not None]
    said = [key for key in given if not is_empty(row[key])]
    for other in said[1:]:
        if row[other] != row[said[0]]:
            raise DataError(
                f"`{said[0]}` and `{other}` mean the same and differ; keep one, or name one in data.train[].ignore"
            )
    return next(iter(said or given), None)


def _required(row: Mapping[str, Any], keys: tuple[str, ...], what: str) -> str:
    key = _key(row, keys)
    if key is None:
        raise DataError(f"there is no {what}; add one of {_names(keys)}, or name it with data.train[].columns")
    return key


def _names(keys: tuple[str, ...]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
