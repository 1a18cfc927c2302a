"""Lab hosts as containers with systemd and sshd: created, found again, repaired and removed."""

from __future__ import annotations

import hashlib
import io
import ipaddress
import json
import socket
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from .console import note, step
from .gpu import apply_gpu, gpu_files
from .images import ensure_image
from .machine import Machine, container_options, init_command, podman, ready_machine
from .paths import LabPaths, lab_paths, locked
from .process import output, run
from .ssh import config_path, host_key, user_key, wait_for_host, write_config
from .state import ContainerInfo, HostRecord, LabState, host_action, read_state, write_state

LABEL = "fleetfit.lab"
MIRROR_NAME = "mirror.fleetfit-lab"
MIRROR_PORT = 8080
PORT_ATTEMPTS = 5


@dataclass(frozen=True)
class Host:
    """A lab host that answers over SSH: ``ssh -F <ssh_config> <name>``."""

    name: str
    container: str
    ssh_port: int
    user: str
    ssh_config: str


def ensure_network(paths: LabPaths) -> ipaddress.IPv4Network:
    """Make the lab's bridge network where it is missing and return its subnet."""
    inspect = ["podman", "network", "inspect", paths.network]
    done = run(inspect, what="look at the lab's network", check=False)
    if done.returncode != 0:
        run(
            ["podman", "network", "create", "--label", f"{LABEL}={paths.lab_id}", paths.network],
            what="make the lab's network",
        )
        done = run(inspect, what="look at the lab's network")
    for subnet in json.loads(done.stdout)[0]["subnets"]:
        network = ipaddress.ip_network(subnet["subnet"])
        if isinstance(network, ipaddress.IPv4Network):
            return network
    raise FleetfitError(
        f"The network {paths.network} has no IPv4 subnet.",
        code="lab_network",
        remedy="Run `fleetfit lab down` and `fleetfit lab up`.",
    )


def mirror_address(network: ipaddress.IPv4Network) -> str:
    """Return the mirror's fixed address: high in the subnet, since podman gives out low ones."""
    return str(network[-6])


def find_container(name: str) -> ContainerInfo | None:
    """Return what podman knows of the container, or None where there is none."""
    done = run(["podman", "container", "inspect", name], what="look at a container", check=False)
    if done.returncode != 0:
        return None
    data = json.loads(done.stdout)[0]
    labels = data["Config"].get("Labels") or {}
    return ContainerInfo(data["Id"], bool(data["State"]["Running"]), labels.get("fleetfit.spec", ""))


def remove_container(name: str) -> None:
    """Remove a container with its storage, running or not; nothing happens where there is none."""
    run(["podman", "rm", "--force", "--ignore", "--time", "5", "--volumes", name], what=f"remove {name}")


