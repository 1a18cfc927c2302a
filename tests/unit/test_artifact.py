"""Artifacts: what is refused, what counts as present, and what the disk must hold."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import artifact as subject
from ansible_collections.fleetfit.llm.plugins.module_utils.artifact import (
    Artifact,
    Source,
    Unpack,
    check_disk,
    inspect_artifact,
    parse_artifacts,
    partial_bytes,
    place_file,
    redact_url,
    set_attributes,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "name": "model.gguf",
        "size": len(CONTENT),
        "sha256": SHA256,
        "dest": "/var/lib/fleetfit/models/m/model.gguf",
        "sources": [{"type": "http", "url": "http://mirror.example/model.gguf"}],
        **changes,
    }


def make(tmp_path: Path, **changes: Any) -> Artifact:
    return parse_artifacts([entry(dest=str(tmp_path / "store" / "model.gguf"), **changes)])[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sha256": None}, "sha256"),  # without a checksum nothing is deployed
        ({"sha256": "abc"}, "abc"),
        ({"size": 0}, "size"),
        ({"size": None}, "None"),
        ({"dest": "models/x"}, "models/x"),
        ({"dest": "/"}, "dest"),
        ({"mode": 640}, None),
        ({"mode": "rw-r-----"}, "rw-r-----"),
        ({"sources": []}, "no sources"),
        ({"sources": [{"type": "ftp", "url": "ftp://x/y"}]}, "ftp"),
        ({"sources": [{"type": "http"}]}, "url"),
        ({"sources": [{"type": "http", "url": "file:///etc/shadow"}]}, "neither http nor https"),
        ({"sources": [{"type": "file", "path": "/x"}]}, "location"),
        ({"sources": [{"type": "file", "path": "/x", "location": "elsewhere"}]}, "elsewhere"),
        ({"sources": [{"type": "hub", "repository": "a/b", "filename": "x"}]}, "revision"),
        ({"sources": "http://x"}, "http://x"),
        ({"sources": ["http://x"]}, "http://x"),
        ({"unpack": "/opt/x"}, "/opt/x"),
        ({"unpack": {"dest": "/opt/x", "strip": "one"}}, "one"),
        ({"unpack": {"dest": "relative"}}, "unpack.dest"),
        ({"unpack": {"dest": "/opt/x", "creates": "../etc/passwd"}}, "creates"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(changes: dict[str, Any], named: str | None) -> None:
    if named is None:
        assert parse_artifacts([entry(**changes)])[0].mode == "640"
        return
    with pytest.raises(FleetfitError) as caught:
        parse_artifacts([entry(**changes)])
    assert caught.value.code == "artifact_invalid"
    assert "model.gguf" in str(caught.value)
    assert named in str(caught.value)


def test_two_artifacts_cannot_share_a_place() -> None:
    with pytest.raises(FleetfitError, match="same dest"):
        parse_artifacts([entry(), entry(name="other")])


def test_an_artifact_survives_its_job_file() -> None:
    original = parse_artifacts(
        [entry(unpack={"dest": "/opt/x", "strip": 1, "creates": "bin/x"}, owner="root", mode="0640")]
    )[0]
    copied = json.loads(json.dumps(subject.artifact_to_dict(original)))
    assert parse_artifacts([copied])[0] == original


def test_hub_addresses_follow_the_hub_and_its_mirrors() -> None:
    source = Source("hub", repository="org/name", revision="abc", filename="sub dir/x.gguf")
    assert source.address() == "https://huggingface.co/org/name/resolve/abc/sub%20dir/x.gguf"
    mirrored = Source("hub", repository="o/n", revision="r", filename="f", endpoint="http://mirror:8080/")
    assert mirrored.address() == "http://mirror:8080/o/n/resolve/r/f"


@pytest.mark.parametrize(
    "url",
    ["https://user:secret@host/x", "https://host/x?X-Amz-Signature=secret", "https://host/x#secret"],
)
def test_no_address_shows_a_secret(url: str) -> None:
    assert "secret" not in redact_url(url)
    assert redact_url(url).startswith("https://host/x")


# --- presence


def test_a_present_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, state = make(tmp_path), str(tmp_path / "state")
    Path(artifact.dest).parent.mkdir()
    Path(artifact.dest).write_bytes(CONTENT)
    hashed: list[str] = []
    real = subject.sha256_of_file
    monkeypatch.setattr(subject, "sha256_of_file", lambda path: hashed.append(path) or real(path))

    assert inspect_artifact(artifact, state).present
    assert inspect_artifact(artifact, state).present
    assert hashed == [artifact.dest]
    assert inspect_artifact(artifact, state, verify=True).present
    assert hashed == [artifact.dest] * 2


def test_a_changed_file_is_noticed_even_with_its_old_times(tmp_path: Path) -> None:
    artifact, state = make(tmp_path), str(tmp_path / "state")
    path = Path(artifact.dest)
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert inspect_artifact(artifact, state).present
    before = path.stat()
    path.write_bytes(bytes(reversed(CONTENT)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not inspect_artifact(artifact, state).present


def test_the_record_of_hashes_is_for_root_only(tmp_path: Path) -> None:
    artifact, state = make(tmp_path), tmp_path / "state"
    Path(artifact.dest).parent.mkdir()
    Path(artifact.dest).write_bytes(CONTENT)
    inspect_artifact(artifact, str(state), write_stamp=False)
    assert not state.exists()  # check mode leaves nothing
    inspect_artifact(artifact, str(state))
    assert state.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in state.iterdir())


def test_a_directory_in_the_way_is_an_error(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    Path(artifact.dest).mkdir(parents=True)
    with pytest.raises(FleetfitError, match="not a regular file"):
        inspect_artifact(artifact, str(tmp_path / "state"))


def write_partial(artifact: Artifact, count: int, **notes: Any) -> None:
    Path(artifact.dest).parent.mkdir(exist_ok=True)
    Path(artifact.partial).write_bytes(CONTENT[:count])
    notes = {"sha256": artifact.sha256, "boot_id": subject.boot_id(), "synced_bytes": 0, **notes}
    Path(artifact.sidecar).write_text(json.dumps({"size": artifact.size, **notes}))


def test_partial_bytes_count_only_for_the_same_content(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    assert partial_bytes(artifact) == 0
    write_partial(artifact, 500)
    assert partial_bytes(artifact) == 500
    write_partial(artifact, 500, sha256="0" * 64)
    assert partial_bytes(artifact) == 0
    os.unlink(artifact.sidecar)
    assert partial_bytes(artifact) == 0


def test_after_a_power_cut_only_synced_bytes_count(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    write_partial(artifact, 500, boot_id="an earlier boot", synced_bytes=200)
    assert partial_bytes(artifact) == 200


# --- disk


def test_the_disk_must_hold_everything_that_is_missing_and_the_reserve(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path, name="second")
    missing = [(first, 700), (second, 300)]
    check_disk(missing, 100, free_bytes=lambda path: 1100)
    with pytest.raises(FleetfitError) as caught:
        check_disk(missing, 100, free_bytes=lambda path: 1099)
    assert caught.value.code == "disk_too_small"
    assert "1 bytes" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_archive_needs_room_for_its_tree_too(tmp_path: Path) -> None:
    plain = make(tmp_path)
    packed = Artifact(**{**vars(plain), "unpack": Unpack(str(tmp_path / "tree"))})
    check_disk([(plain, 1000)], 0, free_bytes=lambda path: 1000)
    with pytest.raises(FleetfitError, match="too small"):
        check_disk([(packed, 1000)], 0, free_bytes=lambda path: 1000 + packed.size - 1)


def test_nothing_missing_needs_no_room(tmp_path: Path) -> None:
    check_disk([], 10**18)
    check_disk([(make(tmp_path), 0)], 10**18)


# --- visibility


def test_a_placed_file_has_its_mode_and_leaves_nothing_beside(tmp_path: Path) -> None:
    artifact, state = make(tmp_path, mode="0640"), str(tmp_path / "state")
    write_partial(artifact, len(CONTENT))
    place_file(artifact, artifact.partial, state)
    path = Path(artifact.dest)
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_unknown_owner_is_one_sentence_and_no_error_in_check_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(FleetfitError) as caught:
        set_attributes(str(path), None, "nobody-has-this-name", None)
    assert caught.value.code == "unknown_owner"
    assert set_attributes(str(path), None, "nobody-has-this-name", None, check_mode=True)
