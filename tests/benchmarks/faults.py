"""Films from a server that misbehaves in a fifth of its answers, whole or listed as refused; then the same under SIGKILLs.

    python -m tests.benchmarks.faults --films FOLDER

One run from a server that behaves is what the others are compared with. A second, among faults, has to keep each film
whole or list it with its reason, and the same command has to end in the same bytes when the server behaves again. A third,
among faults, is killed at random instants and has to end in the same bytes too, after the same command once more where a
film had no luck in any of its attempts. Every other film is a JPEG, whose bytes nothing protects, with its SHA-256 in the
table; the others are PNG without. Three minutes on two cores.
"""

import argparse
import filecmp
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faulty_server import FINAL, SEEN, UNSEEN, FaultyServer, start_download
from utils.files import read_jsonl, sha256_file, write_jsonl
from utils.refusal import ArgumentParser, Refused, run

SIDE = 512  # pixels of films made up
SHIFTS = 16  # films that are made of one
TIMEOUT_S = 2.0  # what a server that stalls costs
MAX_RUNS = 5  # after the last kill


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path, help="folder of films, cropped until there are enough; else made up")
    parser.add_argument("--num_films", type=int, default=2000)
    parser.add_argument("--share", type=float, default=0.2, help="of requests that go wrong")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mirror = make_mirror(root / "mirror", args.films, args.num_films)
        unbroken, faulty, killed = (root / name for name in ("unbroken", "faulty", "killed"))
        faults = dict(share=args.share, faults=(*SEEN, *UNSEEN), rare=FINAL)
        print(f"{'run':<28}{'s':>6}{'requests':>10}{'faulty':>8}{'kept':>7}{'rejected':>10}")
        with FaultyServer(mirror) as server:
            finish(unbroken, server, "no faults")
        with FaultyServer(mirror, seed=args.seed, **faults) as server:
            finish(faulty, server, f"{args.share:.0%} faults")
            print(f"    faults: {tally(server.behaved)}")
            print(f"    rejected: {tally(Counter(rejected(faulty).values())) or 'none'}")
            kept, wrong = compare(faulty, unbroken)
            accounted = kept + len(rejected(faulty))
            print(f"    {accounted} of {args.num_films} kept or rejected, {wrong} kept that are not as without faults")
            server.share = 0
            finish(faulty, server, "again, no faults")
        with FaultyServer(mirror, seed=args.seed + 1, **faults) as server:
            kill(killed, server, args.kills, args.num_films, random.Random(args.seed))
            for number in range(1, MAX_RUNS + 1):
                finish(killed, server, f"after the kills, run {number}")
                if rejected(killed) == rejected(unbroken):
                    break
        equal = {name: same(data, unbroken) for name, data in (("faults", faulty), ("kills", killed))}
    for name, outcome in equal.items():
        print(f"folder after {name}: {'equal to' if outcome else 'NOT'} the unbroken run's, byte by byte")
    passed = accounted == args.num_films and not wrong and all(equal.values())
    print(f"{'pass' if passed else 'fail'}: {args.num_films} films, {args.share:.0%} faults, {args.kills} kills")
    return int(not passed)


