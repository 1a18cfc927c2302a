"""`fleetfit catalog pin` against a loopback server with the hub's API, and a plan that then uses the pins."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import layout_of
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MODEL = "qwen2.5-0.5b-instruct"
GGUF = "Qwen/Qwen2.5-0.5B-Instruct-GGUF"
BF16 = "Qwen/Qwen2.5-0.5B-Instruct"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test_token_that_must_stay_here"
HTML = b"<!DOCTYPE html><html><body>This page is blocked by your organisation.</body></html>"
ENTRY = load_catalog().entry(MODEL)


class Hub:
    """A hub in a thread: answers by path, and what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.redirects: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append((self.path, self.headers.get("Authorization")))
                if self.path in hub.redirects:
                    self.send_response(302)
                    self.send_header("Location", hub.redirects[self.path])
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                status, body = hub.answers.get(self.path, (404, b'{"error":"Repository not found"}'))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def describe(self, repository: str, *files: dict[str, Any], revision: str = "main") -> None:
        """Answer for a repository as the real API does with blobs=true."""
        document = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": list(files)}
        path = f"/api/models/{repository}/revision/{revision}?blobs=true"
        self.answers[path] = (200, json.dumps(document).encode())

    def serve(self, repository: str, name: str, content: bytes) -> None:
        self.answers[f"/{repository}/resolve/{COMMIT}/{name}"] = (200, content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    yield found
    found.server.shutdown()
    found.server.server_close()


def large(name: str, size: int) -> dict[str, Any]:
    """Return a large (LFS) file as the API lists it; its content is never asked for."""
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return {
        "rfilename": name,
        "size": size,
        "blobId": "f" * 40,
        "lfs": {"sha256": sha256, "size": size, "pointerSize": 134},
    }


def small(name: str, content: bytes) -> dict[str, Any]:
    """Return a small file (kept in git itself) as the API lists it."""
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return {"rfilename": name, "size": len(content), "blobId": git}


def weights(variant: str) -> int:
    return layout_of(ENTRY, ENTRY.variant(variant)).file_bytes


def gguf(variant: str) -> dict[str, Any]:
    return large(f"{MODEL}-{variant.lower()}.gguf", weights(variant))


def fleetfit(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command without what this machine's environment says of proxies and hubs."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith("HF_")
    }
    return subprocess.run(
        [BIN / "fleetfit", *arguments],
        env={**inherited, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def pin(hub: Hub, folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return fleetfit(
        "catalog",
        "pin",
        MODEL,
        *arguments,
        "--endpoint",
        hub.endpoint,
        "--output-dir",
        str(folder),
        **environ,
    )


def pins_in(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((folder / "pins" / f"{MODEL}.yml").read_text())
    return document["variants"]  # type: ignore[no-any-return]


def select(folder: Path, catalog_dirs: list[str]) -> dict[str, Any]:
    """Run fleetfit.llm.select_quantization in a play and return its result."""
    facts = {
        "schema_version": 1,
        "stable": {
            "machine_id": "0" * 32,
            "ram_total_bytes": 16 << 30,
            "cgroup_limit_bytes": None,
            "cpu": {"threads": 4},
            "driver": None,
            "accelerators": [],
        },
        "foreign_bytes": {},
        "live": {},
        "problems": [],
    }
    result = folder / "result.json"
    play = {
        "hosts": "edge",
        "gather_facts": False,
        "tasks": [
            {
                "name": "Plan",
                "fleetfit.llm.select_quantization": {
                    "facts": facts,
                    "model": MODEL,
                    "catalog_dirs": catalog_dirs,
                },
                "register": "outcome",
                "ignore_errors": True,
            },
            {
                "name": "Keep the result",
                "ansible.builtin.copy": {
                    "content": "{{ outcome | to_json }}",
                    "dest": str(result),
                    "mode": "0600",
                },
                "delegate_to": "controller",
            },
        ],
    }
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    hosts = {"edge": {"ansible_host": "192.0.2.1"}, "controller": local}
    (folder / "play.json").write_text(json.dumps([play]))
    (folder / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts}}))
    done = subprocess.run(
        [BIN / "ansible-playbook", "-i", str(folder / "hosts.json"), str(folder / "play.json")],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.exists(), done.stdout + done.stderr
    return json.loads(result.read_text())  # type: ignore[no-any-return]


def test_large_files_are_pinned_by_what_the_hub_tells(hub: Hub, tmp_path: Path) -> None:
    hub.describe(GGUF, gguf("Q8_0"), gguf("Q4_K_M"), small("README.md", b"# read me"))
    done = pin(hub, tmp_path, "Q8_0")
    assert done.returncode == 0, done.stderr
    assert "Q8_0: 1 file" in done.stdout
    wanted = gguf("Q8_0")
    assert pins_in(tmp_path) == {
        "Q8_0": {
            "repository": GGUF,
            "revision": COMMIT,
            "files": [
                {"name": wanted["rfilename"], "size": wanted["size"], "sha256": wanted["lfs"]["sha256"]}
            ],
        }
    }
    # Nothing but the description was asked for: weights are not fetched to pin them.
    assert [path for path, _ in hub.asked] == [f"/api/models/{GGUF}/revision/main?blobs=true"]
    # What was pinned before stays.
    assert pin(hub, tmp_path, "Q4_K_M").returncode == 0
    assert set(pins_in(tmp_path)) == {"Q8_0", "Q4_K_M"}


def test_small_files_are_fetched_and_hashed_also_behind_a_redirect(hub: Hub, tmp_path: Path) -> None:
    config, merges = b'{"model_type": "qwen2"}\n', b"#version: 0.2\n"
    hub.describe(
        BF16,
        large("model.safetensors", weights("BF16")),
        small("config.json", config),
        small("merges.txt", merges),
        small("README.md", b"not wanted"),
    )
    hub.serve(BF16, "merges.txt", merges)
    storage = Hub()
    storage.answers["/blob/1"] = (200, config)
    hub.redirects[f"/{BF16}/resolve/{COMMIT}/config.json"] = f"{storage.endpoint}/blob/1"
    try:
        done = pin(hub, tmp_path, "BF16", HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr
        files = {item["name"]: item for item in pins_in(tmp_path)["BF16"]["files"]}
        assert set(files) == {"model.safetensors", "config.json", "merges.txt"}
        assert files["config.json"]["sha256"] == hashlib.sha256(config).hexdigest()
        assert files["config.json"]["size"] == len(config)
        assert files["merges.txt"]["sha256"] == hashlib.sha256(merges).hexdigest()
        # The token belongs to the hub and does not follow to the storage, nor into a file.
        assert [token for _, token in storage.asked] == [None]
        assert TOKEN not in (tmp_path / "pins" / f"{MODEL}.yml").read_text()
        assert TOKEN not in done.stdout + done.stderr
    finally:
        storage.server.shutdown()
        storage.server.server_close()


def test_a_revision_and_a_mirror_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    hub.describe(GGUF, gguf("Q8_0"), revision="refs%2Fpr%2F7")
    arguments = ("catalog", "pin", MODEL, "Q8_0", "--revision", "refs/pr/7", "--output-dir", str(tmp_path))
    done = fleetfit(*arguments, HF_ENDPOINT=f"{hub.endpoint}/")
    assert done.returncode == 0, done.stderr
    assert pins_in(tmp_path)["Q8_0"]["revision"] == COMMIT


def test_the_pinned_entry_is_planned_and_was_refused_before(hub: Hub, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    before = select(tmp_path, [str(overlay)])
    assert before["failed"] is True
    assert before["code"] == "model_not_pinned"
    assert f"fleetfit catalog pin {MODEL}" in before["msg"]
    hub.describe(GGUF, gguf("Q8_0"), gguf("Q4_K_M"))
    assert pin(hub, overlay, "Q8_0", "Q4_K_M").returncode == 0
    after = select(tmp_path, [str(overlay)])
    assert not after.get("failed"), after["msg"]
    deployment = after["ansible_facts"]["fleetfit_plan"]["deployments"][0]
    assert deployment["variant"] == "Q8_0"
    assert deployment["repository"] == GGUF
    assert deployment["revision"] == COMMIT
    wanted = gguf("Q8_0")
    assert deployment["files"] == [
        {"name": wanted["rfilename"], "size": wanted["size"], "sha256": wanted["lfs"]["sha256"]}
    ]
    assert fleetfit("catalog", "check", "--catalog-dir", str(overlay)).returncode == 0


def _missing_repository(hub: Hub) -> None:
    pass


def _gated(hub: Hub) -> None:
    hub.answers[f"/api/models/{GGUF}/revision/main?blobs=true"] = (401, b'{"error":"gated"}')


def _missing_file(hub: Hub) -> None:
    hub.describe(GGUF, gguf("Q4_K_M"), small("README.md", b"x"))


def _html(hub: Hub) -> None:
    hub.answers[f"/api/models/{GGUF}/revision/main?blobs=true"] = (200, HTML)


def _list(hub: Hub) -> None:
    hub.answers[f"/api/models/{GGUF}/revision/main?blobs=true"] = (200, b"[]")


def _no_siblings(hub: Hub) -> None:
    hub.answers[f"/api/models/{GGUF}/revision/main?blobs=true"] = (200, b'{"sha": "%s"}' % COMMIT.encode())


def _siblings_of_strings(hub: Hub) -> None:
    text = json.dumps({"sha": COMMIT, "siblings": ["a.gguf"]}).encode()
    hub.answers[f"/api/models/{GGUF}/revision/main?blobs=true"] = (200, text)


def _deep(hub: Hub) -> None:
    hub.answers[f"/api/models/{GGUF}/revision/main?blobs=true"] = (200, b"[" * 200_000)


def _no_commit(hub: Hub) -> None:
    hub.describe(GGUF, gguf("Q8_0"))
    path = f"/api/models/{GGUF}/revision/main?blobs=true"
    hub.answers[path] = (200, hub.answers[path][1].replace(COMMIT.encode(), b"main"))


def _outside(hub: Hub) -> None:
    hub.describe(GGUF, gguf("Q8_0"), {**gguf("Q8_0"), "rfilename": "../../etc/cron.d/x-q8_0.gguf"})


def _bad_sha256(hub: Hub) -> None:
    item = gguf("Q8_0")
    hub.describe(GGUF, {**item, "lfs": {**item["lfs"], "sha256": "deadbeef"}})


def _no_sha256(hub: Hub) -> None:
    item = gguf("Q8_0")
    del item["lfs"]
    hub.describe(GGUF, item)


def _other_model(hub: Hub) -> None:
    hub.describe(GGUF, {**gguf("Q8_0"), **large(gguf("Q8_0")["rfilename"], 7 << 30)})


def _server_error(hub: Hub) -> None:
    hub.answers[f"/api/models/{GGUF}/revision/main?blobs=true"] = (503, b"busy")


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (_missing_repository, ["has no Qwen/Qwen2.5-0.5B-Instruct-GGUF", "404"]),
        (_gated, ["HTTP 401", "gated", f"/{GGUF}", "HF_TOKEN"]),
        (_missing_file, [f"No weights in {GGUF}", "q8_0", f"{MODEL}-q4_k_m.gguf"]),
        (_html, ["not a model's description", "proxy or mirror"]),
        (_list, ["not a model's description"]),
        (_no_siblings, ["not a model's description"]),
        (_siblings_of_strings, ["not a model's description"]),
        (_deep, ["not a model's description"]),
        (_no_commit, ["'main' is no commit"]),
        (_outside, ["not a model's description"]),
        (_bad_sha256, ["not a model's description"]),
        (_no_sha256, ["tells no sha256"]),
        (_other_model, ["has 7.0 GiB", "these are not its files"]),
        (_server_error, ["HTTP 503"]),
    ],
)
def test_a_bad_answer_is_one_sentence_and_nothing_is_written(
    hub: Hub, tmp_path: Path, prepare: Callable[[Hub], None], says: list[str]
) -> None:
    prepare(hub)
    done = pin(hub, tmp_path, "Q8_0")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for text in says:
        assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("served", "says"),
    [
        (None, "404"),
        (HTML, "are declared"),
        (b'{"model_type": "QWEN2"}', "not the content that the hub declares"),
    ],
)
def test_a_small_file_that_is_not_what_was_declared(
    hub: Hub, tmp_path: Path, served: bytes | None, says: str
) -> None:
    hub.describe(
        BF16, large("model.safetensors", weights("BF16")), small("config.json", b'{"model_type": "qwen2"}')
    )
    if served is not None:
        hub.serve(BF16, "config.json", served)
    done = pin(hub, tmp_path, "BF16")
    assert done.returncode == 2
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_is_not_there_and_an_address_that_is_none(tmp_path: Path) -> None:
    gone = Hub()
    gone.server.shutdown()
    gone.server.server_close()
    done = pin(gone, tmp_path, "Q8_0")
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert "--endpoint" in done.stderr
    done = fleetfit("catalog", "pin", MODEL, "Q8_0", "--endpoint", "hub", "--output-dir", str(tmp_path))
    assert done.returncode == 2
    assert "is not a URL" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("qwen2.5-0.5b-instuct",), "Did you mean qwen2.5-0.5b-instruct"),
        ((MODEL, "Q9_0"), "Q8_0"),
        (("smollm2-135m-instruct",), "no variant to pin"),
    ],
)
def test_a_name_that_the_catalog_does_not_have(arguments: tuple[str, ...], says: str) -> None:
    done = fleetfit("catalog", "pin", *arguments, "--endpoint", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_fits_reads_a_hub_ids_own_config(hub: Hub) -> None:
    config = json.dumps(
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        }
    ).encode()
    hub.describe("acme/tiny", small("config.json", config))
    hub.serve("acme/tiny", "config.json", config)
    arguments = ("--gpu", "RTX 3060 12GB", "--endpoint", hub.endpoint)
    done = fleetfit("what-fits", "acme/tiny", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["selected"]["engine"] == "llama_cpp"
    hub.answers["/api/models/acme/gated/revision/main?blobs=true"] = (403, b"{}")
    done = fleetfit("what-fits", "acme/gated", *arguments)
    assert done.returncode == 2
    assert f"Accept the licence on {hub.endpoint}/acme/gated" in done.stderr
    hub.serve("acme/tiny", "config.json", HTML)
    done = fleetfit("what-fits", "acme/tiny", *arguments)
    assert done.returncode == 2
    assert "config.json of acme/tiny is not JSON" in done.stderr
