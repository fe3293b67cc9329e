"""Models side by side, and answers that try to take over the terminal."""

from __future__ import annotations

import pytest

from dist_ft.report.table import metric_name, render_comparison, render_samples


def test_models_stand_side_by_side_and_what_is_missing_is_a_dash() -> None:
    columns = {
        "base": {"eval_loss": 2.5, "perplexity": 1e9},
        "tuned": {"eval_loss": 1.25, "perplexity": None, "bleu": 12.5},
    }
    lines = [line.split("  ") for line in render_comparison(columns).splitlines()]
    assert [[part.strip() for part in line if part.strip()] for line in lines] == [
        ["base", "tuned"],
        ["held-out loss", "2.5000", "1.2500"],
        ["perplexity", "1.000e+09", "-"],
        ["BLEU", "-", "12.5000"],
    ]
    assert render_comparison({"base": {}}) == render_comparison({}) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\t", "two\\nlines"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("x" * 300, "x" * 200 + "… (100 more characters)"),
    ],
)
def test_no_answer_reaches_the_terminal_as_a_command(text: str, shown: str) -> None:
    assert render_samples([{"prompt": text}]) == f"prompt          {shown}"


@pytest.mark.parametrize(
    ("metric", "shown"),
    [
        ("eval_loss", "held-out loss"),
        ("orders/eval_loss", "orders: held-out loss"),
        ("orders/perplexity", "orders: perplexity"),
        ("rewards/accuracies", "rewards/accuracies"),
    ],
)
def test_a_metric_of_a_held_out_set_is_shown_with_its_name(metric: str, shown: str) -> None:
    assert metric_name(metric) == shown
