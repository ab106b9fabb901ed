"""What the engine tells of its work."""

from typing import Protocol


class Meter(Protocol):
    """Called from the engine's thread. stage: "vision", "qformer", "decode" or "match"."""

    def saw_rows(self, stage: str, num_rows: int) -> None:
        """Is told of every batch."""

    def saw_padding(self, ratio: float) -> None:
        """Is told of prompts that are read together: which part of their positions is padding."""

    def spent(self, stage: str, seconds: float) -> None:
        """Is told of every piece of work; the Q-Former's time is the vision tower's here."""

    def ran_out_of_memory(self, stage: str) -> None:
        """Is told when a batch did not fit into the device's memory."""
