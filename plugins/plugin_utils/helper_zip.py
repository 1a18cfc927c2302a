"""Building the host helper: one zip application of the module_utils that it runs, and nvidia-ml-py."""

from __future__ import annotations

import ast
import importlib.util
import io
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.host_helper import SUBCOMMANDS

PACKAGE = "fleetfit_host"
MODULE_UTILS = Path(__file__).resolve().parent.parent / "module_utils"
# -I: neither the caller's environment nor a working directory can put other code in front of ours.
SHEBANG = b"#!/usr/bin/python3 -I\n"
MAIN = f"import sys\n\nfrom {PACKAGE}.host_helper import main\n\nsys.exit(main(sys.argv[1:]))\n"


def find_pynvml() -> Path:
    """Return the path of the controller's ``pynvml.py``; raises FleetfitError (``pynvml_missing``)."""
    spec = importlib.util.find_spec("pynvml")
    if spec is None or spec.origin is None:
        raise FleetfitError(
            "The Python package nvidia-ml-py is not installed beside Ansible on the controller.",
            code="pynvml_missing",
            remedy="Install requirements/controller.txt into the environment that runs ansible-playbook.",
        )
    return Path(spec.origin)


def relative_imports(source: str) -> set[str]:
    """Return the names after the dot in every relative import of ``source``, those inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    return names


def helper_modules() -> set[str]:
    """Return the module_utils that the helper's subcommands import, directly or through each other.

    Only these, so that an edit of what hosts never run, such as the planner, does not change the helper's
    digest and with it every host.
    """
    wanted = {"__init__", "host_helper"} | {entry[0] for entry in SUBCOMMANDS.values()}
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        found.add(name)
        wanted |= relative_imports((MODULE_UTILS / f"{name}.py").read_text()) - found
    return found


def pack_modules(names: Iterable[str]) -> bytes:
    """Return the zip application with these module_utils: the same sources give the same bytes everywhere.

    Nothing is compressed: zlib's output differs between its versions, and with it the digest would, so
    that each controller would send every host the same helper again.
    """
    files = {f"{PACKAGE}/{name}.py": (MODULE_UTILS / f"{name}.py").read_bytes() for name in names}
    files["pynvml.py"] = find_pynvml().read_bytes()
    files["__main__.py"] = MAIN.encode()
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(
                name, date_time=(1980, 1, 1, 0, 0, 0)
            )  # the earliest time that zip can hold
            entry.create_system = 3  # Unix
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


@cache
def build_helper_zip() -> bytes:
    """Return the host helper's bytes."""
    return pack_modules(helper_modules())
