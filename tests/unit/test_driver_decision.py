"""What is decided about a host's driver: the table in data/driver_decisions.txt, and what holds for every host."""

from __future__ import annotations

import copy
import fnmatch
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.driver_decision import Wanted, decide
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_drivers
from hypothesis import given, settings
from hypothesis import strategies as st

from . import drivers

TABLE = Path(__file__).parent / "data/driver_decisions.txt"
REPO = Path(__file__).resolve().parents[2]


def rows() -> list[list[str]]:
    lines = [line for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    return [[cell.strip() for cell in line.split("|")] for line in lines[1:]]


def in_words(decision: dict[str, Any]) -> list[str]:
    """Return the last three columns of a row."""
    state = decision["state"]
    head = (
        state
        if state in ("refused", "nothing")
        else (f"{state} {decision['source']} {decision['branch']} {decision['flavour']}")
    )
    codes = [item["code"] for item in decision["refusals"]] or [
        item["action"] for item in decision["actions"]
    ]
    problems = [item["code"] for item in decision["problems"]]
    return [head, " ".join(codes) or "-", " ".join(problems) or "-"]


def of(system: str, host: str = "-", wanted: str = "-", *, cards: str = "4090", boot: str = "off") -> Any:
    return decide(drivers.wanted_of(wanted), drivers.state_of(system, cards, boot, host), drivers.DATA)


@pytest.mark.parametrize("row", rows(), ids=lambda row: " / ".join(row[:5]))
def test_table(row: list[str]) -> None:
    system, cards, boot, host, wanted, *expected = row
    assert in_words(of(system, host, wanted, cards=cards, boot=boot)) == expected


def test_the_report_tells_what_is_there_what_would_change_and_why() -> None:
    lines = of("debian-12", "nvidia:580.95.05:open newkernel=missing", "version=580.105.08")["report"]
    assert lines[0].split("; ") == [
        "there is: GeForce RTX 4090",
        "driver 580.95.05 (open modules, from NVIDIA's repository, held)",
        "module 580.95.05 loaded",
        f"kernel {drivers.KERNEL} (running, module 580.95.05), kernel {drivers.NEWER_KERNEL} (newest, no module)",
        "Secure Boot disabled",
    ]
    assert (
        lines[1] == "Branch 580 with open modules: version 580.105.08 is wanted and 580.95.05 is installed."
    )
    [install] = [line for line in lines if line.startswith("install_packages: ")]
    assert install.endswith("(version 580.105.08 is wanted and 580.95.05 is installed)")
    assert lines[-1] == "no reboot by this run: nvidia_driver_reboot is never"
    bare = of("debian-12", "runfile")["report"]
    assert bare[0].startswith("there is: GeForce RTX 4090; no driver installed; no module loaded; ")
    assert [line.partition(":")[0] for line in bare[1:]] == ["refused"]
    assert of("debian-12", wanted="source=none")["report"]


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        ("branch=999", "nvidia_driver_branch asks for the driver branch 999"),
        ("version=999.1", "nvidia_driver_version asks for the driver branch 999"),
        ("source=distribution branch=580", "nvidia_driver_branch asks for branch 580"),
        ("source=distribution version=580.95.05", "nvidia_driver_version asks for branch 580"),
        ("branch=580 version=595.45.04", "nvidia_driver_version 595.45.04"),
        ("source=distribution flavour=open", "open kernel modules of branch 535"),
        ("key_fingerprint=8793F200", "nvidia_driver_key_fingerprint '8793F200'"),
        ("flavour=open", "nvidia_driver_flavour says open"),
    ],
)
def test_a_refusal_names_value_origin_and_remedy(wanted: str, value: str) -> None:
    cards = "v100" if wanted == "flavour=open" else "4090"
    [refusal] = of("debian-12", wanted=wanted, cards=cards)["refusals"]
    assert value in refusal["message"]
    assert refusal["remedy"].endswith(".")


