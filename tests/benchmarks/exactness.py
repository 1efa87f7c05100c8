"""Runs that are killed, stopped, split over two processes or broken on one of them, against runs that nothing happens to.

    python -m tests.benchmarks.exactness

Four parts, all of them through the command line of train_lora.py on a tiny base and made-up films, in fp32 on a CPU:

    kills      SIGKILLs at random instants of a run, on one process and on two: the same command has to end in the
               bytes of an unbroken run, with no file more or less
    signals    SIGTERM and SIGINT at random instants: the run has to end by itself with a checkpoint of the step it was
               in, and the same command in the same bytes
    processes  two processes, with and without accumulation, against one at the same films a step, over several seeds:
               losses, gradient norms, validations, cached posteriors and samples at the script's default rates; at a
               hundred times those, losses against what rounding alone comes to
    failures   a film that one process cannot read, a process that is killed, a loss that is not finite: the job has to
               end, soon, with the reason in what it says

The instants are spread over the run: within steps, validations and checkpoints, and at any moment of a start.
Most of the time goes into Python's imports.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import utils.quiet  # noqa: F401

import numpy as np
import psutil
import torch
from PIL import Image

from tests.conftest import build_base, build_data
from tests.training import flags, kill, start
from train_lora import RECIPES
from utils.checkpoint import TENSORS_NAME, checkpoint_steps
from utils.files import read_jsonl
from utils.refusal import ArgumentParser, run

PARTS = ("kills", "signals", "processes", "failures")
FILMS_A_STEP = 8
VALIDATION_STEPS, CHECKPOINTING_STEPS = 20, 7
VALIDATION_S, CHECKPOINT_S = 0.4, 0.02  # about as long as one takes here
RATES = {
    "default": tuple(RECIPES["stable-diffusion"][name] for name in ("learning_rate", "text_encoder_lr")),
    "high": (1e-2, 1e-2),
}  # fmt: skip
# Processes and micro-steps of 8 films a step. A split of one process differs from the first by the order of summation
# alone: what rounding comes to for the split of two below it, which has its micro-batches
SPLITS = {
    "one": (1, 1), "one, 2 parts": (1, 2), "two": (2, 1), "one, 8 parts": (1, 8), "two, 4 parts": (2, 4),
}  # fmt: skip
LOSS_BAR = 1e-5  # at the default rates
NORM_BAR = 1e-5  # of the gradient before it is clipped, relative; AdamW hides a factor on it from the losses
ROUNDING_BAR = 3  # at the high rates: how many times what rounding alone makes of either
SCORE_BARS = {"ssim": 5e-5, "psnr": 2e-4, "mse": 1e-5}  # a pixel that rounds to the next grey level: 1e-6 and 2e-5 dB
POSTERIOR_BAR = 1e-6
GREY_BAR = 1
END_BAR_S = 20  # from the reason to the end; a process that ignores torchrun's SIGTERM is killed after 30
TIMEOUT_S = 600
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts [all]")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of kills and signals [1 2]")
    parser.add_argument("--kills", type=int, default=20, help="a number of processes [20]")
    parser.add_argument("--signals", type=int, default=5, help="of each kind and a number of processes [5]")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="from --seed on, of processes [3]")
    parser.add_argument("--show", action="store_true", help="print the last 30 lines of what failing jobs say")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    os.environ["TQDM_MININTERVAL"] = "0"  # the bar shows every step
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin take sixty times as long where others want the cores
    passed = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_base(root / "base"), build_data(root / "data")
        if "kills" in args.only or "signals" in args.only:
            for processes in args.processes:
                unbroken = measure_unbroken(root, processes, args.steps)
                if "kills" in args.only:
                    passed[f"kills, {processes}"] = kills(root, unbroken, processes, args)
                for number in STATUS if "signals" in args.only else []:
                    name = f"{number.name}, {processes}"
                    passed[name] = signals(root, unbroken, processes, number, args)
        if "processes" in args.only:
            passed |= two_against_one(root, args)
        if "failures" in args.only:
            passed |= failures(root, args)
    bad = [name for name, outcome in passed.items() if not outcome]
    print(f"{'fail' if bad else 'pass'}: {len(passed) - len(bad)} of {len(passed)}{', not ' if bad else ''}"
          f"{'; '.join(bad)}")  # fmt: skip
    return int(bool(bad))


def command(root: Path, run_dir: Path, processes: int, steps: int, *more: str) -> list[str]:
    """Return the command line of a run in `run_dir`; `more` wins over what stands here."""
    settings = ["--max_train_steps", steps, "--train_batch_size", FILMS_A_STEP // processes]
    settings += ["--validation_steps", VALIDATION_STEPS, "--checkpointing_steps", CHECKPOINTING_STEPS]
    settings += ["--early_stopping_patience", 0, "--use_ema"]
    return flags(root / "base", root / "data", run_dir, *map(str, settings), *more)


def finish(processes: int, argv: list[str], output: Path) -> tuple[int, float]:
    """Run a command to its end and return its status and its seconds; what it says goes to `output`."""
    began = time.perf_counter()
    process = start(processes, argv, output)
    try:
        status = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        kill(process)
        status = "no end"
    return status, time.perf_counter() - began


def shown(output: Path) -> int:
    """Return how many steps the progress bar of a start says are done, -1 before there is one."""
    with open(output, "rb") as file:
        file.seek(max(0, output.stat().st_size - 4096))
        found = re.findall(rb"fold 0:[^\r\n]*? (\d+)/\d+ ", file.read())
    return int(found[-1]) if found else -1


def last_step(log: Path) -> int:
    """Return the step of the last whole row of a log, -1 without one."""
    rows = read_jsonl(log) if log.exists() else []
    return rows[-1]["step"] if rows else -1


def measure_unbroken(root: Path, processes: int, steps: int) -> dict:
    """Run once to the end, into a cache of its own, and keep the posteriors; return folders and seconds."""
    run_dir = root / f"unbroken{processes}"
    shutil.rmtree(root / "cache", ignore_errors=True)
    began = time.perf_counter()
    output = root / f"{run_dir.name}.txt"
    process = start(processes, command(root, run_dir, processes, steps), output)
    while process.poll() is None and shown(output) < 0:
        time.sleep(0.01)
    start_s = time.perf_counter() - began
    if status := process.wait(TIMEOUT_S):
        raise RuntimeError(f"the unbroken run ends with status {status}:\n{tail(output)}")
    total_s = time.perf_counter() - began
    cache = (root / "cache").rename(root / f"cache-unbroken{processes}")
    print(f"\n{processes} process{'es' * (processes > 1)}, {steps} steps, unbroken: {total_s:.1f} s, "
          f"of it {start_s:.1f} s until the first step", flush=True)  # fmt: skip
    return {"run_dir": run_dir, "cache": cache, "start_s": start_s}


def kills(root: Path, unbroken: dict, processes: int, args: argparse.Namespace) -> bool:
    """Kill a run again and again, each time a little later, and compare its end with the unbroken run's."""
    generator, run_dir = random.Random(f"{args.seed} {processes}"), root / f"killed{processes}"
    argv = command(root, run_dir, processes, args.steps)
    shutil.rmtree(root / "cache", ignore_errors=True)
    print(f"{'kill':>6}  {'meant for':<12}{'s':>6}{'shown':>7}{'logged':>8}{'checkpoint':>12}  came")
    places, failed = Counter(), False
    for number in range(args.kills):
        target = round(args.steps * (number + generator.random()) / args.kills)
        meant = ("step", "validation", "start", "checkpoint")[number % 4]
        due, longest_s = {
            "start": (lambda: True, 1.1 * unbroken["start_s"]),
            "step": (lambda: shown(output) >= target, 0.05),  # noqa: B023
            "validation": (lambda: in_validation(run_dir, target), VALIDATION_S),  # noqa: B023
            "checkpoint": (lambda: in_checkpoint(run_dir, target), CHECKPOINT_S),  # noqa: B023
        }[meant]
        output, began = root / f"killed{processes}-{number}.txt", time.perf_counter()
        process = start(processes, argv, output)
        wait_until(due, process)
        time.sleep(generator.uniform(0, longest_s))
        if process.poll() is None:
            kill(process)
            came = where_killed(run_dir, shown(output))
            places[came.split(",")[0]] += 1
        else:
            failed |= process.returncode != 0
            came = f"not: it had ended with status {process.returncode}"
            came += f"\n{tail(output)}" if process.returncode else ""
        newest = (checkpoint_steps(run_dir) or [-1])[-1]
        print(f"{number + 1:>6}  {meant:<12}{time.perf_counter() - began:>6.1f}{shown(output):>7}"
              f"{last_step(run_dir / 'log.jsonl'):>8}{newest:>12}  {came}", flush=True)  # fmt: skip
    status, seconds = finish(processes, argv, root / f"killed{processes}-end.txt")
    differing = compare(run_dir, unbroken["run_dir"]) + compare(root / "cache", unbroken["cache"])
    tally = ", ".join(f"{times} {place}" for place, times in places.most_common())
    print(f"to the end: status {status}, {seconds:.1f} s; after {places.total()} kills "
          f"({tally}) {'NOT as the unbroken run: ' + ', '.join(differing) if differing else 'equal to the unbroken run'}")  # fmt: skip
    if status:
        print(tail(root / f"killed{processes}-end.txt"))
    return not (status or failed or differing)


