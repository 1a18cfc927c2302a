"""Write a wheelhouse of one small package, laid out as `fleetfit wheelhouse build` does."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

NAME, VERSION = "fleetfit_probe", "1.0"
WHEEL = f"{NAME}-{VERSION}-py3-none-any.whl"
DIST_INFO = f"{NAME}-{VERSION}.dist-info"


def wheel() -> bytes:
    """Return the wheel: a module, and a command that says which Python runs it."""
    files = {
        f"{NAME}.py": "import sys\n\n\ndef main():\n    print(sys.version_info.minor)\n",
        f"{DIST_INFO}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        f"{DIST_INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{DIST_INFO}/entry_points.txt": f"[console_scripts]\nfleetfit-probe = {NAME}:main\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')},"
        f"{len(text)}\n"
        for name, text in files.items()
    )
    files[f"{DIST_INFO}/RECORD"] = f"{record}{DIST_INFO}/RECORD,,\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return buffer.getvalue()


def main(folder: Path) -> None:
    """Write wheelhouse.tar and wheelhouse.json into ``folder``."""
    content = wheel()
    digest = hashlib.sha256(content).hexdigest()
    members = {
        "requirements.txt": f"{NAME}=={VERSION} --hash=sha256:{digest}\n".encode(),
        f"wheels/{WHEEL}": content,
    }
    target = folder / "wheelhouse.tar"
    with tarfile.open(target, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    description = {
        "python": "3.11",
        "arch": "x86_64",
        "glibc": "2.34",
        "path": str(target),
        "size": target.stat().st_size,
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
    }
    (folder / "wheelhouse.json").write_text(json.dumps(description))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
