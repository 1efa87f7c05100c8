"""Downloads from a server on this machine that misbehaves in every way servers do."""

import hashlib
import random
import threading
from contextlib import nullcontext
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest

import utils.fetch
from utils.fetch import NotFetched, Stopped, check_mirror, fetch_file, open_client, seconds_until
from utils.refusal import Refused

CONTENT = random.Random(0).randbytes(1 << 20)


class Server(ThreadingHTTPServer):
    """Serves CONTENT under any name; `script` holds one behaviour a request, "ok" once it is used up."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.ranges, self.etag, self.content = [], [], '"one"', CONTENT
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Say nothing of clients that have read enough."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        behaviour = server.script.pop(0) if server.script else "ok"
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if behaviour == "busy" or isinstance(behaviour, int):
            self.send_response(429 if behaviour == "busy" else behaviour)
            if behaviour == "busy":
                self.send_header("Retry-After", "7")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(asked[6:-1]) if asked and behaviour != "ignores range" else 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("ETag", server.etag)
        if behaviour != "says no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = behaviour in ("breaks off", "says no length")
        self.wfile.write(body[: len(body) // 2] if half else body)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def fetch(server, path, stop=None, **expected):
    with open_client(2) as client:
        fetch_file(
            client, f"{server.address}/film.png", path, stop or threading.Event(), first_wait_s=0.01, **expected
        )


def leftovers(path):
    parts = path.parent / ".part"
    return list(parts.iterdir()) if parts.is_dir() else []


@pytest.mark.parametrize(
    "script",
    [
        [],
        [500, 503, 429],
        ["breaks off", "breaks off"],
        ["breaks off", "ignores range"],
        ["breaks off", 416],
        ["breaks off", 500, "breaks off", 502],
    ],
)
def test_file_arrives_whole_through_faults(script, server, tmp_path):
    server.script = script
    path = tmp_path / "raw" / "film.png"
    fetch(server, path, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT
    assert not leftovers(path)


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("7", 7, 7),
        pytest.param(
            format_datetime(datetime.now(timezone.utc) + timedelta(days=1), usegmt=True), 80_000, 86_400, id="day"
        ),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00", 0, 0),
        ("soon", 0, 0),
        ("-1", 0, 0),
        ("", 0, 0),
    ],
)
def test_a_wait_is_asked_for_in_seconds_or_by_date(said, least, most):
    assert least <= seconds_until(said) <= most


def test_all_threads_wait_where_a_host_asks_one_to(server, tmp_path, monkeypatch):
    monkeypatch.setattr(utils.fetch, "not_before", {})
    clock, waits = [100.0], []
    monkeypatch.setattr(utils.fetch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    stop = SimpleNamespace(is_set=lambda: False, wait=lambda seconds: waits.append(seconds))
    server.script = ["busy"]
    fetch(server, tmp_path / "one.png", stop)
    assert 7 <= max(waits) <= 7 * 1.2  # its own wait
    waits.clear()
    fetch(server, tmp_path / "other.png", stop)  # the clock stands still: the host is still busy
    assert len(waits) == 1 and 7 <= waits[0] <= 7 * 1.2
    clock[0] += 8
    fetch(server, tmp_path / "third.png", stop)
    assert len(waits) == 1


def test_a_broken_transfer_goes_on_where_it_was(server, tmp_path):
    server.script = ["breaks off"]
    fetch(server, tmp_path / "film.png")
    assert server.ranges == [None, f"bytes={len(CONTENT) // 2}-"]


def test_another_run_goes_on_where_the_first_was(server, tmp_path):
    server.script = ["breaks off", *[500] * 5]
    path = tmp_path / "film.png"
    with pytest.raises(NotFetched, match="server error 500"):
        fetch(server, path)
    assert not path.exists()
    server.ranges.clear()
    fetch(server, path)
    assert server.ranges == [f"bytes={len(CONTENT) // 2}-"]
    assert path.read_bytes() == CONTENT


def test_little_that_came_before_a_break_is_kept(server, tmp_path):
    """A film of some kilobytes: a server that breaks off often would otherwise never get it through."""
    server.content, server.script = CONTENT[:10_000], ["breaks off"]
    fetch(server, tmp_path / "film.png")
    assert server.ranges == [None, "bytes=5000-"]


@pytest.mark.parametrize(
    ("status", "content_range"),
    [
        (416, None),
        (416, "bytes */0"),
        (206, "bytes 5-104/105"),
        (206, None),
        (206, "bytes " + "9" * 5000 + "-104/105"),
        (206, "bytes 0-104/" + "9" * 5000),
    ],
)
@pytest.mark.parametrize("known", [b"", b"earlier"])
def test_ranges_that_make_no_sense_are_no_fault_of_ours(status, content_range, known, tmp_path):
    """A server that answers any request with a range, or says there is none."""
    if known:
        (tmp_path / ".part").mkdir()
        (tmp_path / ".part" / "film.png.00000000").write_bytes(known)
    headers = {"Content-Range": content_range} if content_range else {}
    transport = httpx.MockTransport(
        lambda request: httpx.Response(status, headers=headers, content=iter([CONTENT[:100]]))
    )
    with httpx.Client(transport=transport) as client:
        try:
            fetch_file(client, "http://host/film.png", tmp_path / "film.png", threading.Event(), first_wait_s=0.001)
        except NotFetched as failure:
            assert str(failure) in ("range not understood", "changed on the server")
        else:
            assert (tmp_path / "film.png").read_bytes() == CONTENT[:100]


def endless():
    while True:
        yield bytes(1 << 16)


@pytest.mark.parametrize("length", [None, str(1 << 40)])
def test_a_film_without_end_is_given_up(length, tmp_path, monkeypatch):
    monkeypatch.setattr(utils.fetch, "MAX_FILM_BYTES", 1 << 20)
    headers = {"Content-Length": length} if length else {}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, headers=headers, content=endless()))
    with httpx.Client(transport=transport) as client, pytest.raises(NotFetched, match="too large"):
        fetch_file(client, "http://host/film.png", tmp_path / "film.png", threading.Event())
    assert not leftovers(tmp_path / "film.png")


@pytest.mark.parametrize(("bytes_s", "arrives"), [(900, False), (1100, True)])
def test_a_film_that_trickles_in_is_given_up(bytes_s, arrives, tmp_path, monkeypatch):
    seconds = iter(range(0, 10**6, 5))
    monkeypatch.setattr(utils.fetch, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    blocks = [CONTENT[i : i + 5 * bytes_s] for i in range(0, 100_000, 5 * bytes_s)]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=iter(blocks)))
    given_up = nullcontext() if arrives else pytest.raises(NotFetched, match="too slow")
    with httpx.Client(transport=transport) as client, given_up:
        fetch_file(client, "http://host/film.png", tmp_path / "film.png", threading.Event(), first_wait_s=0.001)
    assert (tmp_path / "film.png").exists() == arrives


def test_two_versions_are_never_stitched_together(server, tmp_path):
    server.script = ["breaks off", *[500] * 5]
    path = tmp_path / "film.png"
    with pytest.raises(NotFetched):
        fetch(server, path)
    server.etag, server.content = '"two"', CONTENT[::-1]
    fetch(server, path)
    assert path.read_bytes() == CONTENT[::-1]
    assert not leftovers(path)


def test_parts_of_files_with_similar_names_are_kept_apart(server, tmp_path):
    server.script = ["breaks off", *[500] * 5]
    with pytest.raises(NotFetched):
        fetch(server, tmp_path / "film.png.png")
    server.ranges.clear()
    fetch(server, tmp_path / "film.png")
    assert server.ranges == [None]


def test_a_file_that_is_there_is_not_asked_for(server, tmp_path):
    (tmp_path / "film.png").write_bytes(b"whole")
    fetch(server, tmp_path / "film.png")
    assert not server.ranges


@pytest.mark.parametrize(
    ("script", "reason", "num_requests"),
    [([404], "not found", 1), ([403], "refused by the server", 1), ([500] * 9, "server error 500", 6)],
)
def test_hopeless_files_are_given_up(script, reason, num_requests, server, tmp_path):
    server.script = script
    with pytest.raises(NotFetched, match=reason):
        fetch(server, tmp_path / "film.png")
    assert len(server.ranges) == num_requests
    assert not (tmp_path / "film.png").exists()


def test_a_wrong_file_gets_no_final_name(server, tmp_path):
    with pytest.raises(NotFetched, match="wrong SHA-256"):
        fetch(server, tmp_path / "film.png", sha256="0" * 64)
    assert not (tmp_path / "film.png").exists()


def test_a_file_cut_short_without_a_word_is_noticed_where_its_hash_is_known(server, tmp_path):
    server.script = ["says no length"]
    fetch(server, tmp_path / "film.png", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "film.png").read_bytes() == CONTENT


def test_a_host_that_does_not_answer_is_refused(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(Refused, match="cannot connect"):
        fetch(server, tmp_path / "film.png")


def test_a_stopped_run_stops_waiting_and_transferring(server, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        fetch(server, tmp_path / "film.png", stop)
    server.script = [500]
    with pytest.raises(Stopped):
        fetch(server, tmp_path / "other.png", stop)


@pytest.mark.parametrize("mirror", ["ftp://host/set", "file:///set", "http://", "https:///set", "/no/such/folder", ""])
def test_mirrors_that_cannot_be_read_are_refused(mirror, tmp_path, monkeypatch):
    with pytest.raises(Refused, match="--mirror"):
        check_mirror(mirror)


def test_mirror_loses_its_last_slash(tmp_path):
    assert check_mirror("https://host/set/") == "https://host/set"
    assert check_mirror(f"{tmp_path}/") == str(tmp_path)
