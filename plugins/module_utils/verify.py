"""Ask a host's services whether they really answer, and compare what they say with the plan."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from .errors import FleetfitError
from .gate import GateSpec, Talk, gate_of_release, read_credential, wait_ready
from .manifest import HostPaths, read_manifest
from .memory_account import run_terms
from .ownership import ENGINES
from .proof import proof_text
from .release import current_digest, read_settings
from .speed import is_impossible
from .switch import read_good
from .units import format_size

SCHEMA_VERSION = 1
# The roles' sections in the manifest, in the order in which their services depend on each other.
SERVICES = {"llama_cpp": "llama-server", "vllm": "vllm", "open_webui": "open-webui"}
PROBE_TIMEOUT_S = 10.0
# The log rounds to 0.01 MiB a line (ggml's "%8.2f MiB").
ROUNDING_BYTES = 64 * 1024

REMEDIES = {
    "loading": "Wait, and run fleetfit verify again; a larger verify_timeout_s waits longer.",
    "hung": "Restart it (systemctl restart {service}) and look at what it does:"
    " journalctl --namespace={service}.",
    "out_of_memory": "Something else takes its memory, or the plan is too tight: look at nvidia-smi and free,"
    " then plan again with fleetfit_replan=true, fewer fleetfit_slots or a smaller"
    " fleetfit_min_context_tokens.",
    "crashed": "Read journalctl --namespace={service} on the host, then run site.yml again: it goes back to"
    " the release before if this one does not start.",
    "port_in_use": "Stop the other program, or give the service another port.",
    "refused": "The credential on the host is not the service's: run site.yml again; for Open WebUI, the"
    " administrator's password was changed on the page, so put the new one into the secrets store.",
    "wrong_answer": "If the engine answers at all, the model may be damaged or too small for the question:"
    " look at the model's files, or set verify_prompt and verify_expected.",
    "wrong_settings": "Somebody started it with other arguments: run site.yml again.",
    "not_deployed": "Run site.yml for this host.",
    "wrong_model": "The engine runs something else than its release: run site.yml again.",
    "open_to_network": "Run site.yml again, which gives the service a loopback address; look for other"
    " programs on the port.",
    "more_memory": "The prediction was too small, and the margin pays for it: report it with this report.",
    "unreadable": "Run site.yml again.",
}


@dataclass
class Check:
    """One question and its verdict; ``code`` and ``remedy`` where it is not ok."""

    service: str
    name: str
    ok: bool
    message: str
    code: Optional[str] = None
    remedy: Optional[str] = None
    log_tail: list[str] = field(default_factory=list)


def failed(service: str, name: str, code: str, message: str, log_tail: Sequence[str] = ()) -> Check:
    """Return a check that failed, with the remedy that belongs to ``code``."""
    remedy = REMEDIES.get(code, REMEDIES["crashed"]).format(service=service)
    return Check(service, name, False, message, code, remedy, list(log_tail))


# --- memory ---

# The terms of the plan, and what each engine calls them in its log.
_TERMS = {
    "weights": ("model", "model_bytes", "lora"),
    "kv_cache": ("kv", "rs", "kv_bytes"),
    "compute": ("compute", "output"),
}


def _sum_terms(parts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    terms = dict.fromkeys(_TERMS, 0)
    for part in parts:
        for term, names in _TERMS.items():
            terms[term] += sum(int(part[name]) for name in names if isinstance(part.get(name), int))
    return terms


def compare_memory(deployment: Mapping[str, Any], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each device and one for the host: predicted and measured bytes, term by term.

    ``measured`` is what the engine logged (gate.measured_memory): ``CUDA<i>`` is the plan's device i,
    everything else of llama.cpp lies in the host's memory. ``difference_percent`` is measured over predicted
    minus 1, of the terms that the engine logs; ``ok`` says whether they stay within what was set aside for
    the engine: total without margin.
    """
    devices, host = run_terms(deployment)
    on_gpu = {
        name: terms for name, terms in measured.items() if name.startswith("CUDA") and name[4:].isdecimal()
    }
    rows = []
    for position, device in enumerate(devices):
        if "vllm" in measured and position > 0:
            break  # vLLM logs the first worker's figures; all workers are alike
        found = measured.get("vllm") if "vllm" in measured else on_gpu.get(f"CUDA{position}")
        if found:
            name = str(device.get("name") or device.get("id") or position)
            rows.append(_memory_row(name, device, [found]))
    # vLLM's figures are the host's where it ran on the CPU.
    elsewhere = {*on_gpu, *(["vllm"] if devices else [])}
    on_host = [terms for name, terms in measured.items() if name not in elsewhere]
    if on_host and host:
        rows.append(_memory_row("host", host, on_host))
    return rows