def test_the_table_is_large_and_says_nothing_twice() -> None:
    questions = [tuple(row[:5]) for row in rows()]
    assert len(questions) >= 150
    assert len(set(questions)) == len(questions)


# ---- what a row does not show ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "wanted", "cards", "packages"),
    [
        ("debian-12", "-", "4090", ["nvidia-driver-cuda", "nvidia-kernel-open-dkms"]),
        ("debian-13", "-", "v100", ["nvidia-driver-cuda", "nvidia-kernel-dkms"]),
        (
            "debian-12",
            "source=distribution",
            "4090",
            ["nvidia-kernel-dkms", "libcuda1", "nvidia-smi", "nvidia-persistenced", "nvidia-modprobe"],
        ),
        (
            "ubuntu-24.04",
            "kernels=6.8.0-45-generic,6.11.0-9-lowlatency",
            "4090",
            [
                "linux-modules-nvidia-580-server-open-generic",
                "linux-modules-nvidia-580-server-open-lowlatency",
                "nvidia-headless-no-dkms-580-server-open",
                "nvidia-utils-580-server",
            ],
        ),
        (
            "ubuntu-22.04",
            "source=nvidia",
            "v100",
            ["libnvidia-compute-580", "nvidia-compute-utils-580", "nvidia-utils-580", "nvidia-dkms-580"],
        ),
        ("ubuntu-22.04", "source=nvidia branch=595", "4090", ["libnvidia-compute", "nvidia-dkms-open"]),
        ("rhel-9", "fingerprint", "4090", ["nvidia-driver-cuda", "kmod-nvidia-open-dkms"]),
        ("rocky-10", "fingerprint", "p40", ["nvidia-driver-cuda", "kmod-nvidia-latest-dkms"]),
        (
            "debian-13",
            "cuda_toolkit=yes",
            "4090",
            ["nvidia-driver-cuda", "nvidia-kernel-open-dkms", "cuda-toolkit-13-0"],
        ),
    ],
)
def test_packages(system: str, wanted: str, cards: str, packages: list[str]) -> None:
    assert of(system, wanted=wanted, cards=cards)["packages"] == packages


def test_modules_of_the_other_flavour_go() -> None:
    """Debian's two can be installed beside each other, and then both are built."""
    decision = of("debian-13", "distribution:550.163.01:open", "flavour=proprietary")
    assert decision["remove"] == ["nvidia-open-kernel-dkms"]
    assert of("debian-13", "distribution:550.163.01:open")["remove"] == []


def test_fabric_manager_is_of_the_branch() -> None:
    assert "nvidia-fabricmanager-580" in of("ubuntu-22.04", cards="hgx-a100")["packages"]


def test_fabric_manager_follows_a_driver_that_stays_and_not_the_newest() -> None:
    """Another version of it than the driver's leaves CUDA with error 802."""
    host = "distribution:580.95.05:open fabric=580.65.06 candidate=580.105.08"
    decision = of("ubuntu-22.04", host, cards="hgx-a100")
    assert decision["specs"][:-1] == decision["packages"][:-1]
    assert decision["specs"][-1] == "nvidia-fabricmanager-580=580.95.05*"
    wanted = "fingerprint fabric_manager_package=nvidia-fabric-manager"
    decision = of("rhel-9", "nvidia:580.95.05:open fabric=none", wanted, cards="hgx-a100")
    assert decision["specs"][-1] == "nvidia-fabric-manager-580.95.05"
    fresh = of("ubuntu-22.04", cards="hgx-a100")
    assert fresh["specs"] == fresh["packages"]


def test_blackwells_switches_need_another_module_at_boot() -> None:
    wanted = "fabric_manager_package=nvidia-fabricmanager"
    assert of("debian-12", wanted=wanted, cards="hgx-b200")["modules_load"] == ["nvidia-uvm", "ib_umad"]
    assert of("debian-12", wanted=wanted, cards="hgx-a100")["modules_load"] == ["nvidia-uvm"]
    assert of("debian-12", cards="b200")["modules_load"] == ["nvidia-uvm"]


