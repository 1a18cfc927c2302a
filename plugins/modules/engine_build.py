#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: documentation of the action engine_build, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_build
short_description: Build llama.cpp on the controller, once for all hosts
version_added: "0.1.0"
description:
  - Compiles llama.cpp from its pinned source, or finds what an earlier run compiled, once per version,
    backend and CPU baseline. Hosts whose C library is older than the result needs are refused.
options:
  version:
    description: The version of the source package.
    type: str
    default: 11434.0.0
  source_sha256:
    description: The checksum of the source archive; the pinned version's where it is left out.
    type: str
  backend:
    description: What it computes on.
    type: str
    choices: [cpu, cuda]
    default: cpu
  arch:
    description: The hosts' architecture.
    type: str
    required: true
  glibc:
    description: The host's C library.
    type: str
    required: true
  cpu_isa:
    description: The host's instruction sets, as in its facts.
    type: list
    elements: str
    required: true
attributes:
  check_mode:
    support: full
    description: Builds nothing, and says whether it would.
  diff_mode:
    support: none
    description: There is no text to compare.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: Have a build of llama.cpp on the controller
  fleetfit.llm.engine_build:
    arch: x86_64
    glibc: "2.36"
    cpu_isa: [avx, avx2, bmi2, f16c, fma, sse4_2]
  register: build
"""

RETURN = r"""
key:
  description: What names the build in the cache.
  returned: success
  type: str
archive:
  description: An entry as in the role llama_cpp's archives; null in check mode where nothing was built yet.
  returned: success
  type: dict
"""
