"""Finds the text of another tool's chat template, and knows which of them equal ours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from dist_ft.importers.verdicts import Outcome, Source

OURS = {
    "axolotl": {"chatml": "chatml", "llama3": "llama3", "gemma3": "gemma", "phi_35": "phi"},
    "llamafactory": {"chatml": "chatml", "llama3": "llama3", "qwen3_nothink": "chatml"},
}
"""Templates that render the same as one of ours, on text turns with and without a system turn."""
NO_SYSTEM = {
    "axolotl": {"gemma": ("gemma", "refuses"), "mistral_v2v3": ("mistral", "drops")},
    "llamafactory": {"gemma": ("gemma", "joins"), "mistral": ("mistral", "joins")},
}
"""Templates that equal one of ours on rows without a system turn, and what theirs does with one."""


def chat_template(source: Source, tool: str, name: str) -> Outcome:
    """Return the template of a name: ours, a text at hand, or else the tokenizer's own."""
    if name in OURS[tool]:
        return Outcome("same", "", {"data.chat_template": OURS[tool][name]})
    if name in NO_SYSTEM[tool]:
        ours, theirs = NO_SYSTEM[tool][name]
        return Outcome("close", f"the same save system turns, which theirs {theirs}", {"data.chat_template": ours})
    if name == "tokenizer_default":
        return Outcome("same", "the tokenizer's own")
    if name.startswith("tokenizer_default_fallback_"):
        return Outcome("close", "the tokenizer's own; if it has none, choose a template as data.chat_template")
    text = _text_of(source, tool, name)
    if text is not None:
        return Outcome("same", f"the text of {name}", {"data.chat_template": text})
    return Outcome(
        "close",
        f"the text of {name} is not at hand, so the tokenizer's own template is used; compare a row with `dist-ft data "
        "show`, or give the text: --templates DIR",
    )


def _text_of(source: Source, tool: str, name: str) -> str | None:
    folders = [source.options.templates] if source.options.templates is not None else []
    if tool == "axolotl" and (spec := find_spec("axolotl")) is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "utils" / "chat_templates" / "templates")
    for folder in folders:
        path = folder / f"{Path(name).name}.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None