def test_a_newer_kernel_gets_its_own_signed_module() -> None:
    """The metapackage that would bring it is held."""
    decision = of("ubuntu-24.04", "distribution:580.95.05:open newkernel=missing")
    assert decision["packages"][-1] == f"linux-modules-nvidia-580-server-open-{drivers.NEWER_KERNEL}"
    assert drivers.NEWER_KERNEL in decision["summary"]


def test_headers_are_for_the_running_and_the_newest_kernel() -> None:
    decision = of("debian-12", "newkernel=missing noheaders")
    assert decision["headers"] == [f"linux-headers-{drivers.KERNEL}", f"linux-headers-{drivers.NEWER_KERNEL}"]
    assert of("debian-12", "newkernel=missing", "kernels=6.1.0-50-amd64")["headers"] == [
        "linux-headers-6.1.0-50-amd64"
    ]


def test_an_old_kernel_that_is_neither_running_nor_newest_needs_no_module() -> None:
    state = drivers.state_of("debian-12", "4090", "off", "nvidia:580.95.05:open")
    state["kernels"].append({**drivers.kernel("6.1.0-9-amd64", newest=False), "running": False})
    assert decide(drivers.wanted_of("-"), state, drivers.DATA)["state"] == "ok"


def test_a_kernel_without_a_module_is_named() -> None:
    """What the role's last look says where a module was not built and DKMS left no log."""
    decision = of("debian-12", "nvidia:580.95.05:open newkernel=missing")
    assert decision["state"] == "install"
    assert drivers.NEWER_KERNEL in decision["summary"]
    assert drivers.KERNEL not in decision["summary"]


def test_a_failed_build_names_the_kernel_and_the_logs_line() -> None:
    [refusal] = of("debian-12", "nvidia:580.95.05:open newkernel=failed")["refusals"]
    assert drivers.NEWER_KERNEL in refusal["message"]
    assert "nv-mmap.c:42: error: too few arguments" in refusal["message"]


def test_a_mirror_serves_packages_and_key() -> None:
    repository = of("debian-13", wanted="repository_url=https://mirror.example.com/cuda/")["repository"]
    assert repository["url"] == "https://mirror.example.com/cuda/"
    assert repository["key_url"] == "https://mirror.example.com/cuda/8793F200.pub"
    assert repository["fingerprint"] == "02182E60104FCDC26EAE1B8597A5D4CB8793F200"


def test_debian_13_has_a_key_and_a_repository_of_its_own() -> None:
    twelve, thirteen = (of(f"debian-{version}")["repository"] for version in (12, 13))
    assert twelve["fingerprint"] != thirteen["fingerprint"]
    assert "debian13" in thirteen["url"]


def test_an_arm_server_reads_the_sbsa_directory() -> None:
    assert of("debian-12", cards="gh200")["repository"]["url"].endswith("/debian12/sbsa/")


def test_an_unsupported_system_is_told_what_is_supported() -> None:
    [refusal] = of("fedora-42")["refusals"]
    assert "Debian 12" in refusal["remedy"]
    assert "Ubuntu 24.04" in refusal["remedy"]
    assert "AlmaLinux 10" in refusal["remedy"]


def test_a_version_that_is_asked_for_is_pinned_exactly() -> None:
    pins = of("debian-12", wanted="version=580.95.05")["pins"]
    assert {"version 580.95.05*", "version *"} == {pin["pin"] for pin in pins}
    assert "version 580.*" in {pin["pin"] for pin in of("debian-12")["pins"]}


