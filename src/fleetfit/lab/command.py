"""``fleetfit lab``: the embedded lab."""

from __future__ import annotations

import json

import click

from . import containers
from .console import console
from .down import take_down
from .paths import LabPaths, lab_paths
from .status import as_document, look, print_status
from .up import bring_up, lab_definition


@click.group()
def lab() -> None:
    """Run the embedded lab: hosts with systemd and sshd in containers on this machine."""


@lab.command()
@click.option("--hosts-only", is_flag=True, help="Start hosts and mirror, but build and serve nothing.")
@click.option("--deploy", is_flag=True, help="Then run the main job (site.yml) on them.")
def up(hosts_only: bool, deploy: bool) -> None:
    """Bring the lab up, or repair what a killed run or a reboot left."""
    forwards = bring_up(lab_paths(), hosts_only=hosts_only)
    console.print("The lab is up: ssh -F .lab/ssh_config HOST")
    if not deploy:
        return
    # Imported here: ansible-runner takes a second to load.
    from .deploy import deploy as run_main_job

    run_main_job(lab_paths(), forwards)


@lab.command()
@click.option("--keep-images", is_flag=True, help="Keep the images, so that the next up takes seconds.")
@click.option("--cache", is_flag=True, help="Also empty the cache: engine, wheelhouse, models, images.")
def down(keep_images: bool, cache: bool) -> None:
    """Remove this checkout's lab and free its disk; the cache stays unless --cache is given."""
    take_down(lab_paths(), images=not keep_images, cache=cache)
    console.print("The lab is down.")


@lab.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(as_json: bool) -> None:
    """Show what of the lab is there; exit code 0 if all of it is up, else 1."""
    parts = look(lab_paths(), lab_definition())
    if as_json:
        click.echo(json.dumps(as_document(parts), indent=1))
    else:
        print_status(parts, console)
    raise click.exceptions.Exit(0 if all(part.ok for part in parts) else 1)


@lab.group("host")
def host_group() -> None:
    """Start and remove single hosts, for Molecule and for experiments."""


@host_group.command("up")
@click.argument("name")
@click.option("--suite", default="bookworm", show_default=True, help="A recipe of lab/images.yml.")
@click.option("--profile", help="A GPU profile of the simulated NVML library; none: a host without a GPU.")
@click.option("--user", default="root", show_default=True, help="Who signs in: root, or ops (sudo).")
@click.option("--image", help="A podman image to start from instead of the suite's own.")
@click.option("--layer", help="A service whose Python environment the host has already: open-webui or vllm.")
def host_up(
    name: str, suite: str, profile: str | None, user: str, image: str | None, layer: str | None
) -> None:
    """Start the host NAME and print how to reach it."""
    if layer is not None:
        from .layers import ensure_layer

        image = ensure_layer(layer, suite)
    host = containers.start_host(name, suite, user=user, profile=profile, image=image)
    console.print(f"ssh -F {host.ssh_config} {host.name}")


@host_group.command("profile")
@click.argument("name")
@click.argument("profile")
def host_profile(name: str, profile: str) -> None:
    """Give the running host NAME the simulated GPU PROFILE ("none": no GPU), as if cards were swapped."""
    containers.set_profile(name, None if profile == "none" else profile)


@host_group.command("down")
@click.argument("name")
def host_down(name: str) -> None:
    """Remove the host NAME."""
    containers.stop_host(name)


@lab.command("vm")
@click.argument("name", default="vm")
@click.option("--recipe", default="bookworm", show_default=True, help="A recipe of lab/vm_images.yml.")
@click.option("--memory-mib", default=1536, show_default=True, type=click.IntRange(min=512))
def vm(name: str, recipe: str, memory_mib: int) -> None:
    """Run a fresh virtual machine until Ctrl-C: real kernel, boot loader and initramfs, emulated processor."""
    from .ssh import config_path
    from .vm import VirtualMachine

    # A folder of its own: the ssh configuration of the lab's hosts stays as it is.
    paths = LabPaths(lab_paths().folder / "vms" / name)
    with VirtualMachine(name, paths, recipe=recipe, memory_mib=memory_mib) as machine:
        console.print(f"It is up after {machine.boots_s[0]:.0f} s: ssh -F {config_path(paths)} {name}")
        console.print(f"Console: {machine.console}; it ends with Ctrl-C.")
        try:
            machine.wait_off()
        except KeyboardInterrupt:
            console.print("Switched off; its disk is gone.")
