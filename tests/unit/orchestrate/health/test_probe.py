"""What a preflight does on a node: what it writes is read by the others, and removed."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dist_ft.orchestrate.health import probe
from dist_ft.orchestrate.health.facts import NodeFacts, NodeRef
from dist_ft.orchestrate.health.probe import clean_up, find_unread, probe_node

LISTENER = socket.create_server(("127.0.0.1", 0))
HERE, OTHER = (
    NodeRef("a", "127.0.0.1", LISTENER.getsockname()[1], "localhost"),
    NodeRef("b", "127.0.0.1", 1, "no.invalid"),
)


def facts(me: NodeRef, others: list[NodeRef], output_dir: Path) -> NodeFacts:
    return probe_node(me, others, str(output_dir), "scratch")


def test_files_of_two_nodes_are_seen_by_both_and_leave_nothing(tmp_path: Path) -> None:
    output_dir = tmp_path / "not" / "yet"
    both = [facts(HERE, [OTHER], output_dir), facts(OTHER, [HERE], output_dir)]
    assert [found.storage_problem for found in both] == [None, None]
    assert [found.is_first for found in both] == [True, False], "of two creators one wins"
    assert {found.nearest_dir for found in both} == {str(tmp_path)}
    assert find_unread(HERE, [OTHER], str(output_dir), "scratch") == []
    clean_up(str(output_dir), "scratch")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_shared_is_found(tmp_path: Path) -> None:
    for name, me in (("disk-a", HERE), ("disk-b", OTHER)):
        (tmp_path / name).mkdir()
        facts(me, [], tmp_path / name)
    assert find_unread(HERE, [OTHER], str(tmp_path / "disk-a"), "scratch") == ["b"]


def test_one_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    assert facts(HERE, [], Path("/proc/nowhere")).storage_problem


def test_ways_and_names(tmp_path: Path) -> None:
    found = facts(HERE, [HERE, OTHER], tmp_path)
    assert (found.unreached, found.unknown) == (["b"], ["no.invalid"])
    assert found.interface == "lo"


@pytest.mark.parametrize(
    ("setting", "key", "expected"),
    [
        ("auto", None, ("offline", False)),
        ("auto", "k", ("online", False)),
        ("online", None, ("online", True)),
        ("disabled", "k", ("disabled", False)),
    ],
)
def test_where_wandb_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str, key: str | None, expected: tuple[str, bool]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://user:pass@127.0.0.1:1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    found = probe.ask_wandb(setting)
    assert (found.mode, found.problem is not None) == expected
    assert not found.is_reached and found.host == "127.0.0.1"
