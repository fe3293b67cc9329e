"""Rules that join sections or look at the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_ft.config import Config, check_config, load_config
from dist_ft.errors import ConfigError
from dist_ft.machine import has_fast_bfloat16

Check = Callable[..., list[str]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Checks a sound config, in a directory with one data file, after `overrides`; returns the problems."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{}\n")
    Path("run.yaml").write_text("model: {name: tiny-random}\ndata: {train: [{source: a.jsonl}]}\n")

    def problems(*overrides: str) -> list[str]:
        config = load_config(Path("run.yaml"), overrides)
        try:
            check_config(config)
        except ConfigError as error:
            return str(error).splitlines()
        return []

    return problems


def adapter(path: Path, name: str) -> Path:
    path.mkdir(parents=True)
    (path / name).write_text("{}")
    return path


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "data.train=[{source: 'embedded:orders/train'}]",
        "data.train=[{source: a.jsonl, weight: 1}, {source: a.jsonl, weight: 2}]",
        "data.train=[{source: a.jsonl}, {source: a.jsonl}]",
        "data.eval=embedded:orders/eval",
        "data.eval=0.1",
        "data={train: [{source: a.jsonl}, {source: a.jsonl}], eval: 0.1, group_by: user}",
        "data.eval={source: a.jsonl, format: alpaca, columns: {output: answer}}",
        "data.train=[{source: org/chats, name: small, split: train_sft, revision: v1}]",
        "data.train=[{source: folder, split: test, name: small}]",
        "data.train=[{source: a.jsonl, format: sharegpt}]",
        "model.name=some-org/some-model",
        "train={global_batch_size: 4, micro_batch_size: 4}",
        "run.output_dir=not/yet/there",
        "checkpoint={every_steps: 10, keep_every: 100, max_gib: 20}",
        "checkpoint.every_steps=auto",
        "zero={stage: 1, offload: true}",
        "zero={stage: 0, offload: true}",  # bfloat16 at stage 0 is run as stage 1
        "method={kind: full}",
        "data.chat_template=chatml",
        "data.chat_template='{{ messages[0].content }}'",
        "data.train_on=last",
        "data.train=[{source: a.jsonl, weight: 1.0e+308}, {source: a.jsonl, weight: 1.0e+308}]",  # no float as a sum
        "data.train=[{source: a.jsonl, weight: 1.0e-9}, {source: a.jsonl, weight: 0.99}]",
    ],
)
def test_sound_configs_pass(check: Check, tmp_path: Path, override: str) -> None:
    (tmp_path / "folder").mkdir()
    assert check(override) == []


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["objective={kind: dpo, label_smoothing: 0.1}"], "label_smoothing=0.1 does nothing with .*sigmoid; .*robust"),
        (["objective={kind: cpo, gamma: 1.0}"], "objective.gamma=1 is for objective.loss=simpo"),
        (["objective={kind: dpo}", "data.train_on=all"], "data.train_on=all trains prompts"),
        (["objective={kind: kto}", "data.long_samples=split"], "data.long_samples=split cuts answers"),
        (["objective={kind: dpo, reference: nowhere}"], "objective.reference=nowhere: no model or adapter there"),
        (
            ["objective={kind: kto}", "data.eval=0.5", "eval={every_steps: 1, best_metric: rewards/accuracies}"],
            "eval.best_metric=rewards/accuracies is not measured with objective.kind=kto; choose one of eval_loss",
        ),
    ],
)
def test_an_objective_that_cannot_be_is_refused(check: Check, overrides: list[str], problem: str) -> None:
    (found,) = check(*overrides)
    assert re.search(problem, found), found


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.train=[{source: b.jsonl}]"], "data.train.0.source=b.jsonl: no such file (looked in "),
        (["data.train=[{source: a.jsonl}, {source: b.jsonl}]"], "data.train.1.source=b.jsonl: no such file"),
        (["data.train=[{source: empty.jsonl}]"], "data.train.0.source=empty.jsonl is empty"),
        (["data.train=[{source: ''}]"], "data.train.0.source= names nothing"),
        (["data.preparation=stream", "data.eval=0.1", "train.max_steps=1"], "data.eval=0.1 is a fraction of rows that"),
        (["data.preparation=stream", "data.eval=7", "train.max_steps=1"], "data.eval=7 is a number of rows that"),
        (["data.eval={sources: {x: {source: b.jsonl}}}"], "data.eval.sources.x.source=b.jsonl: no such file"),
        (
            ["data.eval=a.jsonl", "eval={every_steps: 1, best_metric: x/eval_loss}"],
            "eval.best_metric=x/eval_loss: data.eval has no set x; its",
        ),
        (
            ["data.eval={sources: {y: {source: a.jsonl}}}", "eval={every_steps: 1, best_metric: x/eval_loss}"],
            "eval.best_metric=x/eval_loss: data.eval has no set x; choose one of y",
        ),
        (["data.eval=b.jsonl"], "data.eval=b.jsonl: no such file"),
        (["data.eval={source: b.jsonl}"], "data.eval.source=b.jsonl: no such file"),
        (["data.eval={source: a.jsonl, split: test}"], "data.eval.split is for a Hugging Face data set"),
        (["data.train=[{source: a.jsonl, name: chats}]"], "data.train.0.name is for a Hugging Face data set"),
        (["data.train=[{source: folder, revision: main}]"], "data.train.0.revision is for a Hugging Face data set"),
        (["data.train=[{source: 'embedded:orders/train', split: x}]"], "data.train.0.split is for a Hugging Face"),
        (["data.train=[{source: folder/b.jsonl}]"], "data.train.0.source=folder/b.jsonl: no such file"),
        (["data.train=[{source: squad}]"], "data.train.0.source=squad: no such file"),
        (
            ["data.train=[{source: 'gs://b/*.jsonl'}]"],
            "data.train.0.source=gs://b/*.jsonl: reading gs:// needs a package",
        ),
        (
            ["data.train=[{source: 'what://b/x'}]"],
            "data.train.0.source=what://b/x: what:// is no known kind of address",
        ),
        (
            ["data.eval={source: 'https://h/a.jsonl', split: x}"],
            "data.eval.split is for a Hugging Face data set, which",
        ),
        (["data.eval=https://h/a?sig=abc"], "data.eval=https://h/a?sig=*** holds a secret"),
        (["data.group_by=user"], "data.group_by=user is for a held-out fraction"),
        (["data.group_by=user", "data.eval=a.jsonl"], "data.group_by=user is for a held-out fraction"),
        (["data.chat_template=b.jinja"], "data.chat_template=b.jinja: no such file"),
        (["data.chat_template=folder"], "data.chat_template=folder: no such file"),
        (["method.init_from=folder"], "method.init_from=folder: no PEFT adapter there"),
        (["run.output_dir=a.jsonl"], "run.output_dir=a.jsonl: "),
        (["run.output_dir=a.jsonl/below/it"], "run.output_dir=a.jsonl/below/it: "),
        (
            ["run.output_dir=s3://bucket/runs?X-Amz-Signature=abc"],
            "run.output_dir: s3://bucket/runs?***: user info and signatures",
        ),
        (["run.output_dir=sftp://host/runs"], "run.output_dir: sftp://host/runs: a store without exclusive creation"),
        (["model.name=./nowhere"], "model.name=./nowhere: no such directory"),
        (["model.name=~/no-such-model"], "model.name=~/no-such-model: no such directory"),
        (["model.name=folder"], "model.name=folder is not a model: config.json is missing"),
        (["model.name=./a.jsonl"], "model.name=./a.jsonl is not a model"),
        (
            ["train.global_batch_size=4", "train.micro_batch_size=5"],
            "train.micro_batch_size=5 is larger than train.global_batch_size=4",
        ),
        (
            ["data.train=[{source: a.jsonl, weight: 1}, {source: a.jsonl}]"],
            "data.train: weight is set on some sources",
        ),
        (
            ["data.train=[{source: a.jsonl, weight: 1}, {source: a.jsonl, weight: 1.0e-10}]"],
            "data.train.1.weight=1e-10 is less than a billionth of the sum of all weights",
        ),
        (["data.exhaust=first"], "data.exhaust=first is for sources with a weight"),
        (
            ["data.exhaust=repeat", "data.train=[{source: a.jsonl, weight: 1}]"],
            "data.exhaust=repeat has no end of an epoch to stop at; set train.max_steps",
        ),
        (["data.preparation=stream"], "data.preparation=stream has no end of an epoch to stop at; set train.max_steps"),
        (
            ["data.preparation=stream", "train.max_steps=9", "data.train=[{source: a.jsonl}, {source: a.jsonl}]"],
            "data.preparation=stream: how large the sources are is not known at the start; set a weight on each",
        ),
        (["eval.metrics=[exact_match]"], "eval.metrics=['exact_match'] needs held-out data"),
        (
            ["data.eval=0.1", "eval.metrics=[regex]"],
            "eval.regex=None and `regex` in eval.metrics=['regex'] need one another",
        ),
        (["data.eval=0.1", "eval.regex=x"], "eval.regex=x and `regex` in eval.metrics=[] need one another"),
        (
            ["checkpoint={every_steps: auto, keep_every: 100}"],
            "checkpoint.keep_every=100 keeps steps by their number, and checkpoint.every_steps=auto",
        ),
        (["checkpoint.keep_best=2"], "checkpoint.keep_best=2 needs a metric to compare by; set eval.best_metric"),
        (["checkpoint.keep_every=75"], "checkpoint.keep_every=75 is no multiple of checkpoint.every_steps=50"),
        (["data.eval=0.1", "eval.best_metric=eval_loss"], "eval.best_metric needs evaluations on the way"),
        (
            ["eval.every_steps=5", "eval.early_stopping={patience: 2}"],
            "eval.early_stopping needs evaluations on the way, but data.eval=None",
        ),
        (["zero={stage: 0, offload: true}", "model.dtype=fp32"], "zero.offload=true needs zero.stage >= 1"),
        (
            ["method={kind: full, init_from: adapter}"],
            "method.init_from names an adapter, but method.kind=full",
        ),
    ],
)
def test_one_mistake_gives_one_line_that_names_key_and_value(
    check: Check, tmp_path: Path, overrides: list[str], problem: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    adapter(tmp_path / "adapter", "adapter_config.json")
    (found,) = check(*overrides)
    assert found.startswith(problem)


def test_a_model_directory_passes(check: Check, tmp_path: Path) -> None:
    adapter(tmp_path / "model", "config.json")
    assert check("model.name=./model") == []
    assert check(f"model.name={tmp_path}/model") == []


def test_an_adapter_to_start_from_passes(check: Check, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", "adapter_config.json")
    assert check("method.init_from=adapter") == []


@pytest.mark.parametrize(
    "source",
    [
        "https://h/a.jsonl",
        "hf://datasets/a/b/*.parquet",
        "memory://a",
        "*.jsonl",
        "none/**/*.csv",
        "file://{here}/a.jsonl",
    ],
)
def test_urls_and_patterns_pass_until_they_are_listed(check: Check, tmp_path: Path, source: str) -> None:
    assert check(f"data.train=[{{source: '{source.format(here=tmp_path)}'}}]") == []


def test_every_mistake_is_reported(check: Check) -> None:
    found = check("data.eval=b.jsonl", "train.micro_batch_size=99", "model.name=/nowhere", "run.output_dir=a.jsonl")
    assert [line.split("=")[0].split(":")[0] for line in found] == [
        "train.micro_batch_size", "data.eval", "run.output_dir", "model.name",
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everywhere")
def test_what_may_not_be_read_or_written_is_found_before_the_start(check: Check, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    (tmp_path / "secret.jsonl").write_text("{}\n")
    (tmp_path / "secret.jsonl").chmod(0)
    assert "not writable" in check("run.output_dir=locked/runs")[0]
    assert "not readable" in check("data.eval=secret.jsonl")[0]


def test_checking_writes_nothing(check: Check, tmp_path: Path) -> None:
    assert check("run.output_dir=not/yet/there") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "run.yaml"]


@pytest.mark.parametrize("key", ["model.name", "data.eval", "run.output_dir", "data.chat_template", "method.init_from"])
def test_a_path_that_cannot_exist_is_a_problem_and_no_traceback(check: Check, key: str) -> None:
    assert check(f"{key}={'x' * 300}/{'y' * 300}")[0].startswith(key)


def test_check_config_takes_any_config() -> None:
    config = Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"name": "tiny-random"},
            "data": {"train": [{"source": "embedded:orders/train"}]},
        }
    )
    check_config(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method={kind: full, freeze: [embed_tokens, '^model.layers.[01].']}"],
        ["method={kind: lora, modules_to_save: [lm_head]}"],
        ["method={kind: full, freeze: [], modules_to_save: []}"],
        ["method={kind: lora, freeze: [], modules_to_save: []}"],
        ["optimizer.groups=[{pattern: lora_B, lr: 1e-3}, {pattern: norm, lr: 0, weight_decay: 0.1}, {pattern: a}]"],
        ["method.kind=full", "optimizer.groups=[{pattern: embed, weight_decay: 0}]"],
        ["cluster.memory_per_worker=16"],
        ["cluster.memory_per_worker=0.5"],
        ["cluster.memory_per_worker=null"],
    ],
)
def test_what_is_trained_and_with_how_much_can_be_said(check: Check, overrides: list[str]) -> None:
    assert check(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["method={kind: full, modules_to_save: [lm_head]}"],
            "method.modules_to_save is for method.kind=lora; method.kind=full trains every module",
        ),
        (["method={kind: lora, freeze: [norm]}"], "method.freeze is for method.kind=full;"),
        (["method.freeze=[norm]"], "method.freeze is for method.kind=full;"),  # lora is the default
    ],
)
def test_a_key_of_the_other_method_is_one_problem(check: Check, overrides: list[str], problem: str) -> None:
    (found,) = check(*overrides)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("text", "is_fast"),
    [
        ("flags\t\t: fpu sse avx2 fma\n", False),
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd\n", False),
        ("model name\t: unknown\n", True),
    ],
)
def test_a_cpu_without_bfloat16_is_known_by_its_flags(tmp_path: Path, text: str, is_fast: bool) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + text)
    assert has_fast_bfloat16(tmp_path / "cpuinfo") == is_fast


def test_where_the_flags_cannot_be_read_nothing_is_claimed(tmp_path: Path) -> None:
    assert has_fast_bfloat16(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method={kind: full, use_dora: true}"], "method.use_dora"),
        (["method={kind: full, use_rslora: true}"], "method.kind=lora"),
        (["method={kind: full, layers_to_transform: [0]}"], "layers_to_transform"),
        (["method.layers_to_transform=[0]"], "needs method.target_modules as a list"),
        (["model.name=https://huggingface.co/org/model"], "model.name is a URL"),
        (["model.name=/tmp", "model.revision=main"], "has no revision main"),
        (["model.name=/tmp", f"model.commit={'0' * 40}"], "leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused(check: Check, overrides: list[str], said: str) -> None:
    (problem,) = check(*overrides)
    assert said in problem


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("{teacher: /nowhere}", "objective.teacher=/nowhere: no such directory"),
        ("{teacher: https://hub/org/model}", "objective.teacher is a URL"),
        (
            "{teacher: /tmp, teacher_revision: main}",
            "objective.teacher=/tmp is a directory, which has no revision main",
        ),
        ("{teacher: RUN}", "RUN/exports/final"),
        ("{teacher: ADAPTER, teacher_revision: v1}", "has no revision v1"),
    ],
)
def test_a_teacher_that_cannot_be_one_is_refused_by_its_key(
    check: Check, tmp_path: Path, objective: str, said: str
) -> None:
    for name, file in (("run", "exports/final/config.json"), ("adapter", "adapter_config.json")):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text("{}")
    places = {"RUN": str(tmp_path / "run"), "ADAPTER": str(tmp_path / "adapter")}
    for word, place in places.items():
        objective, said = objective.replace(word, place), said.replace(word, place)
    (problem,) = check(f"objective={objective.replace('{', '{kind: distill, ')}")
    assert said in problem
    assert problem.startswith("objective.teacher")
    assert check(f"objective={{kind: distill, teacher: {places['ADAPTER']}}}") == []
    assert check("objective={kind: distill, teacher: org/model, teacher_revision: v1}") == []


def test_layers_are_chosen_beside_names(check: Check) -> None:
    assert check("method.layers_to_transform=[0]", "method.target_modules=[q_proj]", "method.use_dora=true") == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.curation={min_characters: 9, max_characters: 8}"], "data.curation.min_characters=9 is more than"),
        (["data.curation={min_turns: 3, max_turns: 2}"], "data.curation.min_turns=3 is more than"),
        (["data.limits.leaked=0.0"], "data.limits.leaked=0 needs held-out data; set data.eval"),
        (["data.curation.against_eval=true"], "data.curation.against_eval=true needs held-out data; set data.eval"),
    ],
)
def test_curation_that_cannot_be_meant_is_refused(check: Check, overrides: list[str], says: str) -> None:
    (problem,) = check(*overrides)
    assert problem.startswith(says)


def test_curation_that_can_be_meant_is_not(check: Check) -> None:
    curation = "{min_turns: 2, max_turns: 2, against_eval: true, near: 0.8, drop: [{pattern: x, role: user}]}"
    assert check(f"data.curation={curation}", "data.eval=0.1", "data.redact=[email]") == []


def test_schedule_free_training_takes_a_constant_rate(check: Check) -> None:
    (problem,) = check("optimizer.kind=schedule_free_adamw")
    assert "schedule.kind=cosine; set schedule.kind=constant_with_warmup" in problem
    for kind in ("constant", "constant_with_warmup"):
        assert check("optimizer.kind=schedule_free_adamw", f"schedule.kind={kind}") == []


@pytest.mark.parametrize(
    ("export", "problem"),
    [
        ("{every_steps: 75}", "export.every_steps=75 is no multiple of checkpoint.every_steps=50"),
        ("{best: true}", "export.best=true needs a metric to compare by; set eval.best_metric"),
        ("{merge: true}", "export.merge=true folds an adapter, but method.kind=full trains none"),
    ],
)
def test_an_export_that_cannot_be_is_refused(check: Check, export: str, problem: str) -> None:
    (found,) = check(f"export={export}", "method={kind: full}")
    assert problem in found
    assert check(f"export={export}", "method={kind: full}", "checkpoint.every_steps=null")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("method.kind=full", "nothing to train"),
        ("zero.stage=3", "set zero.stage=2"),
        ("method.use_dora=true", "use_dora"),
    ],
)
def test_what_a_quantised_base_cannot_be_joined_with_is_refused(check: Check, override: str, problem: str) -> None:
    found = check("model.quantization={kind: nf4}", "method.kind=lora", override)
    assert [problem in line for line in found] == [True]


def test_a_rate_of_adapters_needs_an_adapter(check: Check) -> None:
    (line,) = check("optimizer.lora_plus_ratio=16", "method.kind=full")
    assert line.startswith("optimizer.lora_plus_ratio=16")
