"""Images of lab hosts with a service's Python environment in them, so that no test installs gigabytes again.

The environment is the one that the role python_runtime would make, made by the same code at the same path:
a host started from such an image has it already, and the role finds it.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.python_runtime import choose_environment
from ansible_collections.fleetfit.llm.plugins.plugin_utils.wheelhouse import Wheelhouse, build_first
from uv import find_uv_bin

from fleetfit.wheelhouse import wheelhouse_entry

from .console import step
from .images import REPOSITORY, ensure_image, image_exists
from .machine import Machine, podman, ready_machine, ulimit_options
from .paths import cache_root, checkout_root, locked
from .process import output, run

# Service -> its locks in the order in which they are tried.
LAYERS = {
    "open-webui": ("locks/open-webui/cpu-py311.txt", "locks/open-webui/default-py311.txt"),
    "vllm": ("locks/vllm/cpu-py311.txt",),
}
PYTHON = "3.11"

# Prints what choose_environment asks about a host.
ASK = (
    "import json, platform; print(json.dumps({'system_python': platform.python_version(),"
    " 'arch': platform.machine(), 'glibc': platform.libc_ver()[1]}))"
)
# The collection's own builder, as the module runs it on a host.
BUILD = """
import subprocess, sys
sys.path.insert(0, "/collections")
from ansible_collections.fleetfit.llm.plugins.module_utils.python_environment import EnvironmentSpec, build
def call(argv, env):
    done = subprocess.run(argv, env=env, capture_output=True, text=True, cwd="/")
    return done.returncode, done.stdout, done.stderr
path, python = sys.argv[1:]
build(EnvironmentSpec(path, "/uv", python, "/wheelhouse/requirements.txt", "/wheelhouse/wheels"), call)
"""


def ensure_layer(service: str, suite: str, machine: Machine | None = None) -> str:
    """Return the image of ``suite`` with the environment of ``service``, making it where it is missing.

    Needs a suite whose own Python fits (Debian 12). Raises FleetfitError, ``unknown_layer`` for a service
    that has none.
    """
    if service not in LAYERS:
        raise FleetfitError(
            f"There is no layer of '{service}'.", code="unknown_layer", remedy=f"Use {', '.join(LAYERS)}."
        )
    machine = machine or ready_machine()
    base = ensure_image(suite)
    cache = cache_root()
    locks = [checkout_root() / name for name in LAYERS[service]]
    built = build_first(locks, PYTHON, cache / "wheelhouse", machine=machine.arch, report=step)
    asked = ["run", "--rm", "--network=none", *ulimit_options(machine), base, "python3", "-c", ASK]
    host = json.loads(output(podman(machine, *asked), what=f"ask {suite} for its Python"))
    choice = choose_environment(service, [wheelhouse_entry(built)], [], **host)
    environment: str = choice["environment"]
    tag = f"{base.rpartition(':')[2]}-{Path(environment).name}"
    reference = f"{REPOSITORY}/{suite}-{service}:{tag}"
    if image_exists(reference):
        return reference
    with locked(cache / "images" / f"{suite}-{service}.lock"):
        if not image_exists(reference):
            _make(machine, base, reference, built, environment, choice["path"])
    return reference


def _make(
    machine: Machine, base: str, reference: str, built: Wheelhouse, environment: str, python: str
) -> None:
    step(f"Making {reference.rpartition('/')[2]}: {len(built.requirements)} packages, about two minutes")
    name = f"fleetfit-layer-{Path(environment).name}"
    with tempfile.TemporaryDirectory(prefix="fleetfit-layer-", dir=built.tar.parent) as scratch:
        with tarfile.open(built.tar) as archive:
            archive.extractall(scratch, filter="data")
        Path(scratch).chmod(0o755)
        mounts = {
            scratch: "/wheelhouse",
            find_uv_bin(): "/uv",
            str(checkout_root() / "plugins"): "/collections/ansible_collections/fleetfit/llm/plugins",
        }
        argv = ["run", f"--name={name}", "--network=none", *ulimit_options(machine)]
        argv += [f"--volume={source}:{target}:ro" for source, target in mounts.items()]
        argv += [base, "python3", "-B", "-c", BUILD, environment, python]
        remove = ["podman", "rm", "--force", "--ignore", "--volumes", name]
        run(remove, what=f"remove what is left of {name}")
        try:
            run(podman(machine, *argv), what=f"build {environment} in a container")
            commit = ["commit", "--quiet", "--change=CMD=/sbin/init", name, reference]
            run(podman(machine, *commit), what=f"keep {reference}")
        finally:
            run(remove, what=f"remove {name}", check=False)
