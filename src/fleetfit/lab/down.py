"""Remove this checkout's lab and give its disk back."""

from __future__ import annotations

import shutil

from .console import note, step
from .containers import remove_everything
from .forward import stop_forwards
from .images import lab_images
from .paths import LabPaths, cache_root, locked
from .process import run


def take_down(paths: LabPaths, *, images: bool = True, cache: bool = False) -> None:
    """Stop the forwards, remove containers, network and .lab; then images that no other lab uses.

    ``cache`` also empties the cache that all labs of this user share: the next `lab up` builds anew.
    What is not there is not missed, so that a second run, or one after a killed run, ends well.
    """
    if paths.folder.exists():
        with locked(paths.folder / "lock"):
            stop_forwards(paths)
            if shutil.which("podman"):
                remove_everything(paths)
            shutil.rmtree(paths.folder)
    elif shutil.which("podman"):
        remove_everything(paths)
    if images and shutil.which("podman"):
        step("Removing the lab's images")
        for reference in lab_images():
            # Without --force podman keeps what another checkout's lab still uses.
            done = run(["podman", "rmi", reference], what=f"remove {reference}", check=False)
            if done.returncode != 0:
                note(f"{reference.rpartition('/')[2]} stays: something else uses it")
    if cache:
        step(f"Emptying {cache_root()}")
        shutil.rmtree(cache_root(), ignore_errors=True)
