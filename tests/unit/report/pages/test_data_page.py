"""The page of `data check`: complete, and inert whatever the rows hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_ft.jobs.data_report.findings import check_data
from dist_ft.jobs.data_report.summary import DataReport
from dist_ft.report.pages.data_page import render_check_page
from tests.helpers.configs import tiny_config, write_rows
from tests.helpers.pages import check_inert, texts_of

HOSTILE = '<script>alert(1)</script>" onload="x \x1b[2J\u202e </style> https://evil.example/x.js'


def chat(question: str, answer: str = "yes") -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def report_of(tmp_path: Path, *lines: str, **changes: Any) -> DataReport:
    source = tmp_path / "<b>&.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    return check_data(tiny_config(tmp_path, data__train=[{"source": str(source)}], **changes))


def test_all_findings_and_sources_are_on_the_page(tmp_path: Path) -> None:
    report = report_of(
        tmp_path, *[chat("a")] * 9, chat("I am a@b.com", ""), "broken", chat("x" * 300),
        data__curation={"max_characters": 400}, data__limits={"exact_copies": 0.1},
    )  # fmt: skip
    texts = texts_of(render_check_page(report))
    assert len(report.findings) >= 6
    for finding in report.findings:
        assert any(finding.message in text for text in texts)
        assert all(any(place in text for text in texts) for place in finding.places)
    assert all(any(split.source in text for text in texts) for split in report.splits)


def test_hostile_rows_stay_inert(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no: ' + messages[0]['content']) }}")
    page = render_check_page(
        report_of(
            tmp_path, chat(HOSTILE, HOSTILE), json.dumps({HOSTILE: 1}), json.dumps({"messages": [{"role": HOSTILE}]}),
            HOSTILE, chat(HOSTILE + " a@b.com"), data__chat_template=str(template),
        )
    )  # fmt: skip
    check_inert(page)
    assert "&lt;script&gt;" in page
    assert "://" not in "".join(part for part in page.split(">") if "<" in part and "evil" not in part)


def test_a_row_of_ten_megabytes_makes_no_large_page(tmp_path: Path) -> None:
    page = render_check_page(report_of(tmp_path, json.dumps({"x" * 10_000_000: HOSTILE}), chat("y" * 500_000)))
    check_inert(page)
    assert len(page) < 30_000


@pytest.mark.parametrize("num_rows", [0, 1, 300])
def test_any_number_of_rows_makes_a_page(tmp_path: Path, num_rows: int) -> None:
    path = write_rows(tmp_path / "rows.jsonl", num_rows)
    lines = path.read_text().splitlines() or ["broken"]
    page = render_check_page(report_of(tmp_path, *lines))
    check_inert(page)
    assert (page.count("<svg") > 2) == (num_rows > 0) or num_rows == 0
    assert page.count("<rect") < 200