def make_mirror(directory: Path, films: Path | None, num_films: int) -> Path:
    """Write a folder of films with its table, those made of one film under one patient."""
    directory.mkdir()
    paths = sorted(path for path in films.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg")) if films else []
    if films and num_films > SHIFTS * len(paths):
        raise Refused(f"--films {films} has {len(paths)} films; expected {-(-num_films // SHIFTS)} for {num_films}")
    rows = []
    for number in range(num_films):
        shift, source = divmod(number, len(paths) or num_films)
        image = crop(Image.open(paths[source]).convert("L"), shift) if paths else make_up(number)
        path = directory / f"{number:05d}.{'jpg' if number % 2 else 'png'}"
        image.save(path, quality=90)
        digest = sha256_file(path) if number % 2 else None
        text = f"Chest radiograph {number}."
        rows.append({"file_name": path.name, "text": text, "patient_id": f"p{source}", "sha256": digest})
    write_jsonl(directory / "metadata.jsonl", rows)
    return directory


def crop(image: Image.Image, shift: int) -> Image.Image:
    """Return all but a sixteenth of a film, another for each shift."""
    width, height = image.size
    left, top = shift % 4 * width // 64, shift // 4 * height // 64
    return image.crop((left, top, left + width - width // 16, top + height - height // 16))


def make_up(number: int) -> Image.Image:
    """Return a film that is smooth but for noise, and unlike any other."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 240, (10, 10), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + generator.integers(-4, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def start(folder: Path, server: FaultyServer) -> subprocess.Popen:
    argv = ["--source", "folder", "--mirror", server.address, "--resolution", "256"]
    return start_download(
        [*argv, "--output_dir", str(folder / "data"), "--cache_dir", str(folder / "cache")], TIMEOUT_S
    )


def finish(folder: Path, server: FaultyServer, name: str) -> None:
    """Run to the end and print a line of the table."""
    before, began = server.behaved.copy(), time.perf_counter()
    process = start(folder, server)
    stderr = process.communicate()[1]
    seconds = time.perf_counter() - began
    if process.returncode:
        raise Refused(f"{name}: status {process.returncode}, {stderr}")
    num_kept = len(read_jsonl(folder / "data" / "metadata.jsonl"))
    print_line(name, seconds, server.behaved - before, num_kept, len(rejected(folder)))


def print_line(name: str, seconds: float, behaved: Counter, kept: int, num_rejected: int | str = "") -> None:
    num_faults = behaved.total() - behaved["well"]
    print(f"{name:<28}{seconds:>6.1f}{behaved.total():>10}{num_faults:>8}{kept:>7}{num_rejected:>10}", flush=True)


def kill(folder: Path, server: FaultyServer, num_kills: int, num_films: int, generator: random.Random) -> None:
    """Start runs and kill each a moment after a random number of requests, so that all together get about to the end."""
    num_killed = 0
    while num_killed < num_kills:
        before, began = server.behaved.copy(), time.perf_counter()
        num_requests = before.total() + generator.uniform(0, 1.6 * num_films / num_kills)
        longest_s = generator.uniform(0, 20)  # nothing is asked for at the end of a run
        process = start(folder, server)
        while process.poll() is None and server.behaved.total() < num_requests:
            time.sleep(0.001)
            if time.perf_counter() - began > longest_s:
                break
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        was_killed = process.returncode == -signal.SIGKILL
        num_killed += was_killed
        num_there = len(list((folder / "data" / "images").glob("*.png")))
        name = f"kill {num_killed}" if was_killed else "ended before the kill"
        print_line(name, time.perf_counter() - began, server.behaved - before, num_there)


def rejected(folder: Path) -> dict[str, str]:
    """Return the reason of each film left out."""
    return {row["source_id"]: row["reason"] for row in read_jsonl(folder / "data" / "rejected.jsonl")}


def compare(folder: Path, unbroken: Path) -> tuple[int, int]:
    """Return how many films were kept, and how many of them are not to the byte those of the unbroken run."""
    kept = [row["file_name"] for row in read_jsonl(folder / "data" / "metadata.jsonl")]
    equal = filecmp.cmpfiles(folder / "data", unbroken / "data", kept, shallow=False)[0]
    return len(kept), len(kept) - len(equal)


def same(folder: Path, other: Path) -> bool:
    """Return whether two data folders have the same files, byte by byte."""
    one, two = folder / "data", other / "data"
    names, others = ([p.relative_to(root) for p in sorted(root.rglob("*")) if p.is_file()] for root in (one, two))
    return names == others and filecmp.cmpfiles(one, two, names, shallow=False)[0] == names


def tally(counts: Counter) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items()) if name != "well")


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