def wait_until(due: Callable[[], Any], process: subprocess.Popen, pause_s: float = 0.002) -> None:
    while process.poll() is None and not due():
        time.sleep(pause_s)


def in_validation(run_dir: Path, target: int) -> bool:
    """Return whether steps up to a validation from `target` on are logged and the validation is not."""
    step = last_step(run_dir / "log.jsonl")
    return step >= target and step % VALIDATION_STEPS == 0 and last_step(run_dir / "validation.jsonl") < step


def in_checkpoint(run_dir: Path, target: int) -> bool:
    """Return whether a checkpoint from `target` on is being written."""
    names = [path.name for path in run_dir.glob("checkpoint-*.tmp")]
    return any(int(name.removeprefix("checkpoint-").removesuffix(".tmp")) >= target for name in names)


def where_killed(run_dir: Path, step: int) -> str:
    """Say what a run was doing by what it left behind."""
    if step < 0:
        return "in start-up"
    partial = sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*.tmp"))
    if partial:
        return f"in a write, left {', '.join(partial)}"
    logged, validated = last_step(run_dir / "log.jsonl"), last_step(run_dir / "validation.jsonl")
    if logged > 0 and logged % VALIDATION_STEPS == 0 and logged > validated:
        return "in a validation"
    if logged > 0 and logged not in checkpoint_steps(run_dir) and logged == validated:
        return "between a validation and its checkpoint"
    return "in a step"


