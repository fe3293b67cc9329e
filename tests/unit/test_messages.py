"""Messages between processes: through JSON and back, unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dist_ft.messages import (
    Envelope,
    EvalDone,
    Heartbeat,
    IntervalMeasured,
    Leaving,
    Loaded,
    Located,
    Message,
    NodeSampled,
    Phase,
    PhaseChanged,
    RankDone,
    RankFailed,
    RankStarted,
    RendezvousOpen,
    Reply,
    SaveFailed,
    SaveSkipped,
    SaveStreamed,
    Staged,
    StepDone,
    encode_line,
)
from dist_ft.metric_rows import EvalRow
from dist_ft.slices import ParamInfo, WrittenFile
from tests.helpers.manifests import saved_state
from tests.helpers.rows import step_row

MESSAGES: list[Message] = [
    RankStarted(4711, "10.0.0.1"),
    RendezvousOpen("::1", 29500),
    PhaseChanged(Phase.FIRST_STEP, 3),
    Loaded(40, 2**40, ["workers: 2 → 3"]),
    StepDone(step_row(3, digest="zeile\nzwei \u2028 ü", loss=None, metrics={"margin": 0.5}), [0.25, 0.5]),
    EvalDone(EvalRow(0, 1, {"eval_loss": 2.5})),
    Staged(40, WrittenFile("slices-00000-of-00002.safetensors", 2**40, "00"), None),
    Staged(40, WrittenFile("x", 1, "ff"), saved_state(40, (ParamInfo("a", (2, 3), "a"),))),
    SaveFailed(40, "OSError: no space left", is_last=True),
    Leaving("SIGTERM"),
    Located("waits"),
    SaveSkipped(20),
    NodeSampled("10.0.0.1", {"cpu_percent": 12.5}),
    SaveStreamed(20, 2**40, 2**30),
    IntervalMeasured(20, 416.0, 208, 1.0, 86_400.0),
    RankDone("completed", 60),
    RankDone("stopped", 41),
    RankFailed({"type": "DataError", "message": "a.jsonl:3: broken"}),
    RankFailed({"type": "DivergedError", "message": "nan"}, step=41),
    Heartbeat(),
]


def over_the_wire(data: dict[str, Any]) -> dict[str, Any]:
    line = encode_line(data)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    back: dict[str, Any] = json.loads(line)
    return back


def test_every_kind_has_an_example_here() -> None:
    assert {type(message) for message in MESSAGES} == set(Message.__subclasses__())
    assert len({cls.kind for cls in Message.__subclasses__()}) == len(Message.__subclasses__())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_a_message_survives_the_wire(message: Message) -> None:
    envelope = Envelope("run-1", 3, 17, message)
    assert Envelope.from_dict(over_the_wire(envelope.to_dict())) == envelope


def test_an_unknown_kind_is_refused_by_name() -> None:
    wire = Envelope("run-1", 1, 0, Heartbeat()).to_dict()
    with pytest.raises(ValueError, match="unknown message kind 'gossip'"):
        Envelope.from_dict({**wire, "kind": "gossip"})


@pytest.mark.parametrize("kind", ["", None, 5])
def test_a_kind_that_is_no_kind_is_refused(kind: object) -> None:
    with pytest.raises(ValueError, match="unknown message kind"):
        Envelope.from_dict({**Envelope("run-1", 1, 0, Heartbeat()).to_dict(), "kind": kind})


@pytest.mark.parametrize(
    "reply",
    [
        Reply(),
        Reply(stop=True),
        Reply(stop=True, hold=True),
        Reply(abort="rank 3 is late", dump=True),
        Reply(committed_step=40, rendezvous=("10.0.0.1", 29500)),
    ],
)
def test_a_reply_survives_the_wire(reply: Reply) -> None:
    assert Reply.from_dict(over_the_wire(reply.to_dict())) == reply


def test_making_the_wire_form_shares_nothing_with_the_message() -> None:
    metrics: dict[str, float | None] = {"a": 1.0}
    wire = Envelope("run-1", 1, 0, StepDone(step_row(1, metrics=metrics), [])).to_dict()
    metrics["a"] = 2.0
    assert wire["body"]["row"]["metrics"] == {"a": 1.0}
