"""The policy: what a host's owner wants from a plan, read from play variables or from the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

from .catalog_entry import QUALITY_TIERS, TIER_OF_SCHEME, tier_of_scheme
from .errors import FleetfitError
from .lora import Adapter, adapters_from_variable

SCHEMA_VERSION = 1
PREFERENCES = ("quality", "speed", "context")
ENGINE_CHOICES = ("auto", "llama_cpp", "vllm")
# Every variable that begins with fleetfit_: a name close to one of them, but none of them, is a slip of the pen.
VARIABLE_NAMES = frozenset(
    {
        "fleetfit_accepted_licences",
        "fleetfit_batch",
        "fleetfit_catalog_dirs",
        "fleetfit_cpu_threads",
        "fleetfit_engine",
        "fleetfit_kv_type",
        "fleetfit_lora_adapters",
        "fleetfit_min_context_tokens",
        "fleetfit_min_quality_tier",
        "fleetfit_min_tokens_per_s",
        "fleetfit_model",
        "fleetfit_open_webui",
        "fleetfit_prefer",
        "fleetfit_probe_root",
        "fleetfit_proof_s",
        "fleetfit_proxy",
        "fleetfit_records_dir",
        "fleetfit_release_hold",
        "fleetfit_replan",
        "fleetfit_report_dir",
        "fleetfit_report_path",
        "fleetfit_secrets_dir",
        "fleetfit_simulated_gpus",
        "fleetfit_slots",
        "fleetfit_use_gpus",
        "fleetfit_vram_reserve_bytes",
    }
)
# As alike as a name with a letter left out, doubled or changed, or with its words in another form.
LIKENESS = 0.85
PROXY_KEYS = ("http", "https", "no_proxy")
# llama-server's -ctk/-ctv choices; fp8 is vLLM's.
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "fp8")
# llama-server refuses more parallel sequences than this (LLAMA_MAX_SEQ in its source).
MAX_SLOTS = 256
MAX_CONTEXT_TOKENS = 1 << 24
# ggml takes no more threads in one pool (GGML_MAX_N_THREADS in ggml.h).
MAX_CPU_THREADS = 512


@dataclass(frozen=True)
class Policy:
    """What the plan must satisfy; lengths in tokens, sizes in bytes.

    ``min_context_tokens`` is per slot and is the context served, exactly. ``cpu_threads`` is how many of the host's
    threads the engine computes with; 0: all. ``replan`` is about this run only
    and is no part of the recorded policy.
    """

    model: str
    min_context_tokens: int = 8192
    slots: int = 2
    prefer: str = "quality"
    min_quality_tier: str = "Q4_K_M"
    min_tokens_per_s: float = 0.0
    engine: str = "auto"
    kv_type: str = "f16"
    accepted_licences: tuple[str, ...] = ()
    vram_reserve_bytes: int = 0
    cpu_threads: int = 0
    use_gpus: bool = True
    open_webui: bool = False
    simulated_gpus: bool = False
    accepted_problems: tuple[str, ...] = ()
    lora_adapters: tuple[Adapter, ...] = ()
    replan: bool = False

    @property
    def min_tier_rank(self) -> int:
        """Return the position of the lowest tier allowed; 0 is best."""
        return QUALITY_TIERS.index(self.min_quality_tier)

    def as_dict(self) -> dict[str, Any]:
        """Return the policy as the plan records it (catalog/schemas/policy.json)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "min_context_tokens": self.min_context_tokens,
            "slots": self.slots,
            "prefer": self.prefer,
            "min_quality_tier": self.min_quality_tier,
            "min_tokens_per_s": self.min_tokens_per_s,
            "engine": self.engine,
            "kv_type": self.kv_type,
            "accepted_licences": list(self.accepted_licences),
            "vram_reserve_bytes": self.vram_reserve_bytes,
            "cpu_threads": self.cpu_threads,
            "use_gpus": self.use_gpus,
            "open_webui": self.open_webui,
            "simulated_gpus": self.simulated_gpus,
            "accepted_problems": list(self.accepted_problems),
            # Where the files come from is no part of it: another mirror is not another policy.
            "lora_adapters": [f"{item.name} {item.format} {item.digest}" for item in self.lora_adapters],
        }


