"""Writes a row of instruction, input and output as plain text with headings or marks. Pure.

These are formats of models that have no turns, or no template. The texts are those of Stanford Alpaca, in the four
styles that Axolotl has for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ft.data.rows.keys import refuse_beside_text
from dist_ft.errors import DataError
from dist_ft.printable import excerpt
from dist_ft.records import Completion

_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request."
_SYSTEMS = (f"{_TASK}. {_ANSWER}", f"{_TASK}, paired with an input that provides further context. {_ANSWER}")
"""What stands in front: without and with an input."""
_PROMPTS = {
    "alpaca": (
        "%(system)s\n\n### Instruction:\n%(instruction)s\n\n### Response:\n",
        "%(system)s\n\n### Instruction:\n%(instruction)s\n\n### Input:\n%(input)s\n\n### Response:\n",
    ),
    "alpaca_chat": (
        "SYSTEM: %(system)s\nUSER: %(instruction)s\nASSISTANT:",
        "SYSTEM: %(system)s\nUSER: %(instruction)s\n%(input)s\nASSISTANT:",
    ),
    "alpaca_chatml": tuple(
        f"<|im_start|>system\n%(system)s<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        for asked in ("%(instruction)s", "%(instruction)s\n%(input)s")
    ),
    "alpaca_phi": (
        "<|system|>\n%(system)s<|end|>\n<|user|>\n%(instruction)s<|end|>\n<|assistant|>\n",
        "<|system|>\n%(system)s<|end|>\n<|user|>\n%(instruction)s<|end|>%(input)s<|assistant|>",
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
    has_input = bool(texts["input"])
    prompt = _PROMPTS[name][has_input] % {**texts, "system": _SYSTEMS[has_input]}
    return Completion(prompt, texts["output"], is_apart=True)
