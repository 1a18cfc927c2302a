"""Which files of a model can run code when they are loaded: refused, unless the catalog's variant waives it.

Pickled weights run what they contain (Python's pickle documentation: never unpickle untrusted data); a
repository's own Python is run where its configuration has ``auto_map`` and remote code is trusted. Safetensors
and GGUF hold data only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .errors import FleetfitError

PICKLE_WEIGHTS = "pickle_weights"
REMOTE_CODE = "remote_code"
# What a variant of the catalog can waive, each with its reason, and what people call it.
WAIVERS: Mapping[str, str] = {PICKLE_WEIGHTS: "pickled weights", REMOTE_CODE: "code of its own"}
# What torch.save and its kin are called on model hubs.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
CODE_SUFFIXES = (".py",)
# config.json, tokenizer_config.json, processor_config.json …: where transformers looks for auto_map.
CONFIG_SUFFIX = "config.json"
# Real ones have some kilobytes; a bigger one is not read into memory on a host.
MAX_CONFIG_BYTES = 16 << 20


def waiver_needed(name: str) -> str:
    """Return which waiver a file needs by its name; empty for none."""
    folded = name.casefold()
    if folded.endswith(PICKLE_SUFFIXES):
        return PICKLE_WEIGHTS
    return REMOTE_CODE if folded.endswith(CODE_SUFFIXES) else ""


def check_names(names: Sequence[str], waivers: Sequence[str], *, model: str, origin: str) -> None:
    """Raise FleetfitError ``unsafe_model_file`` where a list of files has one that is not waived."""
    for waiver, what in WAIVERS.items():
        found = sorted(name for name in names if waiver_needed(name) == waiver)
        if found and waiver not in waivers:
            raise _refusal(model, what, ", ".join(found), waiver, origin)


def check_directory(directory: str, waivers: Sequence[str], *, model: str) -> list[str]:
    """Return the files that were looked at; raises ``unsafe_model_file`` for what vLLM would find there.

    Whatever brought the files: also those that no plan names count, since an engine is given the directory.
    """
    names = sorted(_files(directory))
    check_names(names, waivers, model=model, origin=directory)
    if REMOTE_CODE not in waivers:
        for name in names:
            if name.endswith(CONFIG_SUFFIX) and _names_code(os.path.join(directory, name)):
                raise _refusal(model, WAIVERS[REMOTE_CODE], f"auto_map in {name}", REMOTE_CODE, directory)
    return names


def _refusal(model: str, what: str, found: str, waiver: str, origin: str) -> FleetfitError:
    return FleetfitError(
        f"{model} has {what} ({found}), which runs with the engine's rights when it is loaded: {origin}.",
        code="unsafe_model_file",
        remedy=f"Use a repository with safetensors or GGUF alone. For one that you have read, the variant's"
        f" `waivers: {{{waiver}: <why>}}` in your catalog overlay allows it at its pinned revision.",
    )


def _files(directory: str) -> Iterator[str]:
    for base, _directories, names in os.walk(directory):
        for name in names:
            yield os.path.relpath(os.path.join(base, name), directory)


def _names_code(path: str) -> bool:
    """Return whether a configuration names classes of the repository's own; raises for one that is no JSON."""
    if os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise _unreadable(path, f"it has more than {MAX_CONFIG_BYTES} bytes")
    try:
        with open(path, encoding="utf-8") as stream:
            return _has_auto_map(json.load(stream))
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None


def _unreadable(path: str, why: str) -> FleetfitError:
    return FleetfitError(
        f"{path} is not a configuration that can be read: {why}.",
        code="unsafe_model_file",
        remedy="Remove the file and run it again: it is brought anew.",
    )


def _has_auto_map(content: Any) -> bool:
    if isinstance(content, dict):
        return bool(content.get("auto_map")) or any(_has_auto_map(value) for value in content.values())
    return isinstance(content, list) and any(_has_auto_map(value) for value in content)
