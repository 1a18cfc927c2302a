"""What every role would do on each system of README's table, compared with tests/golden/systems.

Only Debian is run in our tests; the others are rendered from facts: the golden files say so. With
``FLEETFIT_GOLDEN=write`` in the environment this file writes them, for a change that is meant.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import plan_host
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import policy_from_variables

from .planning import CATALOG, accelerator, facts, lab_entry

REPO = Path(__file__).resolve().parents[2]
GOLDEN = REPO / "tests/golden/systems"
# os-release's ID, its version, the C library and the Python that the distribution ships as python3.
SYSTEMS: dict[str, tuple[str, str, str, str]] = {
    "debian-12": ("debian", "12", "2.36", "3.11.2"),
    "debian-13": ("debian", "13", "2.41", "3.13.5"),
    "ubuntu-22.04": ("ubuntu", "22.04", "2.35", "3.10.12"),
    "ubuntu-24.04": ("ubuntu", "24.04", "2.39", "3.12.3"),
    **{f"{name}-9": (name, "9.6", "2.34", "3.9.21") for name in ("rhel", "rocky", "almalinux")},
    **{f"{name}-10": (name, "10.0", "2.39", "3.12.9") for name in ("rhel", "rocky", "almalinux")},
}
RUN = ("debian-12", "debian-13")
FILES = [
    ("host_baseline", ["preflight", "configure", "service"]),
    ("python_runtime", ["preflight", "environment"]),
    ("model_store", ["preflight"]),
    ("llama_cpp", ["preflight", "install_archive", "build_on_host", "configure"]),
    ("vllm", ["install"]),
    ("open_webui", ["preflight", "configure"]),
]
WHEELS = {"arch": "x86_64", "glibc": "2.34", "size": 1, "url": "http://mirror.example/wheels.tar"}


def os_of(system: str) -> dict[str, str]:
    """Return the stable facts' ``os`` of a system."""
    names = ("distribution", "version", "glibc", "python")
    return {"codename": "", **dict(zip(names, SYSTEMS[system], strict=True))}


def host_of(system: str, **variables: Any) -> dict[str, Any]:
    """Return a host with a card as the renderer wants it: every setting that differs between systems is used."""
    found = facts([accelerator("RTX 4090")])
    entry = lab_entry()
    plan = plan_host(
        found,
        policy_from_variables({"fleetfit_model": entry.id}),
        entry=entry,
        gpus=CATALOG.gpus,
        engines=CATALOG.engines,
        available_engines=frozenset(["llama_cpp"]),
        siblings=CATALOG.siblings(entry),
        previous=None,
        require_pinned=True,
    )
    found["stable"] |= {"arch": "x86_64"}
    found["stable"]["os"] = os_of(system)
    found["live"] = {
        "clock_offset_s": 0.0,
        "disk_free_bytes": {"/var/lib/fleetfit": 1 << 40, "/opt/fleetfit": 1 << 40},
        "disk_held_bytes": {},
    }
    return {
        "variables": {
            "inventory_hostname": "host",
            "inventory_dir": "/inventory",
            "ansible_facts": {"fleetfit": found, "fleetfit_plan": plan},
            "fleetfit_proxy": {
                "http": "http://proxy.example:3128",
                "https": "http://who:pass%40word@proxy.example:3128",
                "no_proxy": "mirror.example",
            },
            "host_baseline_ca_certificates": [],
            "llama_cpp_archives": [
                {**WHEELS, "version": "11434.0.0", "backend": "cuda", "sha256": "a" * 64},
            ],
            "python_runtime_uv": {**WHEELS, "version": "0.9.9", "sha256": "b" * 64},
            "python_runtime_archives": [{**WHEELS, "version": "3.11.7", "sha256": "c" * 64}],
            "python_runtime_service": "open-webui",
            "python_runtime_wheelhouses": (
                wheelhouses := [
                    {**WHEELS, "python": "3.12", "sha256": "d" * 64},
                    {**WHEELS, "python": "3.11", "sha256": "e" * 64},
                ]
            ),
            "open_webui_wheelhouses": wheelhouses,
            "__llama_cpp_builder": "host",
            "__llama_cpp_builder_os": found["stable"]["os"],
            "__llama_cpp_build": {"build": {"version": "11434.0.0"}},
            "__vllm_mapping": None,
            "__vllm_choice": {"wheelhouse": wheelhouses[0]},
            **variables,
        },
        "registers": {
            "__host_baseline_selinux": {"stat": {"exists": True}},
            "__host_baseline_labels": {"stdout": ""},
            "__python_runtime_stat": {"stat": {"exists": False}},
            "__vllm_apt_binding": {"stat": {"exists": True}},
        },
    }


