"""The memory model against llama.cpp's own accounting, on models whose weights do not exist.

Weights and KV must agree within 1 MiB or 0.1 % in every cell; compute must never be under, and on a single
device at most 10 % or 32 MiB over. ``make test`` runs a sample, ``make test-all`` the matrix; the comparison is
the benchmark's (benchmarks/sizing/memory.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ansible_collections.fleetfit.llm.plugins.module_utils.gguf_reader import read_gguf
from ansible_collections.fleetfit.llm.plugins.module_utils.memory_llama_cpp import all_layers
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import from_gguf
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    check_header,
    layout_from_gguf,
    layout_from_scheme,
)

from benchmarks.sizing import oracle as llama_oracle
from benchmarks.sizing.memory import CONTEXTS, SAMPLE, Cell, cells, problems
from benchmarks.sizing.shapes import SHAPES


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> llama_oracle.Oracle:
    """The oracle; without it these tests fail and say how to build it: a skipped comparison proves
    nothing."""
    try:
        return llama_oracle.Oracle(tmp_path_factory.mktemp("sparse"))
    except llama_oracle.OracleMissingError as missing:
        pytest.fail(str(missing), pytrace=False)


@pytest.fixture(scope="session")
def ports(oracle: llama_oracle.Oracle) -> Iterator[list[int]]:
    with llama_oracle.rpc_devices(3, oracle.bin) as ports:
        yield ports


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(oracle: llama_oracle.Oracle, ports: list[int], name: str) -> None:
    """Every context, two slot counts and both KV types somewhere; every placement once."""
    matrix = cells(name, CONTEXTS, (1, 3))
    sample = matrix[:: len(matrix) // 12] + [
        cell for cell in matrix if cell.context == 8193 and cell.slots == 1
    ]
    found = [problem for cell in sample for problem in problems(oracle, ports, name, cell)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_matrix(oracle: llama_oracle.Oracle, ports: list[int], name: str) -> None:
    found = [problem for cell in cells(name) for problem in problems(oracle, ports, name, cell)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("scheme", ["Q8_0", "F16", "Q2_K", "Q6_K", "Q4_0"])
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "gemma-3-1b", "tinyllama-1.1b"])
def test_other_schemes(oracle: llama_oracle.Oracle, ports: list[int], name: str, scheme: str) -> None:
    full = all_layers(SHAPES[name])
    found = []
    for cell in (Cell(8193, 1), Cell(8193, 1, "f16", 1, full), Cell(8193, 1, "f16", 1, 5)):
        found += problems(oracle, ports, name, cell, scheme)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.vocab_size <= 50_000])
def test_long_contexts_of_small_vocabularies_are_never_under(
    oracle: llama_oracle.Oracle, ports: list[int], name: str
) -> None:
    """From twice the vocabulary on llama.cpp puts the logits where the mask was.

    The model does not follow it there, since a longer context would then need less (docs/sizing.md lists
    what is over): the bound must hold all the same.
    """
    shape = SHAPES[name]
    full = all_layers(shape)
    edge = 2 * shape.vocab_size // 256 * 256
    tried = [
        Cell(context, slots, kv_type, devices, layers)
        for context in (edge - 256, edge, edge + 256, 131072)
        for slots, kv_type, devices, layers in ((1, "f16", 0, 0), (3, "f16", 1, full), (1, "q8_0", 1, full))
    ]
    if shape.experts:
        tried += [Cell(131072, 1, "f16", 1, full, moe) for moe in (1, shape.layers // 2, shape.layers)]
    found = [problem for cell in tried for problem in problems(oracle, ports, name, cell)]
    assert not [problem for problem in found if not problem.endswith(" MiB over")]


@pytest.mark.parametrize("split", [(3, 1), (1, 3), (1, 0), (0, 1)])
def test_unlike_cards_get_layers_as_llama_cpp_splits_them(
    oracle: llama_oracle.Oracle, ports: list[int], split: tuple[int, ...]
) -> None:
    full = all_layers(SHAPES["qwen2.5-7b"])
    found = []
    for layers in (full, 15):
        found += problems(oracle, ports, "qwen2.5-7b", Cell(8193, 1, "f16", 2, layers, 0, split))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", SAMPLE)
def test_header_and_shape_give_the_same_layout(oracle: llama_oracle.Oracle, name: str) -> None:
    path = oracle.model(name, SHAPES[name], "Q4_K_M")
    from_file, from_rules = layout_from_gguf(path), layout_from_scheme(SHAPES[name], "Q4_K_M")
    assert from_file.blocks == from_rules.blocks
    assert from_file.block_experts == from_rules.block_experts
    assert from_file.tensor_bytes == from_rules.tensor_bytes
    header = read_gguf(path)
    assert from_gguf(header.metadata, header.tensor_names) == SHAPES[name]
    check_header(SHAPES[name], header)


def test_the_abort_that_check_graph_names(oracle: llama_oracle.Oracle) -> None:
    """When a newer llama.cpp no longer aborts here, this fails: then drop the rule in check_graph."""
    model = oracle.model("phi-4", SHAPES["phi-4"], "Q4_K_M")
    with pytest.raises(llama_oracle.OracleFailedError):
        oracle.ask(model, n_ctx=2048, slots=2, kv_type_k="q8_0", kv_type_v="q8_0")
