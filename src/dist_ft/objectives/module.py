"""The module that DeepSpeed wraps: a model whose output layer sees trained tokens only.

Shapes: B rows, T tokens, N trained tokens of the micro batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from dist_ft.model.attention import attend_by_sample
from dist_ft.objectives.objective import Outputs, Rows

Found = TypeVar("Found")


class ObjectiveModule(nn.Module):
    """Runs the model on rows and applies a function of the objective to its predictions.

    The output layer runs on trained tokens only: it is a fifth of the work of a 135M model and most of its
    activation memory. A pre-hook on the output layer selects them, so that whatever a family does to its
    logits (scaling, soft-capping) stays the model's own code.

    Args:
        model: A causal language model of transformers, adapter attached.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        attend_by_sample(model)
        self.model = model
        self._selected_BT: torch.Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    def forward(self, rows: Rows, measure: Callable[[Outputs, Rows], Found]) -> Found:
        """Return what a function measures on the rows: sums of an objective, or the entries of a scorer."""
        self._selected_BT = rows.is_trained_BT
        try:
            logits: torch.Tensor = self.model(
                input_ids=rows.input_ids_BT, position_ids=rows.position_ids_BT, use_cache=False
            ).logits
            # The output layer has seen the trained tokens only: logits is [1, N, V].
            return measure(Outputs(logits[0].float(), rows.targets_BT[self._selected_BT]), rows)
        finally:
            self._selected_BT = None

    def _select(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._selected_BT is None:
            return None
        hidden_BTH, *rest = args
        return (hidden_BTH[self._selected_BT].unsqueeze(0), *rest)
