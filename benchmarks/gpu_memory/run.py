"""Measure on a real GPU what the planner predicts: memory per device and tokens/s, with llama.cpp built on
the spot.

Two phases, each within its ``--limit`` seconds and each resumable: ``build`` compiles llama.cpp for the
local card, ``run`` writes full-size models of random weights, starts llama-server case by case and writes
``gpu_memory.md`` and ``gpu_memory.json``. No network is used. What the time did not allow is written down
as "not run". See README.md.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import lzma
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "plugins")]

from module_utils import engine_args  # noqa: E402
from module_utils.memory import DeviceBudget  # noqa: E402
from module_utils.memory_llama_cpp import estimate, n_ctx  # noqa: E402
from module_utils.model_shape import ModelShape  # noqa: E402
from module_utils.speed import LLAMA_CPP_GPU, is_impossible, roofline_tokens_per_s  # noqa: E402
from module_utils.tensor_sizes import layout_from_gguf  # noqa: E402
from synthetic_gguf import write_model  # noqa: E402

MIB = 1 << 20
TARGETS = ("llama-server", "llama-bench", "llama-fit-params")
SHAPES = {
    # Qwen2.5-7B's config.json.
    "qwen2.5-7b": ModelShape(
        "qwen2", 28, 3584, 28, 4, 128, 18944, 152_064, False, 32_768, attention_bias=True
    ),
    # For a rehearsal without a GPU.
    "tiny": ModelShape("qwen2", 4, 256, 4, 2, 64, 768, 4_096, False, 32_768, attention_bias=True),
}
# (scheme, context per slot, slots, KV type, layers on the GPU or None for all), the most telling first:
# what the time does not allow is at the end.
CASES: tuple[tuple[str, int, int, str, int | None], ...] = (
    ("Q4_K_M", 8192, 1, "f16", None),
    ("Q4_K_M", 32768, 1, "f16", None),
    ("Q4_K_M", 32768, 1, "q8_0", None),
    ("Q8_0", 8192, 1, "f16", None),
    ("Q8_0", 32768, 1, "f16", None),
    ("F16", 8192, 1, "f16", None),
    ("F16", 32768, 1, "f16", None),
    ("Q8_0", 32768, 1, "q8_0", None),
    ("F16", 32768, 1, "q8_0", None),
    ("Q4_K_M", 8192, 4, "f16", None),
    ("Q4_K_M", 8192, 1, "q8_0", None),
    ("Q8_0", 8192, 4, "q8_0", None),
    ("Q4_K_M", 8192, 1, "f16", 15),
    ("Q8_0", 8192, 1, "q8_0", None),
    ("F16", 8192, 1, "q8_0", None),
    ("F16", 8192, 4, "f16", None),
    ("Q6_K", 8192, 1, "f16", None),
    ("Q6_K", 32768, 1, "f16", None),
    ("Q5_K_M", 8192, 1, "f16", None),
    ("Q3_K_M", 8192, 1, "f16", None),
    ("Q4_0", 8192, 1, "f16", None),
)
CASE_LIMIT_S = 75
GENERATED_TOKENS = 96
PROMPT_TOKENS = 128


class Clock:
    """Seconds left of this call."""

    def __init__(self, limit_s: float) -> None:
        self.end = time.monotonic() + limit_s

    def left(self) -> float:
        return self.end - time.monotonic()


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# --- build ---


def build(args: argparse.Namespace) -> int:
    """Compile llama.cpp; exit code 0 when done, 75 when the time ended first (call again)."""
    clock = Clock(args.limit)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    source = unpack_source(Path(args.source), work)
    build_dir = work / f"build-{args.backend}"
    if not (build_dir / "build.ninja").exists():
        configure(source, build_dir, args.backend, args.cuda_architecture)
    jobs = str(args.jobs or os.cpu_count() or 4)
    say(f"building {', '.join(TARGETS)} with {jobs} jobs, {clock.left():.0f} s left")
    started = time.monotonic()
    log = work / "build.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["cmake", "--build", str(build_dir), "--target", *TARGETS, "-j", jobs],
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that the compilers can be ended with it
        )
        try:
            code = process.wait(timeout=max(5.0, clock.left() - 25))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            say(f"the time ended first; last line: {last_lines(log, 1)}")
            return 75
    if code != 0:
        print(last_lines(log, 40))
        say(f"the build failed with {code}; see above")
        return 1
    say(f"built in {time.monotonic() - started:.0f} s")
    (work / "build_seconds").write_text(f"{time.monotonic() - started:.0f}\n")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pack_build(build_dir, out)
    # The time that is left goes into the models, which the next call finds on a machine that is still warm.
    if clock.left() > 120 and not args.no_models:
        for scheme in dict.fromkeys(case[0] for case in CASES):
            if clock.left() < 60:
                break
            model_file(work, args.shape, scheme)
    return 0


def unpack_source(archive: Path, work: Path) -> Path:
    """Return the directory with llama.cpp's CMakeLists.txt, unpacked once."""
    if archive.is_dir():
        return archive
    target = work / "source"
    marker = target / ".complete"
    if not marker.exists():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
        marker.touch()
    found = sorted(target.glob("**/ggml/CMakeLists.txt"), key=lambda path: len(path.parts))
    if not found:
        raise SystemExit(f"{archive} holds no llama.cpp source tree.")
    return found[0].parents[1]