def signals(root: Path, unbroken: dict, processes: int, number: signal.Signals, args: argparse.Namespace) -> bool:
    """Stop a run again and again with a signal, the last time with two at once; look at each end, and at the last."""
    generator, run_dir = random.Random(f"{args.seed} {number} {processes}"), root / f"{number.name}{processes}"
    argv = command(root, run_dir, processes, args.steps)
    # torchrun answers a signal with status 1 and a traceback, whatever its processes end with
    expected = {STATUS[number]} if processes == 1 else {STATUS[number], 1}
    print(f"{number.name:>8}{'s to end':>10}{'status':>8}{'shown':>7}{'logged':>8}{'checkpoint':>12}  as it should")
    num_good = 0
    for place in range(args.signals + 1):
        twice = place == args.signals
        target = round(args.steps * (place + generator.uniform(0.05, 0.95)) / (args.signals + 1))
        output = root / f"{number.name}{processes}-{place}.txt"
        process = start(processes, argv, output)
        wait_until(lambda: shown(output) >= target, process)  # noqa: B023
        time.sleep(generator.uniform(0, 0.05 if place % 2 else VALIDATION_S))
        seen, began = max(0, shown(output)), time.perf_counter()
        # torchrun passes a signal on; systemd and Slurm send it to everyone at once, so that workers get it twice
        launcher = psutil.Process(process.pid)
        receivers = [launcher, *(launcher.children(recursive=True) if processes > 1 and place % 2 else [])]
        for time_no in range(1 + twice):
            time.sleep(0.1 * time_no)
            for receiver in receivers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    receiver.send_signal(number)
        try:
            process.wait(END_BAR_S)
        except subprocess.TimeoutExpired:
            kill(process)
        seconds = time.perf_counter() - began
        logged, newest = last_step(run_dir / "log.jsonl"), (checkpoint_steps(run_dir) or [-1])[-1]
        # Twice: ends anyhow. Once: after the step it was in, or the one that began while the signal was on its way
        good = process.returncode != 0 and seconds < END_BAR_S
        if not twice:
            good &= process.returncode in expected and logged == newest and seen <= newest <= seen + 2
        num_good += good
        to = "twice" if twice else "everyone" if len(receivers) > 1 else "once"
        print(f"{to:>8}{seconds:>10.1f}{process.returncode:>8}{seen:>7}{logged:>8}{newest:>12}  "
              f"{'yes' if good else 'NO'}", flush=True)  # fmt: skip
        if args.show:
            print(tail(output))
    status, seconds = finish(processes, argv, root / f"{number.name}{processes}-end.txt")
    differing = compare(run_dir, unbroken["run_dir"])
    print(f"to the end: status {status}, {seconds:.1f} s; "
          f"{'NOT as the unbroken run: ' + ', '.join(differing) if differing else 'equal to the unbroken run'}")  # fmt: skip
    if status:
        print(tail(root / f"{number.name}{processes}-end.txt"))
    return not (status or differing) and num_good == args.signals + 1


