"""A teacher before a run: what is stored of it, an adapter with its own base, and what it is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dist_ft.config import Config
from dist_ft.data.stream.cache import open_split
from dist_ft.errors import ConfigError, UserError
from dist_ft.jobs import score
from dist_ft.jobs.prepare import prepare
from dist_ft.jobs.spec import Preparation
from tests.helpers.configs import preference_config
from tests.helpers.teacher import make_teacher


def config_of(tmp_path: Path, teacher: Path, **objective: Any) -> Config:
    if not teacher.exists():
        make_teacher(teacher)
    settings = {"kind": "distill", "teacher": str(teacher), "top_k": 8, **objective}
    return preference_config(tmp_path, settings, data__eval=None)


def scored(config: Config) -> Preparation:
    for job in prepare(config).to_score:
        score.run(**{**job.task(config.model_dump(mode="json"), share=0.5).arguments, "config": config})
    return prepare(config)


def stored(config: Config, row: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], torch.Tensor]:
    """Returns what is stored of a sequence, and the tokens that it is of."""
    split = scored(config).inputs.splits[0]
    found = open_split(split, config.data.loader).read(0, row)
    places = np.flatnonzero(found.trained)
    ids = torch.tensor(found.input_ids[: places[-1] + 1], dtype=torch.long)
    assert len(found.numbers["teacher_tokens"]) == len(places)
    return found.numbers["teacher_logps"], found.numbers["teacher_tokens"], ids


def said(model: torch.nn.Module, ids: torch.Tensor, places: int, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1][-places:]
    return torch.log_softmax(logits / temperature, 1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_likeliest_tokens_and_the_rest_are_stored(tmp_path: Path, temperature: float) -> None:
    config = config_of(tmp_path, tmp_path / "teacher", temperature=temperature)
    logps, tokens, ids = stored(config)
    wanted = said(AutoModelForCausalLM.from_pretrained(tmp_path / "teacher"), ids, len(tokens), temperature)
    best = wanted.topk(8)
    assert tokens.tolist() == best.indices.tolist()
    assert logps[:, :-1] == pytest.approx(best.values.numpy(), abs=4e-3)
    assert np.exp(logps[:, -1].astype(np.float64)) == pytest.approx(1 - best.values.exp().sum(1).numpy(), abs=2e-3)


def test_an_adapter_teaches_on_the_base_that_it_names(tmp_path: Path) -> None:
    """Of another rank than the student's, on another model than the student's."""
    base = make_teacher(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1.0)
    model.save_pretrained(tmp_path / "adapter")
    config = config_of(tmp_path, tmp_path / "adapter")
    _, tokens, ids = stored(config)
    assert tokens.tolist() == said(model.eval(), ids, len(tokens), 1.0).topk(8).indices.tolist()
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert tokens.tolist() != said(plain, ids, len(tokens), 1.0).topk(8).indices.tolist()
    config_file = tmp_path / "adapter" / "adapter_config.json"
    config_file.write_text(config_file.read_text().replace(str(base), ""))
    with pytest.raises(ConfigError, match=r"objective\.teacher=.*names no base model"):
        prepare(config)


def test_another_teacher_or_temperature_is_another_run_and_the_tokens_stay(tmp_path: Path) -> None:
    first = prepare(config_of(tmp_path, tmp_path / "teacher"))
    make_teacher(tmp_path / "teacher2")
    (tmp_path / "teacher2" / "config.json").write_text((tmp_path / "teacher2" / "config.json").read_text() + " ")
    for other in (
        config_of(tmp_path, tmp_path / "teacher2"),
        config_of(tmp_path, tmp_path / "teacher", temperature=2.0),
        config_of(tmp_path, tmp_path / "teacher", top_k=9),
    ):
        found = prepare(other)
        assert found.inputs.fingerprint.objective != first.inputs.fingerprint.objective
        assert found.inputs.splits[0].score_key != first.inputs.splits[0].score_key
        assert found.inputs.splits[0].key == first.inputs.splits[0].key
    # Where the files lie is no part of it.
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert prepare(config_of(tmp_path, tmp_path / "moved")).inputs.fingerprint == first.inputs.fingerprint


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("cut", r"objective\.teacher=.*is cut short"),
        ("short", r"data\.seq_len=96 is longer than the model allows \(max_position_embeddings=64 in the config of"),
        ("gone", r"objective\.teacher=.*has no \*\.safetensors file"),
    ],
)
def test_a_teacher_that_would_not_do_is_refused_before_anything_is_scored(
    tmp_path: Path, change: str, says: str
) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    weights = teacher / "model.safetensors"
    if change == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif change == "gone":
        weights.unlink()
    else:
        text = (teacher / "config.json").read_text()
        (teacher / "config.json").write_text(
            text.replace('"max_position_embeddings": 2048', '"max_position_embeddings": 64')
        )
    with pytest.raises(UserError, match=says):
        prepare(config_of(tmp_path, teacher))


def test_more_tokens_than_the_teacher_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.top_k=300 is more than the 259 tokens of objective\.teacher="):
        prepare(config_of(tmp_path, tmp_path / "teacher", top_k=300))
