"""Renders a comparison of models, and their answers, as text. Pure; any text in an answer is safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_ft.printable import printable

METRIC_NAMES = {
    "eval_loss": "held-out loss",
    "token_accuracy": "token accuracy",
    "perplexity": "perplexity",
    "exact_match": "exact match",
    "json_valid": "JSON valid",
    "json_fields": "JSON fields",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
}
"""Display names of metrics; other metrics keep their own names."""


def metric_name(metric: str) -> str:
    """Return the display name of a metric, which may be of a held-out set: `orders/eval_loss`."""
    set_name, _, plain = metric.rpartition("/")
    return (
        f"{set_name}: {METRIC_NAMES[plain]}" if plain in METRIC_NAMES and set_name else METRIC_NAMES.get(metric, metric)
    )


_WIDTH = 16
_SAMPLE_CHARS = 200


def format_value(value: float | None) -> str:
    """Return the value of a metric as text; a dash if there is none."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def render_comparison(columns: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return a table with models as columns and metrics as rows; empty text if there is nothing to show."""
    metrics = dict.fromkeys(metric for values in columns.values() for metric in values)
    if not metrics:
        return ""
    names = {metric: metric_name(metric) for metric in metrics}
    width = max(_WIDTH, 2 + max(map(len, names.values())))
    lines = [" " * width + "".join(f"{name:>12}" for name in columns)]
    for metric in metrics:
        shown = "".join(f"{format_value(values.get(metric)):>12}" for values in columns.values())
        lines.append(f"{names[metric]:{width}}{shown}")
    return "\n".join(lines)


def render_samples(samples: Sequence[Mapping[str, str]]) -> str:
    """Return questions with their answers, each cut to one line."""
    blocks = [
        "\n".join(f"{name:{_WIDTH}}{printable(text.strip(), _SAMPLE_CHARS)}" for name, text in sample.items())
        for sample in samples
    ]
    return "\n\n".join(blocks)