def policy_from_variables(variables: Mapping[str, Any]) -> Policy:
    """Return the policy that the play variables ``fleetfit_*`` state.

    Raises :class:`FleetfitError`: ``model_not_named`` without ``fleetfit_model``, ``bad_policy`` naming the
    variable and its value.
    """
    model = variables.get("fleetfit_model")
    if model is None or (isinstance(model, str) and not model.strip()):
        raise FleetfitError(
            "No model is named.",
            code="model_not_named",
            remedy="Set fleetfit_model, e.g. to qwen2.5-7b-instruct; `fleetfit catalog list` shows all.",
        )
    if not isinstance(model, str):
        raise _bad("fleetfit_model", model, "the id of a catalog entry")
    return Policy(
        model=model.strip(),
        min_context_tokens=_whole(variables, "fleetfit_min_context_tokens", 8192, 1, MAX_CONTEXT_TOKENS),
        slots=_whole(variables, "fleetfit_slots", 2, 1, MAX_SLOTS),
        prefer=_choice(variables, "fleetfit_prefer", "quality", PREFERENCES),
        min_quality_tier=_tier(variables),
        min_tokens_per_s=_number(variables, "fleetfit_min_tokens_per_s", 0.0),
        engine=_choice(variables, "fleetfit_engine", "auto", ENGINE_CHOICES),
        kv_type=_choice(variables, "fleetfit_kv_type", "f16", KV_TYPES),
        accepted_licences=_names(variables, "fleetfit_accepted_licences"),
        vram_reserve_bytes=_whole(variables, "fleetfit_vram_reserve_bytes", 0, 0, 1 << 50),
        cpu_threads=_whole(variables, "fleetfit_cpu_threads", 0, 0, MAX_CPU_THREADS),
        use_gpus=_boolean(variables, "fleetfit_use_gpus", True),
        open_webui=_boolean(variables, "fleetfit_open_webui", False),
        simulated_gpus=_boolean(variables, "fleetfit_simulated_gpus", False),
        accepted_problems=_names(variables, "host_baseline_accepted_problems"),
        lora_adapters=adapters_from_variable(variables.get("fleetfit_lora_adapters")),
        replan=_boolean(variables, "fleetfit_replan", False),
    )


def check_variable_names(names: Iterable[str]) -> None:
    """Raise ``unknown_variable`` for a ``fleetfit_`` name that is all but one of ours, and would be ignored.

    A name that resembles none is the inventory's own and is left alone.
    """
    for name in sorted(names):
        if not name.startswith("fleetfit_") or name in VARIABLE_NAMES:
            continue
        near = difflib.get_close_matches(name, sorted(VARIABLE_NAMES), n=1, cutoff=LIKENESS)
        if near:
            raise FleetfitError(
                f"The variable {name} is not one of fleetfit's and would be ignored.",
                code="unknown_variable",
                remedy=f"Write {near[0]}, or give your own variable a name that does not resemble it.",
            )


