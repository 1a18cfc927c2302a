"""`fleetfit wheelhouse`: build the Python packages of a service once, for hosts that reach no index."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import click
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.vllm_wheels import (
    wheel_of_requirements,
    wheels_of,
)
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog
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
    click.echo(f"# {'found' if built.reused else 'built'}: {len(built.requirements)} packages.")
    click.echo("# For the inventory, with url in place of path where hosts download it:")
    click.echo(yaml.safe_dump([wheelhouse_entry(built)], sort_keys=False), nl=False)


def wheelhouse_entry(built: Wheelhouse) -> dict[str, object]:
    """Return a wheelhouse as roles take it: an entry of open_webui_wheelhouses, or of vllm_wheelhouses with its
    build's variant and release."""
    arch, _, glibc = built.platform.partition("-glibc")
    wheel = wheel_of_requirements(wheels_of(load_catalog().engines), built.requirements)
    return {
        **({} if wheel is None else {"variant": wheel.variant, "release": wheel.release}),
        "python": built.python,
        "arch": arch,
        "glibc": glibc,
        "path": str(built.tar),
        "size": built.size,
        "sha256": built.sha256,
    }


def _as_dict(built: Wheelhouse) -> dict[str, object]:
    return {
        **wheelhouse_entry(built),
        "requirements": list(built.requirements),
        "reused": built.reused,
    }
