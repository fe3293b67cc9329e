"""Keys and values of other tools, and secrets in a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.config import load_config
from dist_ft.errors import ConfigError


def problems(tmp_path: Path, *overrides: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: tiny-random}\ndata: {train: [{source: a.jsonl}]}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    "override",
    [
        "method.kind=qlora",
        "method.kind=QLoRA",
        "model.load_in_4bit=true",
        "model.load_in_8bit=true",
        "model.quantization_config={load_in_4bit: true}",
        "method.qlora=true",
        "model.bnb_4bit_quant_type=nf4",
        "load_in_4bit=true",
    ],
)
def test_keys_of_quantisation_point_to_ours(tmp_path: Path, override: str) -> None:
    (line,) = problems(tmp_path, override)
    assert line.startswith(override.split("=")[0])
    for word in ("model.quantization", "{kind: nf4}", "method.kind=lora"):
        assert word in line


def test_a_wrong_kind_that_nobody_uses_is_an_ordinary_error(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, "method.kind=loar")
    assert "quantised" not in line


@pytest.mark.parametrize("key", ["model.token", "model.hf_token", "model.use_auth_token", "monitor.token"])
def test_a_key_for_a_token_names_the_variable(tmp_path: Path, key: str) -> None:
    (line,) = problems(tmp_path, f"{key}=something")
    assert line.startswith(f"{key}: ")
    assert "HF_TOKEN" in line
    assert "something" not in line


SECRET = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"model.name={SECRET}", "model.name"),
        (f"model.name=https://me:{SECRET}@huggingface.co/org/m", "model.name"),
        ("model.name=https://me:pass@huggingface.co/org/m", "model.name"),
        (f"model.token={SECRET}", "model.token"),
        (f"data.train=[{{source: a.jsonl}}, {{source: {SECRET}}}]", "data.train.1.source"),
        (f"train.epochs={SECRET}", "train.epochs"),
    ],
)
def test_a_secret_is_refused_and_never_shown(tmp_path: Path, override: str, key: str) -> None:
    (line,) = problems(tmp_path, override, "nonsense.key=1")
    assert line.startswith(f"{key} holds a token")
    assert SECRET not in line
    assert "pass" not in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.kind=adafactor", ["rows and columns", "optimizer.kind=lion"]),
        ("optimizer.kind=galore_adamw", ["whole matrices", "method.kind=lora"]),
        ("optimizer.kind=galore_adamw_8bit", ["optimizer.kind=lion"]),
        ("optimizer.kind=adamw_8bit", ["blocks of 256", "number of workers", "optimizer.kind=lion"]),
        ("optimizer.kind=paged_adamw_32bit", ["zero.offload"]),
        ("optimizer.kind=adamw_bnb_8bit", ["blocks of 256"]),
        ("optimizer.kind=adamw_torch_fused", ["optimizer.kind=adamw"]),
        ("optimizer.kind=muon", ["whole matrices", "optimizer.kind=adamw"]),
        ("schedule.kind=cosine_with_restarts", ["schedule.kind=cosine", "schedule.num_cycles"]),
        ("schedule.kind=warmup_stable_decay", ["schedule.kind=wsd"]),
        ("schedule.lr_end=1e-7", ["min_lr_ratio"]),
        ("objective.kind=simpo", ["objective.kind=cpo", "objective.loss=simpo"]),
        ("model.attention=flash_attention_3", ["flash_attention_2", "sdpa"]),
        ("model.dtype=float16", ["bfloat16", "not supported"]),
        ("method.kind=dora", ["method.use_dora=true"]),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest_choice(tmp_path: Path, override: str, words: list[str]) -> None:
    (line,) = problems(tmp_path, override)
    assert line.startswith(override.split("=")[0])
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.gradient_accumulation_steps=4", ["train.global_batch_size", "x gradient_accumulation_steps x devices"]),
        ("gradient_accumulation_steps=4", ["train.global_batch_size"]),
        ("train.batch_size=4", ["train.global_batch_size", "train.micro_batch_size"]),
        ("adapter=lora", ["method.kind=lora", "method.init_from"]),
        ("base_model=x/y", ["model.name"]),
        ("model.model_name_or_path=x/y", ["model.name"]),
        ("datasets=[]", ["data.train"]),
        ("data.train=[{path: x, source: a.jsonl}]", ["data.train[].source"]),
        ("sequence_len=512", ["data.seq_len"]),
        ("train.learning_rate=1e-4", ["optimizer.lr"]),
        ("train.num_train_epochs=3", ["train.epochs"]),
        ("method.lora_r=8", ["method.r"]),
        ("lora_target_linear=true", ["method.target_modules=all-linear"]),
        ("train_on_inputs=false", ["data.train_on"]),
        ("bf16=auto", ["model.dtype=bfloat16"]),
        ("deepspeed=zero3.json", ["zero.stage"]),
        ("val_set_size=0.1", ["data.eval"]),
        ("save_total_limit=2", ["checkpoint.keep_last"]),
        ("resume_from_checkpoint=x", ["--resume"]),
        ("liger_rope=true", ["no effect", "remove it"]),
        # The project's own keys in another section.
        ("train.seq_len=512", ["data.seq_len"]),
        ("train.lr=1e-4", ["optimizer.lr"]),
        ("warmup_steps=10", ["schedule.warmup_steps"]),
        ("train.micro_batchsize=2", ["did you mean train.micro_batch_size?"]),
    ],
)
def test_a_key_of_another_tool_is_answered_with_the_key_that_does_it(
    tmp_path: Path, override: str, words: list[str]
) -> None:
    (line,) = problems(tmp_path, override)
    assert [word for word in words if word not in line] == [], line


def test_nothing_is_guessed_where_nothing_is_near(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, "train.foobar=1")
    assert "did you mean" not in line
    assert "known: global_batch_size, " in line
