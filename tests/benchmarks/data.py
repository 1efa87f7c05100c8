"""download.py against aria2c and img2dataset on the loopback: films/s, what threads are worth, and its memory.

    python -m tests.benchmarks.data
    python -m tests.benchmarks.data --films FOLDER --aria2c PATH --img2dataset PATH

Fetched only: `fetch_file` in sixteen threads against `aria2c -j16`; the bar is 0.9 times its films/s. Fetched and brought
to 512 px PNG: `download.py` against `img2dataset`, whole commands, 1.0 times. One thread against sixteen, where the server
takes 50 ms to answer. Memory: the peaks of a run over 20,000 films and of one over 200 may be 8 KB a film apart, which
the table and the journal need; what comes and what is made of it are 16 KB each, and more once decoded.

The films are 8-bit PNG of 1,024 px and 400 KB or so, as the NIH publishes its own, made of those in FOLDER (default: of
assets/demo, which are smoother than films are). A contender that is not installed is named and left out. Contenders take
turns, and the ratio is the median over the rounds. aria2c is also let off its control files, without which it cannot go on
where it was. img2dataset is compared at equal work: the same filter, and the level of PNG whose files are about as large as
ours; beside it stand its own filter, means of areas, and its quickest, with this filter and larger files. Fifteen minutes on
two cores, and 4 GB of disk.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import read_jsonl, write_bytes, write_jsonl
from utils.refusal import ArgumentParser, Refused, run

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo" / "images"
PARTS = ("fetch", "prepare", "threads", "memory")
SIDE_PX = 1024
RESOLUTION = 512
NUM_THREADS = 16
FETCH_BAR, PREPARE_BAR, THREADS_BAR = 0.9, 1.0, 8.0  # times as many films/s
MEMORY_BAR_KB = 8.0  # a film
FEW_FILMS = 200
THREADS_FILMS = 200
SMALL_SIDE_PX = 128
GRAIN = 1.0  # grey levels
NUM_SERVERS = 2


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path, nargs="+", default=[DEMO], metavar="FOLDER", help="of PNG or JPEG films")
    parser.add_argument("--num_films", type=int, default=2000, help="of 1,024 px, made of those")
    parser.add_argument("--num_small_films", type=int, default=20_000, help="of the long run whose memory is measured")
    parser.add_argument("--rounds", type=int, default=3, help="of all contenders in turn")
    parser.add_argument("--latency_ms", type=float, default=50, help="of the server, for one thread against sixteen")
    parser.add_argument("--aria2c", default="aria2c", metavar="PATH", help="the command")
    parser.add_argument("--img2dataset", default="img2dataset", metavar="PATH", help="the command")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--work_dir", type=Path, help="keeps the films that were made (default: a temporary folder)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = (args.work_dir or Path(temporary)).absolute()
        passed, failed, absent = [], [], []

        def judge(name: str, value: float, good: bool, bar: str) -> None:
            (passed if good else failed).append(f"{name} {value:.2f} ({bar})")

        def contest(what: str, contenders: dict[str, Callable[[Path], object]], peer: str, bar: float) -> None:
            if shutil.which(command := getattr(args, peer)) is None:
                print(f"{peer} is not installed, or not at --{peer} {command}: left out", flush=True)
                absent.append(peer)
                contenders = dict([*contenders.items()][:1])
            ratio = compare(what, contenders, args.num_films, args.rounds, work_dir)
            if ratio is not None:
                judge(f"{what}, times {peer}", ratio, ratio >= bar, f"bar {bar:g}")

        if set(args.parts) - {"memory"}:
            mirror = make_films(args.films, work_dir, args.num_films)
        if {"fetch", "prepare"} & set(args.parts):
            with serve(mirror) as address:
                if "fetch" in args.parts:
                    aria2c = partial(fetch_with_aria2c, args.aria2c, address, mirror, args.num_films)
                    contenders = {
                        "fetch_file": partial(fetch, address, mirror, args.num_films, NUM_THREADS),
                        "aria2c -j16": partial(aria2c, []),
                        "no control": partial(aria2c, ["--auto-save-interval=0", "--file-allocation=none"]),
                    }
                    contest("fetched", contenders, "aria2c", FETCH_BAR)
                if "prepare" in args.parts:
                    img2dataset = partial(prepare_with_img2dataset, args.img2dataset, address, mirror, args.num_films)
                    contenders = {
                        "download.py": partial(download, address, args.num_films),
                        "img2dataset": partial(img2dataset, "lanczos", 6),
                        "of areas": partial(img2dataset, "area", 6),
                        "its quickest": partial(img2dataset, "area", 1),
                    }
                    contest(f"{RESOLUTION} px PNG", contenders, "img2dataset", PREPARE_BAR)
        if "threads" in args.parts:
            num_films = min(THREADS_FILMS, args.num_films)
            with serve(mirror, args.latency_ms / 1000) as address:
                contenders = {
                    name: partial(fetch, address, mirror, num_films, num_threads)
                    for name, num_threads in ((f"{NUM_THREADS} threads", NUM_THREADS), ("one thread", 1))
                }
                ratio = compare(f"{args.latency_ms:g} ms away", contenders, num_films, 1, work_dir)
            judge(f"{NUM_THREADS} threads, times one", ratio, ratio >= THREADS_BAR, f"bar {THREADS_BAR:g}")
        if "memory" in args.parts:
            peaks = []
            for num_films in (FEW_FILMS, args.num_small_films):
                mirror = make_small_films(work_dir, num_films)
                with serve(mirror) as address, clean_folder(work_dir) as folder:
                    peaks.append(download(address, num_films, folder, resolution=SMALL_SIDE_PX))
            growth = (peaks[1] - peaks[0]) / (args.num_small_films - FEW_FILMS)
            print(
                f"{'peak memory':<12} {FEW_FILMS} films {peaks[0] / 1000:.0f} MB, {args.num_small_films} films "
                f"{peaks[1] / 1000:.0f} MB: {growth:.1f} KB a film"
            )
            judge("memory, KB a film", growth, growth <= MEMORY_BAR_KB, f"bar {MEMORY_BAR_KB:g}")

    verdict = [*(f"{text} is below the bar" for text in failed), *passed, *(f"not compared with {n}" for n in absent)]
    print(f"{'fail' if failed else 'pass'}: {'; '.join(verdict)}")
    return int(bool(failed))


# What is measured


def compare(
    what: str, contenders: dict[str, Callable[[Path], object]], num_films: int, rounds: int, work_dir: Path
) -> float | None:
    """Let the contenders take turns, print their films/s, and return how many times as many the first has as the second."""
    turns = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            turns[name].append(take_turn(contender, num_films, work_dir))
    for name, taken in turns.items():
        rates, processor_ms, size_kb = zip(*taken, strict=True)
        print(
            f"{what:<12} {name:<12} {statistics.median(rates):7.1f} films/s ({min(rates):.1f} to {max(rates):.1f}), "
            f"{statistics.median(processor_ms):5.1f} ms of processor and {size_kb[0]:.0f} KB each",
            flush=True,
        )
    if len(turns) == 1:
        return None
    ours, theirs = [*turns.values()][:2]
    ratio = statistics.median(one[0] / other[0] for one, other in zip(ours, theirs, strict=True))
    print(f"{what:<12} {' against '.join([*turns][:2])}, by round: {ratio:.2f} times", flush=True)
    return ratio


def take_turn(contender: Callable[[Path], object], num_films: int, work_dir: Path) -> tuple[float, float, float]:
    """Let a contender fill a folder, from the start of its process to the end.

    Returns:
        Films/s; milliseconds of processor a film, which say more where others use the machine; KB a film of its PNGs.
    """
    with clean_folder(work_dir) as folder:
        os.sync()  # what the last one wrote is not this one's to wait for
        start, used = time.perf_counter(), processor_s()
        contender(folder)
        seconds, used = time.perf_counter() - start, processor_s() - used
        images = [path for path in folder.rglob("*.png") if "cache" not in path.relative_to(folder).parts]
        size = statistics.fmean(path.stat().st_size for path in images)
        return num_films / seconds, 1000 * used / num_films, size / 1000


def processor_s() -> float:
    """Return the seconds of processor that commands have used which have ended; the servers have not."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def clean_folder(work_dir: Path):
    """Give an empty folder, and remove it with what was written there."""
    folder = work_dir / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def call(command: list, **more) -> None:
    """Run a contender's command to its end; raise RuntimeError with what it said where it fails."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, **more)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def check_count(paths: list[Path], num_films: int, size: tuple[int, int]) -> None:
    """Raise RuntimeError where a contender was quick because it has not done the work."""
    if (
        len(paths) != num_films
        or Image.open(paths[0]).size != size
        or any(path.stat().st_size < 1000 for path in paths)
    ):
        raise RuntimeError(f"{len(paths)} films of {num_films}, or not of {size} px")


def fetch(address: str, mirror: Path, num_films: int, num_threads: int, folder: Path) -> None:
    """Fetch films with the project's client, in a process of its own."""
    code = "import sys; from tests.benchmarks.data import fetch_all; fetch_all(*sys.argv[1:])"
    write_bytes(folder / "addresses.txt", "\n".join(addresses_of(address, mirror, num_films)).encode())
    call([sys.executable, "-c", code, folder / "addresses.txt", folder, num_threads], env=without_proxy())
    check_count(list(folder.glob("*.png")), num_films, (SIDE_PX, SIDE_PX))


