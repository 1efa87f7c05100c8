"""Five hundred images under ten SIGKILLs: the same files, byte for byte, as from a run that nothing disturbed.

    python -m tests.benchmarks.kills

The bundled base draws a grid of 20 prompts, 25 images each. The process is killed at random instants: while it loads, between two
images and within one, and while it writes its records after the last; each time the same command goes on. What lies there at
the end is compared with the folder of one unbroken run: names and bytes, a line of images.jsonl for each image and none twice.
The solver takes few steps: a kill falls between two steps as well as anywhere.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.training import kill
from utils.files import read_jsonl
from utils.pipeline import ROOT
from utils.refusal import ArgumentParser, Refused, run

GRID = ("view=PA,AP", "sex=M,F", "findings=none,cardiomegaly,pneumonia,pneumothorax,effusion")
LONGEST_PAUSE_S = 1.0  # from the image that a kill waits for to the kill; the last image ends it
FEWEST_KILLS = 2  # before the first image, and after the last


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=25, help="of each of the 20 prompts [25]")
    parser.add_argument("--kills", type=int, default=10, help="[10]")
    parser.add_argument("--num_inference_steps", type=int, default=4, help="of the solver [4]")
    parser.add_argument("--seed", type=int, default=0, help="of the instants [0]")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    if args.kills < FEWEST_KILLS or args.num_images < 1:
        raise Refused(
            f"--kills {args.kills} --num_images {args.num_images}; expected {FEWEST_KILLS} or more, and 1 or more"
        )
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        finish(whole, args, "unbroken")
        total = num_images_in(whole)
        # One kill before the first image, one after the last, the others between
        between = sorted(generator.sample(range(1, total), args.kills - FEWEST_KILLS))
        for number, least in enumerate([0, *between, total], 1):
            there = kill_at(killed, args, least, total, generator.uniform(0, LONGEST_PAUSE_S))
            print(f"kill {number:>2}: {there:>4} of {total} images were there", flush=True)
        finish(killed, args, "after the kills")
        ours, expected = contents(killed), contents(whole)
        recorded = Counter(row["file_name"] for row in read_jsonl(killed / "images.jsonl"))
    missing, more = expected.keys() - ours.keys(), ours.keys() - expected.keys()
    changed = [name for name in expected.keys() & ours.keys() if ours[name] != expected[name]]
    twice = [name for name, count in recorded.items() if count > 1]
    print(
        f"files: {len(missing)} missing, {len(more)} too many, {len(changed)} with other bytes; {len(twice)} recorded twice"
    )
    passed = not (missing or more or changed or twice) and len(recorded) == total
    print(f"{'pass' if passed else 'fail'}: {total} images, {args.kills} kills")
    return int(not passed)


def command(folder: Path, args: argparse.Namespace) -> list[str]:
    return [sys.executable, "generate.py", "--grid", *GRID, "--num_images", str(args.num_images),
            "--num_inference_steps", str(args.num_inference_steps), "--output_dir", str(folder)]  # fmt: skip


def finish(folder: Path, args: argparse.Namespace, name: str) -> None:
    """Run to the end."""
    began = time.perf_counter()
    ended = subprocess.run(command(folder, args), cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise Refused(f"{name}: status {ended.returncode}, {ended.stderr}")
    print(f"{name}: {num_images_in(folder)} images, {time.perf_counter() - began:.0f} s", flush=True)


def kill_at(folder: Path, args: argparse.Namespace, least: int, total: int, pause_s: float) -> int:
    """Go on until at least this many images lie there, and a moment longer; return how many were there at the kill.

    The moment ends with the last image, else a quick run could be over before it.
    """
    process = subprocess.Popen(command(folder, args), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while num_images_in(folder) < least and process.poll() is None:
        time.sleep(0.005)
    end = time.monotonic() + pause_s
    while time.monotonic() < end and num_images_in(folder) < total:
        time.sleep(0.005)
    if process.poll() is not None:
        raise Refused(f"the run ended with status {process.returncode} before it could be killed")
    kill(process)
    return num_images_in(folder)


def num_images_in(folder: Path) -> int:
    return sum(path.name != "contact_sheet.png" for path in folder.glob("*.png"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
