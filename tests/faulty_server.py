"""A server on this machine that misbehaves in a share of its answers: what may go wrong between a mirror and a run.

Which answers, and how, depends on seed, path and how often the path was asked for, so that a run can be repeated.
"""

import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
DROPS = ("drops before the answer", "resets before the answer", "drops within the body", "resets within the body")
STALLS = ("stalls before the answer", "stalls within the body")
LENGTHS = ("says too short a length", "says too long a length")
STATUSES = ("429", "500", "503")
SEEN = (*DROPS, *STALLS, "says too long a length", *STATUSES)  # faults that nobody can miss
UNSEEN = ("says too short a length", "swaps two bytes")  # those that only the film itself or its hash tells
FINAL = ("403",)  # those that are the server's last word

# As download.py itself, but that it waits less for a server that stalls
CODE = """
import sys
import utils.fetch
utils.fetch.TIMEOUT_S = float(sys.argv.pop(1))
sys.argv[0] = "download.py"
import download
from utils.refusal import run
sys.exit(run(download.main, download.parse_args))
"""


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder; use it as a context. `asked` counts requests by path, `behaved` answers by what they were."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, share: float = 0.0, seed: int = 0, faults: tuple[str, ...] = SEEN, rare=()):
        """Misbehave in `share` of the answers, by one of `faults` or, ten times as seldom, of `rare`.

        Tables (.csv, .jsonl) suffer SEEN faults only: nothing says what they should be.
        """
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.share, self.seed, self.faults, self.rare = folder, share, seed, faults, rare
        self.asked, self.behaved, self.counting = Counter(), Counter(), threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "FaultyServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def next_fault(self, path: str) -> tuple[str | None, random.Random]:
        """Return what is wrong with the next answer for this path, None if nothing, and numbers for the details."""
        with self.counting:
            self.asked[path] += 1
            attempt = self.asked[path]
        generator = random.Random(f"{self.seed} {path} {attempt}")
        fault = None
        if generator.random() < self.share:
            faults = [*self.faults * 10, *self.rare]
            if path.endswith((".csv", ".jsonl")):
                faults = [name for name in faults if name in SEEN] or [None]
            fault = generator.choice(faults)
        with self.counting:
            self.behaved[fault or "well"] += 1
        return fault, generator

    def handle_error(self, request, client_address):
        """Say nothing of clients that hang up: many are killed."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self) -> None:
        fault, generator = self.server.next_fault(self.path)
        self.fault = fault or ""
        if self.fault.isdecimal():
            self.answer(int(self.fault), {"Retry-After": "1"} if fault == "429" else {})
        elif self.fault.endswith("before the answer"):
            self.let_down()
        else:
            self.send_file(generator)

    def send_file(self, generator: random.Random) -> None:
        path = self.server.folder / unquote(self.path).lstrip("/")
        if not path.is_file():
            self.answer(404)
            return
        content = path.read_bytes()
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start = int(first)
        if start >= len(content):
            self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        body = content[start : int(last or len(content)) + 1]
        cut = generator.randrange(len(body))
        headers = {"Last-Modified": self.date_time_string(path.stat().st_mtime)}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(content)}"
        length = len(body)
        if self.fault == "says too short a length":
            length, body = cut, body[:cut]
        elif self.fault == "says too long a length":
            length += 1 + cut
            self.close_connection = True
        elif self.fault == "swaps two bytes":
            body = swapped(body, generator)
        elif self.fault.endswith("within the body"):
            body = body[:cut]
        self.answer(206 if "Range" in self.headers else 200, headers, length, body)
        if self.fault.endswith("within the body"):
            self.let_down()

    def answer(self, status: int, headers: dict[str, str] | None = None, length: int = 0, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def let_down(self) -> None:
        """Hang up, or say nothing more until the client does."""
        self.close_connection = True
        if self.fault.startswith("stalls"):
            self.connection.settimeout(60)
            with suppress(OSError):
                self.connection.recv(1)
        elif self.fault.startswith("resets"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def swapped(content: bytes, generator: random.Random) -> bytes:
    """Return the content with two different bytes, one beside the other, in each other's place, if there are any."""
    for _ in range(100):
        place = generator.randrange(max(1, len(content) - 1))
        pair = content[place : place + 2]
        if len(set(pair)) == 2:
            return content[:place] + pair[::-1] + content[place + 2 :]
    return content


def start_download(argv: list[str], timeout_s: float = 0.5) -> subprocess.Popen:
    """Start download.py in a process of its own that takes a server for stalled after `timeout_s`."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(timeout_s), *argv],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
