"""Promises of vLLM's unit where there are real GPUs, which no test host has: rendered here, not run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest

ROLE = Path(__file__).parents[2] / "roles" / "vllm"
UUIDS = ["GPU-aaaa", "GPU-bbbb"]
BASE: dict[str, Any] = {
    "ansible_managed": "Ansible managed",
    "vllm_device_wait_s": 60,
    "__vllm_root": "/opt/fleetfit/vllm",
    "__vllm_user": "fleetfit-vllm",
    "__vllm_service": "vllm",
    "__vllm_api_key_path": "/etc/fleetfit/credentials/vllm.api-key",
    "__vllm_helper": "/usr/bin/python3 /opt/fleetfit/libexec/current/fleetfit-host.pyz",
    "__vllm_drop_in_directory": "/usr/local/lib/systemd/system/vllm.service.d",
    "__vllm_cache": "/var/cache/fleetfit/vllm/0123456789abcdef",
}
ON_GPUS = {
    **BASE,
    "__vllm_mapping": None,
    "__vllm_devices": UUIDS,
    "__vllm_settings": {"startup_free_bytes": [111, 222]},
    "__vllm_host_memory": {},
}
ON_CPU = {
    **BASE,
    "__vllm_mapping": {"settings": {}},
    "__vllm_devices": [],
    "__vllm_settings": {"startup_free_bytes": []},
    "__vllm_host_memory": {"total": 3000, "margin": 1000},
}


def render(name: str, variables: dict[str, Any]) -> str:
    """Return a template of the role as Ansible renders it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROLE / "templates"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - a unit file, not a page
    )
    environment.filters["comment"] = lambda text: f"# {text}"
    environment.filters["basename"] = lambda path: path.rpartition("/")[2]
    return environment.get_template(name).render(variables)


def test_the_planned_gpus_are_waited_for_in_plan_order_with_their_bytes() -> None:
    lines = render("unit.conf.j2", ON_GPUS).splitlines()
    nodes, check = (line for line in lines if line.startswith("ExecStartPre="))
    assert check.endswith("check-devices --wait-s 60 GPU-aaaa=111 GPU-bbbb=222")
    # Before the check, as root, and no reason to fail: the driver's own packages make the nodes on most hosts.
    assert nodes == "ExecStartPre=-+/usr/bin/nvidia-modprobe -c0 -u"
    assert "DeviceAllow=char-nvidia* rwm" in lines
    assert "PrivateDevices=no" in lines
    assert not any(line.startswith("MemoryMax=") for line in lines)


def test_cudas_memory_module_is_there_before_the_unit_looks_its_devices_up() -> None:
    loaded = render("modules-load.conf.j2", ON_GPUS).splitlines()
    assert [line for line in loaded if not line.startswith("#")] == ["nvidia-uvm"]
    after = [line for line in render("vllm.service.j2", ON_GPUS).splitlines() if line.startswith("After=")]
    assert "systemd-modules-load.service" in " ".join(after)


def test_without_gpus_memory_is_limited_and_no_device_is_opened() -> None:
    lines = render("unit.conf.j2", ON_CPU).splitlines()
    assert "MemoryMax=2200" in lines
    assert not any(line.startswith(("ExecStartPre=", "DeviceAllow=", "PrivateDevices=")) for line in lines)


@pytest.mark.parametrize("variables", [ON_GPUS, ON_CPU], ids=["GPUs", "CPU"])
def test_caches_are_the_environments_own(variables: dict[str, Any]) -> None:
    assert "CacheDirectory=fleetfit/vllm/0123456789abcdef" in render("unit.conf.j2", variables)


def test_a_stop_gives_the_engine_time_to_end_and_no_more_and_kernels_can_be_compiled() -> None:
    lines = render("vllm.service.j2", ON_GPUS).splitlines()
    for line in ("KillMode=mixed", "StartLimitBurst=4", "Conflicts=llama-server.service"):
        assert line in lines
    stop = next(line for line in lines if line.startswith("TimeoutStopSec="))
    # A switch with users is without answers for so long, beside the cold start.
    assert 10 <= int(stop.partition("=")[2]) <= 20
    assert not any(line.startswith("MemoryDenyWriteExecute=") for line in lines)
    families = next(line for line in lines if line.startswith("RestrictAddressFamilies="))
    assert "AF_NETLINK" in families
    assert "SystemCallFilter=@system-service @resources" in lines


def test_an_engine_that_loads_for_minutes_and_dies_does_not_do_so_for_ever() -> None:
    """As many starts as are allowed, each as long as a large model loads, happen within the interval."""
    lines = render("vllm.service.j2", ON_GPUS).splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    loading_s = 600
    assert int(values["StartLimitIntervalSec"]) > int(values["StartLimitBurst"]) * (
        loading_s + int(values["RestartSec"])
    )


@pytest.mark.parametrize("variables", [ON_GPUS, ON_CPU], ids=["GPUs", "CPU"])
def test_exposure_is_at_most_two(tmp_path: Path, variables: dict[str, Any]) -> None:
    drop_in = render("unit.conf.j2", variables).partition("[Service]")[2]
    unit = render("vllm.service.j2", variables).replace("\n[Install]", f"{drop_in}\n[Install]")
    path = tmp_path / "vllm.service"
    path.write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20", str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-600:] + done.stderr
