"""Action plugin: decide on the controller, without a connection, what a host serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import plan_host
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import (
    check_shared_variables,
    check_variable_names,
    policy_from_variables,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import NothingFitsError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import (
    available_engines,
    check_schema_of_plan,
    load_catalog,
)
from ansible_collections.fleetfit.llm.plugins.plugin_utils.role_variables import check_role_variables

# Option of the module -> the variable that it stands for.
VARIABLES = {
    "model": "fleetfit_model",
    "min_context_tokens": "fleetfit_min_context_tokens",
    "slots": "fleetfit_slots",
    "prefer": "fleetfit_prefer",
    "min_quality_tier": "fleetfit_min_quality_tier",
    "min_tokens_per_s": "fleetfit_min_tokens_per_s",
    "engine": "fleetfit_engine",
    "kv_type": "fleetfit_kv_type",
    "accepted_licences": "fleetfit_accepted_licences",
    "vram_reserve_bytes": "fleetfit_vram_reserve_bytes",
    "cpu_threads": "fleetfit_cpu_threads",
    "use_gpus": "fleetfit_use_gpus",
    "catalog_dirs": "fleetfit_catalog_dirs",
    "lora_adapters": "fleetfit_lora_adapters",
    "replan": "fleetfit_replan",
}
# Variables that no option repeats: they belong to the host, not to one plan.
OTHER_VARIABLES = ("fleetfit_open_webui", "fleetfit_simulated_gpus", "host_baseline_accepted_problems")
# Defaults of the roles' own variables: judged here, where the name that the user wrote is known.
SHARED_VARIABLES = ("fleetfit_proof_s", "fleetfit_proxy", "fleetfit_release_hold", "fleetfit_secrets_dir")
OPTIONS = {name: {"type": "raw"} for name in (*VARIABLES, "facts", "previous_plan")}


class ActionModule(ActionBase):
    """Return the plan as a fact; nothing runs on the host."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_diff = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Plan one host; a mistake or a model that does not fit fails the task with code and remedy."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(OPTIONS)
        try:
            plan = self._plan(arguments, task_vars or {})
        except NothingFitsError as error:
            return {
                **result,
                **_failure(error),
                # Sentences: Ansible prints all of it in one line.
                "candidates": [
                    f"{item.engine} {item.variant.name}: {item.rejected.reason}"
                    for item in error.candidates
                    if item.rejected
                ],
            }
        except FleetfitError as error:
            return {**result, **_failure(error)}
        return {
            **result,
            "changed": False,
            "ansible_facts": {"fleetfit_plan": plan},
            "summary": plan["reason"],
        }

    def _plan(self, arguments: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        variables = {name: self._variable(name, task_vars) for name in OTHER_VARIABLES}
        for option, name in VARIABLES.items():
            value = arguments.get(option)
            variables[name] = self._variable(name, task_vars) if value is None else value
        host_facts = task_vars.get("ansible_facts") or {}
        # Facts are variables too where ansible.cfg injects them.
        names = [name for name in task_vars if name not in host_facts]
        check_variable_names(names)
        check_role_variables(names)
        check_shared_variables({name: self._variable(name, task_vars) for name in SHARED_VARIABLES})
        policy = policy_from_variables(variables)
        facts = arguments.get("facts") or host_facts.get("fleetfit")
        if not facts:
            raise FleetfitError(
                "The host's facts are not known.",
                code="facts_missing",
                remedy="Run fleetfit.llm.host_state before fleetfit.llm.select_quantization.",
            )
        directories = variables["fleetfit_catalog_dirs"] or []
        if not isinstance(directories, list):
            raise FleetfitError(
                f"fleetfit_catalog_dirs is {directories!r}; it must be a list of directories.",
                code="bad_policy",
                remedy="Correct fleetfit_catalog_dirs in the inventory.",
            )
        catalog = load_catalog([str(item) for item in directories])
        entry = catalog.entry(policy.model)
        plan = plan_host(
            facts,
            policy,
            entry=entry,
            gpus=catalog.gpus,
            engines=catalog.engines,
            available_engines=available_engines(Path(__file__).resolve().parents[2] / "roles"),
            siblings=catalog.siblings(entry),
            calibration=catalog.calibration,
            previous=arguments.get("previous_plan") or host_facts.get("fleetfit_previous_plan"),
        )
        check_schema_of_plan(plan)
        return plan

    def _variable(self, name: str, task_vars: dict[str, Any]) -> Any:
        value = task_vars.get(name)
        return None if value is None else self._templar.template(value)


def _failure(error: FleetfitError) -> dict[str, Any]:
    return {"failed": True, "msg": str(error), "code": error.code, "remedy": error.remedy}