def compare(folder: Path, other: Path) -> list[str]:
    """Return the files that differ or are in one folder only; locks aside. Tensors are compared by their values."""
    one, two = (
        {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}
        for root in (folder, other)
    )
    differing = [f"{name} in one only" for name in sorted(one ^ two)]
    for name in sorted(one & two):
        if (folder / name).read_bytes() == (other / name).read_bytes():
            continue
        if Path(name).name == TENSORS_NAME:  # pickles of equal values differ where strings are shared or not
            first, second = (torch.load(root / name, weights_only=True) for root in (folder, other))
            if same_values(first, second):
                continue
        differing.append(name)
    return differing


def same_values(one: Any, other: Any) -> bool:
    """Return whether nested dicts and lists hold the same keys in the same order, equal tensors and equal numbers."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_values(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_values, one, other))
    return one == other


def two_against_one(root: Path, args: argparse.Namespace) -> dict[str, bool]:
    """Train on one process and on two, at the same films a step, and print how far they are from the first split."""
    print("\ntwo processes against one: the largest difference of losses, in each fifth of the steps and in all, and of\n"
          "gradient norms, relative; how many times what rounding alone makes of either\n"
          f"{'rates':<9}{'seed':>4}  {'split':<18}{'1':>9}{'2':>9}{'3':>9}{'4':>9}{'5':>9}{'all':>9}{'norms':>9}"
          f"{'loss':>9}{'norms':>9}")  # fmt: skip
    passed = {}
    for rates, (learning_rate, text_encoder_lr) in RATES.items():
        for seed in range(args.seed, args.seed + args.seeds):
            runs, logs = {}, {}
            for split, (processes, accumulation) in SPLITS.items():
                name = f"{rates}, seed {seed}, {split}"
                runs[split] = root / name.replace(", ", "-")
                more = dict(
                    num_validation_images=2, validation_steps=max(1, args.steps // 2), seed=seed,
                    gradient_accumulation_steps=accumulation,
                    train_batch_size=FILMS_A_STEP // processes // accumulation,
                    learning_rate=learning_rate, text_encoder_lr=text_encoder_lr,
                    max_grad_norm=0.1,  # clips part of the steps here
                    cache_dir=root / f"cache-of-{processes}",
                )  # fmt: skip
                more = [word for flag, value in more.items() for word in (f"--{flag}", str(value))]
                output = root / f"{runs[split].name}.txt"
                status, _ = finish(processes, command(root, runs[split], processes, args.steps, *more), output)
                if status:
                    print(f"{name}: status {status}\n{tail(output)}")
                    return passed | {name: False}
                rows = read_jsonl(runs[split] / "log.jsonl")
                logs[split] = np.array([[row["loss"], row["grad_norm"]] for row in rows]).T
                if split == "one":
                    continue
                apart, norms = np.abs(logs[split] - logs["one"])
                loss, norm = apart.max(), (norms / logs["one"][1]).max()
                if processes == 1:
                    rounding = loss, norm
                parts = [part.max() for part in np.array_split(apart, 5)]
                print(f"{rates:<9}{seed:>4}  {split:<18}{''.join(f'{most:>9.1e}' for most in (*parts, loss))}"
                      f"{norm:>9.1e}{loss / rounding[0]:>9.3g}{norm / rounding[1]:>9.3g}", flush=True)  # fmt: skip
                if processes == 1:
                    continue
                if rates == "high":
                    passed[name] = bool(loss <= ROUNDING_BAR * rounding[0] and norm <= ROUNDING_BAR * rounding[1])
                else:
                    passed[name] = bool(loss <= LOSS_BAR and norm <= NORM_BAR)
                    passed[f"{name}, validation"] = same_validations(runs["one"], runs[split])
    for name in ("mean", "std"):
        most, number = difference(*(next((root / f"cache-of-{p}").rglob(f"{name}.npy")) for p in (1, 2)), np.load)
        print(f"posteriors' {name}: {most:.1e}, {number} numbers differ")
        passed[f"posteriors' {name}"] = most <= POSTERIOR_BAR
    return passed


def same_validations(run_dir: Path, other: Path) -> bool:
    """Print how far apart two runs' validations and their last sample sheets are; return whether that is little."""
    pairs = list(zip(*(read_jsonl(folder / "validation.jsonl") for folder in (run_dir, other)), strict=True))
    apart = {name: max(abs(one[name] - two[name]) for one, two in pairs) for name in SCORE_BARS}
    sheets = (max((folder / "samples").iterdir()) for folder in (run_dir, other))
    grey, num_differing = difference(*sheets, lambda path: np.asarray(Image.open(path)))
    print(f"{'':15}validation: {', '.join(f'{name} {value:.1e}' for name, value in apart.items())}; "
          f"sample sheet: {grey:.0f} grey levels, {num_differing} pixels differ", flush=True)  # fmt: skip
    return grey <= GREY_BAR and all(apart[name] <= bar for name, bar in SCORE_BARS.items())


