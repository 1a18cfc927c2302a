"""The policy is read from play variables; a mistake names the variable and its value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import (
    VARIABLE_NAMES,
    Policy,
    check_shared_variables,
    check_variable_names,
    policy_from_variables,
)
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import SCHEMA_DIR, read_yaml
from ansible_collections.fleetfit.llm.plugins.plugin_utils.role_variables import (
    check_role_variables,
    role_variables,
)


def test_defaults_are_the_contracts() -> None:
    assert policy_from_variables({"fleetfit_model": "m"}) == Policy(
        model="m",
        min_context_tokens=8192,
        slots=2,
        prefer="quality",
        min_quality_tier="Q4_K_M",
        min_tokens_per_s=0.0,
        engine="auto",
        kv_type="f16",
        accepted_licences=(),
        vram_reserve_bytes=0,
    )


def test_texts_from_the_command_line_are_numbers_and_booleans() -> None:
    policy = policy_from_variables(
        {
            "fleetfit_model": "m",
            "fleetfit_slots": "4",
            "fleetfit_min_tokens_per_s": "7.5",
            "fleetfit_replan": "yes",
            "fleetfit_use_gpus": "false",
        }
    )
    assert (policy.slots, policy.min_tokens_per_s, policy.replan, policy.use_gpus) == (4, 7.5, True, False)


@pytest.mark.parametrize("model", [None, "", "  "])
def test_no_model_named(model: str | None) -> None:
    with pytest.raises(FleetfitError, match="Set fleetfit_model") as caught:
        policy_from_variables({"fleetfit_model": model})
    assert caught.value.code == "model_not_named"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fleetfit_model", 7),
        ("fleetfit_min_context_tokens", 0),
        ("fleetfit_min_context_tokens", "much"),
        ("fleetfit_min_context_tokens", 1.5),
        ("fleetfit_slots", -1),
        ("fleetfit_slots", True),
        ("fleetfit_prefer", "cheap"),
        ("fleetfit_engine", "ollama"),
        ("fleetfit_kv_type", "q3"),
        ("fleetfit_min_quality_tier", "best"),
        ("fleetfit_min_tokens_per_s", -1),
        ("fleetfit_min_tokens_per_s", "fast"),
        ("fleetfit_min_tokens_per_s", float("nan")),
        ("fleetfit_vram_reserve_bytes", -1),
        ("fleetfit_cpu_threads", -1),
        ("fleetfit_accepted_licences", "apache-2.0"),
        ("fleetfit_replan", "perhaps"),
    ],
)
def test_a_mistake_names_the_variable_and_the_value(name: str, value: Any) -> None:
    with pytest.raises(FleetfitError) as caught:
        policy_from_variables({"fleetfit_model": "m", name: value})
    assert caught.value.code == "bad_policy"
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("given", "tier"), [("F16", "Q8_0"), ("AWQ", "Q4_K_M"), ("rest", "rest")])
def test_a_scheme_stands_for_its_tier(given: str, tier: str) -> None:
    policy = policy_from_variables({"fleetfit_model": "m", "fleetfit_min_quality_tier": given})
    assert policy.min_quality_tier == tier


def test_the_recorded_policy_is_what_the_schema_says() -> None:
    schema = read_yaml(SCHEMA_DIR / "policy.json")
    jsonschema.Draft202012Validator(schema).validate(Policy(model="m").as_dict())


@pytest.mark.parametrize("name", ["fleetfit_slot", "fleetfit_min_context_token", "fleetfit_perfer"])
def test_a_misspelt_variable_is_refused_with_the_right_name(name: str) -> None:
    with pytest.raises(FleetfitError, match=name) as caught:
        check_variable_names(["fleetfit_model", name])
    assert caught.value.code == "unknown_variable"
    assert any(known in str(caught.value.remedy) for known in VARIABLE_NAMES)


def test_variables_of_the_inventory_itself_are_left_alone() -> None:
    check_variable_names([*VARIABLE_NAMES, "fleetfit_site_contact", "slots", "my_fleetfit_slot"])


def test_no_variable_of_the_project_is_taken_for_a_slip() -> None:
    root = Path(__file__).resolve().parents[2]
    used = set()
    for folder in ("roles", "playbooks", "inventory"):
        for path in (root / folder).rglob("*"):
            if path.suffix in (".yml", ".j2"):
                used |= set(re.findall(r"(?<![\w.])fleetfit_[a-z_]+", path.read_text()))
    assert "fleetfit_model" in used
    facts = {"fleetfit_plan", "fleetfit_previous_plan"}
    check_variable_names(used - facts)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("llama_cpp_prot", "llama_cpp_port"),
        ("open_webui_wheelhouse", "open_webui_wheelhouses"),
        ("host_baseline_ca_certificate", "host_baseline_ca_certificates"),
        ("model_store_end_point", "model_store_endpoint"),
        ("nvidia_driver_reboots", "nvidia_driver_reboot"),
    ],
)
def test_a_misspelt_variable_of_a_role_is_refused_with_the_right_name(name: str, right: str) -> None:
    with pytest.raises(FleetfitError, match=f"The variable {name} ") as caught:
        check_role_variables(["inventory_hostname", name])
    assert caught.value.code == "unknown_variable"
    assert f"Write {right}," in str(caught.value.remedy)


def test_no_variable_or_result_of_a_role_is_taken_for_a_slip() -> None:
    known = {f"{role}_{option}" for role, options in role_variables().items() for option in options}
    assert len(known) > 80
    results = set()
    for path in (Path(__file__).resolve().parents[2] / "roles").glob("*/tasks/*.yml"):
        text = path.read_text()
        results |= set(re.findall(r"register: (\w+)", text)) | set(
            re.findall(r"^    (\w+): ", text, re.MULTILINE)
        )
    check_role_variables(known | results | {"vllm", "verify_the_fleet", "open_webui_logo", "llama_cpp_notes"})


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"fleetfit_proxy": "http://who:secret@proxy:3128"}, "fleetfit_proxy is a text"),
        ({"fleetfit_proxy": {"http": "proxy:3128"}}, "fleetfit_proxy.http has no scheme"),
        ({"fleetfit_proxy": {"no-proxy": "x"}}, "the key 'no-proxy'"),
        ({"fleetfit_proxy": {"no_proxy": ["a", "b"]}}, "fleetfit_proxy.no_proxy is a list"),
        ({"fleetfit_proof_s": "soon"}, "fleetfit_proof_s is 'soon'"),
        ({"fleetfit_release_hold": "perhaps"}, "fleetfit_release_hold is 'perhaps'"),
        ({"fleetfit_secrets_dir": 7}, "fleetfit_secrets_dir is 7"),
    ],
)
def test_a_wrong_type_of_what_all_roles_share_is_named_as_the_user_wrote_it(
    variables: dict[str, Any], said: str
) -> None:
    with pytest.raises(FleetfitError, match="it must be") as caught:
        check_shared_variables(variables)
    assert said in str(caught.value)
    assert "secret@" not in str(caught.value)
    assert caught.value.remedy


def test_shared_variables_that_are_right_or_absent() -> None:
    proxy = {"http": "http://p:3128", "https": None, "no_proxy": ".example"}
    check_shared_variables({"fleetfit_proxy": proxy, "fleetfit_proof_s": 0, "fleetfit_release_hold": "false"})
    check_shared_variables({"fleetfit_proxy": {}, "fleetfit_secrets_dir": None})
