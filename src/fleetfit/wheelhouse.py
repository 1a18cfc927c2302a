"""`fleetfit wheelhouse`: build the Python packages of a service once, for hosts that reach no index."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import click
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.wheelhouse import (
    DEFAULT_GLIBC,
    Wheelhouse,
    build_first,
)


def default_cache() -> Path:
    """Return the folder of wheelhouses in the user's cache (XDG_CACHE_HOME or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fleetfit" / "wheelhouse"


@click.group()
def wheelhouse() -> None:
    """Python packages of a service as one file, verified against a lock."""


@wheelhouse.command()
@click.option(
    "--lock",
    "locks",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="A hash-pinned lock. Given more than once: the first whose packages this machine's indexes offer.",
)
@click.option("--python", default="3.11", show_default=True, help="The hosts' Python, such as 3.11.")
@click.option(
    "--machine", default="x86_64", show_default=True, help="The hosts' architecture, as uname -m prints it."
)
@click.option(
    "--glibc", default=DEFAULT_GLIBC, show_default=True, help="The oldest C library among the hosts."
)
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Where wheelhouses are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(
    locks: tuple[Path, ...], python: str, machine: str, glibc: str, cache: Path | None, as_json: bool
) -> None:
    """Build the wheelhouse of a lock, or find the one built before.

    Uses this machine's own pip settings (index, proxy, CA). Can be interrupted and run again.
    """
    started = time.monotonic()

    def report(line: str) -> None:
        click.echo(f"{time.monotonic() - started:5.0f} s  {line}", err=True)

    try:
        built = build_first(
            locks, python, cache or default_cache(), machine=machine, glibc=glibc, report=report
        )
    except FleetfitError as error:
        click.echo(f"fleetfit: {error}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(_as_dict(built), indent=1))
        return
    click.echo(f"{'found' if built.reused else 'built'}: {built.tar}")
    click.echo(f"sha256: {built.sha256}")
    click.echo(
        f"size: {built.size} bytes, {len(built.requirements)} packages,"
        f" {built.platform}, CPython {built.python}"
    )


def _as_dict(built: Wheelhouse) -> dict[str, object]:
    return {
        "file": str(built.tar),
        "sha256": built.sha256,
        "size": built.size,
        "python": built.python,
        "platform": built.platform,
        "requirements": list(built.requirements),
        "reused": built.reused,
    }
