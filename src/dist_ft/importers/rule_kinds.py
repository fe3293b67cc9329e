"""Rules that several keys share, whichever tool they are of."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dist_ft.config.yaml_file import Yaml
from dist_ft.importers.verdicts import (
    Outcome,
    Rule,
    Source,
    Verdict,
    as_flag,
    as_mapping,
    as_number,
    as_text,
    as_texts,
    as_whole,
    is_off,
    is_set,
)

_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
Kind = Literal["text", "texts", "number", "whole", "flag"]
_QUANTISED_NAME = re.compile(
    r"(?i)(bnb-?nf4|bnb-?[48]bit|[-_.](gptq|awq|aqlm|hqq|exl2|nf4|fp8|int[48]|[48]bit)\b|prequant)"
)
_BITSANDBYTES_NAME = re.compile(r"(?i)bnb-?(nf4|[48]bit)")
UNQUANTISED = (
    "the same adapters on the base as it is: more memory (2 bytes a weight), and not the numbers of a quantised base"
)


def to(our_key: str, kind: Kind, why: str = "", verdict: Verdict = "same") -> Rule:
    """Return a rule that takes a value over under our key."""

    def rule(source: Source, value: Yaml) -> Outcome:
        return Outcome(verdict, why, {our_key: typed("the value", value, kind)})

    return rule


def held_out_rows(key: str) -> Rule:
    """Return a rule for a share of the rows below 1, or a number of rows, that is held out."""

    def rule(source: Source, value: Yaml) -> Outcome:
        size = as_number(key, value)
        if size == 0:
            return Outcome("no effect", "nothing is held out")
        asked: Yaml = float(size) if size < 1 else as_whole(key, value)
        return Outcome("close", f"the same {'share' if size < 1 else 'number'}, other rows", {"data.eval": asked})

    return rule


def held_out_sets(named: Sequence[tuple[str, dict[str, Yaml]]]) -> Outcome:
    """Take over held-out sources, each with a name that its numbers carry if there are several."""
    if len(named) == 1:
        return Outcome("same", "", {"data.eval": named[0][1]})
    sets: dict[str, Yaml] = {}
    for name, source in named:
        plain = _NO_NAME.sub("-", name).strip("-._")[-30:].strip("-._") or "set"
        sets[plain if plain not in sets else f"{plain}-{len(sets) + 1}"] = source
    return Outcome(
        "same", "eval_loss is of all rows together, NAME/eval_loss of a set", {"data.eval": {"sources": sets}}
    )


def no_effect(why: str) -> Rule:
    """Return a rule for a key that does not change what is trained here."""
    return lambda source, value: Outcome("no effect", why)


def refuse(why: str) -> Rule:
    """Return a rule for a key that changes what is trained in a way that is not there; false leaves it off."""

    def rule(source: Source, value: Yaml) -> Outcome:
        return Outcome("no effect", "off") if is_off(value) else Outcome("refused", why)

    return rule


def close_if_true(why: str) -> Rule:
    """Return a rule for a flag that makes a difference too small to stop for."""

    def rule(source: Source, value: Yaml) -> Outcome:
        return Outcome("close", why) if as_flag("the flag", value) else Outcome("no effect", "off")

    return rule


def typed(key: str, value: Yaml, kind: Kind) -> Yaml:
    """Return a value in the type that our key wants."""
    if kind == "text":
        return as_text(key, value)
    if kind == "texts":
        return list(as_texts(key, value))
    if kind == "number":
        return float(as_number(key, value))
    return as_whole(key, value) if kind == "whole" else as_flag(key, value)


def placeholders(values: Yaml, key: str = "") -> list[str]:
    """Return the keys whose values are placeholders: `${NAME}`, `<your-...>`."""
    if isinstance(values, dict):
        return [found for name, value in values.items() for found in placeholders(value, f"{key}.{name}".strip("."))]
    if isinstance(values, list):
        return [found for index, value in enumerate(values) for found in placeholders(value, f"{key}.{index}")]
    is_one = isinstance(values, str) and re.search(r"\$\{\w+\}|^\$\w+$|(?i:<your[-_ ])|\{\{\s*env", values)
    return [key] if is_one else []


def model_name(source: Source, value: Yaml) -> Outcome:
    """Take over the base model; where it holds quantised weights, the one it was made of, if the name shows which."""
    name = as_text("the model", value)
    last = name.rsplit("/", 1)[-1]
    if not (match := _QUANTISED_NAME.search(last)):
        return Outcome("same", "", {"model.name": name})
    if not source.options.unquantised and _BITSANDBYTES_NAME.search(last):
        return Outcome("same", "its quantised weights are trained on as they are", {"model.name": name})
    made_of = _made_of(last[: match.start()].rstrip("-_."))
    if made_of is None or not source.options.unquantised:
        way = f"; import with --unquantised for {made_of}" if made_of else ""
        return Outcome("refused", f"{name} holds quantised weights; name the model that it was made of{way}")
    return Outcome("close", f"{name} holds quantised weights; is this what it was made of? {UNQUANTISED}",
                   {"model.name": made_of})  # fmt: skip


_MAKERS = (
    (r"(meta-)?llama-3", "meta-llama"), (r"qwen", "Qwen"), (r"(mistral|mixtral)-", "mistralai"),
    (r"gemma-", "google"), (r"phi-", "microsoft"), (r"deepseek-", "deepseek-ai"),
)  # fmt: skip
"""Who published the models of a family; the first pattern that fits the beginning of a name decides."""


def _made_of(name: str) -> str | None:
    """Return the hub id of a published model by the last part of its name; None if that does not show whose it is."""
    return next((f"{maker}/{name}" for pattern, maker in _MAKERS if re.match(pattern, name.lower())), None)


def trust_remote_code(source: Source, value: Yaml) -> Outcome:
    """Take over the permission to run a model's code, if the user gives it again."""
    if not as_flag("trust_remote_code", value):
        return Outcome("no effect", "off, as here")
    if source.options.trust_remote_code:
        return Outcome("same", "", {"model.trust_remote_code": True})
    return Outcome("refused", "runs somebody else's program; if you want that, say so again: --trust-remote-code")


