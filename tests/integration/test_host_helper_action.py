"""fleetfit.llm.host_helper through ansible-playbook: nothing in check mode, then once, then nothing more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST_PYTHON = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable


def play(tmp_path: Path, *extra: str) -> str:
    task = {
        "name": "The helper is current",
        "fleetfit.llm.host_helper": {"libexec_dir": f"{tmp_path}/libexec"},
    }
    (tmp_path / "play.json").write_text(
        json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": [task]}])
    )
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-c", "local"]
    command += ["-e", f"ansible_python_interpreter={HOST_PYTHON}", f"{tmp_path}/play.json", *extra]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_check_run_and_second_run(tmp_path: Path) -> None:
    libexec = tmp_path / "libexec"
    assert "changed=1" in play(tmp_path, "--check")
    assert not libexec.exists()

    shown = play(tmp_path, "-vvv")
    assert "changed=1" in shown
    assert len(shown) < 20_000  # the archive's bytes are not in it
    helper = libexec / "current" / "fleetfit-host.pyz"
    assert helper.stat().st_mode & 0o777 == 0o755
    said = subprocess.run(
        [HOST_PYTHON, "-I", helper, "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout == f"fleetfit-host {(libexec / 'current').readlink()}\n"

    assert "changed=0" in play(tmp_path)