def _memory_row(
    device: str, predicted: Mapping[str, Any], found: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    wanted = {term: int(predicted.get(term) or 0) for term in _TERMS}
    terms = _sum_terms(found)
    if all("kv_tokens" in part for part in found):
        # vLLM fills what is free with KV cache: more than planned is what it should do.
        terms["kv_cache"] = min(terms["kv_cache"], wanted["kv_cache"])
    predicted_bytes, measured_bytes = sum(wanted.values()), sum(terms.values())
    # The margin is for what nobody predicts (other programs, fragmentation), not for known buffers;
    # what only the CUDA backend adds is in overhead (docs/contracts.md, section 4).
    set_aside = max(int(predicted.get("total") or 0) - int(predicted.get("margin") or 0), predicted_bytes)
    return {
        "device": device,
        "predicted": wanted,
        "measured": terms,
        "predicted_bytes": predicted_bytes,
        "measured_bytes": measured_bytes,
        "set_aside_bytes": set_aside,
        "difference_percent": round((measured_bytes / predicted_bytes - 1) * 100, 2)
        if predicted_bytes
        else None,
        "ok": measured_bytes <= set_aside + ROUNDING_BYTES,
    }


def check_memory(service: str, rows: Sequence[Mapping[str, Any]]) -> Check:
    """Return the verdict on the rows of compare_memory."""
    name = "memory within the plan"
    if not rows:
        return Check(service, name, True, "the engine's log of its start is gone: not compared")
    texts = [
        f"{row['device']}: predicted {format_size(row['predicted_bytes'])}, the engine's log says"
        f" {format_size(row['measured_bytes'])} ({row['difference_percent']:+.1f} %)"
        for row in rows
        if row["difference_percent"] is not None
    ]
    if all(row["ok"] for row in rows):
        return Check(service, name, True, "; ".join(texts))
    return failed(service, name, "more_memory", "; ".join(texts))


# --- speed ---


def speed_is_impossible(deployment: Mapping[str, Any], measured_tokens_per_s: Optional[float]) -> bool:
    """Return whether a measured speed is above what the planned devices' memory can deliver.

    Never where the engine runs on other hardware than the plan's (simulated GPUs), nor where the bandwidth of a
    part is assumed: then it is the assumption that is wrong.
    """
    if not measured_tokens_per_s or deployment.get("cpu_mapping") or _assumed_bandwidth(deployment):
        return False
    return is_impossible(measured_tokens_per_s, deployment.get("roofline_tokens_per_s"))


def check_speed(
    service: str, deployment: Mapping[str, Any], measured_tokens_per_s: Optional[float]
) -> Optional[Check]:
    """Return what the measured speed is beside the plan's; it never fails a host. None where either is not known.

    Above the roofline it is flagged: the measurement is wrong, or the card's bandwidth in the catalog is.
    """
    name = "speed beside the plan"
    expected, roofline = deployment.get("expected_tokens_per_s"), deployment.get("roofline_tokens_per_s")
    if not measured_tokens_per_s or not expected or not roofline or deployment.get("cpu_mapping"):
        return None
    text = (
        f"{measured_tokens_per_s:.1f} tokens/s measured, {expected:.1f} expected, {roofline:.1f} at most by memory"
        " bandwidth"
    )
    if speed_is_impossible(deployment, measured_tokens_per_s):
        text += (
            ": IMPOSSIBLE, so the measurement is wrong, or the bandwidth that the catalog has for the card"
            " (catalog/gpus.yml)"
        )
    elif is_impossible(measured_tokens_per_s, roofline):
        text += f": more than the bandwidth of RAM that was {_assumed_bandwidth(deployment)}"
    return Check(service, name, True, text)


def _assumed_bandwidth(deployment: Mapping[str, Any]) -> Optional[str]:
    """Return the source of the RAM's bandwidth where the plan counts on RAM and it was not measured."""
    source = (deployment.get("sources") or {}).get("ram_bandwidth")
    return source if isinstance(source, str) and source.startswith("assumed") else None


# --- what the engine says of itself ---


def engine_identity(
    props: Optional[Mapping[str, Any]], models: Optional[Mapping[str, Any]]
) -> dict[str, Optional[str]]:
    """Return what the engine's own API names: served model, model file, llama.cpp's quantization too."""
    data = (models or {}).get("data")
    first = data[0] if isinstance(data, list) and data and isinstance(data[0], Mapping) else {}
    path = (props or {}).get("model_path") or first.get("root")
    return {
        "served_model": str(first["id"]) if first.get("id") else None,
        "model_file": os.path.basename(str(path)) if path else None,
        "quantization": str((props or {})["model_ftype"]) if (props or {}).get("model_ftype") else None,
    }


def check_identity(
    service: str, identity: Mapping[str, Optional[str]], deployment: Mapping[str, Any]
) -> Check:
    """Return whether the engine names the plan's model file and served name."""
    name = "engine serves the plan's variant"
    said = ", ".join(f"{key} {value}" for key, value in identity.items() if value) or "nothing"
    settings = (deployment.get("cpu_mapping") or deployment).get("settings") or {}
    wanted_file, wanted_name = settings.get("model_file"), deployment.get("served_model_name")
    if wanted_name and identity["served_model"] != wanted_name:
        return failed(
            service, name, "wrong_model", f"the plan serves '{wanted_name}', the engine says: {said}"
        )
    # vLLM's model is a directory, named after the variant; of a release from before that is the link `model`.
    directory = identity["model_file"] if deployment.get("engine") == "vllm" else None
    if directory and directory not in ("model", deployment.get("variant")):
        return failed(
            service,
            name,
            "wrong_model",
            f"the plan runs the variant {deployment.get('variant')}, the engine says: {said}",
        )
    if wanted_file and identity["model_file"] and identity["model_file"] != os.path.basename(wanted_file):
        return failed(service, name, "wrong_model", f"the plan runs {wanted_file}, the engine says: {said}")
    return Check(service, name, True, f"{deployment.get('variant')}: the engine says {said}")


def _get_json(talk: Talk, path: str, token: str) -> Optional[dict[str, Any]]:
    try:
        status, data = talk.call("GET", path, token=token, timeout_s=PROBE_TIMEOUT_S)
        document = json.loads(data) if status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    return document if isinstance(document, dict) else None


# --- where it listens ---


def listening_addresses(port: int, tables: Sequence[str]) -> list[str]:
    """Return the addresses that listen on TCP ``port``, from texts like /proc/net/tcp and tcp6."""
    found = []
    for table in tables:
        for line in table.splitlines()[1:]:
            columns = line.split()
            # 0A is TCP_LISTEN (include/net/tcp_states.h); addresses are words in the host's byte order.
            if len(columns) < 4 or columns[3] != "0A" or int(columns[1].rsplit(":", 1)[1], 16) != port:
                continue
            words = bytes.fromhex(columns[1].rsplit(":", 1)[0])
            packed = b"".join(
                struct.pack("=I", value) for value in struct.unpack(f">{len(words) // 4}I", words)
            )
            family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
            found.append(socket.inet_ntop(family, packed))
    return sorted(found)


def check_listeners(service: str, port: int, addresses: Sequence[str]) -> Check:
    """Return whether everything on ``port`` listens on loopback."""
    name = "listens on loopback alone"
    outside = [a for a in addresses if not (a.startswith("127.") or a in ("::1", "::ffff:127.0.0.1"))]
    if outside:
        return failed(service, name, "open_to_network", f"port {port} is open on {', '.join(outside)}")
    return Check(service, name, True, f"port {port} on {', '.join(addresses) or 'no address'}")


def _tables() -> list[str]:
    texts = []
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(path, encoding="ascii") as stream:
                texts.append(stream.read())
        except OSError:
            continue  # a kernel without IPv6
    return texts


# --- a host ---


@dataclass(frozen=True)
class Question:
    """What every model is asked: ``expected`` is a regular expression that the answer must contain."""

    prompt: str
    expected: str
    timeout_s: float


def verify_host(paths: HostPaths, question: Question) -> dict[str, Any]:
    """Ask every service in the host's manifest; return the host's report.

    ``state`` is ``ok``, ``failed`` or ``not_deployed`` (nothing of ours is there to be asked).
    """
    try:
        sections = (read_manifest(paths.manifest()) or {}).get("sections", {})
    except FleetfitError as error:
        return _report([failed("host", "manifest", "unreadable", str(error))], {}, {})
    plan = sections.get("plan") or {}
    deployments = plan.get("deployments") or [{}]
    deployment = deployments[0]
    checks: list[Check] = []
    services: dict[str, Any] = {}
    for section, service in SERVICES.items():
        # An engine that gave way to another stays installed; the plan says which one serves.
        gave_way = service in ENGINES and section != deployment.get("engine", section)
        if section in sections and not gave_way:
            services[service] = _verify_service(paths, section, service, deployment, question, checks)
    return _report(checks, services, deployment)


def _report(
    checks: Sequence[Check], services: Mapping[str, Any], deployment: Mapping[str, Any]
) -> dict[str, Any]:
    engine: Mapping[str, Any] = next(
        (services[name] for name in ("llama-server", "vllm") if name in services), {}
    )
    ok = bool(checks) and all(check.ok for check in checks)
    return {
        "schema_version": SCHEMA_VERSION,
        "state": "ok" if ok else "failed" if checks else "not_deployed",
        "simulated_gpus": bool(deployment.get("cpu_mapping")),
        "engine": deployment.get("engine"),
        "model": deployment.get("model"),
        "variant": deployment.get("variant"),
        "answer": engine.get("answer"),
        "tokens_per_s": engine.get("tokens_per_s"),
        "expected_tokens_per_s": deployment.get("expected_tokens_per_s"),
        "roofline_tokens_per_s": deployment.get("roofline_tokens_per_s"),
        "speed_is_impossible": speed_is_impossible(deployment, engine.get("tokens_per_s")),
        "memory": engine.get("memory", []),
        "proof": engine.get("proof"),
        "services": dict(services),
        "checks": [dataclasses.asdict(check) for check in checks],
    }


def _verify_service(
    paths: HostPaths,
    section: str,
    service: str,
    deployment: Mapping[str, Any],
    question: Question,
    checks: list[Check],
) -> dict[str, Any]:
    """Append the checks of one service; return its part of the report."""
    digest = current_digest(paths, service)
    if digest is None:
        checks.append(failed(service, "is deployed", "not_deployed", f"{service} has no current release"))
        return {}
    try:
        spec = dataclasses.replace(
            gate_of_release(paths, service, digest),
            question=question.prompt,
            expect=question.expected or None,
            timeout_s=question.timeout_s,
            max_timeout_s=0.0,
        )
        key = read_credential(spec.credential)
    except FleetfitError as error:
        checks.append(failed(service, "is deployed", "unreadable", str(error)))
        return {"release": digest}
    result = wait_ready(spec)
    through = "through Open WebUI as its administrator" if section == "open_webui" else "through the engine"
    name = f"answers {through}"
    if not result["ok"]:
        checks.append(failed(service, name, result["state"], result["message"], result["log_tail"]))
        return {"release": digest, "state": result["state"]}
    speed = f", {result['tokens_per_s']:.1f} tokens/s" if result["tokens_per_s"] else ""
    checks.append(Check(service, name, True, f"'{_short(result['answer'])}'{speed}"))
    checks.append(check_listeners(service, spec.port, listening_addresses(spec.port, _tables())))
    report = {
        "release": digest,
        "state": "ready",
        "answer": result["answer"],
        "first_token_s": result["first_token_s"],
        "tokens_per_s": result["tokens_per_s"],
        "port": spec.port,
    }
    if section != "open_webui":
        report.update(_ask_engine(spec, key, section, service, deployment, checks))
        report["settings"] = read_settings(paths, service, digest)
        report["proof"] = _recorded_proof(paths, service, digest)
        # A release that was good before there were proofs is not bad: it is said, and proven at its next start.
        checks.append(Check(service, "memory holds a long prompt", True, proof_text(report["proof"])))
        speed_check = check_speed(service, deployment, result["tokens_per_s"])
        if speed_check is not None:
            checks.append(speed_check)
        report["memory"] = compare_memory(deployment, result["measured"])
        checks.append(check_memory(service, report["memory"]))
    return report


def _ask_engine(
    spec: GateSpec,
    key: str,
    section: str,
    service: str,
    deployment: Mapping[str, Any],
    checks: list[Check],
) -> dict[str, Any]:
    talk = Talk(spec, key)
    props = _get_json(talk, "/props", key) if section == "llama_cpp" else None
    identity = engine_identity(props, _get_json(talk, "/v1/models", key))
    checks.append(check_identity(service, identity, deployment))
    return {"says": identity}


def _recorded_proof(paths: HostPaths, service: str, digest: str) -> Optional[dict[str, Any]]:
    try:
        proof = read_good(paths, service)["proofs"].get(digest)
    except (FleetfitError, OSError):
        return None
    return dict(proof) if proof else None


def _short(text: Any, length: int = 80) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def sentence(host: str, report: Mapping[str, Any], *, log_lines: int = 8) -> str:
    """Return what went wrong on a host, with the last journal lines and what to do, for people."""
    if report["state"] == "not_deployed":
        return f"{host}: nothing of fleetfit is deployed here. {REMEDIES['not_deployed']}"
    parts = []
    for check in report["checks"]:
        if check["ok"]:
            continue
        parts.append(f"{host}: {check['service']} ({check['name']}): {check['code']}: {check['message']}.")
        if check["log_tail"]:
            parts.append("Its last journal lines:")
            parts += [f"    {line}" for line in check["log_tail"][-log_lines:]]
        parts.append(f"What to do: {check['remedy']}")
    return "\n".join(parts)