@pytest.mark.parametrize(
    ("package", "version", "priority"),
    [
        ("libnvidia-ml1", "580.95.05-1", 1000),
        ("libnvidia-ml1", "595.45.04-1", -1),
        ("nvidia-kernel-open-dkms", "580.105.08-1", 1000),
        ("nvidia-container-toolkit", "1.18.0-1", 500),
        ("libnvidia-container1", "1.18.0-1", 500),
        ("linux-image-amd64", "6.1.150-1", None),
    ],
)
def test_pins_reach_the_driver_and_nothing_else(package: str, version: str, priority: int | None) -> None:
    """apt takes, for each version of a package, the first pin that fits it (apt_preferences(5))."""
    fitting = [
        pin["priority"]
        for pin in of("debian-13")["pins"]
        if any(fnmatch.fnmatchcase(package, pattern) for pattern in pin["packages"])
        and fnmatch.fnmatchcase(version, pin["pin"].removeprefix("version "))
    ]
    assert (fitting or [None])[0] == priority


@pytest.mark.parametrize(
    ("setting", "value"), [("source", "ppa"), ("flavour", "closed"), ("reboot", "always"), ("colour", "red")]
)
def test_a_wrong_setting_is_named(setting: str, value: str) -> None:
    with pytest.raises(FleetfitError, match=f"{setting}|{value}") as caught:
        Wanted.from_dict({setting: value})
    assert caught.value.code == "driver_setting"


def test_facts_of_another_version_are_refused() -> None:
    with pytest.raises(FleetfitError, match="schema_version 2"):
        decide(Wanted(), {**drivers.bare_state(), "schema_version": 2}, drivers.DATA)


def test_a_new_branch_is_a_change_of_data(tmp_path: Path) -> None:
    """Nothing but catalog/drivers.yml changes, and the decision follows."""
    text = (REPO / "catalog/drivers.yml").read_text()
    entry = (
        '  - branch: "640"\n    kind: lts\n    cuda_major: 14\n    end_of_life: "2030-06-30"\n'
        "    flavours: [open]\n    security_floor: null\n    source: made up for this test\n"
    )
    text = text.replace("\nbranches:\n", f"\nbranches:\n{entry}").replace(
        'default_branch: "580"', 'default_branch: "640"'
    )
    (tmp_path / "drivers.yml").write_text(text)
    data = load_drivers(tmp_path)
    decision = decide(Wanted(today=drivers.TODAY), drivers.bare_state("debian-13"), data)
    assert (decision["state"], decision["branch"], decision["flavour"]) == ("install", "640", "open")
    assert "version 640.*" in {pin["pin"] for pin in decision["pins"]}


def test_dnf_is_locked_on_the_branch_while_packages_change_and_on_each_version_after() -> None:
    fresh = of("rhel-10", wanted="fingerprint")["lock"]
    assert (fresh["version"], fresh["entries"]) == ("580.*", [])
    assert fresh["packages"] == ["python3-dnf-plugin-versionlock"]
    assert of("rhel-9", wanted="fingerprint version=580.95.05")["lock"]["version"] == "580.95.05*"
    held = of("rhel-10", "nvidia:580.95.05:open")["lock"]["entries"]
    assert held == ["nvidia-driver-cuda-0:580.95.05.*", "nvidia-kernel-open-dkms-0:580.95.05.*"]


def test_a_newer_kernel_alone_is_no_reason_to_reboot() -> None:
    state = drivers.state_of("debian-12", "4090", "off", "nvidia:580.95.05:open newkernel=installed")
    state["reboot_reasons"] = [{"code": "kernel_outdated", "message": "a newer kernel is installed"}]
    decision = decide(drivers.wanted_of("reboot=if_needed"), state, drivers.DATA)
    assert (decision["state"], decision["reboot"]["needed"]) == ("ok", False)
    state["reboot_reasons"] = [
        {"code": "kernel_without_module", "message": "the running kernel has no module"}
    ]
    decision = decide(drivers.wanted_of("reboot=if_needed"), state, drivers.DATA)
    assert decision["actions"][-1]["action"] == "reboot"


