"""A tiny model with adapters to serve, whose answers differ, and the requests of tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.engine.answering import Engine
from dist_ft.engine.protocol import Accepted, Ask, EngineSpec, Piece, Prompt, Sampling
from dist_ft.model.embedded import materialise
from tests.helpers.configs import tiny_config


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread: for a tiny model a second one only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_base(directory: Path, seed: int = 0) -> Path:
    """Writes the tiny model with larger weights; fresh ones say the same to everything."""
    torch.manual_seed(seed)
    source = materialise("tiny-random")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


def make_adapter(base: Path, directory: Path, seed: int, **settings: Any) -> Path:
    """Writes an adapter with random weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **settings)
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(directory)
    return directory


def engine_spec(base: Path, tmp_path: Path, **changes: Any) -> EngineSpec:
    """Returns an engine's spec for a model directory."""
    config = tiny_config(tmp_path, model__name=str(base), data__chat_template="chatml")
    return replace(EngineSpec(config.model_dump(mode="json")), **changes)


def ask_of(name: str, text: str, adapter: Path | None = None, grammar: str | None = None, **sampling: Any) -> Ask:
    """Returns a request that continues text, greedily unless told."""
    settings = {"max_tokens": 12, "temperature": 0.0, **sampling}
    return Ask(name, Prompt(text=text), Sampling(**settings), str(adapter) if adapter else None, grammar)


def answers(engine: Engine, *asks: Ask) -> dict[tuple[str, int], list[Piece]]:
    """Returns the pieces of every answer, by request and choice."""
    for ask in asks:
        assert isinstance(accepted := engine.submit(ask), Accepted), accepted
    found: dict[tuple[str, int], list[Piece]] = {}
    while not engine.is_idle:
        for event in engine.step():
            assert isinstance(event, Piece), event
            found.setdefault((event.id, event.choice), []).append(event)
    return found


def text_of(pieces: list[Piece]) -> str:
    """Returns the text of an answer."""
    return "".join(piece.text for piece in pieces)
