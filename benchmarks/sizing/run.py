"""Run every row of the sizing table and print one table: required, measured, pass or not.

    .venv/bin/python -m benchmarks.sizing [--quick] [--rows NAME,NAME] [--workers N] [--out docs/sizing_results.md]

``--quick`` takes a sample of the models, cases and hosts. ``--parts DIRECTORY`` keeps each part's result there, and
takes those of the same commit and versions from there, so that a broken run goes on. llama.cpp comes from the
lab's cache or from FLEETFIT_LLAMA_CPP_BIN. Exit code 1 where a row does not pass, or could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from . import decisions, files, memory, monotone, peers, scale, vllm_decisions
from .oracle import Oracle, OracleMissingError, rpc_devices
from .shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]
DECISION_CASES = 574
MONOTONE_HOSTS = 1500
MAKE_TEST_LIMIT_S = 300.0
# What belongs to sizing of what `make test` runs.
UNIT_TESTS = (
    "calibration",
    "catalog_loader",
    "commands",
    "engine_args",
    "gguf_reader",
    "host_view",
    "memory",
    "memory_llama_cpp",
    "memory_vllm",
    "model_shape",
    "plan",
    "plan_memo",
    "policy",
    "safetensors_header",
    "selection",
    "sizing_benchmark",
    "speed",
    "tensor_sizes",
    "vllm_decisions",
    "vllm_wheels",
)
INTEGRATION_TESTS = ("argv_real_server", "decisions", "llama_cpp_oracle", "plan_bytes", "plan_scale")
PASS, FAIL, REPORTED, NOT_RUN = "pass", "FAIL", "reported", "not run"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    required: str
    measured: str
    verdict: str


@dataclass
class Report:
    """The table, and what stands below it: sections of Markdown by their title."""

    rows: list[Row] = field(default_factory=list)
    sections: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    # What was there when the run began; a checkout can change under a run.
    versions: str = ""
    # Parts that ran with other versions.
    others: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, required: str, measured: str, verdict: str | bool) -> None:
        """Add a row; a true or false verdict is pass or fail."""
        word = verdict if isinstance(verdict, str) else PASS if verdict else FAIL
        self.rows.append(Row(what, required, measured, word))

    @property
    def ok(self) -> bool:
        """Return whether every row passed or is only reported."""
        return all(row.verdict in (PASS, REPORTED) for row in self.rows)

    def table(self) -> list[str]:
        """Return the one table in Markdown."""
        lines = ["| what | must be | measured | |", "|---|---|---|---|"]
        return lines + [
            f"| {row.what} | {row.required} | {row.measured} | {row.verdict} |" for row in self.rows
        ]


@dataclass(frozen=True)
class Options:
    """How much is run."""

    quick: bool
    workers: int
    stale: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """Return the shapes of the memory rows: all, or one of each kind."""
        return memory.SAMPLE if self.quick else tuple(SHAPES)


class Bench:
    """The oracle with several pairs of devices, so that questions are asked side by side."""

    def __init__(self, oracle: Oracle, pairs: Sequence[Sequence[int]]) -> None:
        self.oracle = oracle
        self._free: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()
        for pair in pairs:
            self._free.put(pair)
        self.workers = len(pairs)

    @contextmanager
    def ports(self) -> Iterator[Sequence[int]]:
        """Lend one pair of devices."""
        pair = self._free.get()
        try:
            yield pair
        finally:
            self._free.put(pair)

    def each[Item, Result](
        self, function: Callable[[Sequence[int], Item], Result], items: Sequence[Item]
    ) -> list[Result]:
        """Return ``function(ports, item)`` of every item, in their order."""

        def call(item: Item) -> Result:
            with self.ports() as pair:
                return function(pair, item)

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(call, items))


@contextmanager
def bench(workers: int) -> Iterator[Bench]:
    """Run ``workers`` pairs of devices over one directory of sparse models."""
    with tempfile.TemporaryDirectory(prefix="fleetfit-sizing-") as directory:
        oracle = Oracle(Path(directory))
        with rpc_devices(2 * workers, oracle.bin) as ports:
            yield Bench(oracle, [ports[index : index + 2] for index in range(0, 2 * workers, 2)])


# --- the rows


def memory_rows(report: Report, options: Options) -> None:
    """Weights, KV and compute of every model, context, slot count, KV type and placement."""
    work = [(name, cell) for name in options.models for cell in memory.cells(name)]
    with bench(options.workers) as shared:

        def measured(ports: Sequence[int], item: tuple[str, memory.Cell]) -> list[memory.Term]:
            return list(memory.measure(shared.oracle, ports, *item))

        terms = [term for found in shared.each(measured, work) for term in found]
        accuracy = peers.compare(shared.oracle, _first(shared), options.models)
    cells = f"{len(options.models)} shapes, {len(work)} cells"
    bad = [term.problem for term in terms if term.problem]
    for what, name in (("weights", "weights"), ("KV cache", "kv_cache")):
        found = [term for term in terms if term.what == name]
        worst = max(found, key=lambda term: abs(term.error_mib))
        relative = max(
            (term for term in found if abs(term.error_mib) > 1), key=lambda t: abs(t.share), default=None
        )
        share = f", {abs(relative.share):.2%} where it is more than 1 MiB" if relative else ""
        report.add(
            f"{what} against llama-fit-params ({cells}; contexts 1000, 8193, 32768; slots 1, 3, 4; f16 and q8_0)",
            "at most 1 MiB or 0.1 % off, every cell",
            f"{len(found)} figures, furthest {worst.error_mib:+.2f} MiB{share}",
            not [term for term in found if term.problem],
        )
    compute = [term for term in terms if term.what == "compute"]
    least = min(compute, key=lambda term: term.plan_mib - term.truth_mib)
    report.add(
        "compute, without overhead and margin: CPU, one device, two, `-ngl` 1, half, n, n+1, `--n-cpu-moe`",
        "never under, on any device or the host",
        f"{len(compute)} figures, {sum(t.error_mib < 0 for t in compute)} under; the nearest is "
        f"{least.plan_mib - least.truth_mib:.2f} MiB above",
        all(term.error_mib >= 0 for term in compute),
    )
    single = [term for term in compute if term.single]
    # Of those beyond 32 MiB the share tells, of the others the MiB.
    beyond = [term for term in single if term.error_mib > memory.OVER_MIB]
    worst = max(single, key=lambda term: term.error_mib)
    furthest = max((term.share for term in beyond), default=0.0)
    report.add(
        "the same on a single device (or the CPU), at the plan's micro-batch of 512",
        "at most 10 % or 32 MiB over",
        f"{len(single)} figures; {len(beyond)} are more than 32 MiB over, at most {furthest:.1%}; the most is "
        f"{worst.error_mib:.0f} MiB of {worst.truth_mib}",
        not [term for term in single if term.problem],
    )
    report.add(
        "CUDA's own terms: context and libraries, f16 copies of a quantized cache layer, the largest tensor in RAM",
        "labelled",
        "from source, not run here; on an H100 by `benchmarks/gpu_memory` (below)",
        REPORTED,
    )
    report.sections["Memory, shape by shape"] = _by_shape(terms)
    if bad:
        report.sections["Memory: what is off"] = [f"- {text}" for text in bad[:50]]
    report.sections["Other planners: the buffers of a model wholly on one device"] = [
        "Their published formulas, computed and not run; errors as shares of what llama.cpp itself counts for "
        "weights, cache and compute.",
        "",
        "| planner | loads | mean of absolute errors | furthest under | furthest over |",
        "|---|---|---|---|---|",
        *(
            f"| {item.planner} | {item.loads} | {item.mean:.1%} | {item.under:+.1%} | {item.over:+.1%} |"
            for item in accuracy
        ),
    ]
    report.add(
        "other planners on the same loads (accelerate, gguf-parser-go, llmfit, Ollama)",
        "side by side",
        "mean error " + ", ".join(f"{item.planner} {item.mean:.1%}" for item in accuracy),
        REPORTED,
    )


def _first(shared: Bench) -> Sequence[int]:
    with shared.ports() as pair:
        return pair


def _by_shape(terms: Sequence[memory.Term]) -> list[str]:
    lines = [
        "MiB. Furthest from llama.cpp's figure, which is cut to whole MiB: 0 means that the figure cannot tell "
        "them apart.",
        "",
        "| shape | cells | weights | KV cache | compute: least above | compute: most above, single device |",
        "|---|---|---|---|---|---|",
    ]
    by_model: dict[str, list[memory.Term]] = defaultdict(list)
    for term in terms:
        by_model[term.model].append(term)
    for name, found in by_model.items():
        cells = len({term.cell for term in found})
        furthest = [
            max((term.error_mib for term in found if term.what == what), key=abs)
            for what in ("weights", "kv_cache")
        ]
        compute = [term for term in found if term.what == "compute"]
        least = min(term.plan_mib - term.truth_mib for term in compute)
        most = max((term for term in compute if term.single), key=lambda term: term.error_mib)
        lines.append(
            f"| {name} | {cells} | {furthest[0]:+.2f} | {furthest[1]:+.2f} | {least:.2f} | {most.error_mib:.0f} "
            f"({most.share:.1%}) |"
        )
    return lines


def decision_rows(report: Report, options: Options) -> None:
    """Decisions for llama.cpp against the brute force."""
    cases = decisions.draw_cases(DECISION_CASES)
    if options.quick:
        cases = cases[:: DECISION_CASES // 60]
    groups: dict[decisions.Load, list[decisions.Case]] = defaultdict(list)
    for case in cases:
        groups[case.load].append(case)
    findings = decisions.Findings()
    questions = 0
    with bench(options.workers) as shared:

        def judged(
            ports: Sequence[int], item: tuple[decisions.Load, list[decisions.Case]]
        ) -> tuple[decisions.Findings, int]:
            truth = decisions.Truth(shared.oracle, ports)
            return decisions.run(truth, item[1], [item[0]]), len(truth.answers)

        for found, asked in shared.each(judged, list(groups.items())):
            findings.add(found)
            questions += asked
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(findings.kinds.items()))
    needless = len(findings.needless) / findings.cases
    report.add(
        f"decisions, llama.cpp: {findings.cases} cases ({kinds}), {findings.candidates} candidates; truth: "
        f"{questions} answers of llama-fit-params and the documented terms, by an independent brute force",
        "0 false fits; needless refusals at most 1 %, each missing by at most max(256 MiB, 2 %)",
        f"{len(findings.false_fits)} false fits; {len(findings.needless)} needless refusals ({needless:.2%}); "
        f"{len(findings.beyond_bound)} beyond the bound; {len(findings.fewer_layers)} of {findings.partial} "
        "partial plans have fewer layers on the card than possible",
        not findings.problems() and (options.quick or findings.cases >= 500),
    )
    verdicts = findings.verdicts
    lines = [
        f"{len(verdicts)} candidates on a single card, of which llama.cpp holds "
        f"{sum(item.truth for item in verdicts)} whole on the card with CUDA's terms and the margin. Who says so, "
        "by the published formula against the same budget:",
        "",
        "| planner | would run out of memory (says it fits) | needlessly refused |",
        "|---|---|---|",
    ]
    says = []
    for planner in ("fleetfit", *peers.PEERS):
        false = sum(item.says[planner] and not item.truth for item in verdicts)
        refused = sum(item.truth and not item.says[planner] for item in verdicts)
        lines.append(
            f"| {planner} | {false} ({false / len(verdicts):.1%}) | {refused} ({refused / len(verdicts):.1%}) |"
        )
        says.append(f"{planner} {false} and {refused}")
    report.sections["Other planners: does the model fit on the card"] = lines
    report.add(
        f"other planners on the same {len(verdicts)} candidates on one card: false fits and needless refusals",
        "side by side",
        "; ".join(says),
        REPORTED,
    )
    _list(report, "llama.cpp decisions", findings)


def vllm_rows(report: Report, options: Options) -> None:
    """Decisions for vLLM against its written formula."""
    cases = vllm_decisions.draw_cases(150 if options.quick else vllm_decisions.CASES)
    findings = vllm_decisions.run(cases, vllm_decisions.tight_cases(cases))
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(findings.kinds.items()))
    report.add(
        f"decisions, vLLM: {findings.cases} cases ({kinds}), {findings.candidates} candidates, against its written "
        "formula (docs/sizing.md) alone, by an independent brute force over every order of the cards",
        "0 false fits; needless refusals at most 1 %, each missing by at most max(256 MiB, 2 %)",
        f"{len(findings.false_fits)} false fits; {len(findings.needless)} needless refusals; "
        f"{len(findings.beyond_bound)} beyond the bound; {len(findings.other_choices)} other choices of scheme. "
        "No vLLM was run on a GPU",
        not findings.problems(),
    )
    _list(report, "vLLM decisions", findings)


def _list(report: Report, title: str, findings: decisions.Findings | vllm_decisions.Findings) -> None:
    lines = []
    for name in (
        "false_fits",
        "beyond_bound",
        "needless",
        "needless_candidates",
        "other_choices",
        "fewer_layers",
    ):
        texts = getattr(findings, name, [])
        lines += [f"- {name.replace('_', ' ')}: {text}" for text in texts[:20]]
    if lines:
        report.sections[f"{title}: what differs"] = lines


def file_rows(report: Report, options: Options) -> None:
    """Sizes of files, and the official memory table."""
    gguf, safetensors = files.gguf_sizes(), files.safetensors_sizes()
    for what, must, found in (
        ("GGUF file sizes against published ones", "each within its rounding or 0.5 %", gguf),
        ("GPTQ and AWQ file sizes", "within 0.3 %", safetensors),
    ):
        worst = max(found, key=lambda item: abs(item.share))
        mean = statistics.mean(abs(item.share) for item in found)
        report.add(
            what,
            must,
            f"{len(found)} files, mean {mean:.2%}, furthest {worst.share:+.2%} ({worst.model} {worst.scheme})",
            all(item.ok for item in found),
        )
    cells = files.official()
    errors = [computed / published - 1 for *_, computed, published in cells]
    late = [computed / published - 1 for _, _, tokens, computed, published in cells if tokens >= 6144]
    report.add(
        "official Qwen2.5 memory table (transformers on one A100, weights + cache + unchunked prompt)",
        "reported, no gate",
        f"{len(cells)} cells, mean {statistics.mean(map(abs, errors)):.2%}, furthest {max(errors, key=abs):+.1%}; "
        f"input 6144 and more: {len(late)} cells, mean {statistics.mean(map(abs, late)):.2%}, furthest "
        f"{max(late, key=abs):+.1%}",
        REPORTED,
    )
    lines = ["| file | computed GB | published GB | difference |", "|---|---|---|---|"]
    lines += [
        f"| {item.model} {item.scheme} | {item.computed_gb:.3f} | {item.published_gb:.3f} | {item.share:+.2%} |"
        for item in (*gguf, *safetensors)
    ]
    report.sections["File sizes"] = lines
    table: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, scheme, _, computed, published in cells:
        table[name, scheme].append(f"{computed:.2f} / {published:.2f} ({computed / published - 1:+.1%})")
    report.sections["Official Qwen2.5 memory table, GiB computed / published"] = [
        "Another engine's; its one coefficient was fitted on the table, so it predicts nothing.",
        "",
        "| model | scheme | " + " | ".join(f"input {tokens}" for tokens in files.INPUTS) + " |",
        "|---|---|" + "---|" * len(files.INPUTS),
        *(f"| {name} | {scheme} | " + " | ".join(row) + " |" for (name, scheme), row in table.items()),
    ]


def monotone_rows(report: Report, options: Options) -> None:
    """More memory or a shorter context is never worse."""
    hosts = 200 if options.quick else MONOTONE_HOSTS
    compared, worse = monotone.run(hosts)
    report.add(
        f"more memory (card, RAM), or a shorter context: {hosts} drawn hosts, one or two cards, both engines",
        "never a lower policy score",
        f"{compared} comparisons, {len(worse)} lower; property tests in tests/unit/test_selection.py search on",
        not worse,
    )
    if worse:
        report.sections["Where more is worse"] = [f"- {text}" for text in worse[:20]]


def scale_rows(report: Report, options: Options) -> None:
    """A fleet through the planner."""
    found = scale.run()
    report.add(
        f"10,000 fact sets, {found.planned} distinct, through the pure planner in one process, both engines",
        "at most 20 s on 2 cores; growth exponent at most 1.1",
        f"{found.seconds[-1]:.1f} s of CPU time on one core; exponent {found.growth:.2f}; a host planned by "
        f"itself: {found.alone_ms:.1f} ms",
        found.ok,
    )


def argv_rows(report: Report, options: Options) -> None:
    """The plan's arguments in the real server."""
    argv, _ = _run_tests(["tests/integration/test_argv_real_server.py"])
    served = [case for case in argv if case.name.startswith(("test_slots_and_context", "test_yarn"))]
    report.add(
        "the plan's arguments in the real llama-server (tests/integration/test_argv_real_server.py)",
        "`/props` slots and context equal the plan, a YaRN case included",
        f"{_count(served)}: slots and context as planned, YaRN to 10,240 of 8,192 tokens; with every command line "
        f"that is rendered for the catalog, {_count(argv)}",
        bool(served) and any("yarn" in case.name for case in served) and all(case.passed for case in argv),
    )


