"""Plan every request of a JSON document and write the plans as canonical JSON; runs on any Python from 3.9 on.

Usage: plan_bytes.py REQUESTS PLUGINS_DIR. The document has `entries` (catalog data by id), `gpus`, `engines` and
`requests` (facts, variables, model). A refusal is written as its code and text.
"""

import json
import sys

sys.path.insert(0, sys.argv[2])

from module_utils.catalog_entry import canonical_json, entry_from_dict
from module_utils.errors import FleetfitError
from module_utils.plan import plan_host
from module_utils.policy import policy_from_variables

with open(sys.argv[1], encoding="utf-8") as stream:
    document = json.load(stream)
entries = {name: entry_from_dict(data, origin=name) for name, data in document["entries"].items()}
for request in document["requests"]:
    entry = entries[request["model"]]
    try:
        plan = plan_host(
            request["facts"],
            policy_from_variables(request["variables"]),
            entry=entry,
            gpus=document["gpus"],
            engines=document["engines"],
            available_engines=frozenset(["llama_cpp", "vllm"]),
            siblings=[item for item in entries.values() if item.id != entry.id],
            require_pinned=False,
        )
    except FleetfitError as error:
        plan = {"code": error.code, "text": str(error)}
    sys.stdout.write(canonical_json(plan) + "\n")