def quantised_base(source: Source, kind: str, double_quant: bool = True, compute: Yaml = None) -> Outcome:
    """Take over a quantised base, or leave it as it is where the user says so.

    Args:
        source: The config.
        kind: `nf4`, `fp4` or `int8`.
        double_quant: Whether the scales of 4-bit blocks are quantised, too.
        compute: Dtype of the products; None is that of the model.
    """
    if source.options.unquantised:
        return Outcome("close", f"{kind} base there; {UNQUANTISED}")
    dtype = as_text("compute_dtype", compute or "bfloat16").removeprefix("torch.")
    for found, known in ((kind, ("nf4", "fp4", "int8")), (dtype, ("bfloat16", "float32"))):
        if found not in known:
            return Outcome("refused", f"{found} is no way to quantise here; there are {', '.join(known)}")
    asked: dict[str, Yaml] = {"kind": kind}
    if kind == "int8":
        why = "columns of outliers are computed in 16 bits there, and none here, since a micro batch decides on them"
        return Outcome("close", why, {"model.quantization": asked})
    asked |= {"double_quant": double_quant} | ({"compute_dtype": dtype} if compute else {})
    return Outcome("same", "the output layer stays as it is", {"model.quantization": asked})


def quantised(what: str) -> Rule:
    """Return a rule for a way of quantising the base that is not there."""

    def rule(source: Source, value: Yaml) -> Outcome:
        if is_off(value):
            return Outcome("no effect", "off")
        if source.options.unquantised:
            return Outcome("close", f"{what} there; {UNQUANTISED}")
        return Outcome("refused", f"{what} is not supported; import with --unquantised for {UNQUANTISED}")

    return rule


def zero_stage(source: Source, stage: int) -> int:
    """Return the ZeRO stage to run at: a quantised base is not cut, as stage 3 would."""
    bits = mentions(source, "load_in_4bit", "load_in_8bit", "quantization_bit")
    names = (str(source.values.get(key, "")) for key in ("base_model", "model_name_or_path"))
    is_stored = any(_BITSANDBYTES_NAME.search(name) for name in names)
    is_quantised = (bits or is_stored or source.values.get("adapter") == "qlora") and not source.options.unquantised
    return 2 if is_quantised and stage == 3 else stage


def optimizer(source: Source, value: Yaml) -> Outcome:
    """Take over AdamW in its many spellings."""
    name = as_text("the optimizer", value)
    if re.fullmatch(
        r"adamw_(torch|hf|torch_fused|torch_xla|torch_npu_fused|apex_fused|anyprecision)|paged_adamw(_32bit)?|adamw",
        name,
    ):
        return Outcome("same", "AdamW with float32 moments", {"optimizer.kind": "adamw"})
    if re.fullmatch(r"(paged_)?adamw_(bnb_)?8bit|adamw_torch_[48]bit", name):
        why = "AdamW; the moments are quantised there and float32 here (up to 6 bytes a trained parameter more)"
        return Outcome("close", why, {"optimizer.kind": "adamw"})
    return Outcome(
        "refused",
        f"{name} is another optimizer than AdamW; choose an optimizer.kind and its rate in the dist-ft config",
    )


