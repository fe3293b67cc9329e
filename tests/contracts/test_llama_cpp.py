"""GGUF files as llama.cpp itself reads them: tokens of odd texts, greedy answers, adapters (`make gguf-check`)."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dist_ft.model.gguf.gguf_adapter import write_adapter
from dist_ft.model.gguf.gguf_file import write_model
from tests.helpers.gguf_cases import CASES, ODD_TEXTS, make_case
from tests.helpers.paths import ROOT

BINDING = ROOT / "build" / "llama-cpp"
PROMPT = list(range(20, 60))
COUNT = 24
pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(not (BINDING / "node_modules").exists(), reason="no llama.cpp (make gguf-check)"),
]


def ask(directory: Path, *files: Path) -> dict[str, Any]:
    """Returns what llama.cpp says of a model, perhaps with an adapter."""
    shutil.copy(ROOT / "tests" / "node" / "llama_cpp.mjs", BINDING)  # beside what it imports
    request = directory / "request.json"
    request.write_text(json.dumps({"texts": ODD_TEXTS, "prompt": PROMPT, "count": COUNT}))
    command = ["node", str(BINDING / "llama_cpp.mjs"), str(files[0]), str(request), *map(str, files[1:])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def agrees(model: torch.nn.Module, answer: list[int], end: int) -> bool:
    """Whether each token is the likeliest, to within what keys and values in float16 leave of a logit."""
    tokens = [*PROMPT, *answer]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, len(PROMPT) - 1 :]
    # The binding stops at the end token.
    chosen = torch.tensor([*answer, end])[: min(len(answer) + 1, COUNT)]
    missed = logits[: len(chosen)].max(-1).values - logits[torch.arange(len(chosen)), chosen]
    return bool((missed <= 1e-2 * logits.abs().max()).all())


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_reads_tokens_and_answers_as_we_do(name: str, tmp_path: Path) -> None:
    model, tokenizer = make_case(name, tmp_path)
    write_model(model, tmp_path, tmp_path / "model.gguf", "f32", "tiny")
    found = ask(tmp_path, tmp_path / "model.gguf")
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ODD_TEXTS]
    assert dict(zip(ODD_TEXTS, found["tokens"], strict=True)) == dict(zip(ODD_TEXTS, tokens, strict=True))
    assert agrees(model, found["answer"], tokenizer.eos_token_id)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2"])
def test_llama_cpp_adds_an_adapter_as_peft_does(name: str, use_rslora: bool, tmp_path: Path) -> None:
    model, tokenizer = make_case(name, tmp_path)
    write_model(model, tmp_path, tmp_path / "base.gguf", "f32", "tiny")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=use_rslora))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", model.config, tmp_path / "adapter.gguf", "tiny")
    answer = ask(tmp_path, tmp_path / "base.gguf", tmp_path / "adapter.gguf")["answer"]
    assert agrees(adapted.eval(), answer, tokenizer.eos_token_id)
    with adapted.disable_adapter():
        assert not agrees(adapted, answer, tokenizer.eos_token_id)
