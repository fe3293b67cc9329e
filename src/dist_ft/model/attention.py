"""Attention of packed rows, one sample at a time: no mask of [T, T], no work between samples.

transformers builds one mask for a pass and gives it to every layer. Here the mask of packed rows is not a matrix but a
list of samples (`Cuts`), and attention runs on each sample alone, causally, with the kernel for plain causal attention;
on CUDA, in 16 bit, one kernel takes all samples.
The model's own code passes the list on as it passes a mask, so that no layer can miss it.

Whether a list says the same as the mask is read off the mask's own rule, at the borders of each sample: sliding windows
and chunks that are longer than every sample do, shorter ones get their mask of [T, T] as before. So do families that
do not use transformers' registry of attention functions.

Shapes: B rows, H heads, T tokens, D size of a head, N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist_ft.errors import ModelError

BY_SAMPLE = "sdpa_by_sample"
_PROBE = "dist_ft_probe"
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
Attends = Callable[[Any, Any, Any, Any], Any]
"""A mask's rule: whether in a row [B], for a head, a token sees another; all four are broadcast."""


def attend_by_sample(model: PreTrainedModel) -> None:
    """Lets packed rows attend sample by sample where the model uses SDPA; everything else stays as it is."""
    if model.config._attn_implementation == "sdpa" and model.is_backend_compatible():
        model.set_attn_implementation(BY_SAMPLE)


def check_apart(model: PreTrainedModel) -> None:
    """Refuses packed rows for a family in which samples of a row would see one another.

    Such are families whose layers carry a state from token to token, and those whose mask does not know positions
    (what the model asks a mask for is looked at in a pass that ends there).

    Args:
        model: The model, with or without weights. Its attention must be chosen anew after this.

    Raises:
        ModelError: Samples are not kept apart.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if model._is_stateful or not kinds <= _ATTENTION_LAYERS:
        why = "some of its layers carry a state from one token to the next"
    elif not _mask_knows_positions(model):
        why = "its attention mask does not heed positions"
    else:
        return
    raise ModelError(
        f"data.packing=true, but {model.config.model_type} models do not keep the samples of a row apart: {why}. "
        "Set data.packing=false"
    )


def _mask_knows_positions(model: PreTrainedModel) -> bool:
    if "position_ids" not in signature(model.forward).parameters:
        return False
    ids_BT = torch.zeros(1, 4, dtype=torch.long)
    positions_BT = torch.tensor([[0, 1, 0, 1]])
    model.config._attn_implementation = _PROBE
    try:
        with torch.no_grad():
            model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False)
    except _AskedForMaskError as asked:
        return asked.is_packed
    return False


class _AskedForMaskError(Exception):
    """Ends a pass where the model asks for its mask."""

    def __init__(self, is_packed: bool) -> None:
        super().__init__()
        self.is_packed = is_packed


def _ask(allow_is_causal_skip: bool = True, **others: Any) -> NoReturn:
    # transformers allows no shortcut past a mask that keeps samples apart.
    raise _AskedForMaskError(not allow_is_causal_skip)


def find_cuts(attends: Attends, num_rows: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Return the samples of packed rows, if a mask allows each token its sample up to itself and nothing else.

    What a token sees is taken to be one range of neighbours, as in every rule of transformers that is made of indices:
    then the range is known from whether its two ends are seen and the tokens beyond them are not.

    Returns:
        Row, start and end of each sample, in order [1, 1, N, 3], on the CPU; None if the mask says something else.
    """
    rows_B1 = torch.arange(num_rows, device=device)[:, None]
    tokens_T = torch.arange(length, device=device)
    head = torch.zeros((), dtype=torch.long, device=device)

    def sees(others_BT: torch.Tensor) -> torch.Tensor:
        inside_BT = (others_BT >= 0) & (others_BT < length)
        return inside_BT & attends(rows_B1, head, tokens_T, others_BT.clamp(0, length - 1))

    begins_BT = ~sees((tokens_T - 1).expand(num_rows, length))
    starts_BT = torch.where(begins_BT, tokens_T, 0).cummax(dim=1).values
    is_whole = sees(starts_BT) & ~sees(starts_BT - 1) & sees(tokens_T.expand(num_rows, length))
    is_causal = ~sees((tokens_T + 1).expand(num_rows, length))
    if not bool((is_whole & is_causal).all()):
        return None
    rows_N, starts_N = begins_BT.nonzero(as_tuple=True)
    places_N = rows_N * length + starts_N
    ends_N = torch.cat([places_N[1:], places_N.new_tensor([num_rows * length])]) - rows_N * length
    return torch.stack([rows_N, starts_N, ends_N], dim=1)[None, None].cpu()


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Attends,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> torch.Tensor | None:
    """Stands in for `sdpa_mask`: returns cuts where they say the same, else what it returns."""
    is_packed = attention_mask is None and not allow_is_causal_skip and not use_vmap and q_length == kv_length
    cuts = find_cuts(mask_function, batch_size, q_length, torch.device(device)) if is_packed else None
    if cuts is not None:
        return cuts
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
        attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, use_vmap=use_vmap, device=device,
        **others,
    )  # fmt: skip


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Stands in for `sdpa_attention_forward`: query [B, H, T, D]; returns [B, T, H, D]."""
    # A mask is of booleans or floats; integers are cuts.
    if attention_mask is None or attention_mask.dtype != torch.long:
        heads_BTHD, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return heads_BTHD, None
    cuts = attention_mask[0, 0].tolist()
    if has_varlen_kernel(query, value):
        return attend_at_once(query, key, value, cuts, options.get("scaling")), None
    outputs = [
        sdpa_attention_forward(
            module, *(heads[row : row + 1, :, start:end] for heads in (query, key, value)), None, **options
        )[0]
        for row, start, end in cuts
    ]
    # Samples follow one another and fill every row.
    return torch.cat(outputs, dim=1)[0].unflatten(0, (query.shape[0], query.shape[2])), None


def has_varlen_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Tell whether flash attention takes these heads: 16 bit, on a device of 2020 or later, of equal size up to 256."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= 256
    )


def attend_at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cuts: list[list[int]], scale: float | None
) -> torch.Tensor:
    """Return the attention [B, H, T, D] -> [B, T, H, D] of all samples from one kernel for samples of many lengths.

    Args:
        query: Heads [B, H, T, D].
        key: Heads [B, K, T, D], where K divides H.
        value: As `key`.
        cuts: Row, start and end of each sample, in order; they fill every row.
        scale: Factor of the scores; None is 1 / sqrt(D).
    """
    num_rows, num_heads, length, _ = query.shape
    # As one row of B * T tokens. torch 2.11's kernel takes no fewer heads of keys than of queries.
    heads_NHD = [
        heads.repeat_interleave(num_heads // heads.shape[1], dim=1).transpose(1, 2).flatten(0, 1)
        for heads in (query, key, value)
    ]
    ends = [row * length + end for row, _, end in cuts]
    borders = torch.tensor([0, *ends], dtype=torch.int32, device=query.device)
    longest = max(end - start for _, start, end in cuts)
    # A window without a right side is causal.
    output_NHD: torch.Tensor = varlen_attn(
        *heads_NHD, borders, borders, longest, longest, scale=scale, window_size=(-1, 0)
    )
    return output_NHD.unflatten(0, (num_rows, length))


AttentionInterface.register(BY_SAMPLE, _attention)
AttentionMaskInterface.register(BY_SAMPLE, _mask)
AttentionMaskInterface.register(_PROBE, _ask)
