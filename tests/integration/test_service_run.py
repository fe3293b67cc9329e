"""A real run through the service: the unchanged client fine-tunes the tiny model and gets its weights."""

from __future__ import annotations

import json

import pytest

from launch import service_smoke


def test_the_client_gets_a_tuned_model(capfd: pytest.CaptureFixture[str]) -> None:
    assert service_smoke.main() == 0
    said = capfd.readouterr().out
    assert "The job has successfully completed" in said
    result = json.loads(said.splitlines()[-1])
    assert result["model"].startswith("ft:tiny-random:personal::")
    assert result["trained_tokens"] > 0
    assert "model.safetensors" in result["weights"]
    answered = {line.split(": ", 1)[0]: line.split(": ", 1)[1] for line in said.splitlines() if ": '" in line}
    assert set(answered) > {"tiny-random", result["model"]}, said