def configure(source: Path, build_dir: Path, backend: str, cuda_architecture: str) -> None:
    """Run cmake; with CUDA, for the local card alone."""
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_MTMD=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_OPENSSL=OFF",
        # The build moves between machines with its libraries beside the programs.
        "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    ]
    environment = dict(os.environ)
    if backend == "cuda":
        nvcc = find_nvcc()
        options += [
            "-DGGML_CUDA=ON",
            f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architecture}",
            "-DGGML_CUDA_FA_ALL_QUANTS=OFF",
            "-DGGML_CUDA_NCCL=OFF",
            "-DGGML_NATIVE=ON",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            *cuda_library_options(nvcc, build_dir.parent),
        ]
        environment["PATH"] = f"{Path(nvcc).parent}:{environment['PATH']}"
    command = ["cmake", "-S", str(source), "-B", str(build_dir), "-G", "Ninja", *options]
    say(" ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    (build_dir.parent / "configure.log").write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        shutil.rmtree(build_dir, ignore_errors=True)
        raise SystemExit("cmake failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-40:]))


def find_nvcc() -> str:
    """Return CUDA's compiler: on PATH, in a toolkit's usual place, or in Python packages."""
    places = [shutil.which("nvcc") or "", os.environ.get("CUDACXX", "")]
    places += sorted(glob.glob("/usr/local/cuda*/bin/nvcc") + glob.glob("/opt/cuda*/bin/nvcc"))
    for root in python_package_roots():
        places += glob.glob(f"{root}/*/bin/nvcc")
    for place in places:
        if (
            place
            and os.access(place, os.X_OK)
            and b"cuda" in version_of([place, "--version"]).lower().encode()
        ):
            return place
    raise SystemExit("No nvcc was found: CUDA's compiler is needed for the build.")


def python_package_roots() -> list[str]:
    """Return the directories in which pip puts NVIDIA's libraries."""
    return sorted({f"{entry}/nvidia" for entry in sys.path if entry and os.path.isdir(f"{entry}/nvidia")})


def cuda_library_options(nvcc: str, work: Path) -> list[str]:
    """Return what CMake must be told where the toolkit lacks cuBLAS or the driver library but pip or the
    driver has it."""
    toolkit = Path(nvcc).resolve().parents[1]
    wanted = {
        "cublas": "CUDA_cublas_LIBRARY",
        "cublasLt": "CUDA_cublasLt_LIBRARY",
        "cudart": "CUDA_cudart_LIBRARY",
    }
    options = []
    shim = work / "cuda-shim"
    for name, variable in wanted.items():
        if glob.glob(f"{toolkit}/**/lib{name}.so", recursive=True):
            continue
        found = [
            path
            for root in python_package_roots()
            for path in glob.glob(f"{root}/**/lib{name}.so*", recursive=True)
        ]
        found += glob.glob(f"/usr/lib/x86_64-linux-gnu/lib{name}.so*")
        if found:
            shim.mkdir(parents=True, exist_ok=True)
            link = shim / f"lib{name}.so"
            if not link.exists():
                link.symlink_to(found[0])
            options.append(f"-D{variable}={link}")
            os.environ["LD_LIBRARY_PATH"] = f"{Path(found[0]).parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    if not glob.glob(f"{toolkit}/**/include/cublas_v2.h", recursive=True):
        headers = [
            path
            for root in python_package_roots()
            for path in glob.glob(f"{root}/**/cublas_v2.h", recursive=True)
        ]
        if headers:
            directory = Path(headers[0]).parent
            options += [f"-DCMAKE_CUDA_FLAGS=-I{directory}", f"-DCMAKE_CXX_FLAGS=-I{directory}"]
    if not glob.glob(f"{toolkit}/**/stubs/libcuda.so", recursive=True) and not glob.glob(
        "/usr/lib/*/libcuda.so"
    ):
        drivers = glob.glob("/usr/local/nvidia/lib64/libcuda.so.1") + glob.glob("/usr/lib/*/libcuda.so.1")
        if drivers:
            shim.mkdir(parents=True, exist_ok=True)
            link = shim / "libcuda.so"
            if not link.exists():
                link.symlink_to(drivers[0])
            options.append(f"-DCUDA_cuda_driver_LIBRARY={link}")
        else:
            options.append("-DGGML_CUDA_NO_VMM=ON")
    return options


def pack_build(build_dir: Path, out: Path) -> None:
    """Write programs and libraries as compressed parts of at most 15 MiB, so that a fresh machine need not
    build."""
    programs = build_dir / "bin"
    for path in programs.iterdir():
        if path.is_file() and not path.is_symlink() and shutil.which("strip"):
            subprocess.run(["strip", "--strip-unneeded", str(path)], check=False, timeout=60)
    buffer = io.BytesIO()
    with lzma.open(buffer, "wb", preset=1) as compressed, tarfile.open(fileobj=compressed, mode="w|") as tar:
        tar.add(programs, arcname=".")
    data = buffer.getvalue()
    size = 15 * MIB
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    if len(parts) > 4:
        say(f"the build packs to {len(data) >> 20} MiB: it stays on this machine alone")
        return
    for index, part in enumerate(parts):
        (out / f"build.tar.xz.{index:02d}").write_bytes(part)
    say(f"packed the build into {len(parts)} parts, {len(data) >> 20} MiB")


def unpack_build(prebuilt: Path, target: Path) -> None:
    """Put the parts that :func:`pack_build` wrote back together."""
    parts = sorted(prebuilt.glob("build.tar.xz.*"))
    if not parts:
        raise SystemExit(f"{prebuilt} holds no build.tar.xz.* parts.")
    target.mkdir(parents=True, exist_ok=True)
    data = lzma.decompress(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(target, filter="data")


# --- run ---


def run(args: argparse.Namespace) -> int:
    """Run the cases; exit code 0 when all ran or were written down as not run, 1 when none could."""
    clock = Clock(args.limit)
    work, out = Path(args.work), Path(args.out)
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    programs = Path(args.bin) if args.bin else work / f"build-{args.backend}" / "bin"
    if not (programs / "llama-server").exists() and args.prebuilt:
        unpack_build(Path(args.prebuilt), programs)
    if not (programs / "llama-server").exists():
        raise SystemExit(f"{programs} holds no llama-server: run the phase `build` first.")
    cuda_library_options_for_run()
    gpu = Gpu.open() if args.backend == "cuda" else None
    report: dict[str, Any] = {"machine": machine(programs, gpu, work), "shape": args.shape, "cases": []}
    report["gpu_facts"] = read_gpu_facts()
    shape = SHAPES[args.shape]
    cases = [case for case in CASES if not args.schemes or case[0] in args.schemes.split(",")]
    for number, (scheme, context, slots, kv_type, layers) in enumerate(cases, 1):
        case = {
            "scheme": scheme,
            "context_tokens": context,
            "slots": slots,
            "kv_type": kv_type,
            "n_gpu_layers": shape.layers + 1 if layers is None else min(layers, shape.layers + 1),
        }
        if clock.left() < args.case_limit / 2:
            case["status"] = "not run: out of time"
        else:
            say(f"case {number}/{len(cases)}: {label(case)} ({clock.left():.0f} s left)")
            try:
                model = model_file(work, args.shape, scheme)
                case.update(
                    run_case(programs, model, shape, case, gpu, min(args.case_limit, clock.left() - 8), work)
                )
                case["status"] = "run"
            except Exception as error:  # one case that fails must not take the others with it
                case["status"] = f"failed: {type(error).__name__}: {error}"
                say(traceback.format_exc(limit=3))
        report["cases"].append(case)
        write_report(report, out)
    done = sum(case["status"] == "run" for case in report["cases"])
    say(f"{done} of {len(cases)} cases ran; {out}/gpu_memory.md")
    return 0 if done else 1


def cuda_library_options_for_run() -> None:
    """Let the server find CUDA's libraries where they came with Python packages."""
    directories = sorted(
        {
            str(Path(path).parent)
            for root in python_package_roots()
            for path in glob.glob(f"{root}/**/lib*.so*", recursive=True)
        }
    )
    present = os.environ.get("LD_LIBRARY_PATH", "")
    os.environ["LD_LIBRARY_PATH"] = ":".join([*filter(None, [present]), *directories])


def model_file(work: Path, shape_name: str, scheme: str) -> Path:
    """Return the model of random weights, written once."""
    models = work / "models"
    models.mkdir(parents=True, exist_ok=True)
    path = models / f"{shape_name}.{scheme}.gguf"
    if not path.exists():
        started = time.monotonic()
        size = write_model(path, SHAPES[shape_name], scheme)
        say(f"wrote {path.name}, {size / 1e9:.2f} GB in {time.monotonic() - started:.0f} s")
    return path


def run_case(
    programs: Path,
    model: Path,
    shape: ModelShape,
    case: dict[str, Any],
    gpu: Gpu | None,
    limit_s: float,
    work: Path,
) -> dict[str, Any]:
    """Return prediction and measurement of one case."""
    clock = Clock(limit_s)
    context, slots, kv_type = case["context_tokens"], case["slots"], case["kv_type"]
    device = gpu.device() if gpu else DeviceBudget("CPU", "CPU", 1 << 40)
    layout = layout_from_gguf(model)
    layers = case["n_gpu_layers"] if gpu else 0
    plan = estimate(
        shape,
        layout,
        context_tokens=context,
        slots=slots,
        kv_type_k=kv_type,
        kv_type_v=kv_type,
        n_gpu_layers=layers,
        devices=[device] if gpu else [],
    )
    predicted = plan.devices[0] if gpu else plan.host
    result: dict[str, Any] = {"predicted": predicted.as_dict(), "predicted_host": plan.host.as_dict()}
    settings = {
        "model_file": model.name,
        "n_ctx": n_ctx(context, slots),
        "slots": slots,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_gpu_layers": layers,
        "flash_attention": "on",
        "kv_type_k": kv_type,
        "kv_type_v": kv_type,
        "split_mode": "layer",
        "tensor_split": None,
        "cache_ram_mib": 0,
        "load_mode": "mmap",
        "repack": False,
        "n_cpu_moe": 0,
        "rope": None,
        "threads": min(8, os.cpu_count() or 1),
        "served_model_name": "random",
        "device_uuids": [device.id],
        "jinja": False,
    }
    fit = subprocess.run(
        [
            str(programs / "llama-fit-params"),
            "-m",
            str(model),
            *engine_args.llama_memory_args(settings),
            "--fit-print",
            "on",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    result["fit_params"] = parse_fit_params(fit.stdout)
    before = gpu.used_bytes() if gpu else 0
    port = free_port()
    argv = engine_args.llama_server_argv(
        settings,
        binary=str(programs / "llama-server"),
        model_path=str(model),
        host="127.0.0.1",
        port=port,
        api_key_file=None,
        chat_template_file=None,
    )
    log_path = work / "server.log"
    with log_path.open("wb") as log:
        # Buffer sizes are logged from verbosity 4 on.
        server = subprocess.Popen([*argv, "-lv", "4"], stdout=log, stderr=subprocess.STDOUT)
    try:
        started = time.monotonic()
        wait_until_ready(server, port, log_path, clock)
        result["start_s"] = round(time.monotonic() - started, 1)
        result["nvml_after_start"] = gpu.process_bytes(server.pid, before) if gpu else None
        short = complete(port, PROMPT_TOKENS, GENERATED_TOKENS, shape.vocab_size, clock)
        result["tokens_per_s_short"] = short["predicted_per_second"]
        if clock.left() > 20:
            deep_tokens = context - GENERATED_TOKENS - 16
            try:
                deep = complete(port, deep_tokens, GENERATED_TOKENS, shape.vocab_size, clock)
                result["tokens_per_s_full"] = deep["predicted_per_second"]
                result["prompt_tokens_per_s"] = deep["prompt_per_second"]
                result["full_context_tokens"] = deep_tokens
            except OSError as error:  # too slow for the case's time: what was measured so far still counts
                result["full_context_error"] = str(error)
        result["nvml_peak"] = gpu.process_bytes(server.pid, before) if gpu else None
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(timeout=10)
    result["log"] = parse_log(log_path.read_text(errors="replace"))
    result.update(speeds(result, shape, layout, kv_type, gpu, layers))
    return result


def speeds(
    result: dict[str, Any], shape: ModelShape, layout: Any, kv_type: str, gpu: Gpu | None, layers: int
) -> dict[str, Any]:
    """Return the roofline at both depths, where everything is on the GPU."""
    if gpu is None or gpu.bandwidth_bytes_per_s is None or layers <= shape.layers:
        return {}
    weights = sum(layout.blocks) + layout.output_head + layout.output_norm
    per_token = 2 * shape.kv_dim * (2.0 if kv_type == "f16" else 34 / 32) * shape.layers
    found: dict[str, Any] = {}
    for name, depth in (("short", PROMPT_TOKENS), ("full", result.get("full_context_tokens"))):
        measured = result.get(f"tokens_per_s_{name}")
        if depth is None or measured is None:
            continue
        roofline = roofline_tokens_per_s([(int(weights + per_token * depth), gpu.bandwidth_bytes_per_s)])
        found[f"roofline_{name}"] = roofline
        found[f"efficiency_{name}"] = measured / roofline
        found[f"impossible_{name}"] = is_impossible(measured, roofline)
    return found


def wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path, clock: Clock) -> None:
    while clock.left() > 0:
        if server.poll() is not None:
            raise RuntimeError(f"llama-server ended with {server.returncode}: {last_lines(log, 6)}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise RuntimeError(f"llama-server was not ready in time: {last_lines(log, 3)}")


def complete(port: int, prompt_tokens: int, generated: int, vocabulary: int, clock: Clock) -> dict[str, Any]:
    """Return the server's own timings of one completion over a prompt of token numbers."""
    prompt = [256 + (index * 7919) % (vocabulary - 512) for index in range(prompt_tokens)]
    body = {
        "prompt": prompt,
        "n_predict": generated,
        "ignore_eos": True,
        "cache_prompt": False,
        "temperature": 0.0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(  # noqa: S310 - a loopback address
        request, timeout=max(5.0, clock.left())
    ) as answer:
        timings: dict[str, Any] = json.load(answer)["timings"]
    return timings


def parse_log(text: str) -> dict[str, dict[str, float]]:
    """Return llama.cpp's own buffer lines, MiB: {"CUDA0": {"model": …, "KV": …, "compute": …}}."""
    found: dict[str, dict[str, float]] = {}
    for match in re.finditer(r"(\S+) (model|KV|compute|output) buffer size\s*=\s*([\d.]+) MiB", text):
        kinds = found.setdefault(match[1], {})
        # Buffers are logged again when graphs are reserved anew; the model's files may be several.
        kinds[match[2]] = float(match[3]) + (kinds.get(match[2], 0.0) if match[2] in ("model", "KV") else 0.0)
    return found


def parse_fit_params(text: str) -> dict[str, list[int]]:
    rows = re.findall(r"^(\S+)\s+(\d+)\s+(\d+)\s+(\d+)\s*$", text, re.MULTILINE)
    return {name: [int(model), int(context), int(compute)] for name, model, context, compute in rows}


# --- the card ---


class Gpu:
    """The first card, through NVML."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml = nvml
        self.handle = handle
        self.name = text_of(nvml.nvmlDeviceGetName(handle))
        self.uuid = text_of(nvml.nvmlDeviceGetUUID(handle))
        self.bandwidth_bytes_per_s, self.bandwidth_source = self.bandwidth()

    @classmethod
    def open(cls) -> Gpu:
        import pynvml

        pynvml.nvmlInit()
        return cls(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))

    def memory(self) -> tuple[int, int, int]:
        """Return (total, reserved, used) in bytes."""
        try:
            memory = self.nvml.nvmlDeviceGetMemoryInfo(self.handle, version=self.nvml.nvmlMemory_v2)
            return int(memory.total), int(memory.reserved), int(memory.used)
        except (self.nvml.NVMLError, TypeError, AttributeError):
            memory = self.nvml.nvmlDeviceGetMemoryInfo(self.handle)
            return int(memory.total), 0, int(memory.used)

    def used_bytes(self) -> int:
        return self.memory()[2]

    def process_bytes(self, pid: int, before: int) -> dict[str, int | None]:
        """Return what NVML says of the process, and by how much the card's use rose."""
        processes = self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle)
        own = next((p.usedGpuMemory for p in processes if p.pid == pid), None)
        if own is None and len(processes) == 1:  # another PID namespace
            own = processes[0].usedGpuMemory
        return {"process_bytes": own, "card_rise_bytes": self.used_bytes() - before}

    def device(self) -> DeviceBudget:
        total, reserved, _ = self.memory()
        return DeviceBudget(self.uuid, self.name, total, reserved)

    def bandwidth(self) -> tuple[float | None, str]:
        """Return bytes/s: the catalog's, else memory clock x bus width x 2."""
        try:
            import yaml

            for gpu in yaml.safe_load((ROOT / "catalog" / "gpus.yml").read_text())["gpus"]:
                if self.name in gpu["nvml_names"]:
                    return gpu["bandwidth_gb_per_s"] * 1e9, f"catalog: {gpu['source']}"
        except (ImportError, OSError, KeyError):
            pass
        try:
            clock = self.nvml.nvmlDeviceGetMaxClockInfo(self.handle, self.nvml.NVML_CLOCK_MEM)
            bus = self.nvml.nvmlDeviceGetMemoryBusWidth(self.handle)
        except self.nvml.NVMLError:
            return None, "unknown"
        return clock * 1e6 * 2 * bus / 8, "NVML: memory clock x bus width x 2"

    def describe(self) -> dict[str, Any]:
        total, reserved, used = self.memory()
        capability = self.nvml.nvmlDeviceGetCudaComputeCapability(self.handle)
        return {
            "name": self.name,
            "total_bytes": total,
            "reserved_bytes": reserved,
            "used_before_bytes": used,
            "compute_capability": f"{capability[0]}.{capability[1]}",
            "driver": text_of(self.nvml.nvmlSystemGetDriverVersion()),
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s,
            "bandwidth_source": self.bandwidth_source,
        }


def read_gpu_facts() -> dict[str, Any]:
    """Return what fleetfit's own probe says of this machine, or why it said nothing.

    In a process of its own, as in an Ansible module: NVML answers "blocked by the operating system" to the probe's
    child where the parent has NVML open already (seen with driver 580.159.04).
    """
    code = (
        "import dataclasses, json, sys, time; sys.path.insert(0, sys.argv[1]);"
        "from module_utils import gpu_facts; began = time.monotonic(); facts = gpu_facts.gather();"
        "print(json.dumps({'seconds': round(time.monotonic() - began, 2), 'facts': dataclasses.asdict(facts)}))"
    )
    plugins = Path(__file__).resolve().parents[2] / "plugins"
    argv = [sys.executable, "-c", code, str(plugins)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        return {"error": (done.stderr or done.stdout).strip()[-500:]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def machine(programs: Path, gpu: Gpu | None, work: Path) -> dict[str, Any]:
    seconds = work / "build_seconds"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": gpu.describe() if gpu else None,
        "llama_cpp": version_of([str(programs / "llama-server"), "--version"]),
        "nvcc": (version_of(["nvcc", "--version"]).splitlines() or [""])[-1]
        if shutil.which("nvcc")
        else None,
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "build_seconds": seconds.read_text().strip() if seconds.exists() else None,
    }


# --- the report ---


def write_report(report: dict[str, Any], out: Path) -> None:
    (out / "gpu_memory.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    (out / "gpu_memory.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    facts, gpu = report["machine"], report["machine"]["gpu"]
    lines = ["# Predicted and measured on a real GPU", ""]
    if gpu:
        lines.append(
            f"{gpu['name']} (compute capability {gpu['compute_capability']}, {gpu['total_bytes'] >> 20} MiB, "
            f"{gpu['reserved_bytes'] >> 20} MiB reserved), driver {gpu['driver']}, bandwidth "
            f"{(gpu['bandwidth_bytes_per_s'] or 0) / 1e9:.0f} GB/s ({gpu['bandwidth_source']})."
        )
    else:
        lines.append("**No GPU: a rehearsal on the CPU. Nothing here says anything about a GPU.**")
    version = " ".join(facts["llama_cpp"].split()[:12])
    lines += [
        f"llama.cpp {version}; {facts['nvcc'] or 'no nvcc'}; Linux {facts['kernel']}; {facts['date']}.",
        f"Models: random weights in the shape of {report['shape']}, every block valid; sizes and arithmetic "
        "are real, answers are noise.",
        "",
        "MiB. `log`: llama.cpp's own buffer lines. `NVML`: the process after a full-context prompt. `rest`: "
        "NVML less the three buffers, against the overhead that the plan takes. `fits`: NVML within the "
        "plan's total.",
        "",
        "| case | weights plan / log | KV plan / log | compute plan / fit-params / log | rest / overhead "
        "| total plan without margin / NVML | with margin | fits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        lines.append(memory_row(case, "CUDA0" if gpu else "CPU"))
    lines += [
        "",
        f"Tokens/s, one stream. The plan's factor is {LLAMA_CPP_GPU.factor} ({LLAMA_CPP_GPU.source}) where "
        "decode_speed in catalog/gpus.yml has nothing measured for the card.",
        "",
        "| case | short: measured / roofline = factor | full context: measured / roofline = factor "
        "| prompt tok/s | start s |",
        "|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        if case["status"] == "run":
            lines.append(speed_row(case))
    found = report["gpu_facts"]
    lines += [
        "",
        "## gpu_facts on this machine",
        "",
        "```json",
        json.dumps(found, indent=1, default=str),
        "```",
        "",
    ]
    return "\n".join(lines)


def label(case: dict[str, Any]) -> str:
    size = f"{case['context_tokens']}x{case['slots']}"
    return f"{case['scheme']} {size} {case['kv_type']} ngl {case['n_gpu_layers']}"


def memory_row(case: dict[str, Any], device: str) -> str:
    if case["status"] != "run":
        return f"| {label(case)} | {case['status'].splitlines()[0][:160]} | | | | | | |"
    plan = {name: value / MIB for name, value in case["predicted"].items()}
    log = dict.fromkeys(("model", "KV", "compute"), 0.0)
    for name, kinds in case["log"].items():
        if name == device or (device == "CPU" and name.startswith("CPU")):
            for kind in log:
                log[kind] += kinds.get(kind, 0.0)
    fit = case["fit_params"].get(device, case["fit_params"].get("Host", [0, 0, 0]))
    nvml = case.get("nvml_peak") or {}
    used = nvml.get("process_bytes") or nvml.get("card_rise_bytes")
    total = plan["weights"] + plan["kv_cache"] + plan["compute"] + plan["overhead"]
    cells = [
        f"{plan['weights']:.0f} / {log['model']:.0f}",
        f"{plan['kv_cache']:.0f} / {log['KV']:.0f}",
        f"{plan['compute']:.0f} / {fit[2]} / {log['compute']:.0f}",
    ]
    if used:
        used_mib = used / MIB
        cells += [
            f"{used_mib - sum(log.values()):.0f} / {plan['overhead']:.0f}",
            f"{total:.0f} / {used_mib:.0f} ({(total - used_mib) / used_mib:+.1%})",
            f"{plan['total']:.0f}",
            "yes" if used_mib <= plan["total"] else "**NO**",
        ]
    else:
        cells += ["-", f"{total:.0f} / -", f"{plan['total']:.0f}", "-"]
    return f"| {label(case)} | " + " | ".join(cells) + " |"


def speed_row(case: dict[str, Any]) -> str:
    cells = []
    for name in ("short", "full"):
        measured, roofline = case.get(f"tokens_per_s_{name}"), case.get(f"roofline_{name}")
        if measured is None:
            cells.append("not run")
        elif roofline is None:
            cells.append(f"{measured:.1f}")
        else:
            flag = " **impossible**" if case[f"impossible_{name}"] else ""
            cells.append(f"{measured:.1f} / {roofline:.1f} = {measured / roofline:.2f}{flag}")
    prompt = case.get("prompt_tokens_per_s")
    cells += [f"{prompt:.0f}" if prompt else "-", str(case.get("start_s", "-"))]
    return f"| {label(case)} | " + " | ".join(cells) + " |"


# --- small things ---


def version_of(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def text_of(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def last_lines(path: Path, count: int) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join(lines[-count:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main() -> int:
    """Parse the command line and run one phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("phase", choices=("build", "run"))
    parser.add_argument("--source", help="llama.cpp's source: a tar archive or a directory")
    parser.add_argument("--work", default="/tmp/fleetfit-gpu-memory", help="where build and models are kept")  # noqa: S108
    parser.add_argument("--out", required=True, help="where tables and the packed build go")
    parser.add_argument("--backend", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--limit", type=float, default=540, help="seconds for this call")
    parser.add_argument("--case-limit", type=float, default=CASE_LIMIT_S, help="seconds per case")
    parser.add_argument("--schemes", help="only these, comma-separated")
    parser.add_argument("--bin", help="llama.cpp's programs, where they are built already")
    parser.add_argument("--prebuilt", help="a directory with build.tar.xz.* parts from an earlier `build`")
    parser.add_argument(
        "--cuda-architecture", default="native", help="as CMake knows it; the local card by default"
    )
    parser.add_argument("--jobs", type=int)
    parser.add_argument(
        "--no-models", action="store_true", help="build: do not write models in the time that is left"
    )
    args = parser.parse_args()
    if args.phase == "build":
        if not args.source:
            parser.error("build needs --source")
        return build(args)
    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
