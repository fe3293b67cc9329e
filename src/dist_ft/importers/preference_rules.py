"""What becomes of the keys of preference tuning, which all three tools hand on to TRL or do in its way."""

from __future__ import annotations

from dist_ft.config.yaml_file import Yaml
from dist_ft.importers.verdicts import Outcome, Rule, Source, as_number, as_text

DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero", "apo_down")
"""Losses of pairs that have the same name and formula here."""
TOKEN_MEAN = "its cross entropy is a mean over the tokens of a device batch there, and a mean per answer here"
STEP_MEAN = "what a good answer is compared with comes from a device batch there, and from the whole step here"


def loss_of(name: str) -> Outcome | None:
    """Return what a loss of preferences becomes, without its numbers; None for one that is not there.

    Args:
        name: Name of the loss, as TRL, LLaMA-Factory or Axolotl (`rl`) have it.
    """
    if name in ("dpo", *DPO_LOSSES):
        settings: dict[str, Yaml] = {"objective.kind": "dpo", "objective.loss": "sigmoid" if name == "dpo" else name}
        return Outcome("same", "", settings)
    if name == "kto":
        return Outcome("close", STEP_MEAN, {"objective.kind": "kto"})
    if name == "orpo":
        return Outcome("close", TOKEN_MEAN, {"objective.kind": "orpo"})
    if name in ("simpo", "cpo"):
        loss = "simpo" if name == "simpo" else "sigmoid"
        return Outcome("close", TOKEN_MEAN, {"objective.kind": "cpo", "objective.loss": loss})
    return None


def unknown_loss(name: str) -> Outcome:
    """Refuse a loss that is not there."""
    losses = ", ".join([*DPO_LOSSES, "kto", "orpo", "simpo", "cpo"])
    return Outcome("refused", f"{name} is a method or loss that is not there; there are {losses}")


def number(our_key: str, needed: tuple[str, ...], kind_of: Rule, neutral: float | None = None) -> Rule:
    """Return a rule for a number of an objective, which means nothing beside another one.

    Args:
        our_key: Our key, without `objective.`.
        needed: Objectives that have it.
        kind_of: The rule that says which objective the file asks for.
        neutral: Value that changes nothing.
    """

    def rule(source: Source, value: Yaml) -> Outcome:
        found = float(as_number(our_key, value))
        kind = kind_of(source, None).settings.get("objective.kind", "sft")
        if found == neutral:
            return Outcome("no effect", "off")
        if kind not in needed:
            return Outcome("no effect", f"belongs to {' and '.join(needed)}, and the file asks for {kind}")
        return Outcome("same", "", {f"objective.{our_key}": found})

    return rule


def smoothing(kind_of: Rule) -> Rule:
    """Return a rule for label smoothing, which TRL honours for one loss only."""

    def rule(source: Source, value: Yaml) -> Outcome:
        found = float(as_number("label_smoothing", value))
        if found == 0:
            return Outcome("no effect", "off")
        if kind_of(source, None).settings.get("objective.loss") == "robust":
            return Outcome("same", "", {"objective.label_smoothing": found})
        return Outcome("refused", "smooths labels of a loss that is not `robust`, which is not supported; leave it out")

    return rule


def dropout(kind_of: Rule) -> Rule:
    """Return a rule for the dropout of an adapter, which preference tuning turns off in all three tools."""

    def rule(source: Source, value: Yaml) -> Outcome:
        share = float(as_number("lora_dropout", value))
        is_sft = kind_of(source, None).settings.get("objective.kind", "sft") == "sft"
        if is_sft or not source.flag("disable_dropout", True):
            return Outcome("same", "", {"method.lora_dropout": share})
        return Outcome("same", "preference tuning turns dropout off there", {"method.lora_dropout": 0.0})

    return rule


def has_reference(source: Source, value: Yaml) -> Outcome:
    """Take over another reference, by the name of its folder."""
    return Outcome("same", "", {"objective.reference": as_text("the reference", value)})
