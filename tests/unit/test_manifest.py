"""The manifest: sections replaced whole, and what may be deleted."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import (
    read_manifest,
    safe_to_delete,
    write_section,
)

SCHEMA = json.loads((Path(__file__).parents[2] / "catalog/schemas/manifest.json").read_text())


def test_sections_are_replaced_whole_and_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "fleetfit" / "manifest.json")
    assert read_manifest(path) is None
    assert write_section(path, "llama_cpp", {"paths": ["/opt/fleetfit/x"], "units": ["x.service"]})
    assert write_section(path, "verify", {"port": 1})
    assert not write_section(path, "llama_cpp", {"units": ["x.service"], "paths": ["/opt/fleetfit/x"]})
    assert write_section(path, "llama_cpp", {"units": []})
    document = read_manifest(path)
    assert document == {"schema_version": 1, "sections": {"llama_cpp": {"units": []}, "verify": {"port": 1}}}
    jsonschema.validate(document, SCHEMA)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert write_section(path, "llama_cpp", None)
    assert not write_section(path, "llama_cpp", None)
    assert os.listdir(tmp_path / "fleetfit") == ["manifest.json"]


def test_check_mode_and_rights(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    assert write_section(str(path), "verify", {}, check_mode=True)
    assert not path.exists()
    assert not write_section(str(path), "verify", None)
    write_section(str(path), "verify", {})
    path.chmod(0o644)
    assert write_section(str(path), "verify", {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "manifest_unreadable"),
        ('{"schema_version": 1}', "manifest_unreadable"),
        ('{"schema_version": 2, "sections": {}}', "manifest_version"),
        ("[]", "manifest_version"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_not_overwritten(
    tmp_path: Path, text: str, code: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(FleetfitError) as caught:
        write_section(str(path), "verify", {})
    assert caught.value.code == code
    assert path.read_text() == text


BAD: list[tuple[str, dict[str, Any]]] = [
    ("Bad-Name", {}),
    ("x", {"paths": ["relative"]}),
    ("x", {"paths": ["/opt/fleetfit/../../etc"]}),
    ("x", {"paths": ["/opt/fleetfit/"]}),
    ("x", {"units": "x.service"}),
    ("x", {"users": [1]}),
]


@pytest.mark.parametrize(("name", "content"), BAD)
def test_a_section_that_could_mislead_is_refused(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    with pytest.raises(FleetfitError) as caught:
        write_section(str(tmp_path / "manifest.json"), name, content)
    assert caught.value.code == "bad_section"


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("/opt/fleetfit/x", True),
        ("/opt/fleetfit/x/", True),
        ("/var/lib/fleetfit/models/m", True),
        ("/etc/fleetfit/credentials/k", True),
        ("/opt/fleetfit/link-out", True),  # the link itself
        ("/opt/fleetfit/link-out/file", False),
        ("/opt/fleetfit", False),
        ("/opt/fleetfit/", False),
        ("/opt/fleetfit/.", False),
        ("/opt/fleetfit-other/x", False),
        ("/opt/fleetfit/../etc", False),
        ("/opt/fleetfit/x/../../../etc/passwd", False),
        ("/", False),
        ("/etc/passwd", False),
        ("opt/fleetfit/x", False),
        ("", False),
    ],
)
def test_only_what_lies_below_our_own_directories_is_deleted(tmp_path: Path, path: str, safe: bool) -> None:
    for folder in ("opt/fleetfit/x", "var/lib/fleetfit", "etc/fleetfit", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "opt/fleetfit/link-out").symlink_to(tmp_path / "outside")
    rooted = str(tmp_path) + path if path.startswith("/") else path
    assert safe_to_delete(rooted, root=str(tmp_path)) is safe