def bytes_rows(report: Report, options: Options) -> None:
    """The same bytes on every Python."""
    same, _ = _run_tests(["tests/integration/test_plan_bytes.py"])
    versions = [case.name.partition("[")[2].rstrip("]") for case in same if case.passed]
    report.add(
        "same inputs (tests/integration/test_plan_bytes.py: 96 hosts, models and preferences, hash seeds drawn)",
        "the same bytes out, on Python 3.9 to 3.13",
        f"the same on {', '.join(versions)}"
        + (f"; {_count(same)}" if not all(c.passed for c in same) else ""),
        bool(same) and all(case.passed for case in same),
    )


def growth_rows(report: Report, options: Options) -> None:
    """How long sizing's own tests of `make test` take."""
    paths = [f"tests/unit/test_{name}.py" for name in UNIT_TESTS]
    paths += [f"tests/integration/test_{name}.py" for name in INTEGRATION_TESTS]
    cases, seconds = _run_tests(paths)
    wall = sum(case.seconds for case in cases)
    failed = [case for case in cases if not case.passed and not case.skipped]
    report.add(
        f"`make test` grows by sizing's own tests ({len(cases)} tests, warm cache, one after another)",
        "at most 5 min",
        f"{seconds:.0f} s of processor time; {wall:.0f} s by the clock of a machine that did other things too"
        + (f"; {len(failed)} FAILED: {', '.join(case.name for case in failed)}" if failed else ""),
        seconds <= MAKE_TEST_LIMIT_S and not failed,
    )
    by_file: Counter[str] = Counter()
    for case in cases:
        by_file[case.file] += case.seconds
    report.sections["Time of sizing's tests in `make test`, by the clock"] = [
        ", ".join(f"{name} {count:.0f} s" for name, count in by_file.most_common() if count >= 1) + "."
    ]


