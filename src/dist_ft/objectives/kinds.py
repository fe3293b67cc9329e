"""The table of objectives: which one a config names."""

from __future__ import annotations

from dist_ft.config.training_sections import (
    CpoConfig,
    DistillConfig,
    DpoConfig,
    KtoConfig,
    ObjectiveConfig,
    OrpoConfig,
    SftConfig,
)
from dist_ft.objectives.distill import distill
from dist_ft.objectives.kto import kto
from dist_ft.objectives.objective import Objective
from dist_ft.objectives.preference import cpo, dpo, orpo
from dist_ft.objectives.sft import SFT


def build_objective(config: ObjectiveConfig) -> Objective:
    """Return the objective of a run, with the settings of its section."""
    match config:
        case SftConfig():
            return SFT
        case DpoConfig():
            return dpo(config)
        case CpoConfig():
            return cpo(config)
        case OrpoConfig():
            return orpo(config)
        case KtoConfig():
            return kto(config)
        case DistillConfig():
            return distill(config)
