"""The table of objectives: which one a config names."""

from __future__ import annotations

from dist_ft.config.training_sections import ObjectiveConfig, SftConfig
from dist_ft.objectives.objective import Objective
from dist_ft.objectives.sft import SFT


def build_objective(config: ObjectiveConfig) -> Objective:
    """Returns the objective of a run, with the settings of its section."""
    match config:
        case SftConfig():
            return SFT
