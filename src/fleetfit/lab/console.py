"""What the lab says while it works: one line per step."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False, soft_wrap=True)


def step(text: str) -> None:
    """Print the beginning of a step that may take a while."""
    console.print(f"[bold]==>[/bold] {text}")


def note(text: str) -> None:
    """Print a detail under the current step."""
    console.print(f"    {text}")
