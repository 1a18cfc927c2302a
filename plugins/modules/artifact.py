#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: files with known content on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: artifact
short_description: Bring files with a known sha256 to a host
version_added: "0.1.0"
description:
  - Brings models, wheelhouses, CPython and engine builds to a host, from a file on the controller or the
    host, from an HTTP(S) server or from a Hugging Face hub (or its mirror).
  - A file is written to C(<dest>.partial), verified, synced and renamed. An interrupted download goes on
    where it stopped. A file whose size or sha256 differs never becomes visible, and the old one stays.
  - Long downloads run on the host in the transient unit C(fleetfit-download-<id>.service). The action plugin
    polls it, a lost connection or a killed C(ansible-playbook) does not stop it, and the next run finds it.
author:
  - fleetfit contributors (@fleetfit)
options:
  artifacts:
    description: The files, handled together.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: What people call it.
        type: str
        required: true
      size:
        description: Its size in bytes.
        type: int
        required: true
      sha256:
        description: The sha256 of its content. There is no way around it.
        type: str
        required: true
      dest:
        description: Its absolute path on the host.
        type: str
        required: true
      mode:
        description: Its mode, as octal text.
        type: str
        default: "0644"
      owner:
        description: Its owner; of an unpacked tree, of everything in it.
        type: str
      group:
        description: Its group; of an unpacked tree, of everything in it.
        type: str
      unpack:
        description:
          - Unpack it, a tar (plain, gz, bz2, xz) or zip. The tree appears whole, and the archive is removed.
          - A run that finds the tree from this archive needs the archive no more.
        type: dict
        suboptions:
          dest:
            description: The absolute path of the tree.
            type: str
            required: true
          strip:
            description: How many leading path parts to leave out.
            type: int
            default: 0
          creates:
            description: A path in the tree that has to be there.
            type: str
      sources:
        description: Where it can be had, tried in this order.
        type: list
        elements: dict
        default: []
        suboptions:
          type:
            description: The kind of source.
            type: str
            required: true
            choices: [file, http, hub]
          path:
            description: For V(file), its path.
            type: str
          location:
            description:
              - For V(file), the machine it lies on. From the controller it is pushed as one file.
            type: str
            choices: [controller, host]
          url:
            description: For V(http), its address.
            type: str
          repository:
            description: For V(hub), the repository, such as V(org/name).
            type: str
          revision:
            description: For V(hub), the commit.
            type: str
          filename:
            description: For V(hub), the file's path in the repository.
            type: str
          endpoint:
            description: For V(hub), the hub or a mirror of it.
            type: str
            default: https://huggingface.co
  bandwidth_limit_bytes_per_s:
    description: The most a host downloads per second on average; 0 is no limit.
    type: int
    default: 0
  proxy:
    description: Proxies for downloads. The environment's are not used.
    type: dict
    default: {}
    suboptions:
      http:
        description: The proxy for http addresses, such as V(http://proxy:3128), with its user and password.
        type: str
      https:
        description: The proxy through which https addresses are tunnelled.
        type: str
      no_proxy:
        description: Hosts to ask directly, separated by commas; names, domains, addresses, networks or V(*).
        type: str
  ca_file:
    description: PEM certificates to trust in place of the system's.
    type: path
  token_file:
    description: A file on the host, mode 0600, with the hub's token, for the hub's own https address only.
    type: path
  reserve_bytes:
    description: How much of the disk must stay free, checked before anything is downloaded.
    type: int
    default: 1073741824
  push_limit_bytes:
    description: The largest file that is pushed from the controller.
    type: int
    default: 268435456
  background:
    description: Whether downloads run in a transient unit; V(auto) takes one for what takes long.
    type: str
    choices: [auto, always, never]
    default: auto
  verify:
    description: Compute the hash of files that are present again, in place of trusting what was recorded.
    type: bool
    default: false
  timeout_s:
    description: How long a server may be silent.
    type: int
    default: 30
  retries:
    description: How often an interrupted download is tried again without getting further.
    type: int
    default: 6
  state_dir:
    description: Where the hashes of present files are recorded.
    type: path
    default: /var/lib/fleetfit/artifacts
  run_dir:
    description: Where downloads that run are recorded.
    type: path
    default: /run/fleetfit/downloads
  libexec_dir:
    description: Where M(fleetfit.llm.host_helper) is installed.
    type: path
    default: /opt/fleetfit/libexec
  step:
    description: Set by the action plugin, what this execution goes on from.
    type: dict
    suboptions:
      helper_digest:
        description: The version of the host helper that a unit has to run.
        type: str
      pushed:
        description: Files that were pushed, by dest.
        type: dict
      job:
        description: The unit to ask for.
        type: str
      wait_s:
        description: How long to wait for it.
        type: float
        default: 0
attributes:
  check_mode:
    support: full
    description: Reports what would be fetched, and whether the disk has room for it.
  diff_mode:
    support: none
    description: Contents are not text.
"""

EXAMPLES = r"""
- name: The model file is present
  fleetfit.llm.artifact:
    artifacts:
      - name: model.gguf
        size: 98000000
        sha256: 44b0bdc3b5b6a5ee1ae8a1ee4d3a2a6ad4f1f5ab2a7ccbd4f5e4a5a3f3bd10aa
        dest: /var/lib/fleetfit/models/example/Q4_1/model.gguf
        mode: "0640"
        group: fleetfit-models
        sources:
          - type: http
            url: http://mirror.example/model.gguf
          - type: hub
            repository: org/example-GGUF
            revision: 0123456789abcdef0123456789abcdef01234567
            filename: model.gguf
    bandwidth_limit_bytes_per_s: 4000000
"""

RETURN = r"""
artifacts:
  description: What was done for each artifact, in their order.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
    dest:
      description: Its path.
      type: str
    state:
      description:
        - V(present) if it was there; V(downloaded), V(pushed) or V(unpacked) if it came.
        - In check mode, what it would be.
      type: str
    source:
      description: Where it came from, without passwords and signatures.
      type: str
    bytes_fetched:
      description: Bytes that came over the network in this run.
      type: int
    resumed_from:
      description: The offset from which an earlier download went on.
      type: int
    bytes_to_fetch:
      description: Bytes that were missing when the run began.
      type: int
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.artifact import Settings, parse_artifacts
from ansible_collections.fleetfit.llm.plugins.module_utils.artifact_ensure import ensure_artifacts
from ansible_collections.fleetfit.llm.plugins.module_utils.download_job import Jobs
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError


def argument_spec():
    """Return the module's options; DOCUMENTATION says what they mean."""
    source = {
        "type": {"type": "str", "required": True, "choices": ["file", "http", "hub"]},
        "path": {"type": "str"},
        "location": {"type": "str", "choices": ["controller", "host"]},
        "url": {"type": "str"},
        "repository": {"type": "str"},
        "revision": {"type": "str"},
        "filename": {"type": "str"},
        "endpoint": {"type": "str", "default": "https://huggingface.co"},
    }
    unpack = {
        "dest": {"type": "str", "required": True},
        "strip": {"type": "int", "default": 0},
        "creates": {"type": "str"},
    }
    artifact = {
        "name": {"type": "str", "required": True},
        "size": {"type": "int", "required": True},
        "sha256": {"type": "str", "required": True},
        "dest": {"type": "str", "required": True},
        "mode": {"type": "str", "default": "0644"},
        "owner": {"type": "str"},
        "group": {"type": "str"},
        "unpack": {"type": "dict", "options": unpack},
        "sources": {"type": "list", "elements": "dict", "default": [], "options": source},
    }
    proxy = {"http": {"type": "str"}, "https": {"type": "str"}, "no_proxy": {"type": "str"}}
    step = {
        "helper_digest": {"type": "str"},
        "pushed": {"type": "dict"},
        "job": {"type": "str"},
        "wait_s": {"type": "float", "default": 0},
    }
    return {
        "artifacts": {"type": "list", "elements": "dict", "required": True, "options": artifact},
        "bandwidth_limit_bytes_per_s": {"type": "int", "default": 0},
        "proxy": {"type": "dict", "default": {}, "options": proxy},
        "ca_file": {"type": "path"},
        "token_file": {"type": "path", "no_log": False},
        "reserve_bytes": {"type": "int", "default": 1073741824},
        "push_limit_bytes": {"type": "int", "default": 268435456},
        "background": {"type": "str", "default": "auto", "choices": ["auto", "always", "never"]},
        "verify": {"type": "bool", "default": False},
        "timeout_s": {"type": "int", "default": 30},
        "retries": {"type": "int", "default": 6},
        "state_dir": {"type": "path", "default": "/var/lib/fleetfit/artifacts"},
        "run_dir": {"type": "path", "default": "/run/fleetfit/downloads"},
        "libexec_dir": {"type": "path", "default": "/opt/fleetfit/libexec"},
        "step": {"type": "dict", "options": step},
    }


def main():
    """Make one step towards having the artifacts."""
    # no_log keeps the arguments out of the host's log: addresses and proxies may hold passwords.
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True, no_log=True)
    params = module.params
    step, proxy = params["step"] or {}, params["proxy"] or {}

    def run_command(arguments):
        code, output, errors = module.run_command(arguments)
        return code, output + errors

    settings = Settings(
        bandwidth_limit_bytes_per_s=params["bandwidth_limit_bytes_per_s"],
        proxy_http=proxy.get("http") or None,
        proxy_https=proxy.get("https") or None,
        no_proxy=proxy.get("no_proxy") or None,
        ca_file=params["ca_file"] or None,
        token_file=params["token_file"] or None,
        reserve_bytes=params["reserve_bytes"],
        state_dir=params["state_dir"],
        timeout_s=params["timeout_s"],
        retries=params["retries"],
    )
    # The result must not repeat the arguments either.
    invocation = {"module_args": {"artifacts": [entry["name"] for entry in params["artifacts"]]}}
    try:
        answer = ensure_artifacts(
            parse_artifacts(params["artifacts"], need_sources=False),
            settings,
            Jobs(params["run_dir"], params["libexec_dir"], run_command, step.get("helper_digest")),
            pushed=step.get("pushed"),
            job=step.get("job"),
            wait_s=step.get("wait_s") or 0.0,
            background=params["background"],
            verify=params["verify"],
            check_mode=module.check_mode,
        )
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy, invocation=invocation)
    except OSError as error:
        module.fail_json(
            msg=f"Bringing the artifacts failed: {error}", code="artifact_failed", invocation=invocation
        )
    module.exit_json(invocation=invocation, **answer)


if __name__ == "__main__":
    main()