def schedule(source: Source, value: Yaml) -> Outcome:
    """Take over the shape of the learning rate."""
    name = as_text("the schedule", value)
    kinds = {
        "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant_with_warmup",
    }  # fmt: skip
    if name in kinds:
        settings: dict[str, Yaml] = {"schedule.kind": kinds[name]}
        if name == "constant":  # it ignores every warm-up
            settings["schedule.warmup_ratio"] = 0.0
        return Outcome("same", "", settings)
    if name == "cosine_with_min_lr":
        kwargs = as_mapping("lr_scheduler_kwargs", source.values.get("lr_scheduler_kwargs", {}))
        if "min_lr_rate" in kwargs:
            rate = float(as_number("min_lr_rate", kwargs["min_lr_rate"]))
        elif "min_lr" in kwargs and source.number("learning_rate", 0) > 0:
            rate = float(as_number("min_lr", kwargs["min_lr"])) / source.number("learning_rate", 0)
        else:
            return Outcome("refused", "its lr_scheduler_kwargs name neither min_lr_rate nor min_lr; set one")
        return Outcome("same", "", {"schedule.kind": "cosine", "schedule.min_lr_ratio": rate})
    if name == "cosine_with_restarts":
        kwargs = as_mapping("lr_scheduler_kwargs", source.values.get("lr_scheduler_kwargs", {}))
        cycles = as_whole("num_cycles", kwargs.get("num_cycles", 1))
        return Outcome("same", "", {"schedule.kind": "cosine", "schedule.num_cycles": cycles})
    return Outcome("refused", f"{name} is a schedule that is not there; choose a schedule.kind in the dist-ft config")


def schedule_arguments(source: Source, value: Yaml) -> Outcome:
    """Judges the arguments of the schedule, which two kinds of cosine have here."""
    known = {"cosine_with_min_lr": {"min_lr", "min_lr_rate"}, "cosine_with_restarts": {"num_cycles"}}
    given = as_mapping("lr_scheduler_kwargs", value).keys()
    if any(name in _schedules(source) and given <= keys for name, keys in known.items()):
        return Outcome("same", "see the schedule")
    return Outcome("refused", "arguments of a schedule that is not there; leave them out, or choose a schedule.kind")


def _schedules(source: Source) -> tuple[Yaml, Yaml]:
    """Return the schedule by its two spellings, one of which is unset."""
    return source.values.get("lr_scheduler"), source.values.get("lr_scheduler_type")


_NO_WARMUP = "a constant rate has no warm-up there"
WARMUP = "the first step has rate 0 there, so the warm-up here is one step ahead"


def warmup_ratio(source: Source, value: Yaml) -> Outcome:
    """Take over a warm-up as a share of the steps."""
    if source.number("warmup_steps", 0) > 0:
        return Outcome("no effect", "warmup_steps wins")
    if "constant" in _schedules(source):
        return Outcome("no effect", _NO_WARMUP)
    ratio = float(as_number("warmup_ratio", value))
    if not 0 <= ratio < 1:
        return Outcome("refused", f"{ratio:g} is no share of the steps; write a number from 0 to 1")
    return Outcome("close" if ratio else "same", WARMUP if ratio else "", {"schedule.warmup_ratio": ratio})


def warmup_steps(source: Source, value: Yaml) -> Outcome:
    """Take over a warm-up in steps."""
    number = as_number("warmup_steps", value)
    if number != int(number) or number < 0:
        return Outcome("refused", f"{number:g} is no number of steps; a share is warmup_ratio")
    if number == 0:
        return Outcome("no effect", "off")
    if "constant" in _schedules(source):
        return Outcome("no effect", _NO_WARMUP)
    return Outcome("close", WARMUP, {"schedule.warmup_steps": int(number)})


def run_place(source: Source, value: Yaml) -> Outcome:
    """Take over the output directory: its last part names the run."""
    path = Path(as_text("output_dir", value))
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.name).lstrip("._-")[:100] or "imported"
    parent = str(path.parent) if path.parent != Path() else "runs"
    return Outcome("same", "", {"run.output_dir": parent, "run.name": name})


