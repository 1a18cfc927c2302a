"""Holds are set on all packages at once, on those alone that are installed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.package_holds import apply, plan, selections

CURRENT = {
    "libcuda1:amd64": "install",
    "nvidia-kernel-dkms": "hold",
    "nvidia-smi": "install",
    "nvidia-old": "deinstall",
}


@pytest.mark.parametrize(
    ("names", "state", "changed"),
    [
        (["libcuda1", "nvidia-kernel-dkms", "nvidia-smi"], "held", ["libcuda1:amd64", "nvidia-smi"]),
        (["nvidia-kernel-dkms", "nvidia-smi"], "unheld", ["nvidia-kernel-dkms"]),
        (["nvidia-old", "never-installed"], "held", []),
        ([], "held", []),
    ],
)
def test_only_what_differs_is_changed(names: list[str], state: str, changed: list[str]) -> None:
    assert plan(names, state, CURRENT) == changed


def test_what_dpkg_is_told() -> None:
    told: list[tuple[list[str], str | None]] = []

    def run(argv: Sequence[str], text: str | None) -> tuple[int, str]:
        told.append((list(argv), text))
        return 0, "libcuda1:amd64\t\t\tinstall\nnvidia-smi\thold\n"

    assert selections(run) == {"libcuda1:amd64": "install", "nvidia-smi": "hold"}
    apply(["libcuda1:amd64"], "held", run)
    assert told[-1] == (["dpkg", "--set-selections"], "libcuda1:amd64 hold\n")


def test_a_failure_is_a_sentence() -> None:
    with pytest.raises(FleetfitError, match="status database is locked") as caught:
        apply(["x"], "held", lambda argv, text: (2, "dpkg: error: status database is locked\n"))
    assert caught.value.code == "hold_failed"
