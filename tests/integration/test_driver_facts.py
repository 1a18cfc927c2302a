"""Driver facts and the fleet's report through Ansible, and on real Debian hosts with a local repository.

The packages are empty and have the driver's names; the cards are simulated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleetfit.lab.machine import podman

from .conftest import SystemdHost, start_host
from .test_gpu_facts import old_python

CHECKOUT = Path(__file__).resolve().parents[2]
LAB = CHECKOUT / "lab/nvml"
SCRIPT = """
import subprocess
from fleetfit_host.driver_facts import driver_state

def run(arguments):
    try:
        environ = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin"}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environ)
    except FileNotFoundError:
        return 127, ""
    return done.returncode, done.stdout

print(json.dumps(driver_state("/opt/fleetfit-lab/root", run=run, driver_kernels=sys.argv[1:])))
"""
# Makes an empty package with the driver's name and version, and the index of the folder.
PACKAGE = r"""
set -eu
mkdir -p "/tmp/p/DEBIAN" /srv/repository
printf 'Package: %s\nVersion: %s\nArchitecture: amd64\n' "$1" "$2" > /tmp/p/DEBIAN/control
printf 'Maintainer: Tests <tests@fleetfit.invalid>\nDescription: empty\n' >> /tmp/p/DEBIAN/control
dpkg-deb --root-owner-group --build /tmp/p "/srv/repository/$1_$2_amd64.deb" > /dev/null
cd /srv/repository
: > Packages
for file in *.deb; do
    dpkg-deb --field "$file" >> Packages
    printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "$file" "$(stat -c %s "$file")" \
        "$(sha256sum "$file" | cut -d' ' -f1)" >> Packages
done
printf 'Origin: NVIDIA\nLabel: NVIDIA CUDA\nSuite: local\nSHA256:\n %s %s Packages\n' \
    "$(sha256sum Packages | cut -d' ' -f1)" "$(stat -c %s Packages)" > Release
rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/srv/repository ./' > /etc/apt/sources.list.d/local.list
apt-get -qq update
"""
RELEASE = "6.1.0-42-amd64"


class DriverHost:
    """A Debian host with a simulated RTX 4090 whose driver 580.95.05 is loaded."""

    def __init__(self, host: SystemdHost) -> None:
        self.host = host
        host.put("/opt/fleetfit-lab/profile.ini", (LAB / "profiles/rtx-4090.ini").read_bytes())
        host.put("/opt/fleetfit-lab/make_probe_root", (LAB / "make_probe_root").read_bytes(), "0755")
        lab = "/opt/fleetfit-lab"
        host.run("python3", f"{lab}/make_probe_root", f"{lab}/profile.ini", f"{lab}/root")

    def offer(self, name: str, version: str) -> None:
        """Put a version of a package into the local repository."""
        self.host.run("sh", "-c", PACKAGE, "sh", name, version)

    def install(self, name: str) -> None:
        """Install or upgrade a package."""
        self.host.run("apt-get", "-qq", "install", "--yes", "--allow-change-held-packages", name)

    def state(self) -> dict[str, Any]:
        """Return the driver facts, of one kernel."""
        found: dict[str, Any] = self.host.python(SCRIPT, RELEASE)
        return found


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def debian(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DriverHost]:
    host = start_host(tmp_path_factory.mktemp("host"), request.param)
    try:
        yield DriverHost(host)
    finally:
        subprocess.run(
            podman(host.machine, "rm", "--force", "--time=0", host.name), check=False, capture_output=True
        )


def test_a_driver_from_bare_to_mismatch_on_a_real_debian(debian: DriverHost) -> None:
    """Offered, installed, held, offered anew, upgraded behind our back: each is told, and the engine runs on."""
    bare = debian.state()
    assert (bare["installed"]["version"], bare["candidate"]["version"]) == (None, None)
    assert (bare["loaded"]["version"], bare["gpus"][0]["generation"]) == ("580.95.05", "ada")

    debian.offer("libnvidia-ml1", "580.95.05-1")
    assert debian.state()["candidate"] == {
        "version": "580.95.05",
        "source": "nvidia",
        "offered": [{"version": "580.95.05", "source": "nvidia"}],
    }

    debian.install("libnvidia-ml1")
    installed = debian.state()
    assert installed["installed"]["packages"] == {"libnvidia-ml1": "580.95.05-1"}
    assert (installed["installed"]["source"], installed["installed"]["held"]) == ("nvidia", [])
    assert (installed["problems"], installed["reboot_reasons"]) == ([], [])

    debian.host.run("apt-mark", "hold", "libnvidia-ml1")
    assert debian.state()["installed"]["held"] == ["libnvidia-ml1"]

    # A newer driver appears in the repository: reported as a candidate, and nothing is installed by looking.
    debian.offer("libnvidia-ml1", "580.105.08-1")
    debian.offer("libnvidia-ml1", "595.71.05-1")
    seen = debian.state()
    assert (seen["installed"]["version"], seen["candidate"]["version"]) == ("580.95.05", "580.105.08")
    assert [offer["version"] for offer in seen["candidate"]["offered"]] == ["595.71.05", "580.105.08"]
    assert (seen["problems"], seen["reboot_reasons"]) == ([], [])

    # Somebody upgrades the user space while an engine runs.
    debian.host.put("/etc/systemd/system/llama-server.service", "[Service]\nExecStart=/bin/sleep 600\n")
    debian.host.run("systemctl", "daemon-reload")
    debian.host.run("systemctl", "start", "llama-server")
    pid = debian.host.show("llama-server", "MainPID")
    debian.install("libnvidia-ml1=580.105.08-1")
    after = debian.state()
    assert [reason["code"] for reason in after["reboot_reasons"]] == ["driver_mismatch"]
    (problem,) = after["problems"]
    assert problem["code"] == "driver_library_mismatch"
    assert "580.95.05" in problem["message"]
    assert "580.105.08" in problem["message"]
    assert "Reboot" in problem["remedy"]
    assert (debian.host.show("llama-server", "MainPID"), pid != "0") == (pid, True)
    debian.host.run("systemctl", "stop", "llama-server")


def test_dpkgs_own_complaint_is_passed_on(debian: DriverHost) -> None:
    debian.offer("libnvidia-compute-broken", "580.95.05-1")
    assert debian.state()["dpkg_audit"] == []
    debian.host.run("dpkg", "--unpack", "/srv/repository/libnvidia-compute-broken_580.95.05-1_amd64.deb")
    assert any("libnvidia-compute-broken" in line for line in debian.state()["dpkg_audit"])
    debian.host.run("dpkg", "--purge", "libnvidia-compute-broken")


# ---- the report ----


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """Return an inventory of two made hosts: one with a mismatch, one without a driver."""
    roots = {}
    for name, options in (("gpu-1", []), ("bare-1", ["--without-driver"])):
        root = tmp_path / name
        subprocess.run(
            [str(LAB / "make_probe_root"), str(LAB / "profiles/rtx-4090.ini"), str(root), *options],
            check=True,
        )
        for folder in ("proc", "etc", "var", "usr", "boot", "lib"):
            (root / folder).unlink()
            (root / folder).mkdir()
        (root / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\n')
        (root / "var/lib/dpkg").mkdir(parents=True)
        (root / "var/lib/dpkg/status").write_text(
            "Package: libnvidia-ml1\nStatus: install ok installed\nMaintainer: NVIDIA <cudatools@nvidia.com>\n"
            "Architecture: amd64\nVersion: 535.261.03-1\n"
            if name == "gpu-1"
            else "Package: bash\nStatus: install ok installed\nVersion: 5\n"
        )
        (root / f"boot/vmlinuz-{RELEASE}").write_text("")
        roots[name] = root
    inventory = tmp_path / "hosts.yml"
    hosts = {
        name: {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "fleetfit_probe_root": str(root),
        }
        for name, root in roots.items()
    }
    hosts["gone-1"] = {"ansible_host": "192.0.2.1", "ansible_connection": "ssh", "ansible_ssh_timeout": 1}
    inventory.write_text(json.dumps({"llm_hosts": {"hosts": hosts}}))
    return inventory


def report(inventory: Path, path: Path, *options: str) -> str:
    """Run the playbook and return what it printed."""
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *("playbooks/report_drivers.yml", "-i", str(inventory), "-e", f"fleetfit_report_path={path}"),
            *("-e", "ansible_become=false", *options),
        ],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={
            **os.environ,
            "ANSIBLE_SSH_ARGS": "-o ConnectTimeout=1",
            "FLEETFIT_LAB_NVML_PROFILE": "/nonexistent",
        },
    )
    assert "changed=0" in done.stdout, done.stdout + done.stderr
    assert "failed=1" not in done.stdout, done.stdout
    return done.stdout


def test_the_report_of_a_fleet_is_the_same_under_check(fleet: Path, tmp_path: Path) -> None:
    printed = report(fleet, tmp_path / "run.json")
    checked = report(fleet, tmp_path / "check.json", "--check")
    run, check = (json.loads((tmp_path / name).read_text()) for name in ("run.json", "check.json"))
    assert run["hosts"].keys() == {"gpu-1", "bare-1", "gone-1"}
    for document in (run, check):
        for state in filter(None, document["hosts"].values()):
            state["boot_free_bytes"] = 0  # others write to this disk too
    assert run == check
    assert run["hosts"]["gone-1"] is None
    gpu, bare = run["hosts"]["gpu-1"], run["hosts"]["bare-1"]
    assert gpu["is_controller"], "it is connected to locally"
    assert "driver_mismatch" in {reason["code"] for reason in gpu["reboot_reasons"]}
    assert (gpu["installed"]["version"], bare["installed"]["version"]) == ("535.261.03", None)
    # The branch's end is from catalog/drivers.yml, which the controller hands over.
    found = {problem["code"] for problem in gpu["problems"]}
    assert found >= {"driver_library_mismatch", "driver_branch_end_of_life"}
    for text in (printed, checked):
        assert "580.95.05" in text
        assert "no answer: see the failure above" in text
        assert "2026-06-30 (over)" in text
        assert "gpu-1: problem driver_library_mismatch" in text


def test_a_report_that_cannot_be_written_says_so(fleet: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *(
                "playbooks/report_drivers.yml",
                "-i",
                str(fleet),
                "--limit",
                "bare-1",
                "-e",
                "ansible_become=false",
            ),
            *("-e", f"fleetfit_report_path={tmp_path}/no/such/report.json"),
        ],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "cannot be written to" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_driver_facts_on_the_oldest_python_under_check(fleet: Path) -> None:
    variables = json.loads(fleet.read_text())["llm_hosts"]["hosts"]["gpu-1"]
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible")),
            *("-i", "localhost,", "-c", "local", "localhost", "--check"),
            *("-e", json.dumps({**variables, "ansible_python_interpreter": old_python()})),
            *(
                "-m",
                "fleetfit.llm.host_state",
                "-a",
                json.dumps({"drivers": True, "driver_kernels": [RELEASE]}),
            ),
        ],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "FLEETFIT_LAB_NVML_PROFILE": "/nonexistent"},
    )
    result = json.loads(done.stdout[done.stdout.find("{") :])
    state = result["ansible_facts"]["fleetfit_drivers"]
    assert state["schema_version"] == 1
    assert state["kernels"][0]["release"] == RELEASE
    assert (state["loaded"]["version"], state["installed"]["version"]) == ("580.95.05", "535.261.03")
    # What planning reads is as without the option.
    assert set(result["ansible_facts"]["fleetfit"]) == {
        "schema_version",
        "stable",
        "foreign_bytes",
        "live",
        "problems",
    }
    assert "driver_context" not in json.dumps(result.get("invocation", {}))
