"""`fleetfit calibrate`: turn measurements of hosts into a data file that planning prefers over constants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.calibration import (
    SCHEMA_VERSION,
    measurement,
    measurements_of_host,
    records_of,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.units import format_size
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import check_schema
from rich.console import Console
from rich.table import Table


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True))
@click.option(
    "--output",
    default="calibration.yml",
    show_default=True,
    type=click.Path(dir_okay=False),
    help="The data file; put it into a directory of fleetfit_catalog_dirs.",
)
def calibrate(sources: tuple[str, ...], output: str) -> None:
    """Make a calibration file from measurements.

    SOURCES are JSON files, or directories of them: what playbooks/record_memory.yml writes of each host, or
    documents with a list of `measurements`. Hosts with simulated GPUs are left out.
    """
    files = [path for source in sources for path in _json_files(Path(source))]
    measurements = [item for path in files for item in measurements_in(path)]
    if not measurements:
        raise FleetfitError(
            f"No measurement of a real GPU is in {', '.join(sources)} ({len(files)} JSON "
            f"{'file' if len(files) == 1 else 'files'}).",
            code="nothing_measured",
            remedy="Run playbooks/record_memory.yml while the engines serve, on hosts with real GPUs.",
        )
    records = records_of(measurements)
    document = {"schema_version": SCHEMA_VERSION, "records": records}
    check_schema(document, "calibration", output)
    text = yaml.safe_dump(document, sort_keys=False, width=120)
    Path(output).write_text(f"# Written by fleetfit calibrate.\n---\n{text}", encoding="utf-8")
    _print(records)
    click.echo(f"written to {output}")


def measurements_in(path: Path) -> Sequence[Mapping[str, Any]]:
    """Return the measurements in one JSON file; raises ``bad_measurements`` with the file's name."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if "measurements" in document:
            return [measurement(**item) for item in document["measurements"]]
        return measurements_of_host(document["facts"], document["plan"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FleetfitError(
            f"{path} holds no measurements: {type(error).__name__} {error}.",
            code="bad_measurements",
            remedy="Name files that playbooks/record_memory.yml wrote.",
        ) from None


def _json_files(source: Path) -> list[Path]:
    return sorted(source.glob("*.json")) if source.is_dir() else [source]


def _print(records: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("engine", "GPU", "model", "variant", "measured", "overhead", "residual"):
        table.add_column(title)
    for item in records:
        table.add_row(
            f"{item['engine']} {item['engine_version']}",
            item["gpu"],
            item["model"],
            item["variant"],
            f"{item['count']}x",
            format_size(item["overhead_bytes"]),
            format_size(item["residual_bytes"]),
        )
    Console(highlight=False).print(table)
