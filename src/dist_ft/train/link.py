"""Defines what training needs from a rank's connection to the coordinator."""

from __future__ import annotations

from typing import Protocol

from dist_ft.messages import Message


class Link(Protocol):
    """A rank's connection to the coordinator. `send` never blocks a step."""

    def send(self, message: Message) -> None:
        """Queues a message; any thread may call this."""
        ...

    def should_stop(self) -> bool:
        """Whether a stop was requested, as far as this rank knows."""
        ...

    def wait_committed(self, step: int) -> None:
        """Blocks until the checkpoint of `step` exists. Raises CheckpointError after its limit."""
        ...
