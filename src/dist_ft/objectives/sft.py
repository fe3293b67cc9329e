"""The training objective as a module: rows in, sum of token losses out.

Shapes: B rows, T tokens, N trained tokens of the micro batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dist_ft.slots import IGNORE


class TokenLoss(nn.Module):
    """Cross entropy summed over trained tokens; a micro batch of padding gives 0, never NaN.

    The output layer runs on trained tokens only: it is a fifth of the work of a 135M model and most of its
    activation memory. A pre-hook on the output layer selects them, so that whatever a family does to its
    logits (scaling, soft-capping) stays the model's own code.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._keep_BT: torch.Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        count_correct: bool = False,
    ) -> torch.Tensor:
        """Returns the loss sum, or the logits [B, T, V] when there are no targets.

        Args:
            input_ids: [B, T].
            targets: [B, T], -100 where nothing is trained.
            position_ids: [B, T] with a restart at each packed sample (transformers then masks samples from
                one another), or None when no row is packed: padding stands at the end, where causal attention
                keeps it from every token that counts.
            count_correct: Return [2] instead, in float64: the loss sum, and for how many of the tokens that count
                the likeliest one is the right one.
        """
        self._keep_BT = None if targets is None else targets != IGNORE
        try:
            logits: torch.Tensor = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            if targets is None:
                return logits
            # The output layer has seen the trained tokens only: logits is [1, N, V].
            logits_NV, targets_N = logits[0].float(), targets[self._keep_BT]
            loss_sum = F.cross_entropy(logits_NV, targets_N, reduction="sum")
            if not count_correct:
                return loss_sum
            num_correct = (logits_NV.argmax(-1) == targets_N).sum()
            return torch.stack([loss_sum.double(), num_correct.double()])
        finally:
            self._keep_BT = None

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._keep_BT is None:
            return None
        hidden_BTH, *rest = args
        return (hidden_BTH[self._keep_BT].unsqueeze(0), *rest)
