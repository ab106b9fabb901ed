"""Gates: what the result of a phase must show on scenes it has never seen before the next builds on it."""

from training.tiny.gates.command import GATES, GateMissedError, format_findings, measure, require
from training.tiny.gates.findings import Bar, Findings, read_findings, write_findings
from training.tiny.gates.plan import NUM_PROBE_SCENES, NUM_SCENES, VALIDATION_SEED, Plan

__all__ = [
    "GATES",
    "NUM_PROBE_SCENES",
    "NUM_SCENES",
    "VALIDATION_SEED",
    "Bar",
    "Findings",
    "GateMissedError",
    "Plan",
    "format_findings",
    "measure",
    "read_findings",
    "require",
    "write_findings",
]
