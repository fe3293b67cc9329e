"""Renders models side by side, and their answers, as text. Pure, and safe whatever an answer holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_ft.printable import printable

METRIC_NAMES = {
    "eval_loss": "held-out loss",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "json_valid": "JSON valid",
    "json_fields": "JSON fields",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
}
"""Names of metrics for people; other metrics keep their own."""
_WIDTH = 16
_SAMPLE_CHARS = 200


def format_value(value: float | None) -> str:
    """Returns a number of a metric; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def render_comparison(columns: Mapping[str, Mapping[str, float | None]]) -> str:
    """Returns the models as columns, the metrics as rows; nothing when there is nothing to show."""
    metrics = dict.fromkeys(metric for values in columns.values() for metric in values)
    if not metrics:
        return ""
    lines = [" " * _WIDTH + "".join(f"{name:>12}" for name in columns)]
    for metric in metrics:
        shown = "".join(f"{format_value(values.get(metric)):>12}" for values in columns.values())
        lines.append(f"{METRIC_NAMES.get(metric, metric):{_WIDTH}}{shown}")
    return "\n".join(lines)


def render_samples(samples: Sequence[Mapping[str, str]]) -> str:
    """Returns questions with the answers to them, each on one line and cut."""
    blocks = [
        "\n".join(f"{name:{_WIDTH}}{printable(text.strip(), _SAMPLE_CHARS)}" for name, text in sample.items())
        for sample in samples
    ]
    return "\n\n".join(blocks)
