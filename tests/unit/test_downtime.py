"""How long a switch keeps a host from answering: measured where it can be, and called what it is."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.downtime import downtime_text, expected_downtime

LLAMA: dict[str, Any] = {"engine": "llama_cpp", "files": [{"size": 4_000_000_000}, {"size": 1_000_000_000}]}
VLLM = {**LLAMA, "engine": "vllm"}


@pytest.mark.parametrize(
    ("deployment", "last_starts", "basis", "text"),
    [
        (LLAMA, None, "none", "none"),
        (LLAMA, {}, "none", "none"),
        (LLAMA, {"llama-server": {"ready_s": 7.25, "stop_s": 1.5}}, "measured", "9 s"),
        (LLAMA, {"llama-server": {"ready_s": 0.3, "stop_s": None}}, "measured", "1 s"),
        # A record of an earlier fleetfit, and a host that changes its engine.
        (LLAMA, {"llama-server": {}}, "estimated", "~10 s"),
        (VLLM, {"llama-server": {"ready_s": 7.0}}, "estimated", "~100 s"),
        ({**LLAMA, "files": []}, {"llama-server": {}}, "unknown", "?"),
        ({**LLAMA, "files": [{"name": "x"}]}, {"llama-server": {}}, "unknown", "?"),
        ({**LLAMA, "engine": "other"}, {"llama-server": {}}, "unknown", "?"),
    ],
)
def test_the_basis_is_always_said(
    deployment: dict[str, Any], last_starts: Any, basis: str, text: str
) -> None:
    found = expected_downtime(deployment, last_starts)
    assert (found["basis"], downtime_text(found)) == (basis, text)
    assert found["source"]