def deepspeed(source: Source, value: Yaml) -> Outcome:
    """Take over the ZeRO stage of a DeepSpeed config, a mapping or the path of a file."""
    content: Yaml = value
    if isinstance(value, str):
        file = find_beside(source, value)
        if file is None:
            stage = re.search(r"(?:zero|z)_?([0-3])", value.lower())
            settings: dict[str, Yaml] = {"zero.stage": zero_stage(source, int(stage[1]))} if stage else {}
            return Outcome("no effect", f"{value} is not there, so the stage follows from its name", settings)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return Outcome("refused", f"{value} cannot be read: {error}; correct it, or leave it out")
    ours = as_mapping("deepspeed", content)
    if as_mapping("deepspeed.fp16", ours.get("fp16", {})).get("enabled") is True:
        return Outcome("refused", FLOAT16)
    if named := [key for key in ("optimizer", "scheduler") if key in ours]:
        return Outcome("refused", f"its {' and '.join(named)} would win over the keys of the file; write them there")
    zero = as_mapping("deepspeed.zero_optimization", ours.get("zero_optimization", {}))
    stage_there = as_whole("deepspeed.zero_optimization.stage", zero.get("stage", 0))
    settings = {"zero.stage": zero_stage(source, stage_there)}
    if any(_offloads(zero.get(key)) for key in ("offload_optimizer", "offload_param")):
        settings["zero.offload"] = True
    clip = ours.get("gradient_clipping", "auto")
    if clip != "auto":
        settings["optimizer.max_grad_norm"] = float(as_number("deepspeed.gradient_clipping", clip))
    return Outcome("no effect", "every stage gives the same result", settings)


def _offloads(value: Yaml) -> bool:
    return isinstance(value, dict) and value.get("device", "cpu") != "none"


FLOAT16 = "float16 needs loss scaling, which skips steps when numbers overflow; write bf16: true"


def lora_only(rule: Rule, *kinds: Yaml, key: str) -> Rule:
    """Return a rule for a key that counts only where the method is one of these kinds."""

    def checked(source: Source, value: Yaml) -> Outcome:
        return rule(source, value) if source.values.get(key) in kinds else Outcome("no effect", "there is no adapter")

    return checked


def lora_plus(source: Source, value: Yaml) -> Outcome:
    """Take over LoRA+: a larger rate for the matrices B."""
    return Outcome("same", "", {"optimizer.lora_plus_ratio": float(as_number("the ratio", value))})


def neftune(source: Source, value: Yaml) -> Outcome:
    """Take over noise on the embeddings."""
    alpha = float(as_number("the noise", value))
    if alpha <= 0:
        return Outcome("no effect", "off")
    why = "its size follows from the padded length of a device batch there, and from each sequence's own here"
    return Outcome("close", why, {"method.neftune_alpha": alpha})


def count_of(our_key: str) -> Rule:
    """Return a rule for a number of steps or copies; less than one is none, or a share of all steps."""

    def rule(source: Source, value: Yaml) -> Outcome:
        if as_number("the number", value) < 1:
            return Outcome("no effect", f"none, or a share of all steps; see {our_key}")
        return Outcome("same", "", {our_key: as_whole("the number", value)})

    return rule


def unless(neutral: Yaml, rule: Rule) -> Rule:
    """Return a rule for a key whose default, written out, changes nothing."""
    return lambda source, value: Outcome("no effect", "the default") if value == neutral else rule(source, value)


def early_stopping(source: Source, value: Yaml) -> Outcome:
    """Take over after how many measurements without a gain a run stops."""
    if source.number("eval_steps", 0) < 1:
        return Outcome("refused", "needs eval_steps as a number of steps; write it")
    return Outcome("same", "", {"eval.early_stopping": {"patience": as_whole("the patience", value)}})


BEST = close_if_true("the best weights are exported there; here the last, and the best as well with eval.best_metric")


def find_beside(source: Source, name: str) -> Path | None:
    """Return a file that a config names: from here, from the config's folder, or from one above it."""
    for folder in (Path.cwd(), *source.path.absolute().parents):
        path = folder / name
        try:
            if path.is_file():
                return path
        except OSError:  # a name that the system refuses
            return None
    return None


def mentions(source: Source, *keys: str) -> list[str]:
    """Return those of the keys that are set and not off."""
    return [key for key in keys if is_set(source.values.get(key)) and not is_off(source.values[key])]


_FAMILY_TARGETS: tuple[tuple[str, list[Yaml]], ...] = (
    (r"phi-?[34]|phi3", ["qkv_proj"]),
    (r"pythia|neox|redpajama", ["query_key_value"]),
    (r"falcon-?(7b|40b)", ["query_key_value"]),
    (r"llama|mistral|mixtral|qwen-?[123]|gemma|smollm|vicuna|alpaca", ["q_proj", "v_proj"]),
)
"""PEFT's own target modules by the model's name; the first pattern that is found decides."""


def family_targets(name: str) -> list[Yaml] | None:
    """Return the modules that PEFT adapts in a family when none are named; None when the name does not show it."""
    return next((targets for pattern, targets in _FAMILY_TARGETS if re.search(pattern, name.lower())), None)
