"""Checkpoints are found on disk, on the web and on the hub; both are a server on loopback and a local cache here."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from convatlas.errors import CheckpointError
from convatlas.weights import sources
from convatlas.weights.sources import locate

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a file, lies about lengths, redirects, and speaks as much of the hub's language as a download needs."""

    requests: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        if path == "/api/models/owner/name/tree/main":
            files = [
                {"type": "file", "path": name, "size": len(CONTENT), "oid": COMMIT}
                for name in ("README.md", "weights/net.pth", "config.json")
            ]
            self.send(200, json.dumps(files))
        elif path == "/owner/name/resolve/main/weights/net.pth":
            self.send(200, CONTENT if body else b"", {"X-Repo-Commit": COMMIT, "ETag": f'"{SHA256}"'}, len(CONTENT))
        elif path.startswith(("/api/", "/owner/")):
            self.send(404, "{}", {"X-Error-Code": "RepoNotFound"})
        elif path.endswith("/model.pth"):
            self.send(200, CONTENT)
        elif path == "/cut.pth":
            self.send(200, CONTENT[:1000], {}, len(CONTENT))
        elif path == "/chunked.pth":
            self.send(200, b"", {"Transfer-Encoding": "chunked"}, None)
            self.wfile.write(b"100\r\nonly the beginning")
        elif path == "/moved.pth":
            self.send(302, b"", {"Location": "/a/model.pth"})
        elif path == "/downgraded.pth":
            self.send(302, b"", {"Location": "http://example.com/model.pth"})
        else:
            self.send(404, "no such file")

    def send(
        self, status: int, text: str | bytes, headers: dict[str, str] | None = None, length: int | None = -1
    ) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(len(data) if length < 0 else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join(timeout=5)


@pytest.fixture
def address(server: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy must not be asked for this machine
    return tmp_path / "hub" / "checkpoints"


# Paths


def test_paths(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    file.write_bytes(b"x")
    assert locate(file) == file
    assert locate(str(file)) == file
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist"):
        locate(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"is a folder; give the checkpoint file; it holds x\.pth"):
        locate(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="no regular file"):
        locate(tmp_path / "pipe.pth")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.pth").write_bytes(b"x")
    assert locate("~/x.pth") == tmp_path / "x.pth"


def test_other_schemes_are_refused() -> None:
    with pytest.raises(CheckpointError, match="a source is a path"):
        locate("ftp://example.com/model.pth")


# The web


def test_download_is_cached(address: str, server: http.server.ThreadingHTTPServer, cache: Path) -> None:
    first = locate(f"{address}/a/model.pth")
    assert first.read_bytes() == CONTENT
    assert first.parent == cache
    assert first.name.endswith("-model.pth")
    assert locate(f"{address}/a/model.pth") == first
    assert server.requests == ["GET /a/model.pth"]  # type: ignore[attr-defined]
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_files_of_one_name_are_kept_apart(address: str) -> None:
    assert locate(f"{address}/a/model.pth") != locate(f"{address}/b/model.pth")


def test_redirects(address: str) -> None:
    assert locate(f"{address}/moved.pth").read_bytes() == CONTENT
    with pytest.raises(CheckpointError, match=r"http://example\.com/model\.pth: only https:// is read"):
        locate(f"{address}/downgraded.pth")


def test_hash(address: str, cache: Path) -> None:
    assert locate(f"{address}/a/model.pth#sha256={SHA256}").read_bytes() == CONTENT
    assert locate(f"{address}/a/model.pth#sha256={SHA256[:8].upper()}").read_bytes() == CONTENT
    with pytest.raises(CheckpointError, match=f"its sha256 is {SHA256}, not {'0' * 64}; the file was removed"):
        locate(f"{address}/a/model.pth#sha256={'0' * 64}")
    assert list(cache.iterdir()) == []
    with pytest.raises(CheckpointError, match="expected #sha256= and 8 to 64 hexadecimal digits"):
        locate(f"{address}/a/model.pth#md5=12345678")


@pytest.mark.parametrize("name", ["cut", "chunked"])
def test_broken_download_leaves_nothing(name: str, address: str, cache: Path) -> None:
    with pytest.raises(CheckpointError, match="the download broke off"):
        locate(f"{address}/{name}.pth")
    assert list(cache.iterdir()) == []


def test_missing_on_the_server(address: str, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/none\.bin: the server answers 404"):
        locate(f"{address}/none.bin")
    assert not cache.exists()


def test_unreachable_and_secret_parts_are_not_shown(address: str, server: http.server.ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match=r"cannot be reached: .*refused") as caught:
        locate(f"{address}/model.pth?token=secret")
    assert "secret" not in str(caught.value)


def test_silent_server_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(sources, "_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(CheckpointError, match="timed out"):
            locate(f"http://127.0.0.1:{port}/model.pth")


def test_plain_http_is_refused() -> None:
    with pytest.raises(CheckpointError, match="only https:// is read from the web"):
        locate("http://example.com/model.pth")
    with pytest.raises(CheckpointError, match="only https:// is read from the web"):
        locate("http://127.0.0.1.example.com/model.pth")


def test_malformed_address() -> None:
    with pytest.raises(CheckpointError, match="is no address"):
        locate("https://example.com:port/model.pth")


def test_cache_that_cannot_be_written(address: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="checkpoints"):
        locate(f"{address}/a/model.pth")


# The hub


def hub_cache(root: Path, files: dict[str, bytes], *, revision: str = "main") -> None:
    folder = root / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(COMMIT)
    for name, data in files.items():
        path = folder / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def in_subprocess(*wanted: str, **environment: str) -> list[tuple[bool, str]]:
    """`locate` of several sources in one process, where the hub's client reads its settings afresh."""
    code = (
        "import sys\nfrom convatlas.weights.sources import locate\nfrom convatlas.errors import CheckpointError\n"
        "for source in sys.argv[1:]:\n"
        "    try:\n        print(locate(source))\n"
        "    except CheckpointError as error:\n        print('ERROR', error)\n"
    )
    src = str(Path(sources.__file__).parents[1])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "http_proxy"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *wanted],
        capture_output=True,
        text=True,
        timeout=120,
        env={**inherited, "PYTHONPATH": src, "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        check=True,
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == len(wanted)
    return [(not line.startswith("ERROR"), line) for line in lines]


def test_hub_offline_by_name_and_by_choice(tmp_path: Path) -> None:
    hub_cache(tmp_path, {"model.safetensors": b"1", "pytorch_model.bin": b"2", "old/net.pth": b"3"})
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    by_name, by_choice, by_hash, none, other = in_subprocess(
        "hf://owner/name",
        "hf://owner/name@main/old/net.pth",
        f"hf://owner/name#sha256={hashlib.sha256(b'1').hexdigest()}",
        "hf://owner/name/none.pth",
        "hf://owner/other",
        HF_HUB_CACHE=str(tmp_path),
        HF_HUB_OFFLINE="1",
    )
    assert by_name == (True, str(snapshot / "model.safetensors"))
    assert by_choice == (True, str(snapshot / "old" / "net.pth"))
    assert by_hash[0]
    assert not none[0]
    assert "not in the local cache, and the hub cannot be reached" in none[1]
    assert not other[0]
    assert "hf://owner/other: not in the local cache" in other[1]


def test_hub_through_its_endpoint(tmp_path: Path, address: str) -> None:
    settings = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    (found, path), secret = in_subprocess("hf://owner/name", "hf://owner/secret", **settings)
    assert found, path
    assert Path(path).read_bytes() == CONTENT
    assert path.endswith(f"snapshots/{COMMIT}/weights/net.pth")
    assert not secret[0]
    assert "the hub has no such repository, or it is private" in secret[1]


def test_choice_among_files() -> None:
    choose = sources._choose
    assert choose("hf://o/n", ["a.pth", "model.safetensors", "pytorch_model.bin"]) == "model.safetensors"
    assert choose("hf://o/n", ["a.pth", "pytorch_model.bin"]) == "pytorch_model.bin"
    assert choose("hf://o/n", ["README.md", "sub/a.pth", "config.json"]) == "sub/a.pth"
    with pytest.raises(CheckpointError, match=r"has several weight files \(a\.pth, b\.pth\); name one"):
        choose("hf://o/n", ["b.pth", "a.pth"])
    with pytest.raises(CheckpointError, match="has no weight file"):
        choose("hf://o/n", ["README.md"])


@pytest.mark.parametrize("source", ["hf://owner", "hf://owner/", "hf:///name", "hf://owner/name@/x.pth"])
def test_malformed_hub_names(source: str) -> None:
    with pytest.raises(CheckpointError, match="expected hf://owner/name"):
        locate(source)
