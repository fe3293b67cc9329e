"""Puts the shares of evaluation tasks together. Torch-free: driver and command line do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_ft.config.training_sections import EvalConfig
from dist_ft.evaluate.metrics import score

_SAMPLES_KEPT = 20
_SAMPLE_CHARS = 2000


def merge(config: EvalConfig, names: Sequence[str], shares: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Puts the answers together in the order of the rows, and judges them.

    Args:
        config: Says which metrics.
        names: Names of the models.
        shares: What `tasks.evaluate` returned, of each share.

    Returns:
        `{<name>: {metric: value}, "num_rows", "samples": [{prompt, reference, <name>: answer}], "eval_s"}`; few
        samples, and of each text the beginning.
    """
    rows = sorted((row for share in shares for row in share["rows"]), key=lambda row: int(row["row"]))
    references = [row["reference"] for row in rows]
    scores = {name: score(config.metrics, config.regex, [row[name] for row in rows], references) for name in names}
    samples = [{key: text[:_SAMPLE_CHARS] for key, text in row.items() if key != "row"} for row in rows[:_SAMPLES_KEPT]]
    eval_s = max(share["eval_s"] for share in shares)
    return {**scores, "num_rows": len(rows), "samples": samples, "eval_s": eval_s}
