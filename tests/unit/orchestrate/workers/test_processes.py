"""What a client asks of a child, as one line of JSON."""

from __future__ import annotations

import pytest

from dist_ft.orchestrate.workers.processes import TaskRequest, decode_request, encode_request
from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
from tests.helpers.simulated_run import INPUTS, run_config

ATTEMPT = AttemptSpec("r", 1, "/runs/r", run_config(), INPUTS)


@pytest.mark.parametrize(
    "request_",
    [
        RankSpec(ATTEMPT, 0, 2, 0, "127.0.0.1", num_threads=1, env={"CUDA_VISIBLE_DEVICES": "0"}),
        TaskRequest("prepare", {"config": {"entry": "rank"}}, {"CUDA_VISIBLE_DEVICES": "1"}),
        TaskRequest("export", {}),
    ],
    ids=lambda request: type(request).__name__,
)
def test_a_request_survives_the_way_to_the_child(request_: RankSpec | TaskRequest) -> None:
    line = encode_request(request_)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode_request(line) == request_
