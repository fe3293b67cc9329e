"""`dist-ft checkpoint ls|verify|rm` on checkpoints that were really committed: what is shown, found and deleted."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft import cli
from dist_ft.checkpoint.lineage import committed, take_attempt
from dist_ft.checkpoint.manifest import MANIFEST, Manifest
from dist_ft.checkpoint.snapshot import write_slices
from dist_ft.coordinator.commit import Staging, commit
from dist_ft.errors import UsageError
from dist_ft.layout import RunDir, slices_name
from dist_ft.messages import Staged
from dist_ft.report.checkpoints import list_checkpoints, remove_checkpoints, verify_checkpoints
from dist_ft.run.place import open_run
from dist_ft.run.state import FINAL, TRANSITIONS, RunRecord
from dist_ft.slices import STATE_KINDS, ParamInfo, SliceKey, WrittenFile
from dist_ft.storage.publish import write_json
from dist_ft.storage.store import LocalStore
from tests.helpers.manifests import saved_state

PARAMS = (ParamInfo("w", (4, 5), "w"), ParamInfo("b", (3,), "b"))
ACTIVE = sorted(set(TRANSITIONS) - set(FINAL))
VERBS = (("ls",), ("ls", "--json"), ("verify",), ("rm", "--step", "10"), ("rm", "--step", "10", "--force"))


@dataclass
class Run:
    """A run directory with checkpoints, written as ranks and coordinator write them."""

    path: Path

    def __post_init__(self) -> None:
        self.store = LocalStore(self.path)
        self.record("completed")
        self.attempt = 0

    def record(self, state: str) -> None:
        record = RunRecord("demo", state=state, attempt=1, step=17, max_steps=40, world_size=2)
        write_json(RunDir(self.path).run_json, asdict(record))

    def fork(self, start: Manifest | None = None) -> None:
        """Takes the next attempt, which starts from a checkpoint."""
        self.attempt = take_attempt(self.store, start).number

    def commit(self, step: int, world_size: int = 2) -> Manifest:
        staging = Staging()
        for rank in range(world_size):
            file = self.write_rank(step, rank, world_size)
            staging.add(rank, Staged(step, file, saved_state(step, PARAMS) if rank == 0 else None))
        return commit(self.store, "demo", self.attempt, None, staging)

    def write_rank(self, step: int, rank: int, world_size: int = 2, first: int = 0, last: int = 0) -> WrittenFile:
        """Writes a rank's share, `first` elements later and `last` elements further than it should."""
        slices = []
        for param in PARAMS:
            start = param.numel * rank // world_size + first
            end = param.numel * (rank + 1) // world_size + last
            for kind in STATE_KINDS:
                slices.append((SliceKey(param.name, start, kind), torch.full((end - start,), float(step))))
        directory = RunDir(self.path).checkpoint(step, self.attempt)
        return write_slices(LocalStore(directory), slices_name(rank, world_size), slices)

    def rewrite(self, manifest: Manifest) -> None:
        """Puts a manifest in the place of a committed one, as only a bug of ours could."""
        (self.path / manifest.directory / MANIFEST).write_bytes(manifest.encode())

    @property
    def tree(self) -> dict[str, bytes]:
        """Every file below the run directory, hidden ones too."""
        files = (path for path in self.path.rglob("*") if path.is_file())
        return {str(path.relative_to(self.path)): path.read_bytes() for path in files}

    @property
    def directories(self) -> list[str]:
        return sorted(path.name for path in RunDir(self.path).checkpoints.iterdir())


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


Call = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    path = tmp_path / "demo"
    path.mkdir()
    return Run(path)


@pytest.fixture
def three(run: Run) -> Run:
    """Steps 10, 20 and 30 of one attempt."""
    run.fork()
    for step in (10, 20, 30):
        run.commit(step)
    return run


