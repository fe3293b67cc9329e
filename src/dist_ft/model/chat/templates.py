"""Selects the chat template of a run: one of ours by name, a file, Jinja text, or the tokenizer's own."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from dist_ft.config.data_sections import CHAT_TEMPLATES, DataConfig
from dist_ft.errors import ModelError


def template_text(data: DataConfig) -> str | None:
    """Return the template that `data.chat_template` asks for; None for the tokenizer's own.

    Raises:
        ModelError: The file cannot be read.
    """
    path = data.template_path
    if path is None:
        return named_template(data.chat_template) if data.chat_template in CHAT_TEMPLATES else data.chat_template
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"data.chat_template={path} cannot be read: {error}; name a Jinja file in UTF-8") from error


def named_template(name: str) -> str:
    """Return one of `config.data_sections.CHAT_TEMPLATES`."""
    return (files("dist_ft.model.chat") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
