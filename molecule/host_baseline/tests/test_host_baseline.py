"""What a host is like after the role host_baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from testinfra.host import Host

CERTIFICATE = Path(__file__).parents[1] / "files/site-authority.crt"


@pytest.mark.parametrize(
    ("path", "mode", "group"),
    [
        ("/etc/fleetfit", 0o755, "root"),
        ("/etc/fleetfit/credentials", 0o700, "root"),
        ("/opt/fleetfit", 0o755, "root"),
        ("/var/lib/fleetfit", 0o755, "root"),
        ("/var/lib/fleetfit/models", 0o750, "fleetfit-models"),
    ],
)
def test_directory_tree(machine: Host, path: str, mode: int, group: str) -> None:
    directory = machine.file(path)
    assert directory.is_directory
    assert (directory.mode, directory.user, directory.group) == (mode, "root", group)


def test_site_authority_is_trusted(machine: Host) -> None:
    verified = machine.run(
        "openssl verify %s", "/usr/local/share/ca-certificates/fleetfit-site-authority.crt"
    )
    bundle = machine.file("/etc/ssl/certs/ca-certificates.crt").content_string
    assert "".join(CERTIFICATE.read_text().split()[2:-2]) in "".join(bundle.split())
    assert verified.rc in (0, 127)  # 127: openssl is not on every host


def test_packages_come_through_the_proxy(machine: Host) -> None:
    config = machine.check_output("apt-config dump")
    assert 'Acquire::http::Proxy "http://proxy.example.com:3128";' in config
    assert 'Acquire::http::Proxy::mirror.example.com "DIRECT";' in config


def test_helper_runs(machine: Host) -> None:
    version = machine.check_output("python3 -I /opt/fleetfit/libexec/current/fleetfit-host.pyz --version")
    assert version.startswith("fleetfit-host ")


def test_recovery_unit_is_enabled_and_sound(machine: Host) -> None:
    assert machine.service("fleetfit-recover.service").is_enabled
    assert machine.check_output("systemd-analyze verify fleetfit-recover.service 2>&1") == ""


def test_manifest_is_root_only_and_names_the_role(machine: Host) -> None:
    manifest = machine.file("/etc/fleetfit/manifest.json")
    assert (manifest.mode, manifest.user) == (0o600, "root")
    section = json.loads(manifest.content_string)["sections"]["host_baseline"]
    assert section["units"] == ["fleetfit-recover.service"]


def test_nothing_world_writable(machine: Host) -> None:
    assert (
        machine.check_output("find /etc/fleetfit /opt/fleetfit /var/lib/fleetfit -perm -o+w ! -type l") == ""
    )
