"""What a job that goes on from an earlier result trains."""

from __future__ import annotations

from dist_ft.service.tuning.catalogue import DEFAULT, read_catalogue
from dist_ft.service.tuning.job_plan import RunFiles, run_config, settle
from dist_ft.service.tuning.job_request import read_request
from dist_ft.service.wire import Object


def config(start: str | None, adapter_base: str | None, **extensions: object) -> Object:
    request = read_request({"model": "tiny-random", "training_file": "file-1", "dist_ft": extensions or None})
    base = read_catalogue(DEFAULT)["tiny-random"]
    files = RunFiles("/runs", "/train.jsonl", None, "chat", start, adapter_base)
    return run_config("ftjob-1", request, base, settle(request.hyperparameters, 10), 10, files)


def test_an_adapter_goes_on_over_its_own_base_with_its_own_settings() -> None:
    made = config("/runs/a/exports/final", "/runs/b/exports/final")
    assert made["model"] == {"name": "/runs/b/exports/final", "dtype": "float32"}
    assert made["method"] == {"kind": "lora", "init_from": "/runs/a/exports/final"}


def test_all_weights_are_a_base_model_for_whatever_method() -> None:
    plain = config("/runs/a/exports/final", None)
    assert plain["model"] == {"name": "/runs/a/exports/final", "dtype": "float32"}
    assert plain["method"] == config(None, None)["method"]
    lora = config("/runs/a/exports/final", None, method={"kind": "lora", "r": 4})
    assert (lora["model"], lora["method"]) == (plain["model"], {"kind": "lora", "r": 4})
