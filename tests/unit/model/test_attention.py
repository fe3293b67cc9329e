"""Packed rows attend sample by sample: the samples are those of the mask, and the numbers are those of each alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from dist_ft.errors import ModelError
from dist_ft.model import attention
from dist_ft.model.attention import attend_by_sample, check_apart, find_cuts

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
ROWS = [[24], [6, 10, 8], [1, 1, 22], [4] * 6]
WINDOW = 7
FAMILIES: dict[str, tuple[dict[str, Any], tuple[bool, ...]]] = {
    # Family -> its settings and, mask for mask of a pass, whether samples are attended to one by one.
    "llama": ({}, (True,)),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, (True,)),
    "deepseek_v2": (
        {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
         "n_routed_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
         "head_dim": 4, "num_key_value_heads": 4},
        (True,),
    ),
    "mistral": ({"sliding_window": WINDOW}, (False,)),
    "gemma3_text": ({"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}, (True, False)),
    # Each chunk is a range of its own, too.
    "llama4_text": ({"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}, (True, True)),
}  # fmt: skip


def positions_of(rows: list[list[int]]) -> torch.Tensor:
    """Returns positions [B, T] that restart at each sample."""
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])


def make_model(family: str, attention: str = "sdpa", **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model


def packed_rule(rule: Callable[..., Any], positions_BT: torch.Tensor) -> Callable[..., Any]:
    """Returns the rule of a packed mask, as transformers makes it."""
    samples_BT = find_packed_sequence_indices(positions_BT)
    if samples_BT is None:
        return rule
    made: Callable[..., Any] = packed_sequence_compatibility_function(rule, positions_BT, samples_BT)
    return made


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3),
    st.one_of(st.none(), st.tuples(st.sampled_from(["window", "chunk"]), st.integers(1, 10))),
)
def test_samples_stand_for_the_mask_exactly_or_not_at_all(rows: list[list[int]], kind: tuple[str, int] | None) -> None:
    length = max(map(sum, rows))
    rows = [[*lengths, *([length - sum(lengths)] if sum(lengths) < length else [])] for lengths in rows]
    rule: Callable[..., Any] = causal_mask_function
    if kind is not None and kind[0] == "window":
        rule = sliding_window_causal_mask_function(kind[1])
    if kind is not None and kind[0] == "chunk":
        rule = chunked_causal_mask_function(kind[1], torch.zeros(len(rows), dtype=torch.long))
    attends = packed_rule(rule, positions_of(rows))
    mask = sdpa_mask(len(rows), length, length, mask_function=attends, allow_is_causal_skip=False)
    assert mask is not None
    cuts = find_cuts(attends, len(rows), length, CPU)
    if cuts is None:
        # Only a window that is shorter than a sample says more than a list can.
        assert kind is not None and kind[0] == "window" and kind[1] < max(n for lengths in rows for n in lengths)
        return
    by_cuts = torch.zeros(len(rows), length, length, dtype=torch.bool)
    for row, start, end in cuts[0, 0].tolist():
        by_cuts[row, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    assert torch.equal(by_cuts, mask[:, 0])
    places = [(row * length + start, row * length + end) for row, start, end in cuts[0, 0].tolist()]
    assert [0, *(end for _, end in places)] == [*(start for start, _ in places), len(rows) * length]


def test_a_rule_that_looks_ahead_is_no_list_of_samples() -> None:
    def both_ways(row: Any, head: Any, token: Any, other: Any) -> Any:
        return (token >= 0) & (other >= 0)

    assert find_cuts(both_ways, 2, 5, CPU) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_what_each_sample_gives_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, wanted = FAMILIES[family]
    model = make_model(family, **settings).eval()
    ids_BT = torch.randint(3, 60, (len(ROWS), sum(ROWS[0])))
    with torch.no_grad():
        masked = model(input_ids=ids_BT, position_ids=positions_of(ROWS), use_cache=False).logits
        alone = [
            torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in row.split(lengths)])
            for row, lengths in zip(ids_BT, ROWS, strict=True)
        ]
    found: list[bool] = []

    def spy(*arguments: Any) -> torch.Tensor | None:
        cuts = find_cuts(*arguments)
        found.append(cuts is not None)
        return cuts

    monkeypatch.setattr(attention, "find_cuts", spy)
    attend_by_sample(model)
    with torch.no_grad():
        logits = model(input_ids=ids_BT, position_ids=positions_of(ROWS), use_cache=False).logits
    assert tuple(found) == wanted
    for other in (masked, torch.stack(alone)):
        assert (logits - other).abs().max() / other.abs().max() < 2e-6


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_mask(recompute: bool) -> None:
    model = make_model("llama").train()
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids_BT = torch.randint(3, 60, (len(ROWS), sum(ROWS[0])))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids_BT, position_ids=positions_of(ROWS), use_cache=False, labels=ids_BT).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    wanted = gradients()
    attend_by_sample(model)
    found = gradients()
    assert len(found) == len(wanted) == len(list(model.parameters()))
    for one, two in zip(found, wanted, strict=True):
        assert (one - two).norm() / two.norm() < 1e-5


def test_rows_that_are_not_packed_and_generation_are_as_before_bit_for_bit() -> None:
    model = make_model("llama").eval()
    ids_BT = torch.randint(3, 60, (2, 9))
    padding_BT = torch.tensor([[0, 0, *[1] * 7], [1] * 9])

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            answers = model.generate(ids_BT, attention_mask=padding_BT, max_new_tokens=5, do_sample=False)
            return [model(input_ids=ids_BT, use_cache=False).logits, answers]

    before = outputs()
    attend_by_sample(model)
    assert model.config._attn_implementation == attention.BY_SAMPLE
    assert all(torch.equal(one, two) for one, two in zip(outputs(), before, strict=True))


@pytest.mark.parametrize("family", ["recurrent_gemma", "minimax", "opt", "bloom", "gpt_oss"])
def test_families_that_mix_the_samples_of_a_row_are_refused(family: str) -> None:
    attention_by = "eager" if family in {"bloom", "gpt_oss"} else "sdpa"
    with init_empty_weights(include_buffers=False):
        model = make_model(family, attention_by)
    with pytest.raises(ModelError, match=f"data.packing=true, but {family} models .* Set data.packing=false"):
        check_apart(model)


@pytest.mark.parametrize("attention_by", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_families_that_keep_samples_apart_are_not(family: str, attention_by: str) -> None:
    with init_empty_weights(include_buffers=False):
        check_apart(make_model(family, attention_by, **FAMILIES[family][0]))


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders_q: torch.Tensor, borders_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float | None, window_size: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """What torch documents of `varlen_attn` [N, H, D], for a CPU, which has no kernel for it."""
    assert window_size == (-1, 0) and borders_q.dtype == torch.int32 and borders_q.equal(borders_k)
    lengths = borders_q.diff().tolist()
    assert max(lengths) == max_q == max_k
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in sample), is_causal=True, scale=scale
        )
        for sample in zip(*(heads.split(lengths) for heads in (query, key, value)), strict=True)
    ]
    return torch.cat([part.transpose(0, 1) for part in parts])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_one_kernel_for_all_samples_gives_what_each_alone_gives(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family, **FAMILIES[family][0])
    attend_by_sample(model)
    rows = [[6, 10, 8], [1, 1, 22]]
    inputs = {"input_ids": torch.randint(3, 64, (2, 24)), "position_ids": positions_of(rows), "use_cache": False}
    alone = model(**inputs).logits
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return one_by_one(*arguments, **options)

    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query, value: True)
    monkeypatch.setattr(attention, "varlen_attn", counted)
    torch.testing.assert_close(model(**inputs).logits, alone, rtol=0, atol=1e-6)
    assert len(calls) == {"llama": 2, "gemma3_text": 1}[family]  # a window shorter than a sample keeps its mask


def test_a_cpu_has_no_kernel_for_all_samples() -> None:
    heads = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    assert not attention.has_varlen_kernel(heads, heads)