def _run_tests(paths: Sequence[str]) -> tuple[list[_TestCase], float]:
    """Return (the test cases, seconds of processor time) of what `make test` runs of these files."""
    with tempfile.TemporaryDirectory(prefix="fleetfit-sizing-") as directory:
        junit = Path(directory) / "junit.xml"
        options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={junit}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *paths],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if not junit.exists():
            raise OracleMissingError(
                f"pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}"
            )
        cases = [_TestCase.of(element) for element in ElementTree.parse(junit).iter("testcase")]  # noqa: S314
    return cases, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@dataclass(frozen=True)
class _TestCase:
    file: str
    name: str
    seconds: float
    passed: bool
    skipped: bool

    @classmethod
    def of(cls, element: ElementTree.Element) -> _TestCase:
        skipped = element.find("skipped") is not None
        bad = element.find("failure") is not None or element.find("error") is not None
        file = element.get("classname", "").rpartition(".")[2]
        return cls(
            file, element.get("name", ""), float(element.get("time", 0)), not bad and not skipped, skipped
        )


def _count(cases: Sequence[_TestCase]) -> str:
    return f"{sum(case.passed for case in cases)} of {len(cases)} tests passed"


def gpu_rows(report: Report, options: Options) -> None:
    """What was measured on a real GPU, from its committed tables."""
    tables = sorted((ROOT / "benchmarks" / "gpu_memory" / "results").glob("*.md"))
    for path in tables:
        lines = path.read_text().splitlines()
        cases = [line for line in lines if re.search(r"\| (yes|no) \|$", line)]
        fitting = [line for line in cases if line.endswith("| yes |")]
        errors = [float(found) for line in cases for found in re.findall(r"\(([+-][\d.]+)%\)", line)]
        card = next(line for line in lines if "compute capability" in line).partition(" (")[0]
        report.add(
            f"on a real GPU: {card} ([table](../{path.relative_to(ROOT)}))",
            "within the plan",
            f"{len(fitting)} of {len(cases)} cases within the plan; total without margin {min(errors):+.1f} to "
            f"{max(errors):+.1f} % of what NVML measured; vLLM not run",
            bool(cases) and len(fitting) == len(cases),
        )
    if not tables:
        report.add("on a real GPU", "within the plan", "no card was at hand", NOT_RUN)