def difference(path: Path, other: Path, load: Callable[[Path], np.ndarray]) -> tuple[float, int]:
    """Return the largest difference of two arrays in files, and how many numbers differ."""
    apart = np.abs(load(path).astype(float) - load(other).astype(float))
    return float(apart.max()), int((apart > 0).sum())


def failures(root: Path, args: argparse.Namespace) -> dict[str, bool]:
    """Break jobs of two processes on one of them and return whether each ends soon, with its reason."""
    print(f"\n{'what goes wrong':<32}{'s':>6}{'status':>8}  the reason, s from it to the end")
    passed = {}
    for rank in (0, 1):
        data = root / f"unreadable{rank}"
        shutil.copytree(root / "data", data)
        row = read_jsonl(data / "metadata.jsonl")[10 + rank]  # rows are dealt to processes in turn
        film = data / row["file_name"]
        film.write_bytes(film.read_bytes()[:300])
        argv = [*command(root, root / f"run-unreadable{rank}", 2, args.steps), "--train_data_dir", str(data),
                "--cache_dir", str(root / f"cache-unreadable{rank}")]  # fmt: skip
        passed[f"film unreadable to process {rank}"] = ends(
            root, f"film unreadable to process {rank}", argv, rf"{film.name} cannot be read", args.show
        )
    hot = ["--learning_rate", "1e30", "--text_encoder_lr", "1e30", "--max_grad_norm", "1e30"]
    argv = command(root, root / "run-hot", 2, args.steps, *hot)
    passed["loss not finite"] = ends(root, "loss not finite", argv, r"step \d+: loss.*images/p\d\d_\d", args.show)
    for rank in (0, 1):
        argv = command(root, root / f"run-lost{rank}", 2, args.steps)
        name = f"process {rank} killed"
        passed[name] = ends(root, name, argv, r"Signal 9 \(SIGKILL\)", args.show, victim=rank, at=args.steps // 2)
    return passed


def ends(
    root: Path, name: str, argv: list[str], reason: str, show: bool, victim: int | None = None, at: int = 0
) -> bool:
    """Start a job of two processes and return whether it ends in failure, soon after it says why; print how."""
    output = root / f"{name.replace(' ', '-')}.txt"
    process = start(2, argv, output)
    if victim is not None:
        wait_until(lambda: shown(output) >= at, process)
        workers = psutil.Process(process.pid).children()
        next(worker for worker in workers if worker.environ()["RANK"] == str(victim)).kill()
    else:
        wait_until(lambda: re.search(reason, said(output)), process, pause_s=0.1)
    began = time.perf_counter()
    try:
        process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        kill(process)
    seconds = time.perf_counter() - began
    lines = said(output).rstrip().split("\n")
    places = [place for place, line in enumerate(lines) if re.search(reason, line)]
    found = "NOT SAID"
    if places:
        found = f"{len(places)} times, last {len(lines) - 1 - places[-1]} lines above the end: {lines[places[-1]].strip()[:90]}"
    print(f"{name:<32}{seconds:>6.1f}{process.returncode:>8}  {found}", flush=True)
    if show or not places:
        print(tail(output))
    return bool(places) and process.returncode not in (0, -signal.SIGKILL) and seconds <= END_BAR_S


def said(output: Path) -> str:
    """Return what a job has said, each state of a progress bar on a line of its own."""
    return output.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")


def tail(output: Path, num_lines: int = 30) -> str:
    """Return the last lines of the screen at the end, indented: of a progress bar its last state."""
    text = output.read_text(encoding="utf-8", errors="replace").rstrip()
    lines = [line.rsplit("\r", 1)[-1] for line in text.split("\n")]
    return "\n".join(f"    | {line}" for line in lines[-num_lines:])


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