def fetch_all(addresses: str, folder: str, num_threads: str) -> None:
    """Fetch each address of a file into a folder, as download.py does."""
    from utils.fetch import fetch_file, open_client

    stop = threading.Event()
    with open_client(int(num_threads)) as client, ThreadPoolExecutor(int(num_threads)) as pool:

        def fetch_one(address: str) -> None:
            fetch_file(client, address, Path(folder) / address.rpartition("/")[2], stop)

        for _ in pool.map(fetch_one, Path(addresses).read_text().split()):
            pass


def fetch_with_aria2c(
    command: str, address: str, mirror: Path, num_films: int, options: list[str], folder: Path
) -> None:
    """Fetch films with aria2c, sixteen at a time."""
    write_bytes(folder / "addresses.txt", "\n".join(addresses_of(address, mirror, num_films)).encode())
    call(
        [command, f"-j{NUM_THREADS}", "--no-conf", "--quiet", "-d", folder, "-i", folder / "addresses.txt", *options],
        env=without_proxy(),
    )
    check_count(list(folder.glob("*.png")), num_films, (SIDE_PX, SIDE_PX))


def download(address: str, num_films: int, folder: Path, resolution: int = RESOLUTION) -> int:
    """Run download.py and return the peak of its memory in KB; it starts no processes of its own."""
    command = [
        sys.executable, ROOT / "download.py", "--source", "folder", "--mirror", address, "--resolution", str(resolution),
        "--num_workers", str(NUM_THREADS), "--output_dir", folder / "data", "--cache_dir", folder / "cache",
    ]  # fmt: skip
    peak = 0
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=without_proxy())
        while process.poll() is None:
            # The kernel's own high-water mark; that of getrusage() would begin with the memory of whoever forked
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"download.py ended with {process.returncode}:\n{(folder / 'log').read_text()[-2000:]}")
    check_count(list((folder / "data" / "images").glob("*.png")), num_films, (resolution, resolution))
    return peak