ROWS: dict[str, Callable[[Report, Options], None]] = {
    "memory": memory_rows,
    "decisions": decision_rows,
    "vllm": vllm_rows,
    "files": file_rows,
    "monotone": monotone_rows,
    "scale": scale_rows,
    "argv": argv_rows,
    "bytes": bytes_rows,
    "growth": growth_rows,
    "gpu": gpu_rows,
}


# --- the page


def machine() -> str:
    """Return what the figures were made on, without the machine's name."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{os.cpu_count()} cores of {model}, {platform.system()} {platform.release()}"


def versions() -> str:
    """Return the versions that matter: this checkout, Python, llama.cpp."""
    commit = _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    try:
        oracle = Oracle(Path("/nonexistent"))
    except OracleMissingError:
        engine = "no llama.cpp"
    else:
        text = _output([str(oracle.bin / "llama-server"), "--version"])
        engine = "llama.cpp " + " ".join(text.split())
    return f"fleetfit {commit}, CPython {platform.python_version()}, {engine}"


def _output(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return "unknown"
    return (done.stdout + done.stderr).strip() or "unknown"


def page(report: Report, options: Options) -> str:
    """Return the results as a page of Markdown."""
    quick = " with --quick" if options.quick else ""
    lines = [
        "# How good the sizing is: results",
        "",
        f"Written by `python -m benchmarks.sizing{' --quick' if options.quick else ''}` on "
        f"{datetime.now(UTC):%d %B %Y}{quick}: {machine()}; {report.versions}. No GPU in this machine: devices are "
        "llama.cpp's RPC servers on loopback, models are header-true files without weights. What each term means: "
        "[sizing.md](sizing.md).",
        "",
        *report.table(),
    ]
    if report.others:
        lines += ["", "Parts that ran with other versions, or earlier:"]
        lines += ["", *(f"- {name}: {other}" for name, other in report.others.items())]
    for title, section in report.sections.items():
        lines += ["", f"## {title}", "", *section]
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    lines += ["", f"Time of each part, {options.workers} questions at once: {took}.", ""]
    return "\n".join(lines)


def run_part(name: str, options: Options, versions_now: str, parts: Path | None) -> Report:
    """Return the report of one part: kept from before for the same versions, else run and kept."""
    kept = parts / f"{name}{'-quick' if options.quick else ''}.json" if parts else None
    if kept is not None and kept.exists():
        found = json.loads(kept.read_text())
        if options.stale or found["versions"] == versions_now:
            return Report(
                [Row(**row) for row in found["rows"]], found["sections"], found["seconds"], found["versions"]
            )
    report = Report(versions=versions_now)
    started = time.monotonic()
    try:
        ROWS[name](report, options)
    except OracleMissingError as missing:
        report.add(name, "run", str(missing), NOT_RUN)
    report.seconds[name] = time.monotonic() - started
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(report)))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the rows, print the table, write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sizing", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a sample of models, cases and hosts")
    parser.add_argument("--rows", help=f"only these parts, comma-separated: {', '.join(ROWS)}")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="questions asked at once")
    parser.add_argument("--out", type=Path, help="also write the results page here")
    parser.add_argument("--parts", type=Path, help="keep each part's result here, and take kept ones")
    parser.add_argument(
        "--stale", action="store_true", help="take kept parts of other commits too, and say so"
    )
    args = parser.parse_args(arguments)
    wanted = args.rows.split(",") if args.rows else list(ROWS)
    unknown = [name for name in wanted if name not in ROWS]
    if unknown or args.workers < 1:
        parser.error(f"there is no part {unknown[0]!r}" if unknown else "--workers must be at least 1")
    # So that a run which is ended takes its devices with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = Options(args.quick, args.workers, args.stale)
    report = Report(versions=versions())
    for name in wanted:
        print(f"{name} …", file=sys.stderr, flush=True)
        part = run_part(name, options, report.versions, args.parts)
        report.rows += part.rows
        report.sections |= part.sections
        report.seconds |= part.seconds
        if part.versions != report.versions:
            report.others[name] = part.versions
    text = page(report, options)
    print("\n".join(report.table()))
    if args.out:
        args.out.write_text(text)
    return 0 if report.ok else 1
