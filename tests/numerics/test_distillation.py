"""Distillation in the real loop: equal at every shape and after a stop that goes on elsewhere; a teacher in process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_ft.config import Config
from dist_ft.config.schema import EvalConfig
from tests.helpers.attempts import Attempt, prepare, relative_l2, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer
from tests.helpers.teacher import make_teacher

STEPS = 3
METRICS = ("kl", "nll_loss")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distill")
    make_teacher(directory / "teacher")
    return directory


def config_at(data: Path, packing: bool, stage: int, size: int, micro: int, **objective: Any) -> Config:
    config = tiny_config(
        data, run__name=f"{packing}-{stage}-{size}", data__packing=packing, zero__stage=stage,
        cluster__num_workers=size, train__micro_batch_size=micro, train__max_steps=STEPS, optimizer__lr=1e-3,
    )  # fmt: skip
    settings = {"kind": "distill", "teacher": str(data / "teacher"), "top_k": 16, **objective}
    config = Config.model_validate({**config.model_dump(mode="json"), "objective": settings})
    return config.model_copy(update={"eval": EvalConfig(every_steps=STEPS)})


def assert_equal(attempt: Attempt, first: Attempt) -> None:
    for row, wanted in zip(attempt.rows + attempt.evals, first.rows[-len(attempt.rows) :] + first.evals, strict=True):
        for key in {*METRICS, "loss", "eval_loss", "agreement"} & wanted.keys():
            assert row[key] == pytest.approx(wanted[key], rel=1e-5), key
    assert relative_l2(attempt.weights(), first.weights()) < 1e-5


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_is_the_same_on_three_workers_and_after_a_stop(packing: bool, data: Path, ranks: RankServer) -> None:
    settings = {"divergence": "jsd" if packing else "forward", "temperature": 2.0, "ce_weight": 0.3}
    alone = config_at(data, packing, 0, 1, 2, **settings)
    whole = train(ranks, alone, prepared=prepare(ranks, alone))
    several = config_at(data, packing, 3, 3, 1, **settings)
    prepared = prepare(ranks, several)
    assert_equal(train(ranks, several, prepared=prepared), whole)
    begun = train(ranks, config_at(data, packing, 2, 2, 3, **settings), prepared=prepared, stop_after=1)
    on = train(
        ranks,
        config_at(data, packing, 2, 2, 1, **settings),
        prepared=prepared,
        start=begun.manifests[1],
        evaluations=begun.evals,
    )
    assert begun.losses | on.losses == pytest.approx(whole.losses, rel=1e-5)
    assert relative_l2(on.weights(), whole.weights()) < 1e-5


def test_what_is_stored_is_what_a_teacher_in_the_process_says(data: Path, ranks: RankServer) -> None:
    """The first held-out numbers, computed again with both models, over the whole vocabulary."""
    config = config_at(data, False, 0, 1, 2, top_k=259)
    (before, *_) = train(ranks, config, prepared=prepare(ranks, config)).evals
    from dist_ft.data.stream.cache import open_split
    from dist_ft.jobs.prepare import prepare_held_out
    from dist_ft.model.base import load_model, load_tokenizer

    (split,) = prepare_held_out(config, load_tokenizer(config)).values()
    shards = open_split(split, config.data.loader)
    student, teacher = load_model(config), AutoModelForCausalLM.from_pretrained(data / "teacher")
    kl, agreed, count = 0.0, 0, 0
    for index in range(split.known_counts.num_sequences):
        row = shards.read(0, index)
        ids = torch.tensor(row.input_ids, dtype=torch.long)[None]
        is_trained = torch.tensor(row.trained)[1:]
        with torch.no_grad():
            p, q = (torch.log_softmax(m(ids).logits[0, :-1][is_trained], 1) for m in (teacher, student))
        kl += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(1) == q.argmax(1)).sum())
        count += int(is_trained.sum())
    assert before["kl"] == pytest.approx(kl / count, rel=1e-3)
    assert before["eval_loss"] == before["kl"]
    assert before["agreement"] == pytest.approx(agreed / count, abs=1e-6)
