"""Scores of a frozen model: what is listed, what they hold, and which model they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_ft.config import Config
from dist_ft.data.stream.cache import open_split
from dist_ft.errors import ConfigError, DataError
from dist_ft.jobs import score
from dist_ft.jobs.prepare import prepare
from dist_ft.jobs.spec import Preparation, ShardJob
from dist_ft.model.adapter import attach_adapter, save_adapter_config
from dist_ft.model.base import load_model, load_tokenizer
from tests.helpers.configs import preference_config


def run(config: Config, job: ShardJob) -> dict[str, Any]:
    task = job.task(config.model_dump(mode="json"), share=0.5)
    return score.run(**{**task.arguments, "config": config})


def scored(config: Config) -> Preparation:
    """Prepares, scores what is missing, and prepares again."""
    for job in prepare(config).to_score:
        run(config, job)
    return prepare(config)


def log_probs(config: Config, prepared: Preparation) -> list[float]:
    """The scores of the first source, sequence by sequence."""
    shards = open_split(prepared.inputs.splits[0], config.data.loader)
    count = prepared.inputs.splits[0].known_counts.num_sequences
    return [float(value) for row in range(count) for value in shards.read(0, row).numbers["ref_logps"]]


def with_reference(config: Config, path: Path) -> Config:
    return config.model_copy(update={"objective": config.objective.model_copy(update={"reference": str(path)})})


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("packing", [False, True])
def test_scores_are_what_the_model_says_of_each_answer_alone(tmp_path: Path, kind: str, packing: bool) -> None:
    config = preference_config(tmp_path, {"kind": kind}, data__packing=packing)
    prepared = scored(config)
    model, shards = load_model(config).eval(), open_split(prepared.inputs.splits[0], config.data.loader)
    for row in range(3):
        ids, trained, starts, numbers = shards.read(0, row)
        assert len(numbers["ref_logps"]) == len(starts)
        for start, end, found in zip(starts, [*starts[1:], len(ids)], numbers["ref_logps"], strict=True):
            tokens = torch.from_numpy(ids[start:end].astype(np.int64))[None]
            with torch.no_grad():
                logps = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
            of_answer = logps.gather(1, tokens[0, 1:, None])[:, 0][torch.from_numpy(trained[start + 1 : end].copy())]
            assert float(found) == pytest.approx(float(of_answer.sum()), rel=1e-5)


def test_what_is_scored_already_is_not_listed_again(tmp_path: Path) -> None:
    config = preference_config(tmp_path, {"kind": "dpo"})
    first, second = prepare(config).to_score  # the training source and the held-out one
    run(config, first)
    assert prepare(config).to_score == (second,)  # a run that was stopped here goes on with the rest
    run(config, second)
    done = prepare(config)
    assert done.to_score == ()
    key = done.inputs.splits[0].score_key
    assert done.inputs.eval_split is not None
    assert key == done.inputs.eval_split.score_key != ""
    assert key in done.inputs.fingerprint.objective


def test_a_streamed_run_makes_tokens_and_scores_of_a_shard_in_one_task(tmp_path: Path) -> None:
    ahead = preference_config(tmp_path, {"kind": "dpo"}, train__max_steps=3)
    streamed = ahead.model_copy(update={"data": ahead.data.model_copy(update={"preparation": "stream"})})
    prepare(ahead)  # tokens alone
    found = prepare(streamed)
    assert found.to_stream is not None
    (job,) = found.to_stream.jobs
    assert (found.to_stream.made, job.task({}).name) == ((), "score")
    assert run(streamed, job)["num_sequences"] == 41
    later = prepare(streamed).to_stream
    assert later is not None
    assert (later.jobs, [made.num_sequences for made in later.made]) == ((), [41])


def test_another_reference_gives_other_scores_and_another_run(tmp_path: Path) -> None:
    config = preference_config(tmp_path, {"kind": "dpo"})
    own = scored(config)
    other = load_model(config)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(config).save_pretrained(tmp_path / "other")
    changed = scored(with_reference(config, tmp_path / "other"))
    assert log_probs(config, changed) != pytest.approx(log_probs(config, own), rel=1e-3)
    assert changed.inputs.fingerprint != own.inputs.fingerprint
    assert changed.inputs.splits[0].key == own.inputs.splits[0].key


def test_going_on_from_an_adapter_its_model_is_the_reference(tmp_path: Path) -> None:
    config = preference_config(tmp_path, {"kind": "dpo"}, method__kind="lora")
    plain = log_probs(config, scored(config))  # a new adapter changes nothing
    model = attach_adapter(load_model(config), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    save_adapter_config(model, config, tmp_path / "adapter")
    method = config.method.model_copy(update={"init_from": str(tmp_path / "adapter")})
    on = config.model_copy(update={"method": method})
    tuned = log_probs(on, scored(on))
    assert tuned != pytest.approx(plain, rel=1e-3)
    named = with_reference(config, tmp_path / "adapter")  # the same adapter, under a new one
    assert log_probs(named, scored(named)) == tuned
    assert log_probs(config, scored(config)) == plain


def test_a_model_of_other_tokens_or_another_machine_is_refused(tmp_path: Path) -> None:
    config = preference_config(tmp_path, {"kind": "dpo"})
    other = tmp_path / "other"
    load_model(config).save_pretrained(other)
    load_tokenizer(config).save_pretrained(other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"objective.reference=.*other has other tokens than model.name=tiny-random"):
        prepare(with_reference(config, other))
    (job, _) = prepare(config).to_score
    with pytest.raises(DataError, match="another model on this machine than at the driver"):
        run(config, replace(job, score_key="0" * 32))
