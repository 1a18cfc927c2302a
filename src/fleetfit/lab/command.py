"""``fleetfit lab``: the embedded lab."""

from __future__ import annotations

from typing import Any

import click
import yaml

from . import containers
from .console import console, step
from .machine import ready_machine
from .paths import checkout_root, lab_paths


def lab_definition() -> dict[str, Any]:
    """Return the content of lab/lab.yml."""
    definition: dict[str, Any] = yaml.safe_load((checkout_root() / "lab/lab.yml").read_text())
    return definition


@click.group()
def lab() -> None:
    """Run the embedded lab: hosts with systemd and sshd in containers on this machine."""


@lab.command()
def up() -> None:
    """Bring the lab up, or repair what a killed run or a reboot left."""
    machine = ready_machine()
    for name, entry in lab_definition()["hosts"].items():
        step(f"Host {name}")
        containers.start_host(
            name,
            entry["suite"],
            user=entry["user"],
            profile=entry["profile"],
            kind="lab",
            machine=machine,
        )
    console.print("The lab is up: ssh -F .lab/ssh_config HOST")


@lab.command()
def down() -> None:
    """Remove this checkout's lab and free its disk."""
    containers.remove_everything(lab_paths())


@lab.group("host")
def host_group() -> None:
    """Start and remove single hosts, for Molecule and for experiments."""


@host_group.command("up")
@click.argument("name")
@click.option("--suite", default="bookworm", show_default=True, help="A recipe of lab/images.yml.")
@click.option("--profile", help="A GPU profile of the simulated NVML library; none: a host without a GPU.")
@click.option("--user", default="root", show_default=True, help="Who signs in: root, or ops (sudo).")
@click.option("--image", help="A podman image to start from instead of the suite's own.")
@click.option("--layer", help="A service whose Python environment the host has already: open-webui.")
def host_up(
    name: str, suite: str, profile: str | None, user: str, image: str | None, layer: str | None
) -> None:
    """Start the host NAME and print how to reach it."""
    if layer is not None:
        from .layers import ensure_layer

        image = ensure_layer(layer, suite)
    host = containers.start_host(name, suite, user=user, profile=profile, image=image)
    console.print(f"ssh -F {host.ssh_config} {host.name}")


@host_group.command("down")
@click.argument("name")
def host_down(name: str) -> None:
    """Remove the host NAME."""
    containers.stop_host(name)
