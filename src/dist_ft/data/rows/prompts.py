"""Writes a row of instruction, input and output as plain text with headings. Pure.

These are formats of models that have no turns. The texts are those of Stanford Alpaca, which other tools use, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ft.data.rows.keys import refuse_beside_text
from dist_ft.errors import DataError
from dist_ft.printable import excerpt
from dist_ft.records import Completion

_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request.\n\n"
_PROMPTS = {
    "alpaca": (
        f"{_TASK}. {_ANSWER}### Instruction:\n%(instruction)s\n\n### Response:\n",
        f"{_TASK}, paired with an input that provides further context. {_ANSWER}"
        "### Instruction:\n%(instruction)s\n\n### Input:\n%(input)s\n\n### Response:\n",
    ),
}
"""Texts by `data.train[].prompt`: without and with an input."""


def read_prompted(row: Mapping[str, Any], name: str) -> Completion:
    """Return the text of a row; prompt and answer are tokenised apart.

    Args:
        row: With the keys of format `alpaca`.
        name: `data.train[].prompt`.

    Raises:
        DataError: A value is no text, or stands beside the text and would be lost.
    """
    refuse_beside_text(row)
    texts = {key: "" if row.get(key) is None else row[key] for key in ("instruction", "input", "output")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"`{key}` is {excerpt(value)}, expected text")
    alone, with_input = _PROMPTS[name]
    return Completion((with_input if texts["input"] else alone) % texts, texts["output"], is_apart=True)
