"""What the lab says while it works: one line per step."""

from __future__ import annotations

import sys

from rich.console import Console

# Into a file or a pipe, wide enough for whole lines.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def step(text: str) -> None:
    """Print the beginning of a step that may take a while."""
    console.print(f"==> {text}", markup=False)


def note(text: str) -> None:
    """Print a detail under the current step."""
    console.print(f"    {text}", markup=False)
