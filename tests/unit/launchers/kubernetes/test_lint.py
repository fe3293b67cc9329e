"""What counts as a secret in plain text; `tests/k8s` has the other rules."""

from __future__ import annotations

import pytest

from dist_ft.launchers.kubernetes.lint import problems_of, size_bytes


def _cluster(name: str) -> dict[str, object]:
    container = {"name": "c", "image": "i:1", "env": [{"name": name, "value": "x"}]}
    head = {"rayStartParams": {"num-cpus": "0"}, "template": {"spec": {"containers": [container]}}}
    return {"kind": "RayCluster", "metadata": {"name": "c"}, "spec": {"headGroupSpec": head}}


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PASSWORD", "DB_PASSWORD"])
def test_a_secret_in_plain_text_is_found_by_its_name(name: str) -> None:
    assert [problem for problem in problems_of([_cluster(name)]) if f"env {name} holds a secret" in problem]


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "RAY_AUTH_TOKEN_PATH", "SECRETARY", "KEYBOARD"])
def test_what_only_sounds_like_a_secret_is_not_taken_for_one(name: str) -> None:
    assert not [problem for problem in problems_of([_cluster(name)]) if "holds a secret" in problem]


@pytest.mark.parametrize(("quantity", "expected"), [("1Gi", 2**30), ("1500M", 1.5e9), ("128974848", 128974848), (7, 7)])
def test_memory_quantities(quantity: str | int, expected: float) -> None:
    assert size_bytes(quantity) == expected