def port_is_free(port: int) -> bool:
    """Return whether nothing is bound to the loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def choose_port(paths: LabPaths, purpose: str, taken: Iterable[int]) -> int:
    """Return the first free loopback port of the ones that the checkout and the purpose give."""
    used = set(taken)
    for port in paths.port_candidates(purpose):
        if port not in used and port_is_free(port):
            return port
    raise FleetfitError(
        "There is no free port on 127.0.0.1 between 20000 and 32000.",
        code="no_free_port",
        remedy="Close a listener and run this again.",
    )


def seed_files(paths: LabPaths, host: str) -> bytes:
    """Return a tar with what a host needs before it boots: its host key and whom it lets in."""
    private = host_key(paths, host)
    public = private.with_name(private.name + ".pub")
    allowed = user_key(paths).with_name("id_ed25519.pub").read_bytes()
    files = [
        ("etc/ssh/ssh_host_ed25519_key", private.read_bytes(), 0o600),
        ("etc/ssh/ssh_host_ed25519_key.pub", public.read_bytes(), 0o644),
        # Outside the home folders, so that it does not depend on their owners.
        ("etc/ssh/lab_authorized_keys", allowed, 0o644),
        (
            "etc/ssh/sshd_config.d/10-lab.conf",
            b"HostKey /etc/ssh/ssh_host_ed25519_key\n"
            b"AuthorizedKeysFile /etc/ssh/lab_authorized_keys\n"
            b"PasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\n",
            0o644,
        ),
    ]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content, mode in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def record_host(paths: LabPaths, state: LabState, name: str, record: HostRecord | None) -> None:
    """Record a host as whole (or forget it) and rewrite the ssh configuration."""
    if record is None:
        state.hosts.pop(name, None)
    else:
        state.hosts[name] = record
    write_state(paths, state)
    write_config(paths, state)


def start_host(
    name: str,
    suite: str,
    *,
    user: str = "root",
    profile: str | None = None,
    kind: str = "test",
    image: str | None = None,
    paths: LabPaths | None = None,
    machine: Machine | None = None,
) -> Host:
    """Make the host be there and answer over SSH, whatever state it is in now.

    ``suite`` is a recipe of lab/images.yml; ``image`` names a prepared podman image to start from
    instead. ``profile`` is a GPU profile of the simulated NVML library, None for a host without a GPU.
    ``kind`` "test" hosts are not part of ``fleetfit lab up``. Raises FleetfitError.
    """
    paths = paths or lab_paths()
    machine = machine or ready_machine()
    reference = image or ensure_image(suite)
    container = paths.container(name)
    with locked(paths.folder / "lock"):
        state = read_state(paths)
        record = state.hosts.get(name)
        mirror = mirror_address(ensure_network(paths))
        options = [
            f"--hostname={name}",
            f"--network={paths.network}",
            f"--add-host={MIRROR_NAME}:{mirror}",
            "--pids-limit=-1",
            f"--label={LABEL}={paths.lab_id}",
            f"--label=fleetfit.kind={kind}",
            *container_options(machine),
        ]
        seed = seed_files(paths, name)
        digest = hashlib.sha256(json.dumps([reference, options, init_command(), user]).encode() + seed)
        spec = digest.hexdigest()
        gpu, gpu_digest = gpu_files(machine, profile)
        action = host_action(spec, find_container(container), record)
        if action == "start":
            done = run(podman(machine, "start", container), what=f"start {name}", check=False)
            if done.returncode != 0:  # its port was taken meanwhile, or its storage is broken
                action = "recreate"
        if action in ("create", "recreate"):
            if action == "recreate":
                note(f"{name}: left half-made or made from something else; making it again")
            record_host(paths, state, name, None)
            remove_container(container)
            record = create_host(paths, machine, state, name, container, reference, options, seed, spec)
            record = HostRecord(record.container_id, record.ssh_port, user, kind, spec)
        if record is None:
            raise RuntimeError("a kept host has a record")
        if record.gpu != gpu_digest:
            apply_gpu(machine, container, gpu, profile)
            record = replace(record, profile=profile, gpu=gpu_digest)
        record_host(paths, state, name, record)
    health = wait_for_host(paths, name)
    if health != "running":
        note(f"{name}: systemd says {health}")
    return Host(name, container, record.ssh_port, user, str(config_path(paths)))


def set_profile(name: str, profile: str | None, *, paths: LabPaths | None = None) -> None:
    """Give a recorded host another simulated GPU; raises FleetfitError ``unknown_host``."""
    paths = paths or lab_paths()
    machine = ready_machine()
    gpu, digest = gpu_files(machine, profile)
    with locked(paths.folder / "lock"):
        state = read_state(paths)
        if name not in state.hosts:
            raise FleetfitError(
                f"The lab has no host {name!r}.",
                code="unknown_host",
                remedy=f"It has {', '.join(sorted(state.hosts)) or 'none: run fleetfit lab up'}.",
            )
        apply_gpu(machine, paths.container(name), gpu, profile)
        record_host(paths, state, name, replace(state.hosts[name], profile=profile, gpu=digest))


def create_host(
    paths: LabPaths,
    machine: Machine,
    state: LabState,
    name: str,
    container: str,
    reference: str,
    options: list[str],
    seed: bytes,
    spec: str,
) -> HostRecord:
    """Create a container with the host's files in it and start it; tries other ports where one is taken."""
    taken = {record.ssh_port for record in state.hosts.values()} | set(state.forwards.values())
    for attempt in range(PORT_ATTEMPTS):
        port = choose_port(paths, f"ssh {name}", taken)
        create = ["create", f"--name={container}", f"--label=fleetfit.spec={spec}"]
        create += [f"--publish=127.0.0.1:{port}:22", *options, reference, *init_command()]
        container_id = output(podman(machine, *create), what=f"create the container of {name}")
        run(podman(machine, "cp", "-", f"{container}:/"), what=f"put the host's keys into {name}", stdin=seed)
        last = attempt == PORT_ATTEMPTS - 1
        done = run(podman(machine, "start", container), what=f"start {name}", check=last)
        if done.returncode == 0:
            return HostRecord(container_id.splitlines()[-1], port, "root", "test", spec)
        remove_container(container)
        taken.add(port)
    raise RuntimeError("not reached: the last attempt raises")


def stop_host(name: str, *, paths: LabPaths | None = None) -> None:
    """Remove a host with its storage, keys and ssh entry; nothing happens where there is none."""
    paths = paths or lab_paths()
    with locked(paths.folder / "lock"):
        state = read_state(paths)
        remove_container(paths.container(name))
        record_host(paths, state, name, None)


def lab_containers(paths: LabPaths) -> list[str]:
    """Return the names of all containers of this checkout's lab, test hosts included."""
    argv = ["podman", "ps", "--all", "--filter", f"label={LABEL}={paths.lab_id}", "--format", "{{.Names}}"]
    return sorted(output(argv, what="list the lab's containers").split())


def remove_everything(paths: LabPaths) -> int:
    """Remove all containers and the network of this checkout's lab; return how many containers there were."""
    names = lab_containers(paths)
    for name in names:
        step(f"Removing {name}")
        remove_container(name)
    run(["podman", "network", "rm", "--force", paths.network], what="remove the lab's network", check=False)
    return len(names)
