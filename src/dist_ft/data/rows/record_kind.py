"""Says which kind of record the keys of a row speak of: a pair of answers, a labelled answer, or neither. Pure.

Rows of preference data look like conversations with one more key (`rejected_response`, `label`), so they must be
recognised before any format is. Owns the names of these keys; what such a row says is not read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

PreferenceKind = Literal["preference", "labelled"]

CHOSEN_KEYS = ("chosen", "preferred_output", "preferred_completion", "chosen_response", "chosen_messages")
"""Keys of the better answer: of TRL, LLaMA-Factory and Axolotl, of OpenAI, and of files derived from theirs."""
REJECTED_KEYS = (
    "rejected", "non_preferred_output", "non_preferred_completion", "rejected_response", "rejected_messages",
)  # fmt: skip
"""Keys of the worse answer; ms-swift's two stand beside a conversation that ends with the better one."""
LABEL_KEYS = ("label", "kto_tag")
"""Keys that say whether an answer is good: of TRL, ms-swift and Axolotl, and of LLaMA-Factory."""
_ANSWERED_KEYS = ("messages", "conversations", "completion", "response", "output")
_TRUTHS = {"true": True, "false": False, "1": True, "0": False}


def preference_kind(row: Mapping[str, Any]) -> PreferenceKind | None:
    """Return what a row is: a pair of answers, an answer with a label, or neither of them.

    An answer is text, a turn or turns; a flag or a number under such a key is not. A label counts only beside an
    answer, and only where it is a truth value: classes and scores of other tasks are also called labels.
    """
    if preference_keys(row, "preference"):
        return "preference"
    return "labelled" if preference_keys(row, "labelled") else None


def preference_keys(row: Mapping[str, Any], kind: PreferenceKind) -> list[str]:
    """Return the keys of a row that make it one of a kind; empty if it is not."""
    if kind == "preference":
        return [
            key for key in (*CHOSEN_KEYS, *REJECTED_KEYS) if isinstance(row.get(key), str | dict | list) and row[key]
        ]
    if all(row.get(key) is None for key in _ANSWERED_KEYS):
        return []
    return [key for key in LABEL_KEYS if truth_of(row.get(key)) is not None]


def truth_of(label: Any) -> bool | None:
    """Return a label as a truth value, which CSV files write as text; None if it is something else."""
    if isinstance(label, bool):
        return label
    if isinstance(label, int | float | str):
        return _TRUTHS.get(str(int(label) if label in (0, 1) else label).strip().lower())
    return None
