"""Reading a config: scalars, overrides, every problem at once, and back to YAML unchanged."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dist_ft.config import (
    Config,
    check_config,
    config_from_dict,
    dump_yaml,
    load_config,
    schema_json,
    with_absolute_paths,
)
from dist_ft.config.data_sections import HeldOutSets, RowSource, SourceConfig
from dist_ft.errors import ConfigError
from tests.helpers.paths import ROOT

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
MINIMAL = """\
model:
  name: tiny-random
data:
  train:
    - source: a.jsonl
"""

Load = Callable[..., Config]
Problems = Callable[..., list[str]]


def load_text(directory: Path, text: str | bytes, overrides: tuple[str, ...] = ()) -> Config:
    path = directory / "first-run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return lambda *overrides, text=MINIMAL: load_text(tmp_path, text, overrides)


@pytest.fixture
def problems(load: Load) -> Problems:
    """Loads what cannot be loaded and returns the lines of the error."""

    def lines(*overrides: str, text: str | bytes = MINIMAL) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(*overrides, text=text)
        return str(caught.value).splitlines()

    return lines


def value_at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


# Scalars and overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.lr=1e-05", 1e-5),
        ("optimizer.lr=1.5E+1", 15.0),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=1", 1),
        ("train.max_steps=12", 12),
        ("run.name=on", "on"),
        ("run.name=no", "no"),
        ("run.name=Yes", "Yes"),
        ("run.name=off", "off"),
        ("run.name='3e-4'", "3e-4"),
        ("data.packing=false", False),
        ("data.packing=True", True),
        ("checkpoint.every_steps=null", None),
        ("checkpoint.every_steps=~", None),
        ("checkpoint.every_steps=", None),
        ("data.eval=0.1", 0.1),
        ("data.eval=held.jsonl", "held.jsonl"),
        ("data.train=[{source: a, columns: {text: b}}]", [SourceConfig(source="a", columns={"text": "b"})]),
        ("data.eval={source: b, format: alpaca}", RowSource(source="b", format="alpaca")),
        ("data.eval=200", 200),
        ("data.eval={sources: {a: {source: b}}}", HeldOutSets(sources={"a": RowSource(source="b")})),
        ("cluster.num_workers=[1,3]", [1, 3]),
        ("cluster.num_workers=[1, 3]", [1, 3]),
        ("cluster.resources_per_worker={GPU: 0.5, big-node: 1}", {"GPU": 0.5, "big-node": 1.0}),
        ("method.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("optimizer.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("monitor.project=größe=2", "größe=2"),
        ("monitor.project='a: b'", "a: b"),
        ("cluster.address=10.0.0.1:6379", "10.0.0.1:6379"),
        ("run.seed=9223372036854775807", 2**63 - 1),
    ],
)
def test_an_override_is_a_yaml_value(load: Load, override: str, value: Any) -> None:
    assert value_at(load(override), override.partition("=")[0]) == value


def test_the_file_reads_scalars_like_an_override(load: Load) -> None:
    config = load(text=MINIMAL + "optimizer:\n  lr: 3e-4\n  eps: 1e-05\nmonitor:\n  project: on\nrun:\n  name: no\n")
    assert (config.optimizer.lr, config.optimizer.eps) == (3e-4, 1e-5)
    assert (config.monitor.project, config.run.name) == ("on", "no")


@pytest.mark.parametrize(
    "value",
    ["1:30", "010", "1_000", "0b11"],
)
def test_a_number_of_yaml_1_1_is_not_read_as_another_number(load: Load, value: str) -> None:
    with pytest.raises(ConfigError):
        load(f"train.max_steps={value}")


def test_overrides_change_only_what_they_name(load: Load) -> None:
    base = load().model_dump()
    changed = load("train.max_steps=7", "optimizer.lr=1").model_dump()
    base["train"]["max_steps"], base["optimizer"]["lr"] = 7, 1.0
    assert changed == base


def test_a_later_override_wins(load: Load) -> None:
    assert load("train.max_steps=7", "train.max_steps=9").train.max_steps == 9
    assert load("train={max_steps: 7, epochs: 2}", "train.max_steps=9").train.model_dump()["epochs"] == 2
    assert load("train.epochs=2", "train={max_steps: 7}").train.epochs == 1


def test_an_override_replaces_a_list_whole(load: Load) -> None:
    config = load("data.train=[{source: b.jsonl, weight: 2}, {source: c.jsonl, weight: 1}]")
    assert [(s.source, s.weight) for s in config.data.train] == [("b.jsonl", 2), ("c.jsonl", 1)]


def test_an_override_can_give_what_the_file_lacks(load: Load) -> None:
    config = load("model.name=tiny-random", "data={train: [{source: a.jsonl}]}", text="train:\n  epochs: 1\n")
    assert config.model.name == "tiny-random"


def test_an_override_fills_an_empty_section(load: Load) -> None:
    assert load("train.max_steps=3", text=MINIMAL + "train:\n").train.max_steps == 3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.lr", "key=value"),
        ("", "key=value"),
        ("=5", "key=value"),
        ("=", "key=value"),
        ("model.name.x=5", "name is not a section"),
        ("data.train.0.weight=2", "train is not a section"),
        ("optimizer.lr=[", "not valid YAML"),
        ("optimizer.lr=@x", "not valid YAML"),
        ("optimizer.lr=*x", "not valid YAML"),
        ("optimizer.lr=\t1", "not valid YAML"),
        ("optimizer.lr=\x00", "not valid YAML"),
        ("optimizer.lr=\udcff", "not valid YAML"),
        ("optimizer.lr=!!python/object:os.system x", "not valid YAML"),
        ("train={max_steps: 1, max_steps: 2}", "twice"),
    ],
)
def test_an_override_that_cannot_be_read_is_quoted(problems: Problems, override: str, says: str) -> None:
    assert problems(override)[0].startswith(f"override {override!r}")
    assert says in "\n".join(problems(override))


@pytest.mark.parametrize(
    "text",
    [
        "a=b=c",
        "a.b.c.d=1",
        "model=5",
        "model=[1]",
        "run=5",
        "data=x",
        "trian.max_steps=5",
        "model.=1",
        "a.=1",
    ],
)
def test_an_override_onto_nothing_is_a_config_error(problems: Problems, text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize(
    "value",
    [
        "2024-13-45", "0x_", "!!int word", "!!bool word", "!!timestamp word", "{[a]: 1}", "{{a: 1}: 1}",
        "9" * 5000, "[" * 500,
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_odd_values_are_config_errors(problems: Problems, value: str) -> None:
    assert problems(f"optimizer.lr={value}")
    assert problems(text=MINIMAL + f"optimizer:\n  lr: {value}\n")


@pytest.mark.parametrize(
    "key",
    ["Model.name", "..", ".a", "1", "int", " train.max_steps", "seq-len"],
)
def test_odd_keys_are_config_errors(problems: Problems, key: str) -> None:
    assert key.split(".")[0] in problems(f"{key}=1")[0]


# Files


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("model:\n\tname: x\n", 2, "\\t"),
        ("model: {name: x\ndata: 1\n", 2, "','"),
        (MINIMAL + "train: *undefined\n", 6, "undefined"),
        (MINIMAL + "---\n" + MINIMAL, 6, "another document"),
        (MINIMAL + "model:\n  name: x\n", 6, "'model' stands twice"),
        ("model:\n  name: a\n  name: b\n", 3, "'name' stands twice"),
        ("data:\n  train:\n    - source: a\n      source: b\n", 4, "'source' stands twice"),
        ("a: &a\n  b: *a\n", 1, "recursive"),
    ],
)
def test_broken_yaml_names_file_and_line(problems: Problems, tmp_path: Path, text: str, line: int, says: str) -> None:
    (problem,) = problems(text=text)
    assert problem.startswith(f"{tmp_path}/first-run.yaml:{line}: ")
    assert says in problem


@pytest.mark.parametrize(
    "text", ["", "# only a comment\n", "~\n", "- a\n", "5\n", "word\n", "a: \x00\n", b"\xff\xfea\x00"]
)
def test_a_file_without_sections_is_refused_by_name(problems: Problems, text: str | bytes) -> None:
    assert "first-run.yaml" in problems(text=text)[0]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("? [a]\n: 1\n", id="list as a key"),
        pytest.param("Model:\n  name: x\n", id="capital letter"),
        pytest.param("train: " + "[" * 500 + "]" * 500 + "\n", id="very deep"),
        pytest.param("1: 2\n", id="number as a key"),
        pytest.param("~: 2\n", id="null as a key"),
        pytest.param("2024-01-01: 2\n", id="date as a key"),
        pytest.param("train: !!set {a}\n", id="set"),
        pytest.param("train: !!binary xx\n", id="binary"),
        pytest.param("train: !!python/name:os.system\n", id="python name"),
        pytest.param("train:\n  <<: 5\n", id="merge of a number"),
    ],
)
def test_odd_files_are_config_errors(problems: Problems, text: str) -> None:
    assert problems(text=MINIMAL + text)


@pytest.mark.parametrize("text", [MINIMAL.replace("\n", "\r\n"), "\ufeff" + MINIMAL, "---\n" + MINIMAL + "...\n"])
def test_editors_may_differ(load: Load, text: str) -> None:
    assert load(text=text) == load()


def test_anchors_and_merges_work(load: Load) -> None:
    config = load(
        text=MINIMAL + "train: &t {max_steps: 3}\neval:\n  every_steps: &n 5\ncheckpoint:\n  every_steps: *n\n"
    )
    assert (config.train.max_steps, config.eval.every_steps, config.checkpoint.every_steps) == (3, 5, 5)
    assert load(text=MINIMAL + "train:\n  <<: {max_steps: 4, epochs: 3}\n  epochs: 2\n").train.epochs == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_directory_is_not_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


# Keys and types


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("trian.max_steps=5", "did you mean train?"),
        ("train.micro_batch=2", "did you mean train.micro_batch_size?"),
        ("optimizer.wibble=1", "known: lr, weight_decay"),
        ("data.seqlen=9", "did you mean data.seq_len?"),
        ("data.train=[{source: a, wieght: 2}]", "did you mean data.train.0.weight?"),
        ("data.train=[{source: a}, {source: b, formats: auto}]", "did you mean data.train.1.format?"),
        ("data.eval={source: a, frmat: text}", "did you mean data.eval.format?"),
        ("data.eval={sources: {a: {source: a, frmat: text}}}", "did you mean data.eval.sources.a.format?"),
        ("data.eval={source: a, weight: 1}", "it is data.train.weight"),
        ("method.lora_alhpa=8", "did you mean method.lora_alpha?"),
    ],
)
def test_an_unknown_key_names_the_nearest(problems: Problems, override: str, near: str) -> None:
    (problem,) = problems(override)
    assert "unknown key" in problem
    assert near in problem


def test_a_key_of_another_kind_of_optimizer_is_told_from_a_typo(problems: Problems) -> None:
    """`did you mean optimizer.betas?` would have the user write a number of one key into another."""
    (problem,) = problems("optimizer={kind: lion, eps: 1e-6}")
    assert problem.startswith("optimizer.eps: a key of optimizer.kind=adamw and schedule_free_adamw only; remove it")
    (problem,) = problems("optimizer={kind: lion, epsilon: 1e-6}")
    assert "unknown key" in problem


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("train.micro-batch-size=2", "did you mean train.micro_batch_size?"),
        ("train.Micro_batch_size=2", "did you mean train.micro_batch_size?"),
        ("Train.max_steps=2", "did you mean train?"),
    ],
)
def test_a_misspelt_key_is_shown_as_written(problems: Problems, override: str, near: str) -> None:
    (problem,) = problems(override)
    assert problem.startswith(override.partition("=")[0].partition(".")[0])
    assert near in problem


@pytest.mark.parametrize(
    ("override", "begins"),
    [
        ("data.eval={source: 5}", "data.eval.source=5 (int): "),
        ("data.train=[{source: a, format: csv}]", "data.train.0.format='csv' (str): "),
        ("data.train=[{source: a, columns: {question: q}}]", "data.train.0.columns.question='question' (str): "),
    ],
)
def test_a_wrong_value_of_a_source_is_one_line(problems: Problems, override: str, begins: str) -> None:
    (line,) = problems(override)
    assert line.startswith(begins)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=fast", "'fast'"),
        ("optimizer.lr='3e-4'", "'3e-4'"),
        ("optimizer.lr=0", "0"),
        ("optimizer.lr=.nan", "nan"),
        ("train.max_steps=1e3", "1000.0"),
        ("train.max_steps='5'", "'5'"),
        ("train.max_steps=0", "0"),
        ("train.max_steps=true", "True"),
        ("data.packing=1", "1"),
        ("data.packing=yes", "'yes'"),
        ("data.seq_len=7", "7"),
        ("data.train=[]", "[]"),
        ("data.train=a.jsonl", "'a.jsonl'"),
        ("data.eval=1.0", "1.0"),
        ("data.eval=0", "0"),
        ("data.eval=[a]", "['a']"),
        ("data.long_samples=cut", "'cut'"),
        ("data.bad_rows=ignore", "'ignore'"),
        ("method.kind=LORA", "'LORA'"),
        ("model.dtype=float64", "'float64'"),
        ("zero.stage=4", "4"),
        ("zero.stage='2'", "'2'"),
        ("run.name=my run", "'my run'"),
        ("run.name=../up", "'../up'"),
        ("run.name=.hidden", "'.hidden'"),
        ("run.name=3e-4", "0.0003"),
        ("run.seed=-1", "-1"),
        ("run.seed=9223372036854775808", "9223372036854775808"),
        ("monitor.wandb=maybe", "'maybe'"),
        ("optimizer.betas=[0.9, 0.99, 0.999]", "[0.9, 0.99, 0.999]"),
        ("cluster.resources_per_worker=5", "5"),
    ],
)
def test_a_wrong_value_is_shown_with_its_key(problems: Problems, override: str, value: str) -> None:
    key = override.partition("=")[0]
    assert all(line.startswith(f"{key}={value} (") for line in problems(override))


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("data.eval={sources: {}}", "data.eval.sources={} (dict): dictionary should have at least 1 item"),
        ("data.eval={sources: {a/b: {source: a}}}", "data.eval.sources.a/b: 'a/b' cannot name a held-out set"),
        ("data.eval={sources: {logps: {source: a}}}", "data.eval.sources.logps: 'logps' cannot name a held-out set"),
        ("data.eval={sources: {a: {}}}", "data.eval.sources.a.source: missing"),
        ("eval.best_metric=loss", "eval.best_metric: 'loss' is none of eval_loss, "),
        ("eval.best_metric=a/loss", "eval.best_metric: 'a/loss' is none of eval_loss, "),
    ],
)
def test_a_wrong_held_out_set_is_one_line(problems: Problems, override: str, start: str) -> None:
    (line,) = problems(override)
    assert line.startswith(start)


@pytest.mark.parametrize(
    "override",
    [
            "optimizer.lr=.inf", "train.epochs=.inf", "data.train=[{source: a.jsonl, weight: .inf}]",
            "optimizer.betas=[2, -1]", "zero.stage=true", "zero.stage=2.0", "method.target_modules=[]",
    ],
)  # fmt: skip
def test_a_senseless_value_is_refused(problems: Problems, override: str) -> None:
    assert problems(override)


def test_every_problem_is_reported_at_once(problems: Problems) -> None:
    found = problems(
        "optimizer.lr",
        "train.max_steps=x",
        text="model: {name: 5, dtype: x}\ndata: {train: [{source: a, wieght: 2}], seqlen: 3}\nfoo: 1\n",
    )
    starts = [
        "override 'optimizer.lr'",
        "model.name=5",
        "model.dtype='x'",
        "data.train.0.wieght",
        "data.seqlen",
        "foo:",
    ]
    for start in [*starts, "train.max_steps='x'"]:
        assert sum(line.startswith(start) for line in found) == 1, start


def test_missing_keys_are_reported_with_their_meaning(problems: Problems) -> None:
    found = problems(text="train:\n  epochs: 1\n")
    assert [line.partition(":")[0] for line in found] == ["model", "data"]
    (name,) = problems(text="model: {dtype: fp32}\ndata: {train: [{source: a}]}\n")
    assert name.startswith("model.name: missing in ")
    assert "Hub id" in name


# What a config is


def test_defaults_come_from_the_schema_alone(load: Load) -> None:
    config = load()
    written = {
        "run": {"name": "first-run"},
        "model": {"name": "tiny-random"},
        "data": {"train": [{"source": "a.jsonl"}]},
    }
    assert config == Config.model_validate(written)
    assert (config.method.kind, config.zero.stage, config.cluster.num_workers) == ("lora", 2, 1)


def test_the_run_is_named_after_the_file_unless_it_is_named(load: Load) -> None:
    assert load().run.name == "first-run"
    assert load("run.seed=1").run.name == "first-run"
    assert load("run.name=other").run.name == "other"


def test_a_config_is_frozen(load: Load) -> None:
    config = load()
    with pytest.raises(ValidationError):
        config.train.max_steps = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.train = config.train  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "dtype"),
    [("fp32", "float32"), ("float32", "float32"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_dtypes_have_short_names(load: Load, written: str, dtype: str) -> None:
    assert load(f"model.dtype={written}").model.torch_dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "stage", "run"),
    [("bf16", 0, 1), ("bfloat16", 0, 1), ("fp32", 0, 0), ("bf16", 1, 1), ("bf16", 2, 2), ("fp32", 3, 3)],
)
def test_bf16_at_stage_0_is_run_as_stage_1(load: Load, dtype: str, stage: int, run: int) -> None:
    config = load(f"model.dtype={dtype}", f"zero.stage={stage}")
    assert (config.zero.stage, config.zero_stage) == (stage, run)


@pytest.mark.parametrize(("written", "workers"), [("3", (3, 3)), ("[1, 4]", (1, 4)), ("[2, 2]", (2, 2))])
def test_workers_are_a_number_or_a_range(load: Load, written: str, workers: tuple[int, int]) -> None:
    cluster = load(f"cluster.num_workers={written}").cluster
    assert (cluster.min_workers, cluster.max_workers) == workers


@pytest.mark.parametrize(
    "written", ["0", "-1", "[3, 1]", "[0, 2]", "[1]", "[1, 2, 3]", "[]", "[1, x]", "'2'", "1.5", "true"]
)
def test_a_wrong_worker_range_is_refused(problems: Problems, written: str) -> None:
    assert all(line.startswith("cluster.num_workers") for line in problems(f"cluster.num_workers={written}"))


# There and back

ODD_STRINGS = [
    "on", "no", "yes", "null", "~", "true", "True", "TRUE", "0x1f", "010", "1:30", "2024-01-01", "=", "<<",
    "- a", "a: b", " lead", "trail ", "#x", "ünï", "a\nb", "a\tb", "'q'", '"', ".inf", ".nan", "1_0", "",
    "*a", "&a", "!a", "%", "@", "`", "{}", "[", "\u2028", "\x7f", "1.5", "😀",
]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        *ODD_STRINGS,
        "3e-4",
        "1e5",
        "12e4567",
        "1E5",
        "5e-3",
    ],
)
def test_strings_come_back_as_strings(load: Load, text: str) -> None:
    config = Config.model_validate(
        {
            "run": {"name": "first-run"},
            "model": {"name": "tiny-random", "revision": text},
            "data": {"train": [{"source": "a.jsonl"}]},
        }
    )
    assert load(text=dump_yaml(config)) == config


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=12),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    epochs=st.floats(min_value=1e-9, max_value=1e9),
    workers=st.integers(1, 99) | st.tuples(st.integers(1, 9), st.integers(9, 99)).map(list),
    held_out=st.none() | st.floats(min_value=1e-9, max_value=0.999) | st.sampled_from(["held.jsonl", {"source": "a"}]),
    resources=st.none() | st.dictionaries(st.sampled_from(["GPU", "CPU", "ümlaut"]), st.floats(0, 8), min_size=1),
)
def test_a_resolved_config_loads_to_itself(
    text: str, lr: float, epochs: float, workers: Any, held_out: Any, resources: Any
) -> None:
    config = Config.model_validate(
        {
            "run": {"name": "first-run"},
            "model": {"name": "tiny-random", "revision": text},
            "data": {
                "train": [{"source": text, "weight": lr}, {"source": "b", "weight": 1}],
                "eval": held_out,
            },
            "train": {"epochs": epochs},
            "optimizer": {"lr": lr},
            "cluster": {"num_workers": workers, "resources_per_worker": resources},
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        assert load_text(Path(directory), dump_yaml(config)) == config
    assert config_from_dict(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_schema_describes_every_field() -> None:
    schema = json.loads(schema_json())
    jsonschema.Draft202012Validator.check_schema(schema)
    for section in [schema, *schema["$defs"].values()]:
        assert section["description"]
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            target = schema["$defs"].get(field.get("$ref", "").removeprefix("#/$defs/"), {})
            assert field.get("description") or target.get("description"), f"{section['title']}.{name}"


def test_schema_accepts_what_the_loader_accepts(load: Load) -> None:
    jsonschema.validate(load("cluster.num_workers=[1, 2]").model_dump(mode="json"), json.loads(schema_json()))


def test_sections_stay_small() -> None:
    """At most fifteen keys of its own, sections within it aside."""
    members = [get_args(field.annotation) or (field.annotation,) for field in Config.model_fields.values()]
    waiting: list[Any] = [get_args(kind)[0] if get_args(kind) else kind for kinds in members for kind in kinds]
    for section in waiting:
        assert isinstance(section, type) and issubclass(section, BaseModel)
        kinds = [field.annotation for field in section.model_fields.values()]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        assert len(kinds) - len(inner) <= 15, section.__name__
        waiting += inner


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_loads_and_opens_with_its_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    check_config(config)
    text = path.read_text(encoding="utf-8")
    opening = re.match(r"(?:#.*\n)+", text)
    assert opening, "opens with no comment"
    assert re.search(rf"dist-ft \w+ {re.escape(str(path.relative_to(ROOT)))}\b", opening.group())
    with tempfile.TemporaryDirectory() as directory:
        assert load_text(Path(directory), dump_yaml(config)) == config


def test_there_are_shipped_configs() -> None:
    assert SHIPPED


# What is trained, and with how much memory


def test_patterns_groups_and_memory_are_read_as_written(load: Load) -> None:
    config = load(
        "method={kind: full, freeze: ['layers\\.[0-3]\\.', embed]}",
        "optimizer.groups=[{pattern: norm, lr: 0}, {pattern: 'bias$', lr: 1e-5, weight_decay: 0.1}]",
        "cluster.memory_per_worker=80",
    )
    assert config.method.freeze == ["layers\\.[0-3]\\.", "embed"]
    assert [group.model_dump() for group in config.optimizer.groups] == [
        {"pattern": "norm", "lr": 0.0, "weight_decay": None},
        {"pattern": "bias$", "lr": 1e-5, "weight_decay": 0.1},
    ]
    assert config.cluster.memory_per_worker == 80.0
    assert load("method.modules_to_save=[lm_head, embed_tokens]").method.modules_to_save == ["lm_head", "embed_tokens"]


def test_by_default_nothing_is_frozen_grouped_or_bounded(load: Load) -> None:
    config = load()
    assert (config.method.freeze, config.method.modules_to_save, config.optimizer.groups) == ([], [], [])
    assert config.cluster.memory_per_worker is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.freeze=['']", "method.freeze.0=''"),
        ("method.freeze=[norm, '']", "method.freeze.1=''"),
        ("method.freeze=norm", "method.freeze='norm'"),
        ("method.freeze=[1]", "method.freeze.0=1"),
        ("method.modules_to_save=lm_head", "method.modules_to_save='lm_head'"),
        ("method.modules_to_save=[lm_head, 1]", "method.modules_to_save.1=1"),
        ("optimizer.groups=[{pattern: ''}]", "optimizer.groups.0.pattern=''"),
        ("optimizer.groups=[{pattern: a}, {lr: 1}]", "optimizer.groups.1.pattern: missing"),
        ("optimizer.groups=[{pattern: a, lr: -1}]", "optimizer.groups.0.lr=-1"),
        ("optimizer.groups=[{pattern: a, lr: .nan}]", "optimizer.groups.0.lr=nan"),
        ("optimizer.groups=[{pattern: a, lr: .inf}]", "optimizer.groups.0.lr=inf"),
        ("optimizer.groups=[{pattern: a, lr: '1'}]", "optimizer.groups.0.lr='1'"),
        ("optimizer.groups=[{pattern: a, weight_decay: -0.1}]", "optimizer.groups.0.weight_decay=-0.1"),
        ("optimizer.groups=[{pattern: a, lrr: 1}]", "optimizer.groups.0.lrr: unknown key"),
        ("optimizer.groups=[a]", "optimizer.groups.0='a'"),
        ("optimizer.groups={pattern: a}", "optimizer.groups={'pattern': 'a'}"),
        ("cluster.memory_per_worker=0", "cluster.memory_per_worker=0"),
        ("cluster.memory_per_worker=-16", "cluster.memory_per_worker=-16"),
        ("cluster.memory_per_worker=.inf", "cluster.memory_per_worker=inf"),
        ("cluster.memory_per_worker=16GiB", "cluster.memory_per_worker='16GiB'"),
        ("cluster.memory_per_worker=true", "cluster.memory_per_worker=True"),
    ],
)
def test_a_wrong_choice_of_weights_or_memory_is_shown_with_its_key(
    problems: Problems, override: str, says: str
) -> None:
    (line,) = problems(override)
    assert line.startswith(says)


PATTERN_KEYS = [
    ("method.freeze=[{}]", "method.freeze.0"),
    ("method.freeze=[norm, {}]", "method.freeze.1"),
    ("optimizer.groups=[{{pattern: norm}}, {{pattern: {}}}]", "optimizer.groups.1.pattern"),
]
BAD_PATTERNS = ["(", "[a", "*", "a{2,1}", "(?P<x", "\\"]


@pytest.mark.parametrize("pattern", BAD_PATTERNS)
@pytest.mark.parametrize(("override", "key"), PATTERN_KEYS)
def test_what_is_no_regular_expression_is_quoted(problems: Problems, override: str, key: str, pattern: str) -> None:
    (line,) = problems(override.format(f"'{pattern}'"))
    assert f"{pattern!r} is not a regular expression: " in line


@pytest.mark.parametrize(("override", "key"), PATTERN_KEYS)
def test_what_is_no_regular_expression_is_shown_with_its_key(problems: Problems, override: str, key: str) -> None:
    (line,) = problems(override.format("'('"))
    assert line.startswith(key)


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 5000 + ")" * 5000], ids=["repetition", "depth"])
def test_a_pattern_beyond_the_limits_of_re_is_a_config_error(problems: Problems, pattern: str) -> None:
    assert problems(f"method.freeze=['{pattern}']")


@pytest.mark.parametrize("override", ["method.freeze=['(']", "cluster.memory_per_worker=0", "optimizer.groups=[{}]"])
def test_a_wrong_choice_is_for_the_user_to_mend(load: Load, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert (caught.value.exit_code, caught.value.retryable) == (2, False)


@given(patterns=st.lists(st.text(min_size=1), max_size=3))
@settings(max_examples=50, deadline=None)
def test_a_pattern_passes_exactly_when_it_compiles(patterns: list[str]) -> None:
    def compiles(pattern: str) -> bool:
        try:
            re.compile(pattern)
        except re.error:
            return False
        return True

    raw = {
        "run": {"name": "r"}, "model": {"name": "tiny-random"}, "data": {"train": [{"source": "a"}]},
        "method": {"kind": "full", "freeze": patterns}, "optimizer": {"groups": [{"pattern": p} for p in patterns]},
    }  # fmt: skip
    if all(map(compiles, patterns)):
        config = config_from_dict(raw)
        assert config.method.freeze == [group.pattern for group in config.optimizer.groups] == patterns
        with tempfile.TemporaryDirectory() as directory:
            assert load_text(Path(directory), dump_yaml(config)) == config
    else:
        with pytest.raises(ConfigError):
            config_from_dict(raw)


def test_only_the_file_of_a_chat_template_becomes_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(MINIMAL)
    Path("mine.jinja").touch()
    Path("chatml").touch()
    text = "{% for m in messages %}" + "x" * 5000 + "{% endfor %}"
    for template, found in [("mine.jinja", str(tmp_path / "mine.jinja")), ("chatml", "chatml"), (text, text)]:
        config = load_config(Path("run.yaml"), [f"data.chat_template={json.dumps(template)}"])
        assert with_absolute_paths(config).data.chat_template == found


def test_paths_of_data_and_shards_are_made_absolute_and_urls_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {name: tiny-random}\nrun: {output_dir: runs}\ndata:\n"
        "  train: [{source: 'rows/*.jsonl'}, {source: 's3://b/*.jsonl'}]\n  cache_dir: shards\n"
        "  loader: {cache_dir: ~/copies, replicas: [more, 'gs://b/shards']}\n"
    )
    config = with_absolute_paths(load_config(path))
    assert config.run.output_dir == str(tmp_path / "runs")
    assert [s.source for s in config.data.train] == [str(tmp_path / "rows" / "*.jsonl"), "s3://b/*.jsonl"]
    assert config.data.cache_dir == str(tmp_path / "shards")
    assert config.data.loader.cache_dir == str(Path.home() / "copies")
    assert config.data.loader.replicas == [str(tmp_path / "more"), "gs://b/shards"]
    on_url = load_config(path, ["run.output_dir=s3://b/runs", "data.cache_dir=s3://b/shards"])
    assert with_absolute_paths(on_url).run.output_dir == "s3://b/runs"
    assert with_absolute_paths(on_url).data.cache_dir == "s3://b/shards"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("adamw", 2e-4, (0.9, 0.999))),
        (["optimizer.lr=1e-3", "optimizer.eps=1e-6"], ("adamw", 1e-3, (0.9, 0.999))),
        (["optimizer.kind=adamw"], ("adamw", 2e-4, (0.9, 0.999))),
        (["optimizer.kind=lion"], ("lion", 3e-5, (0.9, 0.99))),
        (["optimizer.kind=lion", "optimizer.betas=[0.95, 0.98]"], ("lion", 3e-5, (0.95, 0.98))),
        (["optimizer.kind=schedule_free_adamw"], ("schedule_free_adamw", 5e-4, (0.9, 0.999))),
    ],
)
def test_an_optimizer_is_chosen_by_its_kind(load: Load, overrides: list[str], expected: tuple[Any, ...]) -> None:
    config = load(*overrides)
    assert (config.optimizer.kind, config.optimizer.lr, config.optimizer.betas) == expected
    assert config_from_dict(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.kind=sgd", ["optimizer.kind='sgd'", "'adamw', 'lion', 'schedule_free_adamw'"]),
        ("optimizer={kind: lion, epsilon: 1e-8}", ["optimizer.epsilon: unknown key", "known: lr, weight_decay, betas"]),
        ("optimizer={kind: schedule_free_adamw, betas: [0, 0.9]}", ["optimizer.betas.0=0", "greater than 0"]),
        ("optimizer={kind: lion, lr: fast}", ["optimizer.lr='fast'", "three to ten times smaller"]),
        ("optimizer=3", ["optimizer=3"]),
    ],
)
def test_a_wrong_optimizer_is_explained_by_its_own_keys(problems: Problems, override: str, parts: list[str]) -> None:
    (problem,) = problems(override)
    assert [part for part in parts if part not in problem] == [], problem


def test_the_warm_up_is_said_once(load: Load, problems: Problems) -> None:
    config = load("schedule.warmup_steps=10")
    assert "warmup_ratio" not in config.schedule.model_dump()
    assert config_from_dict(config.model_dump(mode="json")) == config
    assert load("schedule.warmup_ratio=0.1").schedule.model_dump()["warmup_ratio"] == 0.1
    (problem,) = problems("schedule.warmup_steps=10", "schedule.warmup_ratio=0.03")
    assert "schedule.warmup_steps=10 and schedule.warmup_ratio=0.03" in problem
    assert "remove one" in problem