def prepare_with_img2dataset(
    command: str, address: str, mirror: Path, num_films: int, filter_name: str, png_level: int, folder: Path
) -> None:
    """Run img2dataset with a process and a shard for each core, as it is quickest, and a filter and a level for its PNGs."""
    names = [row["file_name"] for row in read_jsonl(mirror / "metadata.jsonl")[:num_films]]
    rows = [{"url": f"{address}/{name}", "caption": f"Film {name}"} for name in names]
    write_jsonl(folder / "table.jsonl", rows)
    num_processes = os.cpu_count() or 1
    options = {
        "url_list": folder / "table.jsonl", "input_format": "jsonl", "caption_col": "caption",
        "output_folder": folder / "data", "output_format": "files", "image_size": RESOLUTION, "resize_mode": "border",
        "encode_format": "png", "encode_quality": png_level, "downscale_interpolation": filter_name,
        "thread_count": NUM_THREADS,
        "processes_count": num_processes, "number_sample_per_shard": -(-num_films // num_processes),
    }  # fmt: skip
    call(
        [command, *(f"--{name}={value}" for name, value in options.items())],
        env={**without_proxy(), "NO_ALBUMENTATIONS_UPDATE": "1"},
    )
    check_count(list((folder / "data").glob("*/*.png")), num_films, (RESOLUTION, RESOLUTION))


def without_proxy() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}


def addresses_of(address: str, mirror: Path, num_films: int) -> list[str]:
    """Return the addresses of the first films of the mirror's table."""
    return [f"{address}/{row['file_name']}" for row in read_jsonl(mirror / "metadata.jsonl")[:num_films]]


# The films


