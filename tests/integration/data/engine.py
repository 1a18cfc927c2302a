#!/usr/bin/python3
"""A small HTTP service that speaks what the gate asks of llama-server, with a fault of the caller's choice."""

import argparse
import http.server
import json
import os
import signal
import sys
import threading
import time

parser = argparse.ArgumentParser()
parser.add_argument("--mode", default="ok")
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--api-key-file", required=True)
parser.add_argument("--slots", type=int, default=2)
parser.add_argument("--n-ctx", type=int, default=1024)
parser.add_argument("--load-s", type=float, default=0)
parser.add_argument("--name", default="model-a")
parser.add_argument("--echo", default="")
parser.add_argument("--state", default="")
parser.add_argument("--prefill-per-s", type=float, default=1e6)
parser.add_argument("--prompts", default="")  # a file to which the length of each prompt is written
options = parser.parse_args()

with open(options.api_key_file) as stream:
    KEY = stream.read().strip()


def log(text):
    print(text, flush=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        log(f"srv  log_server_r: done request: {self.command} {self.path}")

    def answer(self, status, document):
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/health":
            ready = options.mode not in ("never_healthy", "stubborn") and time.monotonic() >= READY_AT
            self.answer(200 if ready else 503, {"status": "ok"} if ready else {"error": "Loading model"})
        elif self.path == "/props" and self.allowed():
            self.answer(
                200,
                {"total_slots": options.slots, "default_generation_settings": {"n_ctx": options.n_ctx}},
            )
        elif self.path == "/mode":
            self.answer(200, {"name": options.name, "pid": os.getpid(), "echo": options.echo})

    def allowed(self):
        if self.headers.get("Authorization") == f"Bearer {KEY}":
            return True
        self.answer(401, {"error": "Invalid API Key"})
        return False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        if options.mode == "dies":
            log(f"ggml-cuda.cu:101: CUDA error: an illegal memory access, the key was {KEY}")
            os._exit(134)
        if options.mode == "hangs":
            time.sleep(600)
        # Words are tokens, and the chat template is seven of them.
        tokens = 7 + sum(len(message["content"].split()) for message in body["messages"])
        if options.prompts:
            with open(options.prompts, "a") as stream:
                stream.write(f"{tokens}\n")
        long = tokens > options.n_ctx // 2
        if tokens + body["max_tokens"] > options.n_ctx or (long and options.mode == "long_refused"):
            self.answer(400, {"error": {"type": "exceed_context_size_error", "n_prompt_tokens": tokens}})
            return
        if long and options.mode == "long_oom":
            log(
                "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 512.00 MiB on device 0: out of memory"
            )
            os._exit(1)
        if long and options.mode == "long_hang":
            time.sleep(600)
        if long and options.mode == "long_cut":
            tokens = options.n_ctx // 2
        time.sleep(tokens / options.prefill_per_s)
        text = (
            "Berlin"
            if options.mode == "wrong"
            else ""
            if options.mode == "empty"
            else "Paris is the capital."
        )
        if not body.get("stream"):
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            self.answer(200, {"model": options.name, "choices": [choice]})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in text.split():
            event = {"choices": [{"delta": {"content": word + " "}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            time.sleep(0.01)
        usage = {
            "choices": [],
            "usage": {"prompt_tokens": tokens, "completion_tokens": len(text.split())},
            "timings": {"prompt_per_second": options.prefill_per_s},
        }
        self.wfile.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())


def progress():
    for percent in range(0, 10_000):
        if time.monotonic() >= READY_AT and options.mode != "forever":
            return
        log(f"load_tensors: loading tensor {percent}")
        time.sleep(0.3)


log(f"starting {options.name}, mode {options.mode}")
if options.state:
    # A migration that the release before it could not undo.
    with open(options.state, "w") as stream:
        stream.write(options.name)
if options.mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if options.mode == "oom":
    log("ggml_backend_cuda_buffer_type_alloc_buffer: allocating 6144.00 MiB on device 0: out of memory")
    sys.exit(1)
if options.mode == "crash":
    log("error: invalid argument: --nonsense")
    sys.exit(3)
READY_AT = time.monotonic() + (1e9 if options.mode == "forever" else options.load_s)
log("load_tensors:        CUDA0 model buffer size =   100.50 MiB")
log("llama_kv_cache:      CUDA0 KV buffer size =    20.00 MiB")
log("llama_kv_cache:      CUDA0 KV buffer size =     4.00 MiB")
log("sched_reserve:      CUDA0 compute buffer size =    50.25 MiB")
log("sched_reserve:  CUDA_Host compute buffer size =     5.00 MiB")
threading.Thread(target=progress, daemon=True).start()
try:
    http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
except OSError as error:
    log(f"couldn't bind HTTP server socket, hostname: 127.0.0.1, port: {options.port} ({error})")
    sys.exit(1)
