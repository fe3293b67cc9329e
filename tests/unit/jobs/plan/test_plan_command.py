"""What `dist-ft plan` says about the smoke configs, against the model and the loader themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ft.config import Config, load_config
from dist_ft.data.stream.cache import open_split
from dist_ft.data.stream.loader import RankLayout, TrainLoader, build_order
from dist_ft.errors import ConfigError
from dist_ft.jobs.plan.plan import make_plan, world_sizes
from dist_ft.jobs.plan.planned import Plan
from dist_ft.jobs.prepare import prepare
from dist_ft.model.adapter import save_adapter_config
from dist_ft.model.base import load_model
from dist_ft.model.trained import select_trained
from dist_ft.report.plan_text import render_plan
from tests.helpers.configs import preference_config
from tests.helpers.paths import ROOT

SMOKE = ROOT / "configs" / "smoke" / "full.yaml"


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


def _config(output_dir: Path, *overrides: str) -> Config:
    return load_config(SMOKE, [f"run.output_dir={output_dir}", *overrides])


def planned(config: Config) -> Plan:
    return make_plan(config, prepare(config).inputs)


@pytest.fixture(scope="module")
def plan(output_dir: Path) -> Plan:
    return planned(_config(output_dir, "train.max_steps=20", "cluster.num_workers=[1, 3]"))


def test_plan_is_json(plan: Plan) -> None:
    values = json.loads(json.dumps(plan.to_dict()))
    assert list(values) == [
        "run", "run_dir", "model", "method", "objective", "scores", "optimizer", "state_bytes", "data", "steps",
        "positions",
        "global_batch_size", "micro_batch_size", "tokens_per_step", "zero_stage", "zero_note", "memory", "world_sizes",
        "warnings",
    ]  # fmt: skip
    assert values["memory"][0]["total_bytes"] == plan.memory[0].memory.total_bytes
    assert values["data"]["rows"] == plan.data.rows


def test_scores_of_a_frozen_model_are_planned(tmp_path: Path) -> None:
    config = preference_config(tmp_path, {"kind": "dpo"}, train__max_steps=41)
    scores = planned(config).scores
    assert scores is not None
    assert (scores.model, scores.columns) == ("the model of the first step", ("ref_logps",))
    assert scores.num_bytes == 2 * (41 + 7) * 4
    # One forward pass over all data against eight epochs of three such passes.
    assert scores.share_of_work == pytest.approx((41 + 7) / 41 / 3 / 8, rel=0.1)
    longer = planned(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 1})}))
    assert any("times the work of the training" in warning for warning in longer.warnings)
    assert planned(preference_config(tmp_path, {"kind": "orpo"})).scores is None


def test_length_of_the_run(plan: Plan) -> None:
    assert (plan.steps, plan.positions) == (20, 160)
    assert plan.data.rows == 2000
    assert plan.data.eval_sequences > 0
    assert 0 < plan.data.trained_tokens < plan.data.tokens


def test_epochs_cover_every_sequence(output_dir: Path, plan: Plan) -> None:
    whole = planned(_config(output_dir, "train.max_steps=null", "train.epochs=1"))
    assert whole.positions == plan.data.sequences
    assert whole.steps == -(-whole.positions // 8)
    # Sampled evenly, so close to the mean over the epoch.
    mean = whole.data.tokens / whole.steps
    assert whole.tokens_per_step == pytest.approx(mean, rel=0.05)


def test_a_run_whose_data_is_not_prepared_yet_has_a_plan(cli: str, tmp_path: Path) -> None:
    settings = [f"run.output_dir={tmp_path}", "train.max_steps=5", "data.preparation=stream"]
    page = subprocess.run([cli, "plan", str(SMOKE), *settings], capture_output=True, text=True, check=True).stdout
    (data,) = (line for line in page.splitlines() if line.startswith("  data "))
    said = data.removeprefix("  data    1 shard, prepared while training goes on; ")
    assert "5 of 8 sequences, about 4,096 tokens each\n" in page  # every sequence full; no epochs are known
    assert "no row was read but the held-out ones" in " ".join(page.split())
    held_out = int(said.split()[0])
    shown = subprocess.run([cli, "plan", str(SMOKE), *settings, "--json"], capture_output=True, text=True, check=True)
    counts = json.loads(shown.stdout)["data"]
    assert (counts.pop("shards"), counts.pop("eval_sequences")) == (1, held_out)
    assert set(counts.values()) == {None}


def test_parameters_are_the_real_models(output_dir: Path, plan: Plan) -> None:
    real = sum(p.numel() for p in load_model(_config(output_dir)).parameters())
    assert plan.model.num_params == plan.model.num_trained == real


def test_lora_trains_few_parameters(output_dir: Path, plan: Plan) -> None:
    lora = planned(_config(output_dir, "method.kind=lora", "method.r=2"))
    assert lora.method == "lora"
    # r x (in + out) a linear layer; 7 of them in each of 2 layers.
    assert lora.model.num_trained == 2 * 2 * (128 + 96 + 96 + 128 + 3 * 192)
    assert lora.model.num_params == plan.model.num_params + lora.model.num_trained


def test_memory_has_every_stage_of_every_world_size(plan: Plan) -> None:
    assert [(row.world_size, row.stage) for row in plan.memory] == [
        (size, stage) for size in (1, 2, 3) for stage in range(4)
    ]
    assert all(row.memory.total_bytes > 0 for row in plan.memory)


def test_padding_is_what_the_loader_makes(output_dir: Path, plan: Plan) -> None:
    config = _config(output_dir, "train.max_steps=20")
    (split,) = prepare(config).inputs.splits
    shards = open_split(split, config.data.loader)
    order = build_order([shards], config.data, config.run.seed)
    for row in plan.world_sizes:
        size = row.world_size
        ranks = [TrainLoader(order, [shards], RankLayout(r, size, 2), 8, 160) for r in range(size)]
        steps = [[loader.step(step) for loader in ranks] for step in range(20)]
        used = sum(batches[0].totals.num_tokens for batches in steps)
        micros = [micro for batches in steps for batch in batches for micro in batch.micro_batches]
        computed = sum(micro.input_ids.size for micro in micros)
        assert row.padding_share == pytest.approx(1 - used / computed, abs=1e-4)
        assert row.micro_steps == len(steps[0][0].micro_batches)
        assert row.surplus_slots == row.micro_steps * 2 * size - 8


@pytest.mark.parametrize(
    ("fewest", "most", "expected"),
    [
        (2, 2, [2]),
        (1, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 9, [1, 2, 4, 8, 9]),
        (3, 64, [3, 4, 8, 16, 32, 64]),
        (5, 100, [5, 8, 16, 32, 64, 100]),
    ],
)
def test_world_sizes(fewest: int, most: int, expected: list[int]) -> None:
    assert world_sizes(fewest, most) == expected


def test_bfloat16_at_stage_0_says_that_it_runs_as_stage_1(output_dir: Path) -> None:
    plan = planned(_config(output_dir, "zero.stage=0", "model.dtype=bfloat16"))
    assert plan.zero_stage == 1
    assert "stage 1" in plan.zero_note
    by_stage = {row.stage: row.memory.total_bytes for row in plan.memory}
    assert by_stage[0] == by_stage[1]
    assert plan.zero_note in render_plan(plan)


def test_sizes_that_waste_slots_are_named(output_dir: Path) -> None:
    plan = planned(_config(output_dir, "cluster.num_workers=[1, 8]", "train.micro_batch_size=8"))
    assert [line for line in plan.warnings if line.startswith("with 2, 3, 4, 5, 6, 7, 8 workers")]


def test_long_samples_and_untrained_rows_are_counted_and_warned_of(output_dir: Path) -> None:
    source = output_dir / "few.jsonl"
    texts = [("short", "yes"), ("long", "no" * 200), ("x" * 300, "cut away")]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in texts
    ]
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    plan = planned(_config(output_dir, "data.seq_len=200", f"data.train=[{{source: {source}}}]"))
    assert (plan.data.long_samples, plan.data.untrained_rows) == (2, 1)
    page = render_plan(plan)
    assert "2 samples are longer than data.seq_len=200" in page
    assert "1 rows have no trained token" in page


def test_answers_that_do_not_teach_to_stop_are_said(output_dir: Path) -> None:
    template = output_dir / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", encoding="utf-8")
    plan = planned(_config(output_dir, f"data.chat_template={template}"))
    (line,) = (line for line in plan.warnings if "stopping is not learnt" in line and "held-out" not in line)
    assert line.startswith(f"{plan.data.rows:,} answers end without a token")
    assert not any("stopping" in line for line in planned(_config(output_dir)).warnings)


def test_bad_rows_and_long_samples_of_both_sides_are_said(output_dir: Path) -> None:
    source = output_dir / "bad.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]}
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no" * 200}]}
    source.write_text("\n".join([json.dumps(row), "broken", json.dumps(long)]), encoding="utf-8")
    overrides = [f"data={{train: [{{source: {source}}}], eval: {{source: {source}}}, seq_len: 64}}"]
    plan = planned(_config(output_dir, *overrides, "data.bad_rows=skip", "data.long_samples=drop"))
    assert (plan.data.rows, plan.data.bad_rows, plan.data.long_samples) == (2, 1, 1)
    long_line, bad_line, *held_out = plan.warnings
    assert long_line == "1 samples are longer than data.seq_len=64 and are left out"
    assert bad_line.startswith("1 bad rows are left out; they are in ")
    assert Path(bad_line.split()[-1]).read_text().count("\n") == 1
    assert bad_line.split()[-1] in render_plan(plan)
    assert held_out[:2] == [f"held-out data: {line}" for line in (long_line, bad_line)]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.seq_len=4096", "max_position_embeddings=2048"),
        ("method={kind: lora, target_modules: [nope]}", "method.target_modules"),
    ],
)
def test_what_would_stop_the_run_is_an_error_now(output_dir: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        planned(_config(output_dir, override))


def test_rendering_shows_what_matters_on_one_page(plan: Plan) -> None:
    page = render_plan(plan)
    lines = page.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 110
    for text in ("tiny-random", "107,200", "20 of 8 sequences", "this run"):
        assert text in page


@pytest.mark.parametrize("has_start", [False, True])
def test_the_command_prints_nothing_but_the_plan(output_dir: Path, tmp_path: Path, has_start: bool) -> None:
    overrides = [f"run.output_dir={output_dir}", "method.kind=lora"]
    if has_start:
        config = _config(output_dir, "method.kind=lora")
        model = select_trained(load_model(config), config)
        model.save_pretrained(tmp_path)
        save_adapter_config(model, config, tmp_path)
        overrides.append(f"method.init_from={tmp_path}")
    command = [sys.executable, "-c", "from dist_ft.cli import main; main()", "plan", str(SMOKE), *overrides, "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert shown.stderr == ""
    assert json.loads(shown.stdout)["method"] == "lora"
