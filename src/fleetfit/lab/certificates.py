"""The extra certificate authorities that this machine trusts, for the hosts to trust too."""

from __future__ import annotations

from pathlib import Path

from .paths import LabPaths, write_atomically

# Where Debian's update-ca-certificates(8) takes local authorities from.
LOCAL_AUTHORITIES = Path("/usr/local/share/ca-certificates")


def copy_authorities(paths: LabPaths, source: Path = LOCAL_AUTHORITIES) -> list[Path]:
    """Copy the machine's extra authorities to .lab/ca, where inventory/lab takes them; return the copies.

    Files of the same name in different folders keep apart; an authority that is gone here goes there too.
    """
    folder = paths.folder / "ca"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for path in sorted(source.rglob("*.crt")) if source.is_dir() else []:
        wanted["-".join(path.relative_to(source).parts)] = path.read_bytes()
    for name, content in wanted.items():
        write_atomically(folder / name, content, 0o644)
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    return [folder / name for name in wanted]