def render(hosts: dict[str, Any], files: list[Any] = FILES) -> dict[str, list[list[str]]]:
    """Return what each task would be told on each host."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "data/render_roles.py")],
        input=json.dumps({"hosts": hosts, "files": files}),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ANSIBLE_CONFIG": str(REPO / "ansible.cfg")},
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, list[list[str]]] = json.loads(done.stdout)
    return answer


def refusals(hosts: dict[str, Any], role: str) -> dict[str, list[str]]:
    """Return the sentences with which a role's preflight refuses each host."""
    rendered = render(hosts, [(role, ["preflight"])])
    return {
        name: [text.partition("REFUSED: ")[2] for _, text in told if "REFUSED" in text]
        for name, told in rendered.items()
    }


@functools.cache
def golden_texts() -> dict[str, str]:
    """Return what the golden files should hold: what all systems share, and what is each one's own."""
    rendered = render({system: host_of(system) for system in SYSTEMS})
    shared = [
        entry for entry in rendered["debian-12"] if all(entry in rendered[system] for system in SYSTEMS)
    ]

    def text(title: str, entries: list[list[str]]) -> str:
        blocks = [f"==> {task}\n{told.rstrip()}\n" for task, told in entries]
        return "\n".join([f"# {title}\n", *blocks])

    texts = {"shared": text("the same on every system; run on Debian, rendered elsewhere", shared)}
    for system in SYSTEMS:
        own = [entry for entry in rendered[system] if entry not in shared]
        texts[system] = text(f"{system}: {'run in the tests' if system in RUN else 'rendered, not run'}", own)
    return texts


@pytest.mark.parametrize("name", ["shared", *SYSTEMS])
def test_golden_file(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("FLEETFIT_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(golden_texts()[name])
    assert golden_texts()[name] == path.read_text()


def test_no_system_is_refused_and_the_table_is_whole() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {"shared", *SYSTEMS}
    for system in SYSTEMS:
        assert "REFUSED" not in golden_texts()[system], system
    accepted = yaml.safe_load((REPO / "roles/host_baseline/vars/main.yml").read_text())[
        "__host_baseline_systems"
    ]
    assert set(SYSTEMS) == {
        f"{name}-{version}" for name, versions in accepted.items() for version in versions
    }


def test_readme_names_what_is_run_and_what_is_rendered() -> None:
    """README's table says of each accepted system whether it is run or rendered."""
    table = (REPO / "README.md").read_text().partition("## Supported systems")[2]
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", table, re.MULTILINE))
    run = next(row for row, status in rows.items() if status.startswith("run"))
    rendered = next(row for row, status in rows.items() if status.startswith("rendered, not run"))
    assert {"Debian 12", "Debian 13"} == set(re.findall(r"Debian \d+", run))
    for name in ("Ubuntu 22.04/24.04", "RHEL/Rocky/Alma 9/10"):
        assert name in rendered


def test_other_systems_are_refused_in_one_sentence() -> None:
    hosts = {}
    for distribution, version in (("fedora", "43"), ("debian", "11"), ("ubuntu", "24.10")):
        hosts[f"{distribution} {version}"] = host = host_of("debian-12")
        other = {"distribution": distribution, "version": version}
        host["variables"]["ansible_facts"]["fleetfit"]["stable"]["os"] |= other
    for name, sentences in refusals(hosts, "host_baseline").items():
        (sentence,) = sentences
        assert f"{name} is not supported" in sentence
        assert "Ubuntu 22.04 and 24.04" in sentence


def test_a_package_is_refused_where_there_is_no_apt() -> None:
    hosts = {
        system: host_of(system, llama_cpp_install_method="package")
        for system in ("debian-12", "ubuntu-24.04", "rocky-9", "rhel-10")
    }
    refused = refusals(hosts, "llama_cpp")
    assert refused["debian-12"] == refused["ubuntu-24.04"] == []
    for system in ("rocky-9", "rhel-10"):
        (sentence,) = refused[system]
        assert sentence.endswith("package is for Debian and Ubuntu; use archive or build here.")


def test_the_proxys_password_is_readable_by_root_alone_everywhere() -> None:
    for system in ("debian-12", "rocky-9"):
        told = next(text for text in golden_texts()[system].split("==> ") if "proxy.example" in text)
        assert "mode: '0600'" in told
        assert "pass" in told


def test_the_rule_for_labels_matches_what_units_start() -> None:
    pattern = re.search(r"- (/opt/fleetfit/\S+/run)$", golden_texts()["rhel-9"], re.MULTILINE)
    assert pattern
    for unit in ("llama-server", "vllm", "open-webui"):
        assert re.fullmatch(pattern[1], f"/opt/fleetfit/{unit}/releases/0123456789abcdef/run")
        role = {"llama-server": "llama_cpp", "vllm": "vllm", "open-webui": "open_webui"}[unit]
        unit_file = (REPO / f"roles/{role}/templates/{unit}.service.j2").read_text()
        assert re.search(r"^ExecStart=.*/current/run$", unit_file, re.MULTILINE)


def test_without_selinux_no_label_is_touched() -> None:
    host = host_of("rocky-9")
    host["registers"]["__host_baseline_selinux"] = {"stat": {"exists": False}}
    tasks = render({"x": host}, [("host_baseline", ["configure"])])["x"]
    assert not any("semanage" in told for _, told in tasks)
