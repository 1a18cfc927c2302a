"""Lookup: the program uv that the controller itself has."""

from __future__ import annotations

DOCUMENTATION = r"""
name: controller_uv
short_description: The program uv that the controller itself has
version_added: 0.1.0
description:
  - Returns path, version, size in bytes, sha256 and architecture of the uv that is installed beside fleetfit, to
    be pushed to hosts.
options: {}
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
uv: "{{ lookup('fleetfit.llm.controller_uv') }}"
"""

RETURN = r"""
_list:
  description: One entry, with the keys path, version, size, sha256 and arch.
  type: list
  elements: dict
"""

import hashlib
import os
import platform
from importlib import metadata
from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase


class LookupModule(LookupBase):
    """The lookup."""

    def run(
        self, terms: list[Any], variables: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Return the controller's uv; raise AnsibleLookupError where it has none."""
        try:
            from uv import find_uv_bin

            path = find_uv_bin()
            version = metadata.version("uv")
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except (ImportError, OSError, metadata.PackageNotFoundError) as error:
            raise AnsibleLookupError(
                "The controller has no uv beside fleetfit; install the package uv there,"
                " or set python_runtime_uv."
            ) from error
        return [
            {
                "path": path,
                "version": version,
                "size": os.path.getsize(path),
                "sha256": digest,
                "arch": platform.machine(),
            }
        ]
