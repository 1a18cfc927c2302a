"""Plan many hosts in one process: hosts of equal hardware, load and policy are planned once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Optional

from .catalog_entry import canonical_json, digest_of
from .host_facts import facts_digest
from .plan import previous_of
from .policy import Policy

PlanFunction = Callable[[Mapping[str, Any], Policy, Optional[Mapping[str, Any]]], dict[str, Any]]
# Kept plans; at about 30 KiB of text each this is bounded at about 120 MiB.
MAX_PLANS = 4096
_PLACEHOLDER = "fleetfit-device-{:05d}"


class PlanMemo:
    """A planning function that remembers plans by the digest of what they depend on.

    The digest is over the facts that planning reads, without the host's identity: the machine id is left out
    and devices are named by their place in NVML's order, which is all that planning knows them by.
    The answers are the same bytes as the function's own. Failures are not remembered.
    """

    def __init__(self, plan: PlanFunction) -> None:
        self._plan = plan
        self._texts: dict[str, str] = {}
        self.planned = 0

    def __call__(
        self, facts: Mapping[str, Any], policy: Policy, previous: Optional[Mapping[str, Any]] = None
    ) -> dict[str, Any]:
        """Return the host's plan; raises what the planning function raises."""
        anonymous, names = anonymous_facts(facts)
        last = None if policy.replan else previous_of(previous)
        key = digest_of([anonymous, policy.as_dict(), policy.replan, last])
        text = self._texts.get(key)
        if text is None:
            self.planned += 1
            try:
                text = canonical_json(self._plan(anonymous, policy, last))
            except Exception:
                # Again with the host's own names, which the error's text tells.
                self._plan(facts, policy, previous)
                raise
            if len(self._texts) >= MAX_PLANS:
                del self._texts[next(iter(self._texts))]
            self._texts[key] = text
        for placeholder, name in names.items():
            text = text.replace(placeholder, json.dumps(name)[1:-1])
        plan: dict[str, Any] = json.loads(text)
        plan["facts_digest"] = facts_digest(dict(facts))
        return plan


def anonymous_facts(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the facts that planning reads without the host's identity, and (placeholder -> device's name)."""
    stable = facts["stable"]
    accelerators = stable.get("accelerators") or ()
    ordered = sorted(accelerators, key=lambda item: (item.get("index") or 0, item["uuid"]))
    placeholders = {str(item["uuid"]): _PLACEHOLDER.format(rank) for rank, item in enumerate(ordered)}

    def renamed(uuid: Any) -> Any:
        return placeholders.get(uuid, uuid)

    anonymous = {
        "schema_version": facts.get("schema_version"),
        "stable": {
            **{key: value for key, value in stable.items() if key != "machine_id"},
            "accelerators": [
                # Where a card sits on the bus is no matter of planning, and differs from host to host.
                {
                    **{key: value for key, value in item.items() if key != "pci_bus_id"},
                    "uuid": renamed(item["uuid"]),
                    "mig_parent": renamed(item.get("mig_parent")),
                }
                for item in accelerators
            ],
            "links": [
                {**link, "a": renamed(link["a"]), "b": renamed(link["b"])}
                for link in stable.get("links") or ()
            ],
        },
        "foreign_bytes": {
            renamed(uuid): size for uuid, size in (facts.get("foreign_bytes") or {}).items() if size
        },
        "problems": [
            {**problem, "device": renamed(problem.get("device"))} for problem in facts.get("problems") or ()
        ],
    }
    return anonymous, {placeholder: uuid for uuid, placeholder in placeholders.items()}
