#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: documentation of the action engine_build, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_build
short_description: Find a build of llama.cpp for a host, or make it on the controller
version_added: "0.1.0"
description:
  - Finds what an earlier run compiled for this version, backend, CPU baseline and a C library that the host has,
    or compiles it from its pinned source. Where hosts build it (M(fleetfit.llm.engine_compile)), it is looked for.
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
  build_on:
    description: Where it is compiled if it is missing.
    type: str
    choices: [oldest_host, controller]
    default: controller
  required:
    description: Fail where it is missing and is not compiled here.
    type: bool
    default: false
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
  description: An entry as in the role llama_cpp's archives; null where nothing was built yet.
  returned: success
  type: dict
build:
  description: What decides the bytes of the build.
  returned: success
  type: dict
"""
