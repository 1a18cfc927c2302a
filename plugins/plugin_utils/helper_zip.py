"""Building the host helper: one zip application of this collection's module_utils and nvidia-ml-py."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from functools import cache
from pathlib import Path

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

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


@cache
def build_helper_zip() -> bytes:
    """Return the host helper's bytes: the same sources give the same bytes on every controller.

    Nothing is compressed: zlib's output differs between its versions, and with it the digest would, so
    that each controller would send every host the same helper again.
    """
    files = {f"{PACKAGE}/{path.name}": path.read_bytes() for path in MODULE_UTILS.glob("*.py")}
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
