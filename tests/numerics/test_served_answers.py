"""Answers of the engine equal transformers' `generate`, token by token, whoever shares the batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from llguidance.hf import from_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.engine.answering import Engine
from tests.helpers.configs import WORDS
from tests.helpers.served import answers, ask_of, engine_spec, make_adapter, make_base, one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = 50
TOKENS = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path | None]]:
    place = tmp_path_factory.mktemp("models")
    base = make_base(place / "base")
    return base, [None, *(make_adapter(base, place / f"adapter.{seed}", seed) for seed in (1, 2))]


def prompts() -> list[str]:
    draw = random.Random(5)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(PROMPTS)]


@pytest.fixture(scope="module")
def expected(models: tuple[Path, list[Path | None]]) -> list[list[int]]:
    """What `generate` answers, one prompt at a time, with each adapter in turn."""
    base, adapters = models
    tokenizer = AutoTokenizer.from_pretrained(base)
    loaded = [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval() for _ in adapters]
    loaded = [PeftModel.from_pretrained(m, a).eval() if a else m for m, a in zip(loaded, adapters, strict=True)]
    found = []
    for number, prompt in enumerate(prompts()):
        model = loaded[number % len(loaded)]
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS
        )
        found.append([token for token in made[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id])
    return found


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_greedy_answers_equal_generate(
    models: tuple[Path, list[Path | None]], expected: list[list[int]], rows: int, tmp_path: Path
) -> None:
    base, adapters = models
    engine = Engine(engine_spec(base, tmp_path, max_rows=rows))
    guide = from_tokenizer(AutoTokenizer.from_pretrained(base))
    asks = [
        ask_of(str(n), prompt, adapters[n % len(adapters)], max_tokens=TOKENS, logprobs=0)
        for n, prompt in enumerate(prompts())
    ]
    found = answers(engine, *asks)
    for number, tokens in enumerate(expected):
        told = [chosen.token for piece in found[str(number), 0] for chosen in piece.chosen]
        assert [t.utf8 for t in told] == [tuple(guide.decode_bytes([token])) for token in tokens], number
    assert len({tuple(tokens) for tokens in expected}) > PROMPTS // 2, "the prompts get different answers"
