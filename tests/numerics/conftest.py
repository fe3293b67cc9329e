"""The rank server of the session."""

from tests.helpers.ranks import ranks

__all__ = ["ranks"]
