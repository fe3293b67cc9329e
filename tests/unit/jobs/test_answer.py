"""A teacher's answers as rows: what is asked, what is written, and a work that goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.config import Config
from dist_ft.config.training_sections import DistillConfig
from dist_ft.data.rows.scan import read_rows
from dist_ft.errors import ConfigError, DataError, DataUnavailableError, UsageError
from dist_ft.evaluate import teachers
from dist_ft.evaluate.generate import generate
from dist_ft.evaluate.teachers import LocalTeacher, RemoteTeacher, Sampling, Teacher
from dist_ft.jobs import answer
from dist_ft.jobs.answer import Answered, answer_prompts
from dist_ft.storage.publish import write_json
from tests.helpers.answering_api import AnsweringApi, answering_api
from tests.helpers.configs import config_of
from tests.helpers.teacher import make_teacher

SAMPLING = Sampling(16)


@pytest.fixture
def api() -> Iterator[AnsweringApi]:
    with answering_api() as found:
        yield found


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*contents: str, **keys: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], **keys}


def answered(config: Config, teacher: Teacher, to: Path, sampling: Sampling = SAMPLING) -> tuple[Answered, list[Any]]:
    done = answer_prompts(config, teacher, sampling, to, lambda done: None)
    return done, [json.loads(line) for line in to.read_text().splitlines()] if to.exists() else []


def remote(api: AnsweringApi) -> RemoteTeacher:
    return RemoteTeacher(api.url, "big", SAMPLING, parallel=2)


def test_rows_of_all_forms_are_asked_without_their_answer(tmp_path: Path, api: AnsweringApi) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    source = write(
        tmp_path / "rows.jsonl",
        chat("say red", "old answer"),
        chat("say blue", "old", "and green", "old"),
        chat("only asked"),
        {"prompt": "raw text", "completion": " old"},
        {"prompt": "raw alone"},
        {"instruction": "do it", "input": "now", "output": "old"},
        {"instruction": "do nothing"},
        {"conversations": [{"from": "human", "value": "hello there"}]},
        {"prompt": [{"role": "user", "content": "which one"}], "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]},
        chat("use the tool", tools=tools),
        chat("too long", "old"),
        {"text": "asks nothing"},
    )  # fmt: skip
    config = config_of(tmp_path, source)
    done, rows = answered(config, remote(api), tmp_path / "out.jsonl")
    assert done == Answered(rows=10, cut=1)
    ends = [row["messages"][-1]["content"] if "messages" in row else row["completion"] for row in rows]
    assert ends == [
        "red!", "green!", "asked!", "text!", "alone!", "now!", "nothing!", "there!", "one!", "",
    ]  # fmt: skip
    assert rows[1]["messages"][1] == {"role": "assistant", "content": "old", "weight": 0}
    assert rows[9]["messages"][-1]["tool_calls"][0]["function"]["name"] == "f"
    assert rows[9]["tools"] == tools
    assert rows[3]["prompt"] == "raw text"
    for row, line in zip(rows, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], strict=True):
        assert (row["source"], row["model"], row["temperature"]) == (f"{source}:{line}", "big", 0.0)
    assert not any("old answer" in json.dumps(body) for body in api.asked)
    # What is written can be trained on: every row is read, and nothing in it is unknown.
    again = list(read_rows(config_of(tmp_path, str(tmp_path / "out.jsonl")).data.train[0]))
    assert len(again) == 10
    assert not any(row.unread for row in again)


def test_a_work_that_stopped_goes_on_and_ends_with_the_same_file(
    tmp_path: Path, api: AnsweringApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "WINDOW", 4)
    monkeypatch.setattr(teachers, "_FIRST_WAIT_S", 0.0)
    prompts = [f"word{i}" if i % 5 else "long" for i in range(14)]
    config = config_of(tmp_path, write(tmp_path / "rows.jsonl", *(chat(f"say {word}") for word in prompts)))
    whole, _ = answered(config, remote(api), tmp_path / "whole.jsonl")
    assert (whole.rows, whole.cut) == (11, 3)
    api.asked.clear()
    api.refuse = lambda body: (503, {"Retry-After": "0"}) if "word9" in body["messages"][-1]["content"] else None
    with pytest.raises(DataUnavailableError, match=r"does not answer \(503.*run the same command again to go on"):
        answered(config, remote(api), tmp_path / "cut.jsonl")
    assert not (tmp_path / "cut.jsonl").exists()
    # As if it had been killed while it wrote.
    with (tmp_path / "cut.jsonl.part").open("a") as part:
        part.write('{"messages": [{"role"')
    api.asked.clear()
    api.refuse = lambda body: None
    done, _ = answered(config, remote(api), tmp_path / "cut.jsonl")
    assert done == whole
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(api.asked) == 6  # the two windows before were kept
    assert [path.name for path in tmp_path.glob("cut.jsonl*")] == ["cut.jsonl"]


def test_what_does_not_fit_a_work_that_was_begun_is_refused(tmp_path: Path, api: AnsweringApi) -> None:
    source = write(tmp_path / "rows.jsonl", chat("say one"), chat("say two"))
    config, to = config_of(tmp_path, source), tmp_path / "out.jsonl"
    answered(config, remote(api), to)
    with pytest.raises(UsageError, match="exists; name another file"):
        answered(config, remote(api), to)
    to.unlink()
    note = {"work": {"teacher": remote(api).key}, "done": {}, "num_bytes": 0}
    write_json(tmp_path / "out.jsonl.part.json", note)
    with pytest.raises(UsageError, match="of a work with another sampling, prompts, redact"):
        answered(config, remote(api), to)


def test_an_api_that_is_busy_is_asked_again_and_one_that_refuses_is_not(
    tmp_path: Path, api: AnsweringApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    config = config_of(tmp_path, write(tmp_path / "rows.jsonl", chat("say one")))
    monkeypatch.setattr(teachers, "_FIRST_WAIT_S", 0.0)
    waits = ("0", "Wed, 21 Oct 2026 07:28:00 GMT", "-1", "nan")
    busy = [(429, {"Retry-After": wait}) for wait in waits] + [(500, {"Retry-After": "0"})]
    api.refuse = lambda body: busy.pop() if busy else None
    done, _ = answered(config, remote(api), tmp_path / "out.jsonl")
    assert (done.rows, busy, api.asked[0]["key"]) == (1, [], "Bearer secret-key")
    counted: list[int] = []

    def refuse(body: dict[str, Any]) -> tuple[int, dict[str, str]]:
        counted.append(1)
        return 401, {}

    api.refuse = refuse
    with pytest.raises(ConfigError, match=r"refuses chat/completions for model big: 401.*OPENAI_API_KEY") as found:
        answered(config, remote(api), tmp_path / "other.jsonl")
    assert "secret-key" not in str(found.value)
    assert len(counted) == 1


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"finish_reason": "stop"}, "None under `message`, expected an object"),
        ({"message": "yes"}, "'yes' under `message`, expected an object"),
        ({"message": {"content": ["yes"]}}, r"\['yes'\] under `content`, expected text"),
    ],
)
def test_an_answer_of_another_form_is_named(
    tmp_path: Path, api: AnsweringApi, choice: dict[str, Any], says: str
) -> None:
    api.choice = choice
    config = config_of(tmp_path, write(tmp_path / "rows.jsonl", chat("say one")))
    with pytest.raises(DataError, match=rf"--teacher http://.* {says}"):
        answered(config, remote(api), tmp_path / "out.jsonl")


def test_held_out_rows_are_not_asked_and_personal_data_stays_here(tmp_path: Path, api: AnsweringApi) -> None:
    rows = [chat(f"mail anna{i}@example.com", f"answer {i}") for i in range(30)]
    config = config_of(tmp_path, write(tmp_path / "rows.jsonl", *rows), data__eval=0.3, data__redact=["email"])
    answered(config, remote(api), tmp_path / "out.jsonl")
    assert 10 < len(api.asked) < 30
    assert not any("anna" in json.dumps(body) for body in api.asked)


def test_a_row_that_cannot_be_read_ends_the_work_or_is_skipped(tmp_path: Path, api: AnsweringApi) -> None:
    source = write(tmp_path / "rows.jsonl", chat("say one"), {"odd": 1})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        answered(config_of(tmp_path, source), remote(api), tmp_path / "out.jsonl")
    done, _ = answered(config_of(tmp_path, source, data__bad_rows="skip"), remote(api), tmp_path / "skipped.jsonl")
    assert done.rows == 1


def test_a_model_here_answers_with_its_own_template(tmp_path: Path) -> None:
    directory = make_teacher(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}="
    tokenizer.save_pretrained(directory)
    generation = json.loads((directory / "generation_config.json").read_text())
    # Its answers are noise: they end at one of many tokens, or are cut.
    (directory / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [*range(0, 256, 3)]}))
    words = ["red", "a longer question", "blue", "x y z", "green one", "gold"]
    config = config_of(tmp_path, write(tmp_path / "rows.jsonl", *(chat(word) for word in words)))
    named = DistillConfig(teacher=str(directory))
    done, rows = answered(config, LocalTeacher(config, named, Sampling(4)), tmp_path / "out.jsonl", Sampling(4))
    model = AutoModelForCausalLM.from_pretrained(directory)
    wanted = [generate(model, tokenizer, [f"<user>{word}="], 4)[0] for word in words]
    texts = [found.text for found in wanted if found.is_whole and found.text.strip()]
    assert texts
    assert [row["messages"][-1]["content"] for row in rows] == texts
    assert done.cut == sum(not found.is_whole for found in wanted)
    drawn = Sampling(4, temperature=2.0, seed=1)
    teacher = LocalTeacher(config, named, drawn)
    first, again = (teacher.answer([word], 7)[0].message["content"] for word in ("red", "red"))
    assert first == again
    assert len({teacher.answer(["red"], number)[0].message["content"] for number in range(5)}) > 1
