"""Pages of `dist-ft data`, to be read by eye, and nothing of the data that steers or fills a terminal."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config import Config
from dist_ft.jobs.data_report.findings import check_data
from dist_ft.jobs.data_report.show import show_data
from dist_ft.report.data_text import render_check, render_show
from tests.helpers.configs import tiny_config

COLOR = re.compile("\x1b\\[[0-9;]*m")
HOSTILE = "\x1b[2J\x1b]0;title\x07 \x00 \x9b31m \u202e \u2028 \u2066 \r </script> ⟦fake⟧"


def conversation(*contents: str) -> str:
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]})


@pytest.fixture
def config_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Writes rows to `chats.jsonl` in the current directory."""
    monkeypatch.chdir(tmp_path)

    def make(*lines: str, **changes: Any) -> Config:
        Path("chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
        data = {"data__train": [{"source": "chats.jsonl"}], "data__eval": None, "data__packing": True}
        return tiny_config(tmp_path, **{**data, **changes})

    return make


ConfigFor = Callable[..., Config]

ROWS = (
    conversation("What is 2+2?", "4"),
    conversation("Two lines, please", "one\ntwo", "Thanks!", "✓"),
    conversation("Count.", "one two three four five six seven eight nine ten eleven"),
    conversation("Bye.", "Bye!"),
)


def test_packed_multi_turn_and_cut_samples_by_eye(config_for: ConfigFor) -> None:
    shown = show_data(config_for(*ROWS, data__seq_len=80), "0", 1, 3)
    assert render_show(shown, is_colored=False) == textwrap.dedent(
        """\
        train.0, chats.jsonl: 4 rows in 3 sequences; 219 tokens, 33.8% trained
        ⟦…⟧ is trained, ↵ is a line break of the text

        ━━ sequence 1 of 3: 2 samples, 63 of 80 tokens, 7 trained
        ── sample 1, chats.jsonl:1: 34 tokens, 2 trained
        <|im_start|>user↵
        What is 2+2?<|im_end|>↵
        <|im_start|>assistant↵
        ⟦4<|im_end|>⟧↵
        ── sample 2, chats.jsonl:4: 29 tokens, 5 trained
        <|im_start|>user↵
        Bye.<|im_end|>↵
        <|im_start|>assistant↵
        ⟦Bye!<|im_end|>⟧↵

        ━━ sequence 2 of 3: 1 sample, 76 of 80 tokens, 12 trained
        ── sample 1, chats.jsonl:2: 76 tokens, 12 trained
        <|im_start|>user↵
        Two lines, please<|im_end|>↵
        <|im_start|>assistant↵
        ⟦one↵
        two<|im_end|>⟧↵
        <|im_start|>user↵
        Thanks!<|im_end|>↵
        <|im_start|>assistant↵
        ⟦✓<|im_end|>⟧↵

        ━━ sequence 3 of 3: 1 sample, 80 of 80 tokens, 55 trained
        ── sample 1, chats.jsonl:3: 80 tokens, 55 trained
        <|im_start|>user↵
        Count.<|im_end|>↵
        <|im_start|>assistant↵
        ⟦one two three four five six seven eight nine ten eleven⟧
        ── cut off here: 2 more tokens beyond data.seq_len=80
        """
    ).rstrip("\n")


def test_colours_change_nothing_else(config_for: ConfigFor) -> None:
    shown = show_data(config_for(*ROWS), "0", 1, 3)
    colored = render_show(shown, is_colored=True)
    assert "\x1b[32mone↵\x1b[0m\n\x1b[32mtwo\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in colored
    plain = render_show(shown, is_colored=False)
    assert COLOR.sub("", colored).splitlines()[2:] == re.sub("[⟦⟧]", "", plain).splitlines()[2:]


@pytest.mark.parametrize("is_colored", [True, False])
def test_hostile_text_is_shown_as_what_it_is(config_for: ConfigFor, is_colored: bool) -> None:
    config = config_for(conversation(HOSTILE, HOSTILE), data__seq_len=512)
    page = COLOR.sub("", render_show(show_data(config, "0", 1, 1), is_colored))
    assert all(character.isprintable() or character == "\n" for character in page)
    assert page.count(r"\x1b[2J\x1b]0;title\x07 \x00 \x9b31m \u202e \u2028 \u2066 \r </script>") == 2
    if not is_colored:  # the marks of the page are its own
        assert page.count("⟦") == 2  # the legend's, and one answer


def test_long_text_is_shown_at_both_ends(config_for: ConfigFor) -> None:
    config = config_for(conversation("hi", "begin" + "x" * 90_000 + "end"), data__seq_len=100_000)
    page = render_show(show_data(config, "0", 1, 1), is_colored=False)
    assert len(page) < 5000
    assert "begin" in page and "end<|im_end|>" in page
    assert "86,008 more characters" in page


def test_a_report_by_eye(config_for: ConfigFor) -> None:
    lines = [
        *ROWS,
        "broken",
        conversation("What is 2+2?", "4"),
        *[conversation("no answer")] * 5,
        conversation("x" * 200, "hidden"),
    ]
    report = check_data(config_for(*lines, data__seq_len=80))
    assert render_check(report, is_colored=False) == textwrap.dedent(
        """\
        t: data.seq_len=80, packed

                    rows  sequences  tokens  trained  filled  shortest  median  p95  longest  source
          train.0      6          4     253    30.0%   79.1%        29      34  227      227  chats.jsonl

          train.0   5 of 5 answers end in a stop token; rows: 5 of 2 turns, 1 of 4 turns
          stops     generation ends at <|im_end|>
          run       12 epochs in 6 steps, 3,036 tokens, about 2.0e+09 operations; 107,200 parameters trained

        error    train.0  6 rows cannot be read and would stop a run; mend or remove
            chats.jsonl:5: not valid JSON: Expecting value (column 1); expected one object a line
            chats.jsonl:7: no assistant turn, so nothing to learn from; remove the row or add the answer
            chats.jsonl:8: no assistant turn, so nothing to learn from; remove the row or add the answer
            chats.jsonl:9: no assistant turn, so nothing to learn from; remove the row or add the answer
            chats.jsonl:10: no assistant turn, so nothing to learn from; remove the row or add the answer
            … and 1 more

        warning  train.0  left out for want of a trained token: 1 row (1 because data.seq_len=80 cuts the answer off);
                          give them an answer that fits
            chats.jsonl:12

        warning  train.0  beyond data.seq_len=80 and cut at the end: 2 samples (33.3%); raise it (the longest has 227
                          tokens), shorten them or set data.long_samples
            chats.jsonl:3: 82 tokens
            chats.jsonl:12: 227 tokens

        warning  train    exact copies of earlier rows: 1 (16.7%); remove them if not meant, or set
                          data.curation.exact
            chats.jsonl:6 equals chats.jsonl:1

        1 error, 3 warnings
        """
    ).rstrip("\n")


def test_good_data_gives_a_short_report(config_for: ConfigFor) -> None:
    page = render_check(check_data(config_for(*ROWS)), is_colored=True)
    assert page.endswith("\n\nnothing to complain of")
    assert len(page.splitlines()) == 10


def test_nothing_of_hostile_rows_reaches_the_report(config_for: ConfigFor, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no: ' + messages[0]['content']) }}")
    lines = [
        conversation(HOSTILE, "x"),
        json.dumps({"messages": HOSTILE * 100_000}),
        json.dumps({HOSTILE * 100_000: 1}),
        json.dumps({"messages": [{"role": HOSTILE * 100_000}]}),
    ]
    report = check_data(config_for(*lines, data__chat_template=str(template)))
    page = render_check(report, is_colored=False)
    assert all(character.isprintable() or character == "\n" for character in page)
    assert (report.splits[0].unreadable_rows, report.splits[0].refused_rows) == (3, 1)
    assert max(map(len, page.splitlines())) < 500
