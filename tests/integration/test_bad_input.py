"""Bad input: one clear error, exit code 2, nothing changed. The real command in a real process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_ft.config import load_config
from dist_ft.errors import UserError
from dist_ft.layout import user_cache_dir
from dist_ft.orchestrate.workers.processes import run_task
from tests.helpers.paths import ROOT

CONFIG = ROOT / "configs" / "smoke" / "full.yaml"
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def train(cli: str, tmp_path: Path, *overrides: str, config: Path = CONFIG) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [cli, "train", str(config), f"run.output_dir={tmp_path / 'runs'}", *overrides],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip


def assert_refused(done: subprocess.CompletedProcess[str], tmp_path: Path, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "runs" / "full").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.learning_rat=1"], ["optimizer.learning_rat", "unknown key"]),
        (["optimzer.lr=1"], ["did you mean optimizer?"]),
        (["train.global_batch_size=many"], ["train.global_batch_size='many'", "integer"]),
        (["data.train=[{source: nowhere.jsonl}]"], ["data.train.0.source=nowhere.jsonl", "no such file"]),
        (["model.name=./nothing"], ["model.name=./nothing", "no such directory"]),
        (["model.name=."], ["is not a model", "config.json"]),
        (["cluster.num_workers=500"], ["500", "CPU slots"]),
        (["cluster.num_workers=[3, 1]"], ["[3, 1]", "min"]),
        (["run.output_dir=/dev/null/x"], ["run.output_dir=/dev/null/x", "not a directory"]),
        (["novalue"], ["novalue", "key=value"]),
    ],
)  # fmt: skip
def test_what_needs_no_model_is_refused_before_any_heavy_import(
    cli: str, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    assert_refused(train(cli, tmp_path, *overrides), tmp_path, *words)


def test_all_config_problems_come_at_once(cli: str, tmp_path: Path) -> None:
    done = train(cli, tmp_path, "optimizer.lrr=1", "zero.stage=7", "data.seq_len=x")
    assert_refused(done, tmp_path, "optimizer.lr?", "zero.stage=7", "data.seq_len='x'")
    assert done.stderr.count("error:") == 3


def test_a_missing_config_is_an_error_of_one_line(cli: str, tmp_path: Path) -> None:
    done = train(cli, tmp_path, config=tmp_path / "none.yaml")
    assert_refused(done, tmp_path, "none.yaml does not exist")


def test_an_existing_run_directory_is_refused(cli: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "full").mkdir(parents=True)
    done = train(cli, tmp_path)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert list((tmp_path / "runs" / "full").iterdir()) == []


def data_file(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return f"data.train=[{{source: {path}}}]"


def refuse_preparation(starter: str, tmp_path: Path, *overrides: str) -> str:
    """Runs the preparation as the driver does, in a forked process; returns the message of its error."""
    config = load_config(CONFIG, [f"run.output_dir={tmp_path / 'runs'}", *overrides])
    with pytest.raises(UserError) as caught:
        run_task(starter, "prepare", {"config": config.model_dump(mode="json")})
    assert not list((tmp_path / "runs").glob("**/prepared.json"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([json.dumps(ROW), '{"messages": ['], ["data.jsonl:2", "not valid JSON"]),
        ([json.dumps({"messages": [{"role": "user", "content": "a"}]})], ["data.jsonl:1", "no assistant turn"]),
        ([json.dumps({"body": "a"})], ["data.jsonl:1", "found keys ['body']", "messages", "data.train[].columns"]),
        ([json.dumps({"messages": [{"role": "\x1b[2J"}]})], ["data.jsonl:1: turn 0: the role is '\\x1b[2J'"]),
        (["", ""], ["no rows"]),
    ],
)  # fmt: skip
def test_bad_rows_are_named_by_file_and_line(starter: str, tmp_path: Path, lines: list[str], words: list[str]) -> None:
    message = refuse_preparation(starter, tmp_path, data_file(tmp_path, *lines))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.name=nobody/no-such-model"], ["nobody/no-such-model"]),
        (["data.seq_len=4096"], ["data.seq_len=4096", "max_position_embeddings=2048"]),
        (["method={kind: lora, target_modules: [nothing]}"], ["nothing"]),
        (["data.train=[{source: 'embedded:nothing'}]"], ["embedded:nothing", "orders/train"]),
        (["data.seq_len=8"], ["trained token", "data.seq_len=8"]),
    ],
)  # fmt: skip
def test_what_needs_the_model_is_refused_before_any_process_group(
    starter: str, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    message = refuse_preparation(starter, tmp_path, *overrides)
    assert all(word in message for word in words), message


def test_a_tokenizer_without_a_chat_template_is_refused_by_the_command(
    cli: str, tmp_path: Path, ray_address: str, starter: str
) -> None:
    refuse_preparation(starter, tmp_path, "data.seq_len=4096")  # makes the embedded model
    shutil.copytree(user_cache_dir() / "models" / "tiny-random-v1", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    done = train(cli, tmp_path, f"cluster.address={ray_address}", f"model.name={tmp_path / 'bare'}")
    assert_refused(done, tmp_path, "no chat template", "data.chat_template")


def test_an_unreachable_cluster_is_an_error_with_its_address(cli: str, tmp_path: Path) -> None:
    assert_refused(train(cli, tmp_path, "cluster.address=127.0.0.1:1"), tmp_path, "127.0.0.1:1")


def test_more_workers_than_the_cluster_has_is_refused(cli: str, tmp_path: Path, ray_address: str) -> None:
    done = train(cli, tmp_path, f"cluster.address={ray_address}", "cluster.num_workers=9")
    assert_refused(done, tmp_path, "9", "the cluster has 8")


def test_help_and_errors_import_nothing_heavy(cli: str, tmp_path: Path) -> None:
    code = (
        "import sys; from dist_ft import cli\n"
        "sys.argv = ['dist-ft', 'train', 'none.yaml']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", f"after {time.monotonic() - began:.1f} s"


@pytest.mark.parametrize("verb", ["check", "show", "prepare"])
def test_looking_at_data_needs_no_ray(tmp_path: Path, verb: str) -> None:
    code = (
        "import sys; from dist_ft import cli\n"
        f"sys.argv = ['dist-ft', 'data', {verb!r}, {str(CONFIG)!r}, 'run.output_dir={tmp_path}']\n"
        "try: cli.main()\n"
        "except SystemExit as exit: print(exit.code or 0, sorted({'ray', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert done.stderr == ""
