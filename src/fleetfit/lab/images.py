"""Debian images for the lab, made with mmdebstrap from this machine's own apt sources."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from .console import step
from .paths import cache_root, checkout_root, locked
from .process import output, run

REPOSITORY = "localhost/fleetfit-lab"
# Raised when the way images are made changes in a way that the recipe does not show.
BUILDER_VERSION = 1


@dataclass(frozen=True)
class AptSource:
    """One line of apt sources: where packages of one suite come from."""

    uri: str
    suite: str
    component: str

    def line(self) -> str:
        """Return the source as apt's one-line format."""
        return f"deb {self.uri} {self.suite} {self.component}"


def parse_sources(index_targets: str) -> list[AptSource]:
    """Return the sources in the output of ``apt-get indextargets`` (``uri suite component`` a line)."""
    found: dict[AptSource, None] = {}
    for line in index_targets.splitlines():
        fields = line.split()
        if len(fields) == 3:
            found[AptSource(fields[0].rstrip("/"), fields[1], fields[2])] = None
    return list(found)


def sources_for_suite(
    sources: Sequence[AptSource], machine_suite: str, suite: str, components: Sequence[str] = ("main",)
) -> list[AptSource]:
    """Return Debian's own sources of a machine on ``machine_suite``, for another ``suite`` of Debian.

    Only where ``main`` of the suite itself, its updates and its security archive come from counts: other
    repositories of the machine have no place in a lab host. ``components`` are taken from there.
    """
    kinds = ("", "-updates", "-security")
    wanted = {f"{machine_suite}{kind}": f"{suite}{kind}" for kind in kinds}
    result: dict[AptSource, None] = {}
    for source in sources:
        if source.component == "main" and source.suite in wanted:
            for component in components:
                result[AptSource(source.uri, wanted[source.suite], component)] = None
    return list(result)


def machine_codename() -> str:
    """Return VERSION_CODENAME of this machine's os-release, or an empty string."""
    release = Path("/etc/os-release")
    for line in release.read_text().splitlines() if release.exists() else []:
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    return ""


def find_sources(suite: str, components: Sequence[str] = ("main",)) -> list[AptSource]:
    """Return apt sources for a Debian suite from FLEETFIT_DEBIAN_MIRROR or this machine's apt.

    Raises FleetfitError ``debian_sources_missing`` where neither has any.
    """
    mirror = os.environ.get("FLEETFIT_DEBIAN_MIRROR")
    if mirror:
        suites = (suite, f"{suite}-updates")
        return [AptSource(mirror.rstrip("/"), name, part) for name in suites for part in components]
    form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    targets = output(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"], what="read apt's sources"
    )
    found = sources_for_suite(parse_sources(targets), machine_codename(), suite, components)
    if not found:
        raise FleetfitError(
            f"This machine's apt sources name no Debian archive to make a {suite} image from.",
            code="debian_sources_missing",
            remedy="Set FLEETFIT_DEBIAN_MIRROR to the address of a Debian mirror.",
        )
    return found


def apt_options() -> list[str]:
    """Return this machine's apt settings that decide how archives are reached, for mmdebstrap."""
    wanted = (
        "Acquire::http::Proxy",
        "Acquire::https::Proxy",
        "Acquire::Check-Valid-Until",
        "Acquire::Check-Date",
    )
    dump = output(["apt-config", "dump", *wanted], what="read apt's settings")
    lines = [line.strip() for line in dump.splitlines()]
    return [f"--aptopt={line}" for line in lines if line.split(" ")[0] in wanted and not line.endswith('"";')]


def load_recipes() -> dict[str, dict[str, Any]]:
    """Return the recipes of lab/images.yml by name."""
    recipes: dict[str, dict[str, Any]] = yaml.safe_load((checkout_root() / "lab/images.yml").read_text())
    return recipes


def recipe_key(recipe: dict[str, Any]) -> str:
    """Return twelve hex digits of the recipe's content."""
    canonical = json.dumps([BUILDER_VERSION, recipe], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def image_name(name: str) -> str:
    """Return the image reference of a recipe, with its content's key as tag."""
    recipes = load_recipes()
    if name not in recipes:
        raise FleetfitError(
            f"There is no lab image {name!r}.",
            code="unknown_image",
            remedy=f"lab/images.yml has {', '.join(recipes)}.",
        )
    return f"{REPOSITORY}/{name}:{recipe_key(recipes[name])}"


def image_exists(reference: str) -> bool:
    """Return whether podman has the image."""
    done = run(["podman", "image", "exists", reference], what="look for an image", check=False)
    return done.returncode == 0


def ensure_image(name: str) -> str:
    """Return the image reference of a recipe ("bookworm", "trixie", …), building it where it is missing.

    Two processes may ask at once: one builds, the other waits.
    """
    reference = image_name(name)
    if image_exists(reference):
        return reference
    folder = cache_root() / "images"
    archive = folder / f"{reference.rpartition('/')[2].replace(':', '-')}.tar"
    with locked(folder / f"{name}.lock"):
        if image_exists(reference):
            return reference
        if not archive.exists():
            build_archive(load_recipes()[name], name, archive)
        run(
            ["podman", "import", "--quiet", "--change=CMD=/sbin/init", str(archive), reference],
            what=f"import the image {name}",
        )
    return reference


def build_archive(recipe: dict[str, Any], name: str, archive: Path) -> None:
    """Make a root file system as a tar; it appears under its name only when it is whole."""
    step(
        f"Making the image {name} (Debian {recipe['suite']}) from this machine's apt sources: about a minute"
    )
    started = time.monotonic()
    partial = archive.with_name(archive.name + ".partial")
    argv = ["mmdebstrap", "--variant=minbase", f"--include={','.join(recipe['packages'])}"]
    argv += apt_options()
    argv += [f"--customize-hook={hook}" for hook in recipe["hooks"]]
    argv += ["--format=tar", recipe["suite"], str(partial)]
    argv += [source.line() for source in find_sources(recipe["suite"], recipe.get("components", ["main"]))]
    log = archive.with_suffix(".log")
    run(
        argv,
        what=f"make the image {name}",
        log=log,
        remedy="Check that apt-get update works here, then run this again.",
    )
    os.replace(partial, archive)
    step(f"Made the image {name} in {time.monotonic() - started:.0f} s")


def lab_images() -> list[str]:
    """Return the references of all lab images that podman has, of any recipe version."""
    form = "{{.Repository}}:{{.Tag}}"
    listed = output(
        ["podman", "images", "--filter", f"reference={REPOSITORY}/*", "--format", form], what="list images"
    )
    return sorted(set(listed.split()))
