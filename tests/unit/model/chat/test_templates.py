"""Where the chat template comes from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.data_sections import CHAT_TEMPLATES, DataConfig
from dist_ft.errors import ModelError
from dist_ft.model.chat.templates import named_template, template_text


def _data(**more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": [{"source": "a.jsonl"}], **more})


def test_every_name_has_a_file_and_every_file_a_name() -> None:
    found = {Path(file.name).stem for file in (files("dist_ft.model.chat") / "chat_templates").iterdir()}
    assert found == set(CHAT_TEMPLATES)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_name_is_one_of_ours(name: str) -> None:
    assert template_text(_data(chat_template=name)) == named_template(name)
    assert "messages" in named_template(name)


@pytest.mark.parametrize("text", ["{{ messages[0].content }}", "{% for m in messages %}x{% endfor %}"])
def test_jinja_text_is_the_template(text: str) -> None:
    assert template_text(_data(chat_template=text)) == text


def test_anything_else_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "chatml").write_text("ü {{ messages }}", encoding="utf-8")
    assert template_text(_data(chat_template=str(tmp_path / "chatml"))) == "ü {{ messages }}"
    assert template_text(_data()) is None


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"data\.chat_template=.*mine\.jinja"):
        template_text(_data(chat_template=str(path)))
