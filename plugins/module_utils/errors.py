"""The one base class for errors that a user can act on."""

from __future__ import annotations

from typing import Optional


class FleetfitError(Exception):
    """A mistake or a state that a user can act on: shown as a sentence, never as a traceback.

    ``code`` is a stable snake_case word for programs, ``remedy`` says what to do.
    """

    def __init__(self, message: str, *, code: str, remedy: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.remedy = remedy

    def __str__(self) -> str:
        """Return the message followed by the remedy."""
        return f"{self.message} {self.remedy}" if self.remedy else self.message