# ---- what holds for every host --------------------------------------------------------------------------------

PROPERTY = settings(deadline=None)  # a machine under load is slow, not wrong
SYSTEMS = [
    f"{name}-{entry['version']}" for entry in drivers.DATA["distributions"] for name in entry["distributions"]
]
CARDS = st.lists(st.sampled_from([word for word in drivers.CARDS if word != "gh200"]), max_size=3).map(
    lambda words: "+".join(words) or "none"
)
HOST_WORDS = st.lists(
    st.sampled_from(
        [
            *("audit", "boot=100", "luks", "unheld", "loaded=570.10.01", "nouveau", "controller"),
            *("candidate=580.999.01", "newkernel=missing", "newkernel=failed", "noheaders", "runfile", "ppa"),
            *("cuda_repo", "own_repo"),
        ]
    ),
    max_size=3,
    unique_by=lambda word: word.split("=")[0],
)
INSTALLED = st.sampled_from(
    [
        [],
        ["nvidia:580.95.05:open"],
        ["nvidia:580.95.05:proprietary"],
        ["nvidia:595.45.04:open"],
        ["distribution:535.309.01:proprietary"],
        ["distribution:550.163.01:open"],
    ]
)
WANTED_WORDS = st.lists(
    st.sampled_from(
        [
            *(
                "source=nvidia",
                "source=distribution",
                "source=none",
                "branch=580",
                "branch=595",
                "branch=999",
            ),
            *("version=580.95.05", "flavour=open", "flavour=proprietary", "reboot=if_needed", "fingerprint"),
            *("cuda_toolkit=yes", "fabric_manager=never", "require_gpu=no"),
        ]
    ),
    max_size=4,
    unique_by=lambda word: word.split("=")[0],
).map(" ".join)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Wanted, dict[str, Any]]:
    host = " ".join(draw(INSTALLED) + draw(HOST_WORDS)) or "-"
    state = drivers.state_of(
        draw(st.sampled_from(SYSTEMS)), draw(CARDS), draw(st.sampled_from(sorted(drivers.SECURE_BOOT))), host
    )
    return drivers.wanted_of(draw(WANTED_WORDS) or "-"), state


def applied(state: dict[str, Any], decision: dict[str, Any]) -> dict[str, Any]:
    """Return the host after the decision's actions, where each of them did what it says."""
    after = copy.deepcopy(state)
    version = f"{decision['branch']}.95.05"
    for item in decision["actions"]:
        action = item["action"]
        installed = after["installed"]
        if action == "install_packages":
            if decision["branch"] == installed["branch"] and decision["state"] == "install":
                version = installed["version"]
            after["installed"] = {
                "version": version,
                "flavour": decision["flavour"],
                "branch": decision["branch"],
                "source": decision["source"],
                "packages": {**installed["packages"], **dict.fromkeys(decision["packages"], version)},
                "held": [],
            }
            if decision["modules"] == "signed":
                # The metapackage brings the newest kernel's.
                for kernel in after["kernels"]:
                    if kernel["newest"]:
                        kernel["module_version"] = version
            if after["nvswitch_count"] and any("fabric" in name for name in decision["packages"]):
                after["fabricmanager"]["installed_version"] = version
        elif action == "remove_packages":
            for name in item["items"]:
                del installed["packages"][name]
        elif action == "install_headers":
            for kernel in after["kernels"]:
                kernel["headers"] = True
        elif action == "build_modules":
            for kernel in after["kernels"]:
                if kernel["release"] in item["items"]:
                    kernel.update(dkms="installed", dkms_error=None)
        elif action == "hold":
            after["installed"]["held"] = sorted(after["installed"]["packages"])
        elif action == "blacklist_nouveau":
            after["nouveau"].update(blacklisted=True, in_initramfs=False)
        elif action == "persistenced":
            after["persistenced"] = {"installed": True, "active": True}
        elif action == "load_uvm":
            after["uvm_loaded"] = True
        elif action == "fabric_manager":
            after["fabricmanager"]["active"] = True
        elif action == "reboot":
            after.update(boot_id="b2", reboot_reasons=[])
            after["loaded"] = {"version": after["installed"]["version"], "flavour": decision["flavour"]}
            after["nouveau"]["loaded"] = False
    return after


