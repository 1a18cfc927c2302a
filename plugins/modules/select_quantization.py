#!/usr/bin/python
"""Choose engine, quantization and engine settings of a host: documentation; the action plugin does the
work."""

from __future__ import annotations

DOCUMENTATION = r"""
module: select_quantization
short_description: Choose engine, quantization and engine settings for a host
version_added: 0.1.0
description:
  - Decides on the controller which engine serves a model on a host, in which quantization and with which
    settings, from the host's facts (M(fleetfit.llm.host_state)), the policy in the variables C(fleetfit_*)
    and the model catalog.
  - It is a pure function of these, opens no connection and changes nothing; the same inputs give the same
    plan. Memory is computed term by term and every candidate that is not chosen says why.
  - The order of the decision is hard constraints, full residency in GPU memory, quality tier, speed; the
    option O(prefer) moves speed or context forward. The context served is exactly the one asked for.
  - A host keeps its variant while it fits and its policy is unchanged; a better one is reported under
    C(available).
options:
  model:
    description: Id of a catalog entry. Default is the variable C(fleetfit_model).
    type: str
  min_context_tokens:
    description: Context per slot in tokens; served exactly so. Default is C(fleetfit_min_context_tokens),
      else 8192.
    type: int
  slots:
    description: Requests served at once. Default is C(fleetfit_slots), else 2.
    type: int
  prefer:
    description: What comes first among what fits. Default is C(fleetfit_prefer), else V(quality).
    type: str
    choices: [quality, speed, context]
  min_quality_tier:
    description:
      - The lowest quality tier to serve, one of C(Q8_0), C(Q6_K), C(Q5_K_M), C(Q4_K_M), C(rest), or a
        scheme, which stands for its tier. Default is C(fleetfit_min_quality_tier), else C(Q4_K_M).
    type: str
  min_tokens_per_s:
    description: Refuse what is expected to be slower. Default is C(fleetfit_min_tokens_per_s), else 0.
    type: float
  engine:
    description: Engine to use. Default is C(fleetfit_engine), else V(auto).
    type: str
    choices: [auto, llama_cpp, vllm]
  kv_type:
    description: Type of the KV cache; never chosen by fleetfit. Default is C(fleetfit_kv_type), else
      C(f16).
    type: str
  accepted_licences:
    description: Licences that are accepted where one needs it. Default is C(fleetfit_accepted_licences),
      else none.
    type: list
    elements: str
  vram_reserve_bytes:
    description: GPU memory to keep free on each device. Default is C(fleetfit_vram_reserve_bytes), else 0.
    type: int
  cpu_threads:
    description:
      - How many of the host's threads the engine computes with, where it computes on the CPU.
      - Default is C(fleetfit_cpu_threads), else 0, which is all of them.
    type: int
  use_gpus:
    description: Whether to use the host's GPUs at all. Default is C(fleetfit_use_gpus), else V(true).
    type: bool
  catalog_dirs:
    description:
      - Directories on the controller with further entries, overlays (C(extends)) and pins. Default is
        C(fleetfit_catalog_dirs), else none.
    type: list
    elements: str
  lora_adapters:
    description:
      - LoRA adapters to serve beside the model, each selectable by its name. Keys are C(name), C(base_model) (the
        catalog entry it was made for), C(format) (C(safetensors) for vLLM, C(gguf) for llama.cpp; an adapter
        may be listed once in each), C(rank), C(files) with C(name), C(size) and C(sha256), and one source,
        C(url), C(path) (with C(location), C(controller) or C(host)) or C(repository) with C(revision).
        C(base_model_names) lists further names that the adapter's own files may give for the model.
      - Default is C(fleetfit_lora_adapters), else none.
    type: list
    elements: dict
  replan:
    description: Take a better variant where there is one. Default is C(fleetfit_replan), else V(false).
    type: bool
  facts:
    description: The host's facts. Default is C(ansible_facts['fleetfit']).
    type: dict
  previous_plan:
    description:
      - The last plan of the host. Default is C(ansible_facts['fleetfit_previous_plan']), which
        M(fleetfit.llm.host_state) reads from the host's manifest.
    type: dict
attributes:
  check_mode:
    description: Changes nothing in any mode.
    support: full
  diff_mode:
    description: There is nothing to show a difference of.
    support: none
seealso:
  - module: fleetfit.llm.host_state
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: Read the host's state
  fleetfit.llm.host_state:

- name: Choose engine and quantization by the variables of the host
  fleetfit.llm.select_quantization:

- name: Choose for a longer context, whatever the inventory says
  fleetfit.llm.select_quantization:
    model: qwen2.5-7b-instruct
    min_context_tokens: 32768
    slots: 1
"""

RETURN = r"""
ansible_facts:
  description: The plan under C(fleetfit_plan), see docs/contracts.md section 4.
  returned: success
  type: dict
  contains:
    fleetfit_plan:
      description: What is deployed and why, with every candidate.
      type: dict
      returned: success
summary:
  description: One sentence that says what is chosen and why.
  returned: success
  type: str
  sample: "Q8_0 with llama_cpp on NVIDIA GeForce RTX 3060: the best quality that fits 2 x 8192 tokens,
    needing 11.4 GiB."
code:
  description: A stable word for the reason of a failure, e.g. C(does_not_fit), C(model_not_pinned),
    C(unknown_model).
  returned: failure
  type: str
remedy:
  description: What to do about a failure, the least changes that would fit included.
  returned: failure
  type: str
candidates:
  description: Every candidate with the reason against it; C(fleetfit what-fits --json) has the figures.
  returned: where nothing fits
  type: list
  elements: str
"""


def main() -> None:
    """Say that this module runs on the controller only."""
    from ansible.module_utils.basic import AnsibleModule

    AnsibleModule(argument_spec={}).fail_json(
        msg="fleetfit.llm.select_quantization runs in its action plugin, on the controller."
    )


if __name__ == "__main__":
    main()
