"""Greedy answers of the tiny model: padding and prompts that are too long change no other answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.evaluate.generate import generate
from dist_ft.model.embedded import materialise


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_pretrained(materialise("tiny-random"), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)  # fresh weights say the same to everything
    return found


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(materialise("tiny-random"))


def test_an_answer_does_not_depend_on_its_neighbours(model: Any, tokenizer: Any) -> None:
    prompts = ["red", "a much longer prompt about blue and green", "x"]
    together = generate(model, tokenizer, prompts, 6)
    assert together == [generate(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_of_a_prompt_without_room_the_end_counts(model: Any, tokenizer: Any) -> None:
    room = model.config.max_position_embeddings - 6
    end = "".join(chr(97 + (7 * i) % 26) for i in range(room))
    assert generate(model, tokenizer, ["so" * 50 + end], 6) == generate(model, tokenizer, [end], 6)


def test_an_answer_ends_where_either_the_tokenizer_or_the_model_says(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(["red"], add_special_tokens=False, return_tensors="pt")
    first = int(model(**batch).logits[0, -1].argmax())
    whole = generate(model, tokenizer, ["red"], 6)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [first]
    try:
        (cut,) = generate(model, tokenizer, ["red"], 6)
    finally:
        model.generation_config.eos_token_id = before
    assert len(cut.text) <= 1 < len(whole[0].text)
    assert cut.is_whole