@PROPERTY
@given(cases())
def test_a_refusal_never_comes_with_an_action(case: tuple[Wanted, dict[str, Any]]) -> None:
    decision = decide(case[0], case[1], drivers.DATA)
    assert (decision["state"] == "refused") == bool(decision["refusals"])
    if decision["refusals"]:
        assert not any(decision[name] for name in ("actions", "packages", "files", "hold", "unhold"))
        assert all(item["remedy"] for item in decision["refusals"])


@PROPERTY
@given(cases())
def test_no_reboot_unless_it_is_allowed(case: tuple[Wanted, dict[str, Any]]) -> None:
    wanted, state = case
    decision = decide(wanted, state, drivers.DATA)
    if "reboot" in [item["action"] for item in decision["actions"]]:
        assert wanted.reboot == "if_needed"
        assert decision["reboot"]["reasons"]
        assert not state["is_controller"]
        assert not state["root_needs_passphrase"]
        assert decision["actions"][-1]["action"] == "reboot"


@PROPERTY
@given(cases())
def test_what_was_applied_is_not_decided_again(case: tuple[Wanted, dict[str, Any]]) -> None:
    """After its own actions nothing is left to do: a second run changes nothing."""
    wanted, state = case
    first = decide(wanted, state, drivers.DATA)
    second = decide(wanted, applied(state, first), drivers.DATA)
    if first["state"] in ("refused", "nothing"):
        assert second["state"] == first["state"]
    else:
        assert second["state"] in ("ok", "pending_reboot", "pending_mok")
        assert second["actions"] == []


@PROPERTY
@given(cases())
def test_the_same_question_has_the_same_answer(case: tuple[Wanted, dict[str, Any]]) -> None:
    before = copy.deepcopy(case[1])
    assert decide(*case, drivers.DATA) == decide(*case, drivers.DATA)
    assert case[1] == before


@PROPERTY
@given(cases(), st.sampled_from(["580.999.01", "595.999.01", None]))
def test_a_newer_candidate_is_never_a_reason(
    case: tuple[Wanted, dict[str, Any]], version: str | None
) -> None:
    wanted, state = case
    first = decide(wanted, state, drivers.DATA)
    second = decide(wanted, {**state, "candidate": {"version": version, "source": "nvidia"}}, drivers.DATA)
    assert (first["state"], first["actions"]) == (second["state"], second["actions"])


@PROPERTY
@given(cases())
def test_a_host_without_a_card_is_left_alone(case: tuple[Wanted, dict[str, Any]]) -> None:
    wanted, state = case
    if not state["gpus"] and wanted.require_gpu:
        assert decide(wanted, state, drivers.DATA)["actions"] == []


@PROPERTY
@given(cases())
def test_source_none_does_nothing_at_all(case: tuple[Wanted, dict[str, Any]]) -> None:
    decision = decide(Wanted(source="none"), case[1], drivers.DATA)
    assert (decision["state"], decision["actions"], decision["files"]) == ("nothing", [], [])


@PROPERTY
@given(cases())
def test_everything_installed_is_held(case: tuple[Wanted, dict[str, Any]]) -> None:
    decision = decide(case[0], case[1], drivers.DATA)
    actions = [item["action"] for item in decision["actions"]]
    if "install_packages" in actions:
        assert actions.index("hold") > actions.index("install_packages")
        assert "unhold" not in actions or actions.index("unhold") < actions.index("install_packages")
