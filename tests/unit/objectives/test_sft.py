"""The objective: the sum over trained tokens, equal to the plain cross entropy, packed or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dist_ft.data.stream import loader
from dist_ft.data.stream.loader import MicroBatch, collate
from dist_ft.data.stream.token_shards import Row
from dist_ft.model.embedded import materialise
from dist_ft.objectives.module import ObjectiveModule
from dist_ft.objectives.objective import Outputs, Rows
from dist_ft.objectives.sft import SFT
from dist_ft.slots import IGNORE, SlotTotals

TOLERANCE = 1e-5  # fp32; a few hundred terms summed in another order


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only wait for one another on matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        materialise("tiny-random"), dtype=torch.float32, attn_implementation=request.param
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # fresh weights attend evenly, and hide whom a token sees
    return model


def _rows(lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(sum(lengths))
    return [
        (rng.integers(0, 250, n).astype(np.int32), np.arange(n) % 3 != 1)  # about two thirds are trained
        for n in lengths
    ]


def _unpacked(rows: list[tuple[np.ndarray, np.ndarray]], num_rows: int | None = None) -> MicroBatch:
    starts = np.zeros(1, dtype=np.int32)
    found = [Row(ids, trained, starts) for ids, trained in rows]
    return collate(found, list(range(len(rows))), num_rows or len(rows))


def _packed(rows: list[tuple[np.ndarray, np.ndarray]]) -> MicroBatch:
    lengths = [len(ids) for ids, _ in rows]
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int32)
    ids = np.concatenate([ids for ids, _ in rows])
    trained = np.concatenate([np.r_[False, trained[1:]] for _, trained in rows])  # nothing precedes a first token
    return collate([Row(ids, trained, starts)], [0], 1)


def _on_device(ids: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None = None) -> Rows:
    return Rows(ids, targets, positions, torch.arange(len(ids)), torch.zeros_like(ids))


def _logits(outputs: Outputs, rows: Rows) -> torch.Tensor:
    return outputs.logits_NV


def _loss(model: Any, batch: MicroBatch, with_positions: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    positions = torch.from_numpy(batch.position_ids) if with_positions else None
    rows = _on_device(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets), positions)
    (loss_sum,) = ObjectiveModule(model)(rows, SFT.loss)
    loss_sum.backward()
    return float(loss_sum.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The relative L2 distance of all gradients together."""
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    return (difference / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5


def test_loaders_and_loss_agree_on_what_is_not_trained() -> None:
    assert loader.IGNORE == IGNORE


def test_the_sum_equals_the_cross_entropy_over_all_logits(model: Any) -> None:
    batch = _unpacked(_rows([17, 24, 5]))
    loss, gradients = _loss(model, batch, with_positions=False)
    model.zero_grad()
    logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits
    targets = torch.from_numpy(batch.targets).reshape(-1)
    plain = F.cross_entropy(logits.reshape(len(targets), -1).float(), targets, reduction="sum", ignore_index=IGNORE)
    plain.backward()
    assert loss == pytest.approx(float(plain.detach()), rel=TOLERANCE)
    assert _distance(gradients, {name: p.grad for name, p in model.named_parameters()}) < TOLERANCE


def test_right_tokens_are_counted_among_those_that_count(model: Any) -> None:
    batch = _unpacked(_rows([17, 24, 5]), num_rows=4)
    inputs, targets = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets)
    with torch.no_grad():
        likeliest = model(input_ids=inputs).logits.argmax(-1)
        counts = targets != IGNORE
        # Every second of them is made right.
        chosen = counts & (torch.arange(counts.numel()).view_as(counts) % 2 == 0)
        targets = torch.where(chosen, likeliest, torch.where(counts, (likeliest + 1) % 250, IGNORE))
        module, rows = ObjectiveModule(model), _on_device(inputs, targets)
        found = module(rows, SFT.eval_sums)
        assert found.dtype == torch.float64
        assert SFT.eval_names() == ["eval_loss", "token_accuracy"]
        assert int(found[1]) == int(chosen.sum()) > 0
        assert float(found[0]) == float(module(rows, SFT.loss)[0])


def test_padding_alone_weighs_exactly_nothing(model: Any) -> None:
    loss, gradients = _loss(model, _unpacked([], num_rows=2), with_positions=False)
    assert loss == 0.0
    assert all((gradient == 0).all() for gradient in gradients.values())
    assert len(gradients) == len(list(model.parameters()))  # every rank reduces the same tensors


def test_padding_rows_and_places_change_nothing(model: Any) -> None:
    rows = _rows([17, 9])
    loss, gradients = _loss(model, _unpacked(rows), with_positions=False)
    padded, padded_gradients = _loss(model, _unpacked(rows, num_rows=4), with_positions=False)
    assert padded == pytest.approx(loss, rel=TOLERANCE)
    assert _distance(padded_gradients, gradients) < TOLERANCE


@pytest.mark.parametrize("lengths", [[16, 8], [11, 7, 9, 3], [1, 6, 1, 4]])
def test_a_packed_row_equals_its_samples_apart(model: Any, lengths: list[int]) -> None:
    rows = _rows(lengths)
    packed, packed_gradients = _loss(model, _packed(rows), with_positions=True)
    apart, gradients = _loss(model, _unpacked(rows), with_positions=False)
    assert packed == pytest.approx(apart, rel=TOLERANCE)
    assert _distance(packed_gradients, gradients) < TOLERANCE


def test_without_positions_packed_samples_would_see_one_another(model: Any) -> None:
    rows = _rows([16, 8])
    packed, _ = _loss(model, _packed(rows), with_positions=True)
    blended, _ = _loss(model, _packed(rows), with_positions=False)
    assert abs(packed - blended) > 100 * TOLERANCE * packed


def test_with_every_token_a_target_all_logits_come_back(model: Any) -> None:
    module = ObjectiveModule(model).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        module(_on_device(ids, torch.full((1, 20), 7)), SFT.loss)  # a loss before it leaves nothing behind
        assert torch.equal(module(_on_device(ids, ids), _logits), expected[0])
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_pass_that_fails_leaves_the_model_as_it_was(model: Any) -> None:
    module = ObjectiveModule(model).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with pytest.raises(IndexError):
            module(_on_device(ids, torch.full((1, 20), 10**6)), SFT.loss)
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_positions_are_given_only_where_a_row_is_packed() -> None:
    cpu = torch.device("cpu")
    assert Rows.of(_unpacked(_rows([17, 9]), num_rows=3), cpu).position_ids_BT is None
    assert Rows.of(_packed(_rows([16, 8])), cpu).position_ids_BT is not None


def test_the_weight_of_a_step_is_that_of_its_slots() -> None:
    slots = [SlotTotals(1, 20, 7), SlotTotals(1, 5, 0), SlotTotals(1, 9, 8)]
    assert sum(map(SFT.weight, slots)) == SFT.weight(SlotTotals(3, 34, 15)) == 15


def test_bfloat16_logits_are_summed_in_float32(model: Any) -> None:
    batch = _unpacked(_rows([40, 40]))
    loss, _ = _loss(model, batch, with_positions=False)
    low, _ = _loss(model.bfloat16(), batch, with_positions=False)
    assert low == pytest.approx(loss, rel=5e-3)
