"""Writes a row of instruction, input and output as plain text with headings or marks. Pure.

These are formats of models that have no turns, or no template. The texts with a name are those of Stanford Alpaca, in
the four styles that Axolotl has for them, and its `jeopardy`; others are formats of the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ft.config.data_sections import PromptFormat
from dist_ft.data.rows.keys import refuse_beside_text
from dist_ft.errors import DataError
from dist_ft.printable import excerpt
from dist_ft.records import Completion

_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request."
_SYSTEMS = (f"{_TASK}, paired with an input that provides further context. {_ANSWER}", f"{_TASK}. {_ANSWER}")
"""What stands in front: with and without an input."""


def _preset(system: str, format: str, no_input_format: str, answer: str = "{output}") -> PromptFormat:
    """Return a format whose first words depend on whether there is an input."""
    with_input, without = (system.format(system=text) for text in _SYSTEMS)
    return PromptFormat(format=with_input + format, no_input_format=without + no_input_format, answer_format=answer)


_HEADINGS = (
    "{system}\n\n",
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "### Instruction:\n{instruction}\n\n### Response:\n",
)
_PRESETS: Mapping[str, PromptFormat] = {
    "alpaca": _preset(*_HEADINGS),
    "jeopardy": _preset(*_HEADINGS, answer="what is {output}"),
    "alpaca_chat": _preset(
        "SYSTEM: {system}\n", "USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:"
    ),
    "alpaca_chatml": _preset(
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "alpaca_phi": _preset(
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    ),
}
"""Formats by the name in `data.train[].prompt`. A row's own system prompt has no place in them."""


def read_prompted(row: Mapping[str, Any], prompt: str | PromptFormat) -> Completion:
    """Return the text of a row; prompt and answer are tokenised apart.

    Args:
        row: With the keys of format `alpaca`.
        prompt: `data.train[].prompt`.

    Raises:
        DataError: A value is no text, or stands beside the text and would be lost.
    """
    is_own = isinstance(prompt, PromptFormat)
    found = prompt if isinstance(prompt, PromptFormat) else _PRESETS[prompt]
    refuse_beside_text({key: value for key, value in row.items() if not (is_own and key == "system")})
    texts = {key: "" if row.get(key) is None else row[key] for key in ("instruction", "input", "output", "system")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"`{key}` is {excerpt(value)}, expected text")
    system = texts["system"] if "system" in row else found.system
    opening = found.system_format.format(system=system) if system else ""
    asked = found.format if texts["input"] else found.no_input_format
    asked = asked.format(instruction=texts["instruction"], input=texts["input"])
    return Completion(opening + asked, found.answer_format.format(output=texts["output"]), is_apart=True)
