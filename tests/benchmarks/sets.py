"""Ten thousand films against ten thousand: time and memory of the figures that compare sets of films.

    python -m tests.benchmarks.sets

Three sets of made-up films of 128 px, drawn as they are read, are measured in the bundled feature space a batch at a time, and
what evaluate.py says of sets is computed: Frechet and kernel distance, precision, recall, density and coverage of the second
set and of ten draws from the third, beside the first; and the memorisation audit. Each size in a process of its own, whose
memory's peak is read at its end. The bar: from one size to the next memory grows by no more a film than twice what is kept
of it (features, readings and pixels, 4.6 kB), where the film itself is 16 kB and a matrix of distances would be 80 kB a film.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import utils.quiet  # noqa: F401

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from utils.audit import audit
from utils.encoders import bundled_space, measure_films
from utils.hardware import keep_freed_memory, use_all_cores
from utils.pipeline import ROOT
from utils.realism import compare_sets
from utils.refusal import ArgumentParser, run

SIDE = 128  # pixels


class MadeUpFilms(Dataset):
    """Smooth noise, another one for every place and every set, uint8 [128, 128]."""

    def __init__(self, count: int, first: int):
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> torch.Tensor:
        rough = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(self.first + place))
        return (F.interpolate(rough, (SIDE, SIDE), mode="bicubic")[0, 0].clamp(0, 1) * 255).to(torch.uint8)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=[2_000, 10_000], help="films a set [2000 10000]")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # one size, in this process
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    if args.only:
        print(json.dumps(measure(args.only)))
        return 0
    rows = []
    for size in args.sizes:
        command = [sys.executable, "-m", "tests.benchmarks.sets", "--only", str(size)]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'films a set':>12}{'features, s':>13}{'films/s':>9}{'distances, s':>14}{'audit, s':>10}{'peak, MB':>10}")
    for row in rows:
        rate = 3 * row["films"] / row["features"]
        print(f"{row['films']:>12}{row['features']:>13.1f}{rate:>9.0f}{row['distances']:>14.1f}{row['audit']:>10.1f}"
              f"{row['peak'] / 1e6:>10.0f}")  # fmt: skip
    few, many = rows
    grown = (many["peak"] - few["peak"]) / (3 * (many["films"] - few["films"]))
    good = grown <= 2 * many["kept"]
    print(f"{'pass' if good else 'fail'}: {grown / 1e3:.1f} kB more a film (bar {2 * many['kept'] / 1e3:.1f})")
    return 0 if good else 1


def measure(size: int) -> dict:
    """Return seconds of each stage, the peak of this process's memory in bytes, and the bytes kept of a film."""
    use_all_cores()
    keep_freed_memory()
    space = bundled_space(torch.device("cpu"))
    seconds, start = {}, time.perf_counter()
    sets = [
        measure_films(space, DataLoader(MadeUpFilms(size, first * 10**6), 64), size) for first in range(1, 4)
    ]  # fmt: skip
    seconds["features"] = time.perf_counter() - start
    start = time.perf_counter()
    reference, generated, pool = (of["features"] for of in sets)
    patients = [str(i) for i in range(size)]
    compare_sets(reference, patients, {"generated": generated}, pool, patients, seed=0)
    seconds["distances"] = time.perf_counter() - start
    start = time.perf_counter()
    spaces = [{name: of[name] for name in ("features", "pixels")} for of in sets]
    audit(spaces[1], spaces[2], spaces[0], spaces[2], spaces[0], patients, size, seed=0)
    seconds["audit"] = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = sum(of[0].numel() * of.element_size() for of in sets[0].values())
    return {"films": size, **seconds, "peak": peak, "kept": kept}


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