def check_shared_variables(variables: Mapping[str, Any]) -> None:
    """Raise ``bad_policy`` for a variable of all roles that is not what they take; absent ones are None.

    A proxy's address can hold a password, so it is never shown.
    """
    proxy = variables.get("fleetfit_proxy")
    if proxy is not None:
        wanted = f"a mapping with {', '.join(PROXY_KEYS)}"
        if not isinstance(proxy, Mapping):
            raise _bad_proxy(f"fleetfit_proxy is {_kind(proxy)}", wanted)
        for key, value in proxy.items():
            if key not in PROXY_KEYS:
                raise _bad_proxy(f"fleetfit_proxy has the key {key!r}", wanted)
            if value is not None and not isinstance(value, str):
                raise _bad_proxy(f"fleetfit_proxy.{key} is {_kind(value)}", "a text")
            if value and key != "no_proxy" and "://" not in value:
                raise _bad_proxy(
                    f"fleetfit_proxy.{key} has no scheme", "an address such as http://proxy.example:3128"
                )
    _number(variables, "fleetfit_proof_s", 0.0)
    _boolean(variables, "fleetfit_release_hold", True)
    directory = variables.get("fleetfit_secrets_dir")
    if directory is not None and (not isinstance(directory, str) or not directory):
        raise _bad("fleetfit_secrets_dir", directory, "a directory on the controller")


def _kind(value: Any) -> str:
    """Return what a value is, in a user's words: Ansible's own types have other names."""
    for kind, words in ((bool, "true or false"), (str, "a text"), (int, "a number"), (float, "a number")):
        if isinstance(value, kind):
            return words
    return "a mapping" if isinstance(value, Mapping) else "a list"


def _bad_proxy(what: str, wanted: str) -> FleetfitError:
    return FleetfitError(
        f"{what}; it must be {wanted}.", code="bad_policy", remedy="Correct fleetfit_proxy in the inventory."
    )


def check_min_context(policy: Policy, native_tokens: int, max_tokens: int, model: str) -> None:
    """Raise ``context_above_limit`` where the policy asks for more context than the model supports at all."""
    if policy.min_context_tokens <= max_tokens:
        return
    extended = f", {max_tokens} with YaRN" if max_tokens > native_tokens else ""
    raise FleetfitError(
        f"A context of {policy.min_context_tokens} tokens is asked for (fleetfit_min_context_tokens), but {model} "
        f"supports {native_tokens} tokens{extended}.",
        code="context_above_limit",
        remedy=f"Ask for at most {max_tokens} tokens, or choose a model with a longer context.",
    )


def _bad(name: str, value: Any, wanted: str) -> FleetfitError:
    return FleetfitError(
        f"{name} is {value!r}; it must be {wanted}.",
        code="bad_policy",
        remedy=f"Correct {name} in the inventory or on the command line.",
    )


def _number(variables: Mapping[str, Any], name: str, default: float) -> float:
    value = variables.get(name)
    if value is None:
        return default
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _bad(name, value, "a number, zero or more") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise _bad(name, value, "a number, zero or more")
    return float(value)


def _whole(variables: Mapping[str, Any], name: str, default: int, minimum: int, maximum: int) -> int:
    value = variables.get(name)
    if value is None:
        return default
    wanted = f"a whole number from {minimum} to {maximum}"
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            raise _bad(name, value, wanted) from None
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise _bad(name, value, wanted)
    return int(value)


def _choice(variables: Mapping[str, Any], name: str, default: str, choices: tuple[str, ...]) -> str:
    value = variables.get(name)
    if value is None:
        return default
    if not isinstance(value, str) or value not in choices:
        raise _bad(name, value, f"one of {', '.join(choices)}")
    return str(value)


def _boolean(variables: Mapping[str, Any], name: str, default: bool) -> bool:
    value: Optional[Any] = variables.get(name)
    if value is None:
        return default
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise _bad(name, value, "true or false")


def _names(variables: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = variables.get(name)
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise _bad(name, value, "a list of names")
    return tuple(sorted({str(item) for item in value}))


def _tier(variables: Mapping[str, Any]) -> str:
    name = "fleetfit_min_quality_tier"
    value = variables.get(name)
    if value is None:
        return "Q4_K_M"
    known = (*QUALITY_TIERS, *TIER_OF_SCHEME)
    if not isinstance(value, str) or value not in known:
        raise _bad(name, value, f"one of {', '.join(QUALITY_TIERS)}")
    return value if value in QUALITY_TIERS else tier_of_scheme(value)