def make_films(folders: list[Path], work_dir: Path, num_films: int) -> Path:
    """Write a mirror of films of 1,024 px, no two alike, and return it; one that is there already is taken as it is."""
    sources = sorted(
        path for folder in folders for path in folder.iterdir() if path.suffix in (".png", ".jpg", ".jpeg")
    )
    if not sources:
        raise Refused(f"--films {folders[0]}: no *.png, *.jpg or *.jpeg in there")
    mirror = work_dir / "films"
    rows = []
    for number in range(num_films):
        source = sources[number % len(sources)]
        name = f"{number:05d}.png"
        rows.append({"file_name": name, "text": f"Film {number}.", "patient_id": source.stem})
    if not (mirror / "metadata.jsonl").exists() or read_jsonl(mirror / "metadata.jsonl") != rows:
        shutil.rmtree(mirror, ignore_errors=True)
        mirror.mkdir(parents=True)
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            tasks = [
                (sources[number % len(sources)], mirror / row["file_name"], number) for number, row in enumerate(rows)
            ]
            for _ in pool.map(make_film, *zip(*tasks, strict=True), chunksize=16):
                pass
        write_jsonl(mirror / "metadata.jsonl", rows)
    sizes = [(mirror / row["file_name"]).stat().st_size for row in rows]
    print(f"{num_films} films made of {len(sources)}, {statistics.fmean(sizes) / 1000:.0f} KB each", flush=True)
    return mirror


def make_film(source: Path, path: Path, seed: int) -> None:
    """Write a film of 1,024 px made of another: a part of its own of it, perhaps mirrored, with grain.

    The grain gives back what enlarging takes away; with it the PNG is as large as those the NIH publishes.
    """
    rng = np.random.default_rng(seed)
    image = Image.open(source).convert("L")
    side = min(image.size) * rng.uniform(0.8, 1)
    left, top = (rng.uniform(0, length - side) for length in image.size)
    image = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    grey = np.asarray(image)[:, :: rng.choice((-1, 1))]
    grain = rng.normal(0, GRAIN, grey.shape) * (grey > 8)  # a collimated border has none
    Image.fromarray(np.round((grey + grain).clip(0, 255)).astype(np.uint8)).save(path, compress_level=4)


def make_small_films(work_dir: Path, num_films: int) -> Path:
    """Write a mirror of small films that are not compressed: neither they nor what they become are lost in a row's size."""
    mirror = work_dir / f"small-{num_films}"
    if not (mirror / "metadata.jsonl").exists():
        mirror.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        rows = []
        for number in range(num_films):
            coarse = Image.fromarray(rng.integers(0, 256, (10, 10), dtype=np.uint8))
            film = coarse.resize((SMALL_SIDE_PX, SMALL_SIDE_PX), Image.Resampling.BICUBIC)
            film.save(mirror / f"{number:05d}.png", compress_level=0)
            rows.append({"file_name": f"{number:05d}.png", "text": f"Film {number}.", "patient_id": f"p{number // 4}"})
        write_jsonl(mirror / "metadata.jsonl", rows)
    return mirror


# The server


@contextmanager
def serve(folder: Path, latency_s: float = 0.0):
    """Serve a folder on the loopback from processes of its own, the same for all contenders, and give its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        context = multiprocessing.get_context("fork")
        servers = [context.Process(target=accept, args=(listener, folder, latency_s)) for _ in range(NUM_SERVERS)]
        for server in servers:
            server.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for server in servers:
                server.terminate()
                server.join()


def accept(listener: socket.socket, folder: Path, latency_s: float) -> None:
    """Answer whoever connects, each in a thread; the files go from the kernel's memory to the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection, folder, latency_s), daemon=True).start()


def answer(connection: socket.socket, folder: Path, latency_s: float) -> None:
    """Answer GET on one connection until the other side has enough; ranges are those that go to the end of the file."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, connection.makefile("rb") as requests:
        while line := requests.readline():
            name = line.split()[1].decode().lstrip("/")
            headers = {}
            while (header := requests.readline().decode().strip()) != "":
                key, _, value = header.partition(":")
                headers[key.lower()] = value.strip()
            time.sleep(latency_s)
            try:
                file = open(folder / name, "rb")
            except OSError:
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            with file:
                size = os.fstat(file.fileno()).st_size
                start = int(headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
                status = (
                    f"206 Partial Content\r\nContent-Range: bytes {start}-{size - 1}/{size}" if start else "200 OK"
                )
                keep = headers.get("connection", "").lower() != "close"
                connection.sendall(
                    f"HTTP/1.1 {status}\r\nContent-Length: {size - start}\r\nContent-Type: image/png\r\n"
                    f'ETag: "{name}-{size}"\r\nAccept-Ranges: bytes\r\n'
                    f"Connection: {'keep-alive' if keep else 'close'}\r\n\r\n".encode()
                )
                try:
                    connection.sendfile(file, start)
                except OSError:
                    return
            if not keep:
                return


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