@pytest.fixture
def forked(run: Run) -> Run:
    """Attempt 1 wrote 10, 20 and 30; attempt 2 started from 10 and wrote 20, so that 20 and 30 of 1 are superseded."""
    run.fork()
    first = run.commit(10)
    run.commit(20)
    run.commit(30)
    run.fork(first)
    run.commit(20, world_size=3)
    return run


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls `dist-ft checkpoint VERB RUN ...` through the entry point."""

    def invoke(verb: str, path: Path, *arguments: str) -> Result:
        monkeypatch.setattr("sys.argv", ["dist-ft", "checkpoint", verb, str(path), *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return Result(int(caught.value.code or 0), out, err)

    return invoke


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def name(step: int, attempt: int = 1) -> str:
    return f"step-{step:08d}-a{attempt:04d}"


# ls --------------------------------------------------------------------------------------------------------


def test_every_checkpoint_is_listed_oldest_first_with_what_it_takes(forked: Run) -> None:
    entries, problems = list_checkpoints(open_run(forked.path))
    assert problems == []
    assert [(e.step, e.attempt, e.world_size, e.zero_stage) for e in entries] == [
        (10, 1, 2, 2), (20, 1, 2, 2), (20, 2, 3, 2), (30, 1, 2, 2),
    ]  # fmt: skip
    for entry in entries:
        slices = [path for path in Path(entry.path).iterdir() if path.name != MANIFEST]
        assert entry.num_bytes == sum(path.stat().st_size for path in slices)
        assert Path(entry.path).is_absolute()


def test_what_counts_is_what_a_resume_would_see(forked: Run) -> None:
    entries, _ = list_checkpoints(open_run(forked.path))
    counting = [(entry.step, entry.attempt) for entry in entries if entry.counts]
    assert counting == [(m.step, m.attempt) for m in committed(forked.store)] == [(10, 1), (20, 2)]


def test_superseded_checkpoints_are_marked_in_the_table_and_no_other(forked: Run, call: Call) -> None:
    result = call("ls", forked.path)
    assert result.code == 0
    _, *rows = result.out.splitlines()
    marked = [row for row in rows if "superseded" in row]
    shown = [[part for part in row.split() if part.startswith("checkpoints/")] for row in (*marked, *rows)]
    expected = [*(name(step) for step in (20, 30)), name(10), name(20), name(20, 2), name(30)]
    assert shown == [[f"checkpoints/{directory}"] for directory in expected]


def test_json_is_one_object_with_the_same_facts(forked: Run, call: Call) -> None:
    result = call("ls", forked.path, "--json")
    entries, problems = list_checkpoints(open_run(forked.path))
    assert result.code == 0
    listed = [{**asdict(entry), "tags": list(entry.tags)} for entry in entries]
    assert result.json == {"checkpoints": listed, "problems": problems}
    assert [c["counts"] for c in result.json["checkpoints"]] == [True, False, True, False]


def test_paths_are_absolute_whatever_the_run_was_called(
    three: Run, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(three.path.parent)
    found = call("ls", Path("demo"), "--json").json["checkpoints"]
    assert [c["path"] for c in found] == [str(three.path / "checkpoints" / name(step)) for step in (10, 20, 30)]


def test_a_run_without_checkpoints_has_none(run: Run, call: Call) -> None:
    assert call("ls", run.path, "--json").json == {"checkpoints": [], "problems": []}
    assert call("ls", run.path).out == "no checkpoints\n"
    assert call("verify", run.path).code == 0


def test_staged_files_without_a_manifest_are_no_checkpoint(three: Run, call: Call) -> None:
    three.write_rank(40, 0)
    found = call("ls", three.path, "--json").json
    assert [c["step"] for c in found["checkpoints"]] == [10, 20, 30]
    assert found["problems"] == []
    assert call("verify", three.path).code == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text(path.read_text().replace('"optimizer_step": 20', '"optimizer_step": 21')),
        lambda path: path.write_bytes((path.parent.parent / name(10) / MANIFEST).read_bytes()),
    ],
    ids=["half", "empty", "no text", "edited", "another's"],
)
def test_an_unreadable_manifest_is_listed_and_hides_no_other(
    three: Run, call: Call, spoil: Callable[[Path], Any]
) -> None:
    spoil(RunDir(three.path).checkpoint(20, 1) / MANIFEST)
    found = call("ls", three.path, "--json")
    assert found.code == 0
    assert [(c["step"], c["counts"]) for c in found.json["checkpoints"]] == [(10, True), (30, True)]
    (problem,) = found.json["problems"]
    assert problem.startswith(f"checkpoints/{name(20)}/{MANIFEST}: ")
    assert f"unreadable: {problem}" in call("ls", three.path).out.splitlines()

    verified = call("verify", three.path)
    assert verified.code == 1
    assert sorted(verified.out.splitlines()) == sorted(
        [problem, f"checkpoints/{name(10)}: whole", f"checkpoints/{name(30)}: whole"]
    )


def test_with_nothing_but_an_unreadable_manifest_the_table_says_both(run: Run, call: Call) -> None:
    run.fork()
    run.commit(10)
    (RunDir(run.path).checkpoint(10, 1) / MANIFEST).write_text("[]")
    lines = call("ls", run.path).out.splitlines()
    assert lines[0] == "no checkpoints"
    assert lines[1].startswith(f"unreadable: checkpoints/{name(10)}/")


# verify ----------------------------------------------------------------------------------------------------


def test_whole_checkpoints_pass_and_nothing_is_touched(forked: Run, call: Call) -> None:
    before = forked.tree
    result = call("verify", forked.path)
    assert (result.code, result.out.splitlines()) == (
        0,
        [f"checkpoints/{name(10)}: whole", f"checkpoints/{name(20, 2)}: whole"],
    )
    assert forked.tree == before


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("position", [0, 9, 200, -1])  # length of the header, the header, about its end, the data
def test_a_flipped_bit_is_found_wherever_it_is(three: Run, call: Call, rank: int, position: int) -> None:
    file = RunDir(three.path).checkpoint(20, 1) / slices_name(rank, 2)
    flip(file, position)
    result = call("verify", three.path)
    assert result.code == 1
    whole, damaged, last = result.out.splitlines()
    assert (whole, last) == (f"checkpoints/{name(10)}: whole", f"checkpoints/{name(30)}: whole")
    assert damaged.startswith(f"checkpoints/{name(20)}: ")
    assert file.name in damaged and "damaged" in damaged


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (Path.unlink, "missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-4]), "damaged"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "damaged"),
        (lambda file: file.write_bytes(b""), "damaged"),
        (lambda file: (file.rename(file.with_name("elsewhere")), file.symlink_to(file.with_name("elsewhere"))), ""),
    ],
    ids=["missing", "short", "long", "empty", "link"],
)
def test_a_file_that_is_not_what_was_written_is_found(
    three: Run, call: Call, spoil: Callable[[Path], Any], what: str
) -> None:
    file = RunDir(three.path).checkpoint(30, 1) / slices_name(1, 2)
    spoil(file)
    result = call("verify", three.path)
    assert result.code == 1
    *others, damaged = result.out.splitlines()
    assert all(line.endswith(": whole") for line in others) and len(others) == 2
    assert damaged.startswith(f"checkpoints/{name(30)}: ")
    assert file.name in damaged and what in damaged


@pytest.mark.parametrize(
    ("first", "last", "what"),
    [(1, 0, "missing"), (0, -1, "missing"), (-1, 0, "stored twice"), (0, 1, "elements stored of")],
)
def test_whole_files_that_do_not_cover_every_element_once_are_found(
    run: Run, call: Call, first: int, last: int, what: str
) -> None:
    run.fork()
    manifest = run.commit(10)
    replaced = run.write_rank(10, 1, first=first, last=last)
    run.rewrite(replace(manifest, files=(manifest.files[0], replaced)))
    result = call("verify", run.path)
    assert result.code == 1
    assert result.out.startswith(f"checkpoints/{name(10)}: w (fp32): ")
    assert what in result.out


def test_a_manifest_without_a_rank_lacks_its_elements(run: Run, call: Call) -> None:
    run.fork()
    manifest = run.commit(10)
    run.rewrite(replace(manifest, files=manifest.files[:1]))
    result = call("verify", run.path)
    assert (result.code, result.out) == (1, f"checkpoints/{name(10)}: w (fp32): elements 10..19 are missing\n")


def test_every_damaged_checkpoint_is_named(three: Run) -> None:
    for step in (10, 30):
        flip(RunDir(three.path).checkpoint(step, 1) / slices_name(0, 2), -1)
    found = dict(verify_checkpoints(open_run(three.path), []))
    assert [directory for directory, damage in found.items() if damage] == [
        f"checkpoints/{name(10)}", f"checkpoints/{name(30)}",
    ]  # fmt: skip


def test_only_the_steps_asked_for_are_read(three: Run, call: Call) -> None:
    flip(RunDir(three.path).checkpoint(10, 1) / slices_name(0, 2), -1)
    result = call("verify", three.path, "--step", "20", "--step", "30")
    assert (result.code, result.out.splitlines()) == (
        0,
        [f"checkpoints/{name(20)}: whole", f"checkpoints/{name(30)}: whole"],
    )
    assert call("verify", three.path, "--step", "10").code == 1


def test_what_nobody_reads_is_not_verified(forked: Run, call: Call) -> None:
    flip(RunDir(forked.path).checkpoint(20, 1) / slices_name(0, 2), -1)
    flip(RunDir(forked.path).checkpoint(30, 1) / slices_name(0, 2), -1)
    assert call("verify", forked.path).code == 0
    assert call("verify", forked.path, "--step", "20").code == 0


@pytest.mark.parametrize("step", [0, 15, 30, -10])  # 30 is superseded
def test_verify_refuses_a_step_that_does_not_count(forked: Run, call: Call, step: int) -> None:
    result = call("verify", forked.path, "--step", str(step))
    assert result.code == 2
    assert f"no checkpoint at step {step}; there are: 10, 20" in result.err


def test_a_checkpoint_that_retention_deletes_meanwhile_is_not_damaged(three: Run) -> None:
    verified = verify_checkpoints(open_run(three.path), [])
    assert next(verified) == (f"checkpoints/{name(10)}", None)
    three.store.delete(f"checkpoints/{name(20)}")  # what `checkpoint/retention.py` does
    assert list(verified) == [(f"checkpoints/{name(30)}", None)]


# tag -------------------------------------------------------------------------------------------------------


def test_a_tag_is_shown_keeps_from_rm_and_can_be_taken_away(three: Run, call: Call) -> None:
    assert call("tag", three.path, "good", "--step", "10").out == f"checkpoints/{name(10)} is tagged good\n"
    assert call("tag", three.path, "last").out == f"checkpoints/{name(30)} is tagged last\n"
    shown = call("ls", three.path).out
    assert f"checkpoints/{name(10)}  [good]" in shown
    assert f"checkpoints/{name(30)}  [last]" in shown
    refused = call("rm", three.path, "--step", "10")
    assert (refused.code, "step 10 is held (tag-good)" in refused.err) == (2, True)
    assert call("tag", three.path, "good", "--remove").out == "removed the tag good\n"
    assert call("rm", three.path, "--step", "10").code == 0
    assert three.directories == [name(20), name(30)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("x", "--step", "15"), "no checkpoint at step 15; there are: 10, 20, 30"),
        (("a/b",), "is no name"),
        (("x", "--remove"), "there is no tag x; there are: none"),
    ],
)
def test_a_tag_that_cannot_be_given_is_refused(three: Run, call: Call, arguments: tuple[str, ...], said: str) -> None:
    before = three.tree
    result = call("tag", three.path, *arguments)
    assert (result.code, said in result.err) == (2, True), result.err
    assert three.tree == before


def test_a_superseded_checkpoint_gets_no_tag(forked: Run, call: Call) -> None:
    assert "no checkpoint at step 30; there are: 10, 20" in call("tag", forked.path, "x", "--step", "30").err


# rm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", sorted(FINAL))
def test_rm_deletes_the_steps_it_is_given_and_nothing_else(three: Run, call: Call, state: str) -> None:
    three.record(state)
    kept = {path: data for path, data in three.tree.items() if name(10) not in path}
    result = call("rm", three.path, "--step", "10")
    assert (result.code, result.out) == (0, f"deleted checkpoints/{name(10)}\n")
    assert three.tree == kept
    assert three.directories == [name(20), name(30)]


def test_several_steps_go_at_once_and_one_may_be_named_twice(three: Run, call: Call) -> None:
    result = call("rm", three.path, "--step", "20", "--step", "10", "--step", "20")
    assert (result.code, len(result.out.splitlines())) == (0, 2)
    assert three.directories == [name(30)]
    assert call("verify", three.path).code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--step N"),
        (("--force",), "--step N"),
        (("--step", "15"), "no checkpoint at step 15; there are: 10, 20, 30"),
        (("--step", "15", "--force"), "no checkpoint at step 15; there are: 10, 20, 30"),
        (("--step", "10", "--step", "15"), "no checkpoint at step 15"),
        (("--step", "10", "--step", "15", "--force"), "no checkpoint at step 15"),
        (("--step", "-10"), "no checkpoint at step -10"),
        (("--step", "30"), "step 30 is the newest checkpoint"),
        (("--step", "10", "--step", "30"), "step 30 is the newest checkpoint"),
        (("--step", "ten"), "--step"),
    ],
)
def test_rm_refuses_and_deletes_nothing(three: Run, call: Call, arguments: tuple[str, ...], said: str) -> None:
    before = three.tree
    result = call("rm", three.path, *arguments)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert three.tree == before


@pytest.mark.parametrize("state", ACTIVE)
def test_rm_leaves_a_run_alone_that_is_at_work(three: Run, call: Call, state: str) -> None:
    three.record(state)
    before = three.tree
    result = call("rm", three.path, "--step", "10")
    assert result.code == 2
    assert state in result.err and "--force" in result.err
    assert three.tree == before

    assert call("rm", three.path, "--step", "10", "--force").code == 0
    assert three.directories == [name(20), name(30)]


def test_rm_with_force_deletes_the_newest_and_the_one_before_is_used(three: Run, call: Call) -> None:
    assert call("rm", three.path, "--step", "30", "--force").code == 0
    assert [manifest.step for manifest in committed(three.store)] == [10, 20]
    assert three.directories == [name(10), name(20)]


def test_rm_with_force_can_delete_all(three: Run, call: Call) -> None:
    assert call("rm", three.path, "--step", "10", "--step", "20", "--step", "30", "--force").code == 0
    assert three.directories == []
    assert call("ls", three.path, "--json").json == {"checkpoints": [], "problems": []}


def test_the_newest_is_the_newest_that_counts(forked: Run, call: Call) -> None:
    """Step 30 is later, but superseded: without it nothing is lost."""
    before = forked.tree
    refused = call("rm", forked.path, "--step", "20")
    assert refused.code == 2 and "step 20 is the newest" in refused.err
    assert forked.tree == before
    assert call("rm", forked.path, "--step", "30").code == 0
    assert forked.directories == [name(10), name(20), name(20, 2)]


def test_a_step_goes_with_its_superseded_checkpoints(forked: Run, call: Call) -> None:
    assert call("rm", forked.path, "--step", "20", "--force").code == 0
    assert forked.directories == [name(10), name(30)]
    assert [(m.step, m.attempt) for m in committed(forked.store)] == [(10, 1)]


def test_a_deleted_checkpoint_is_gone_for_rm_too(three: Run, call: Call) -> None:
    assert call("rm", three.path, "--step", "10").code == 0
    again = call("rm", three.path, "--step", "10")
    assert again.code == 2 and "there are: 20, 30" in again.err


def test_an_unreadable_manifest_elsewhere_does_not_hinder_rm(three: Run, call: Call) -> None:
    (RunDir(three.path).checkpoint(20, 1) / MANIFEST).write_text("{")
    assert call("rm", three.path, "--step", "10").code == 0
    assert three.directories == [name(20), name(30)]
    refused = call("rm", three.path, "--step", "30")
    assert refused.code == 2 and "newest" in refused.err


@given(
    steps=st.sets(st.integers(1, 6), min_size=1),
    chosen=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    force=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_rm_deletes_what_is_asked_or_nothing(steps: set[int], chosen: list[int], force: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        run = Run(Path(directory))
        run.fork()
        for step in steps:
            run.commit(step, world_size=1)
        refused = not set(chosen) <= steps or (max(steps) in chosen and not force)
        if refused:
            with pytest.raises(UsageError):
                remove_checkpoints(open_run(run.path), chosen, force)
        else:
            removed = remove_checkpoints(open_run(run.path), chosen, force)
            assert sorted(removed) == [f"checkpoints/{name(step)}" for step in sorted(set(chosen))]
        left = steps if refused else steps - set(chosen)
        assert run.directories == [name(step) for step in sorted(left)]
        assert all(damage is None for _, damage in verify_checkpoints(open_run(run.path), []))


# What is no run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "arguments"), [(verb, rest) for verb, *rest in VERBS])
def test_what_is_no_run_is_refused(tmp_path: Path, call: Call, verb: str, arguments: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        result = call(verb, path, *arguments)
        assert (result.code, result.out) == (2, "")
        assert str(path) in result.err
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize(("verb", "arguments"), [(verb, rest) for verb, *rest in VERBS])
def test_with_a_lost_lineage_nothing_is_guessed(three: Run, call: Call, verb: str, arguments: list[str]) -> None:
    (RunDir(three.path).attempts / "0001.json").write_text("{")
    before = three.tree
    result = call(verb, three.path, *arguments)
    assert (result.code, result.out) == (1, "")
    assert "attempts/0001.json" in result.err
    assert three.tree == before


def test_a_copied_run_is_verified_where_it_lies(three: Run, tmp_path: Path, call: Call) -> None:
    copy = Path(shutil.copytree(three.path, tmp_path / "copy"))
    flip(RunDir(three.path).checkpoint(20, 1) / slices_name(0, 2), -1)
    assert call("verify", copy).code == 0
    assert call("verify", three.path).code == 1
