"""Lets a teacher answer the prompts of a run's training data, and writes rows that any objective trains on.

This is distillation by sequences (Kim and Rush 2016): the way for a teacher with other tokens, or one behind an API.
Rows appear in the order of the prompts. Beside the file lie its beginning and a note of how far it is, so that a work
that was stopped goes on there, and ends with the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dist_ft.config import Config
from dist_ft.config.data_sections import RowSource
from dist_ft.data.curation.personal import redact
from dist_ft.data.rows.scan import BadRow, Row, is_held_out, scan_rows, with_placeholder
from dist_ft.data.sources.listing import list_files
from dist_ft.errors import UsageError
from dist_ft.evaluate.teachers import Prompt, Sampling, Teacher, TeacherAnswer
from dist_ft.jobs.splits import with_fraction
from dist_ft.records import Completion, Conversation, Message, Record
from dist_ft.storage.publish import read_json, sync_directory, write_json

WINDOW = 256
"""Prompts that are answered before the file grows; of these the order may change for speed."""


@dataclass
class Answered:
    """What was done with the prompts.

    Attributes:
        rows: Rows written.
        cut: Answers left out because they reached the longest length.
        empty: Answers left out because they say nothing.
    """

    rows: int = 0
    cut: int = 0
    empty: int = 0

    @property
    def prompts(self) -> int:
        """Prompts that were answered."""
        return self.rows + self.cut + self.empty

    def describe(self, teacher: str, to: Path) -> str:
        """Return what was done, in words."""
        cut = f"{self.cut:,} reached --max-new-tokens"
        left_out = f"left out: {cut}, {self.empty:,} say nothing" if self.cut or self.empty else "none left out"
        if not self.rows:
            return f"no row to train on: {self.prompts:,} prompts answered by {teacher}; {left_out}"
        return f"{to}: {self.rows:,} rows, answered by {teacher}; {left_out}"


@dataclass(frozen=True)
class _Asked:
    record: Conversation | Completion
    place: str

    @property
    def prompt(self) -> Prompt:
        return self.record.prompt if isinstance(self.record, Completion) else self.record

    def row(self, answer: TeacherAnswer, teacher: str, temperature: float) -> dict[str, Any]:
        """Return the row to train on, with where its prompt and its answer come from."""
        origin = {"source": self.place, "model": teacher, "temperature": temperature}
        if isinstance(self.record, Completion):
            return {"prompt": self.record.prompt, "completion": answer.message["content"], **origin}
        tools = {"tools": list(self.record.tools)} if self.record.tools else {}
        return {"messages": [*map(_untrained, self.record.messages), answer.message], **tools, **origin}


def answer_prompts(
    config: Config, teacher: Teacher, sampling: Sampling, to: Path, show: Callable[[Answered], None]
) -> Answered:
    """Write the teacher's answers to the prompts of `data.train`; go on with a work that was stopped.

    Args:
        config: Whose data is answered. Rows that a fraction holds out are not.
        teacher: Who answers.
        sampling: How the answers are drawn.
        to: The file; it appears when it is whole.
        show: Receives the counts after each window.

    Raises:
        UsageError: The file exists, or its beginning is of another work.
        UserError: A row cannot be read.
    """
    part, note = to.with_name(f"{to.name}.part"), to.with_name(f"{to.name}.part.json")
    if to.exists():
        raise UsageError(f"--to {to} exists; name another file, or remove it")
    files = [file.identity for source in config.data.train for file in list_files(source)]
    work = {"teacher": teacher.key, "sampling": asdict(sampling), "prompts": files, "redact": config.data.redact}
    done, num_bytes = _read_note(note, work)
    to.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        file.truncate(num_bytes)
        waiting = islice(_prompts(config), done.prompts, None)
        while window := list(islice(waiting, WINDOW)):
            answers = teacher.answer([asked.prompt for asked in window], done.prompts)
            for asked, answer in zip(window, answers, strict=True):
                if not answer.is_whole:
                    done.cut += 1
                elif not (answer.message["content"].strip() or answer.message.get("tool_calls")):
                    done.empty += 1
                else:
                    done.rows += 1
                    row = asked.row(answer, teacher.name, sampling.temperature)
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())  # the note must not be ahead of it
            write_json(note, {"work": work, "done": asdict(done), "num_bytes": file.tell()})
            show(done)
    if done.rows:
        part.rename(to)
        sync_directory(to.parent)
    else:
        part.unlink()
    note.unlink(missing_ok=True)
    return done


def _read_note(note: Path, work: dict[str, Any]) -> tuple[Answered, int]:
    if not note.is_file():
        return Answered(), 0
    try:
        found = read_json(note)
    except ValueError as error:
        raise UsageError(f"{error}; or remove it to begin anew") from error
    if found["work"] != work:
        changed = ", ".join(key for key in work if found["work"].get(key) != work[key])
        raise UsageError(
            f"{note} is of a work with another {changed}; give what was given then to go on with it, or remove it to "
            "begin anew"
        )
    return Answered(**found["done"]), found["num_bytes"]


def _prompts(config: Config) -> Iterator[_Asked]:
    """Yield what is asked, source by source in file order."""
    data = with_fraction(config).data
    for source in data.train:
        for row in scan_rows(source, data.group_by):
            if isinstance(row, Row) and data.eval_fraction is not None and is_held_out(row, data.eval_fraction):
                continue
            record = _record(row, source, data.bad_rows == "skip")
            asked = redact(record, data.redact).question() if record is not None else None
            if asked is not None:
                yield _Asked(_before_answer(asked.record), f"{row.location}")


def _record(row: Row | BadRow, source: RowSource, skips: bool) -> Record | None:
    """Return the record of a row; of a row without an answer, which is bad only for training, with a placeholder."""
    if isinstance(row, Row):
        return row.record
    record = with_placeholder(row, source)
    if record is None and not skips:
        raise row.error()
    return record


def _before_answer(record: Conversation | Completion) -> Conversation | Completion:
    if isinstance(record, Completion):
        return record
    return Conversation(record.messages[:-1], record.tools)


def _untrained(message: Message) -> Message:
    """Return an earlier turn; the answers among them are not the teacher's."""
    return {**message, "weight": 0} if message["role"] == "assistant" else message
