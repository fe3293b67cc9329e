"""What the routes need: models by name, and somebody who answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from dist_ft.engine.protocol import Ask, EngineSpec, Event
from dist_ft.service.api_keys import Caller
from dist_ft.service.wire import ApiError, Object


@dataclass(frozen=True)
class ServedName:
    """A model that answers under a name.

    Attributes:
        name: What clients ask for.
        created: Unix time.
        owned_by: Whose it is.
        spec: The engine that answers.
        adapter: Directory of its adapter; None for the engine's own model.
    """

    name: str
    created: int
    owned_by: str
    spec: EngineSpec
    adapter: str | None = None

    def to_wire(self) -> Object:
        """Return the API's object."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": self.owned_by}


class Names(Protocol):
    """Models by name."""

    def listed(self, caller: Caller) -> list[Object]:
        """Return the API's objects of the models that a caller sees."""
        ...

    def find(self, name: str, caller: Caller) -> ServedName:
        """Return a model.

        Raises:
            ApiError: There is none of this name.
        """
        ...


class Backend(Protocol):
    """Answers requests."""

    def answer(self, model: ServedName, ask: Ask) -> AsyncIterator[Event]:
        """Yield `Accepted` and the pieces of an answer, or `Refused`; closing the iterator cancels the request."""
        ...


def no_model(name: str) -> ApiError:
    """Return the error for a name that no model has."""
    return ApiError(404, f"The model '{name[:200]}' does not exist", "model", "model_not_found")
