"""The lab's mirror: nginx in a container on the lab's network, serving .lab/mirror read-only to the hosts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from .containers import (
    LABEL,
    MIRROR_NAME,
    MIRROR_PORT,
    ensure_network,
    find_container,
    mirror_address,
    remove_container,
)
from .images import ensure_image
from .machine import Machine, podman, ulimit_options
from .model import HubFile
from .paths import LabPaths, checkout_root, locked, write_atomically
from .process import run
from .state import HostRecord, host_action

URL = f"http://{MIRROR_NAME}:{MIRROR_PORT}"
CONFIG = "lab/mirror/nginx.conf"


def mirror_folder(paths: LabPaths) -> Path:
    """Return the folder whose content the mirror serves."""
    return paths.folder / "mirror"


def place(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: a hard link, or a copy from another file system."""
    if target.exists() and (target.samefile(source) or same_stat(source, target)):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copy2(source, partial)
    partial.chmod(0o644)
    os.replace(partial, target)


def same_stat(source: Path, target: Path) -> bool:
    """Return whether ``target`` is a copy that ``place`` made of ``source``."""
    one, other = source.stat(), target.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def publish_file(paths: LabPaths, source: Path, sha256: str, **more: Any) -> dict[str, Any]:
    """Serve a file under its content's hash and return its entry for artifacts.yml."""
    where = f"artifacts/{sha256[:16]}/{source.name}"
    place(source, mirror_folder(paths) / where)
    size = source.stat().st_size
    return {"size": size, "sha256": sha256, "url": f"{URL}/{where}", **more}


def publish_hub(paths: LabPaths, files: Iterable[HubFile]) -> None:
    """Serve files in a model hub's layout: the API's answers as static JSON, files under resolve/."""
    folder = mirror_folder(paths)
    repositories: dict[tuple[str, str], list[HubFile]] = {}
    for file in files:
        repositories.setdefault((file.repository, file.revision), []).append(file)
    for (repository, revision), members in repositories.items():
        siblings = []
        tree = []
        for file in sorted(members, key=lambda item: item.name):
            place(file.path, folder / repository / "resolve" / revision / file.name)
            lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": 135}
            siblings.append({"rfilename": file.name, "size": file.size, "lfs": lfs})
            tree.append({"type": "file", "path": file.name, "size": file.size, "lfs": {"oid": file.sha256}})
        about = {"id": repository, "modelId": repository, "sha": revision, "siblings": siblings}
        api = folder / "api/models" / repository
        for name in (revision, "main"):
            write_atomically(api / "revision" / name, json.dumps(about), 0o644)
            write_atomically(api / "tree" / name, json.dumps(tree), 0o644)


def write_artifacts(paths: LabPaths, artifacts: dict[str, dict[str, Any]]) -> None:
    """Write .lab/artifacts.yml, from which inventory/lab takes sizes, hashes and addresses."""
    text = "# Written by fleetfit lab up: what the lab's mirror serves.\n---\n"
    write_atomically(paths.folder / "artifacts.yml", text + yaml.safe_dump(artifacts), 0o644)


def read_artifacts(paths: LabPaths) -> dict[str, dict[str, Any]]:
    """Return what .lab/artifacts.yml holds; empty where the lab has not made any."""
    path = paths.folder / "artifacts.yml"
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def start_mirror(paths: LabPaths, machine: Machine, timeout_s: float = 20) -> None:
    """Make the mirror be there and answer; raises FleetfitError ``lab_mirror_silent``."""
    image = ensure_image("mirror")
    name = paths.container("mirror")
    record_path = paths.folder / "mirror.json"
    config = checkout_root() / CONFIG
    mirror_folder(paths).mkdir(parents=True, exist_ok=True)
    with locked(paths.folder / "lock"):
        address = mirror_address(ensure_network(paths))
        options = [
            f"--network={paths.network}",
            f"--ip={address}",
            f"--hostname={MIRROR_NAME}",
            f"--label={LABEL}={paths.lab_id}",
            "--label=fleetfit.kind=mirror",
            "--read-only",
            "--tmpfs=/run",
            "--tmpfs=/var/lib/nginx",
            "--tmpfs=/var/log/nginx",
            "--log-opt=max-size=1mb",
            f"--volume={mirror_folder(paths)}:/srv/mirror:ro",
            f"--volume={config}:/etc/nginx/nginx.conf:ro",
            *ulimit_options(machine),
        ]
        inode = mirror_folder(paths).stat().st_ino  # a folder made anew is not the one that is mounted
        content = json.dumps([image, options, config.read_text(), inode])
        spec = hashlib.sha256(content.encode()).hexdigest()
        record = None
        if record_path.exists():
            record = HostRecord(json.loads(record_path.read_text())["container_id"], 0, "", "mirror", spec)
        action = host_action(spec, find_container(name), record)
        if action == "start":
            done = run(podman(machine, "start", name), what="start the mirror", check=False)
            if done.returncode != 0:
                action = "recreate"
        if action in ("create", "recreate"):
            remove_container(name)
            argv = ["run", "--detach", f"--name={name}", f"--label=fleetfit.spec={spec}", *options, image]
            done = run(podman(machine, *argv, "nginx", "-g", "daemon off;"), what="start the mirror")
            container_id = done.stdout.decode().split()[-1]
            write_atomically(record_path, json.dumps({"container_id": container_id}))
    deadline = time.monotonic() + timeout_s
    # bash can open a connection by itself; the image needs no other client.
    probe = ["exec", name, "bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{MIRROR_PORT}"]
    while run(podman(machine, *probe), what="ask the mirror", check=False).returncode != 0:
        if time.monotonic() > deadline:
            logs = run(["podman", "logs", "--tail", "3", name], what="read the mirror's log", check=False)
            said = (logs.stderr or logs.stdout).decode().strip()
            raise FleetfitError(
                f"The lab's mirror did not answer within {timeout_s:.0f} s: {said}",
                code="lab_mirror_silent",
                remedy=f"Look with `podman logs {name}`.",
            )
        time.sleep(0.3)
