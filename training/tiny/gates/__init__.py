"""Gates: minimum figures that a phase must reach on unseen scenes before later phases build on it."""

from training.tiny.gates.command import GATES, GateMissedError, format_result, measure, require
from training.tiny.gates.plan import NUM_PROBE_SCENES, NUM_SCENES, VALIDATION_SEED, GatePlan
from training.tiny.gates.results import Bar, GateResult, load_result, save_result

__all__ = [
    "GATES",
    "NUM_PROBE_SCENES",
    "NUM_SCENES",
    "VALIDATION_SEED",
    "Bar",
    "GateMissedError",
    "GatePlan",
    "GateResult",
    "format_result",
    "load_result",
    "measure",
    "require",
    "save_result",
]
