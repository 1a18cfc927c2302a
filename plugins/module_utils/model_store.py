"""Where a plan's model files come from and go to, and which models on a host nothing refers to any more."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import FleetfitError
from .lora import link_name
from .manifest import safe_to_delete
from .model_files import check_names

MODELS = "/var/lib/fleetfit/models"
RELEASES = "/opt/fleetfit"


def variant_directory(model: str, variant: str) -> str:
    """Return the directory of one variant of a model on every host."""
    return f"{MODELS}/{model}/{variant}"


def check_pinned(deployment: Mapping[str, Any]) -> None:
    """Raise FleetfitError unless every file has a size and a sha256, and the repository, if any, a commit."""
    unpinned = [
        file["name"] for file in deployment["files"] if not file.get("sha256") or not file.get("size")
    ]
    revision_missing = deployment.get("repository") and not deployment.get("revision")
    if not deployment["files"] or unpinned or revision_missing:
        what = (
            ", ".join(unpinned)
            if unpinned
            else "its revision"
            if deployment["files"]
            else "its list of files"
        )
        raise FleetfitError(
            f"The model {deployment['model']} ({deployment['variant']}) is not pinned: {what}"
            " has no checksum in the catalog.",
            code="model_not_pinned",
            remedy=f"Run `fleetfit catalog pin {deployment['model']}` once and commit what it writes.",
        )


def model_artifacts(
    deployment: Mapping[str, Any], *, sources: Sequence[Mapping[str, Any]], hub: bool, endpoint: str
) -> list[dict[str, Any]]:
    """Return the artifacts (contracts.md §6) of a plan's deployment.

    ``sources`` are bases tried before the hub, each with ``type`` file (``path``, ``location``)
    or http (``url``); below a base a file is ``<model>/<variant>/<name>``, and an adapter's is
    ``<model>/<directory>/<name>``. Raises FleetfitError for a model that is not pinned, and where there is
    no source at all; a model without a repository comes from ``sources`` alone.
    """
    check_pinned(deployment)
    check_names(
        [file["name"] for file in deployment["files"]],
        deployment.get("waivers") or (),
        model=deployment["model"],
        origin="the plan",
    )
    in_hub = hub and bool(deployment.get("repository"))
    if not sources and not in_hub:
        raise FleetfitError(
            f"There is no source for the model {deployment['model']}.",
            code="no_source",
            remedy="Set model_store_sources"
            + (
                ", or model_store_hub to true." if deployment.get("repository") else ": it has no repository."
            ),
        )
    artifacts = []
    for file in deployment["files"]:
        places = _places(sources, deployment["model"], deployment["variant"], file["name"])
        if in_hub:
            places.append(
                {
                    "type": "hub",
                    "repository": deployment["repository"],
                    "revision": deployment["revision"],
                    "filename": file["name"],
                    "endpoint": endpoint,
                }
            )
        artifacts.append(_artifact(deployment["model"], deployment["variant"], file, places))
    for adapter in deployment.get("adapters") or ():
        artifacts += _adapter_artifacts(deployment["model"], adapter, sources, hub=hub, endpoint=endpoint)
    return artifacts


def _adapter_artifacts(
    model: str, adapter: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], *, hub: bool, endpoint: str
) -> list[dict[str, Any]]:
    own = adapter["source"]
    artifacts = []
    for file in adapter["files"]:
        places = _places(sources, model, adapter["directory"], file["name"])
        if own["type"] == "http":
            places.append({"type": "http", "url": f"{own['url']}/{file['name']}"})
        elif own["type"] == "file":
            path = f"{own['path']}/{file['name']}"
            places.append({"type": "file", "path": path, "location": own["location"]})
        elif hub:
            places.append({**own, "filename": file["name"], "endpoint": endpoint})
        if not places:
            raise FleetfitError(
                f"There is no source for the LoRA adapter {adapter['name']}.",
                code="no_source",
                remedy="Set model_store_sources, or model_store_hub to true.",
            )
        artifact = _artifact(model, adapter["directory"], file, places)
        artifacts.append({**artifact, "name": f"{adapter['name']}/{file['name']}"})
    return artifacts


def _places(
    sources: Sequence[Mapping[str, Any]], model: str, directory: str, name: str
) -> list[dict[str, Any]]:
    below = f"{model}/{directory}/{name}"
    places: list[dict[str, Any]] = []
    for source in sources:
        if source["type"] == "http":
            places.append({"type": "http", "url": f"{source['url'].rstrip('/')}/{below}"})
        else:
            path = f"{source['path'].rstrip('/')}/{below}"
            places.append({"type": "file", "path": path, "location": source["location"]})
    return places


def _artifact(
    model: str, directory: str, file: Mapping[str, Any], places: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "name": file["name"],
        "size": file["size"],
        "sha256": file["sha256"],
        "dest": f"{variant_directory(model, directory)}/{file['name']}",
        "owner": "root",
        "group": "fleetfit-models",
        "mode": "0640",
        "sources": places,
    }


def adapter_directories(deployment: Mapping[str, Any]) -> dict[str, str]:
    """Return the directories of a deployment's LoRA adapters under the names of a release's links to them."""
    return {
        link_name(adapter["name"]): variant_directory(deployment["model"], adapter["directory"])
        for adapter in deployment.get("adapters") or ()
    }


def _directories(path: str) -> list[str]:
    try:
        return sorted(entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def referenced_directories(root: str = "/") -> set[str]:
    """Return the model directories that the links of any release on this host point to, as host paths."""
    referenced = set()
    for service in _directories(os.path.join(root, RELEASES.lstrip("/"))):
        for release in _directories(os.path.join(service, "releases")):
            for entry in os.scandir(release):
                if entry.is_symlink():
                    referenced.add(os.path.normpath(os.readlink(entry.path)))
    return referenced


def unreferenced_variants(keep: Sequence[str], root: str = "/") -> list[str]:
    """Return the variant directories (host paths) that neither a release nor ``keep`` (host paths) names."""
    kept = referenced_directories(root) | {os.path.normpath(path) for path in keep}
    found = []
    for model in _directories(os.path.join(root, MODELS.lstrip("/"))):
        for variant in _directories(model):
            path = "/" + os.path.relpath(variant, root)
            if path not in kept:
                found.append(path)
    return found


def remove_variants(paths: Sequence[str], root: str = "/") -> None:
    """Delete variant directories, and a model's directory that has become empty; refuse any other path."""
    for path in paths:
        real = os.path.join(root, path.lstrip("/"))
        if os.path.dirname(os.path.dirname(path)) != MODELS or not safe_to_delete(real, root=root):
            raise FleetfitError(
                f"{path} is not a model below {MODELS} and is not deleted.",
                code="unsafe_path",
                remedy="Report this: a role must not ask for it.",
            )
        shutil.rmtree(real)
        if not os.listdir(os.path.dirname(real)):
            os.rmdir(os.path.dirname(real))
