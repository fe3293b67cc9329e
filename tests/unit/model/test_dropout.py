"""Dropout masks depend on (seed, step, slot, module) and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, OPTConfig, PretrainedConfig

from dist_ft.config import Config
from dist_ft.errors import ModelError
from dist_ft.model.adapter import attach_adapter
from dist_ft.model.dropout import DropoutKeys, SequenceDropout, install_sequence_dropout
from dist_ft.model.embedded import materialise

P = 0.25


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only wait for one another on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _keep(
    slots: list[int],
    *,
    seed: int = 0,
    step: int = 0,
    index: int = 0,
    p: float = P,
    shape: tuple[int, ...] = (64, 16),
) -> torch.Tensor:
    """The mask [B, ...] that rows in these slots get."""
    keys = DropoutKeys(seed, step, torch.tensor(slots))
    return SequenceDropout(p, index, keys)(torch.ones(len(slots), *shape)) != 0


def test_a_row_has_its_mask_in_any_batch() -> None:
    alone = {slot: _keep([slot])[0] for slot in (0, 3, 5, 9)}
    for batch in ([0, 3, 5, 9], [9, 5, 3, 0], [5, -1, 0], [3, 3]):
        for slot, mask in zip(batch, _keep(batch), strict=True):
            if slot in alone:
                assert torch.equal(mask, alone[slot])


def test_a_longer_batch_only_appends_to_the_mask() -> None:
    short, long = _keep([0, 7], shape=(24, 16)), _keep([0, 7], shape=(96, 16))
    assert torch.equal(short, long[:, :24])


def test_the_mask_is_the_same_when_it_is_computed_again() -> None:
    keys = DropoutKeys(1, 2, torch.tensor([3, 4]))
    module = SequenceDropout(P, 5, keys)
    x = torch.randn(2, 8, 4)
    assert torch.equal(module(x), module(x))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = _keep([0])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(_keep([0]), first)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_p(p: float) -> None:
    keep = _keep(list(range(16)), p=p, shape=(20_000,))
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(float((~keep).double().mean()) - p) < 5 * deviation
    rows = (~keep).double().mean(dim=1)
    assert float((rows - p).abs().max()) < 5 * deviation * 16**0.5


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    keys = DropoutKeys(0, 0, torch.arange(4))
    out = SequenceDropout(P, 0, keys)(torch.full((4, 1000), 3.0))
    assert set(out.unique().tolist()) == {0.0, 3.0 / (1 - P)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    keys = DropoutKeys(0, 0, torch.arange(2))
    assert SequenceDropout(P, 0, keys)(torch.ones(2, 8, dtype=dtype)).dtype == dtype


def test_evaluation_and_p_of_zero_change_nothing() -> None:
    x = torch.randn(2, 8)
    keys = DropoutKeys(0)  # no slots are set: neither may look at them
    assert torch.equal(SequenceDropout(P, 0, keys).eval()(x), x)
    assert torch.equal(SequenceDropout(0.0, 0, keys)(x), x)


def test_the_gradient_flows_through_what_is_kept() -> None:
    x = torch.randn(3, 50, requires_grad=True)
    out = SequenceDropout(P, 0, DropoutKeys(0, 0, torch.arange(3)))(x)
    out.sum().backward()
    keep = out.detach() != 0
    assert torch.equal(x.grad, keep * (1 / (1 - P)))


def test_other_rows_than_sequences_are_refused() -> None:
    module = SequenceDropout(P, 0, DropoutKeys(0, 0, torch.arange(2)))
    with pytest.raises(ModelError, match="8 rows for 2 sequences"):
        module(torch.ones(8, 4))


OTHERS: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
    "slots": (_keep([0], shape=(50_000,)), _keep([1], shape=(50_000,))),
    "padding": (_keep([0], shape=(50_000,)), _keep([-1], shape=(50_000,))),
    "steps": (_keep([0], step=10, shape=(50_000,)), _keep([0], step=11, shape=(50_000,))),
    "modules": (_keep([0], index=0, shape=(50_000,)), _keep([0], index=1, shape=(50_000,))),
    "seeds": (_keep([0], seed=0, shape=(50_000,)), _keep([0], seed=1, shape=(50_000,))),
    "high halves of seeds": (_keep([0], seed=0, shape=(50_000,)), _keep([0], seed=1 << 32, shape=(50_000,))),
    "step and module exchanged": (
        _keep([0], step=1, index=2, shape=(50_000,)),
        _keep([0], step=2, index=1, shape=(50_000,)),
    ),
    "slot and step exchanged": (_keep([1], step=2, shape=(50_000,)), _keep([2], step=1, shape=(50_000,))),
    "neighbouring elements": (_keep([0], shape=(50_001,))[:, :-1], _keep([0], shape=(50_001,))[:, 1:]),
    "elements 4096 apart": (_keep([0], shape=(54_096,))[:, :-4096], _keep([0], shape=(54_096,))[:, 4096:]),
}


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    stacked = torch.stack([a.flatten().double(), b.flatten().double()])
    return float(torch.corrcoef(stacked)[0, 1])


@pytest.mark.parametrize("what", sorted(OTHERS))
def test_masks_of_others_are_unrelated(what: str) -> None:
    one, other = OTHERS[what]
    assert not torch.equal(one, other)
    assert abs(_correlation(one, other)) < 5 / 50_000**0.5


def test_no_two_of_many_masks_are_related() -> None:
    masks = torch.cat([_keep(list(range(64)), step=step, index=i, shape=(4096,)) for step in (0, 1) for i in (0, 1)])
    related = torch.corrcoef(masks.double()) - torch.eye(len(masks), dtype=torch.float64)
    # 32640 pairs: the largest of as many normal draws lies near 4.2 deviations.
    assert float(related.abs().max()) < 6 / 4096**0.5
    columns = masks.double().mean(dim=0)
    assert float((columns - (1 - P)).abs().max()) < 6 * (P * (1 - P) / len(masks)) ** 0.5


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Dropout(0.1)
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2))
        self.named = nn.ModuleDict({"default": nn.Dropout(0.3)})


def test_every_dropout_is_replaced_and_has_its_own_number() -> None:
    model = _Block()
    install_sequence_dropout(model, seed=0)
    found = [m for m in model.modules() if isinstance(m, SequenceDropout)]
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert sorted(m.p for m in found) == [0.1, 0.2, 0.3]
    assert len({m._index for m in found}) == 3


def test_the_modules_share_the_keys_that_are_returned() -> None:
    model = _Block()
    keys = install_sequence_dropout(model, seed=0)
    keys.step, keys.slots = 5, torch.tensor([1])
    assert torch.equal(model.first(torch.ones(1, 99)) != 0, _keep([1], step=5, index=0, p=0.1, shape=(99,)))


def _lora_model() -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(materialise("tiny-random"), dtype=torch.float32)
    config = Config.model_validate(
        {
            "run": {"name": "r"},
            "model": {"name": "tiny-random", "dtype": "float32"},
            "method": {"kind": "lora", "r": 4, "lora_dropout": 0.1},
            "data": {"train": [{"source": "embedded:orders/train"}]},
        }
    )
    model = attach_adapter(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros at first: the adapter would do nothing
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model


def test_a_lora_model_computes_a_sequence_alike_in_any_batch() -> None:
    model = _lora_model()
    keys = install_sequence_dropout(model, seed=0)
    assert sum(isinstance(m, SequenceDropout) for m in model.modules()) == 14  # 7 linear layers in 2 blocks
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout)]
    model.train()
    tokens = torch.arange(3 * 24).reshape(3, 24) % 250
    keys.step, keys.slots = 3, torch.tensor([4, 5, 6])
    together = model(input_ids=tokens, use_cache=False).logits
    keys.slots = torch.tensor([6])
    alone = model(input_ids=torch.nn.functional.pad(tokens[2:], (0, 8)), use_cache=False).logits[0, :24]
    # Kernels sum in another order for another shape; a wrong mask would show in the first digit.
    torch.testing.assert_close(alone, together[2], atol=1e-5, rtol=1e-5)
    keys.step = 4
    assert not torch.allclose(model(input_ids=tokens[2:], use_cache=False).logits[0], together[2], atol=1e-3)


@pytest.mark.parametrize("name", ["attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"])
def test_attention_dropout_is_refused(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(materialise("tiny-random"), dtype=torch.float32)
    setattr(model.config, name, 0.1)
    with pytest.raises(ModelError, match=f"{name}=0.1"):
        install_sequence_dropout(model, seed=0)


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, ffn_dim=8, num_attention_heads=2, dropout=0.1),
        BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2, hidden_dropout=0.1),
    ],
    ids=["opt", "bloom"],
)
def test_dropout_that_cannot_be_replaced_is_refused(config: PretrainedConfig) -> None:
    with pytest.raises(ModelError, match="dropout"):
        install_sequence_dropout(AutoModelForCausalLM.from_config(config), seed=0)
