"""What tests of training share: short command lines, runs in this process and in others, and one run looked at closely."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import train_lora
from tests.conftest import ROOT
from tests.processes import Processes
from utils import validation
from utils.checkpoint import checkpoint_steps

QUICK = [
    *("--resolution", "64", "--train_batch_size", "4", "--rank", "4", "--text_encoder_rank", "4"),
    *("--learning_rate", "1e-2", "--text_encoder_lr", "1e-2", "--lr_warmup_steps", "0"),
    *("--num_validation_images", "0", "--report_to", "none", "--validation_steps", "1000"),
]


def flags(base: Path, data: Path, run: Path, *more: str, precision: str | None = "no") -> list[str]:
    """Return a command line; later flags in `more` win."""
    paths = ["--pretrained_model_name_or_path", base, "--train_data_dir", data, "--output_dir", run]
    precise = ["--mixed_precision", precision] if precision else []
    return [*map(str, paths), "--cache_dir", str(data.parent / "cache"), *QUICK, *precise, *more]


def train(*args, in_full: bool = False, **options) -> int:
    """Run the script's main as a fresh process would, and return the status it would exit with.

    Unless in full, it draws no curves, does not load the adapter back and rebuilds films in few steps: all that takes most of a
    run of two steps.
    """
    threads = torch.get_num_threads()  # a test that acts as a launcher has the script take all cores
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        with pytest.MonkeyPatch.context() as patch:
            if not in_full:
                patch.setattr(train_lora, "draw_curves", lambda path, *rows: path.touch())
                patch.setattr(train_lora, "verify_adapter", lambda *args: (0.0, 1.0))
                patch.setattr(validation, "NUM_DDIM_STEPS", 4)
            return train_lora.main(train_lora.parse_args(flags(*args, **options)))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(processes: int, args: list[str], log: Path, cpu: bool = True) -> subprocess.Popen:
    """Start the script as a user does, on one process or on two, on the CPU unless told otherwise."""
    command = [sys.executable, "train_lora.py"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                   "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
                   "train_lora.py"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})
    output = open(log, "a")
    return subprocess.Popen(
        [*command, *args], cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
    )


def wait_for_checkpoint(process: subprocess.Popen | Processes, run: Path) -> None:
    """Return when a run has one more checkpoint than now, or has ended."""
    steps = checkpoint_steps(run)
    while process.poll() is None and checkpoint_steps(run)[-1:] <= steps[-1:]:
        time.sleep(0.01)


def kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to a process and all that it started: torchrun's are in sessions of their own."""
    launcher = psutil.Process(process.pid)
    launcher.suspend()  # else it could start one more
    family = [launcher, *launcher.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def watch_run(base: Path, data: Path, run: Path, *more: str, **options) -> SimpleNamespace:
    """Train and keep the base, its weights from before, and of every call of UNet and text encoder mode and inputs.

    The mode is the set of `training` of all modules.
    """
    seen = SimpleNamespace(run=run, unet=[], text_encoder=[], before={}, base=None)
    load_base = train_lora.load_base

    def load_and_watch(*args):
        seen.base = load_base(*args)
        for part in ("unet", "text_encoder", "vae"):
            for name, tensor in getattr(seen.base, part).state_dict().items():
                seen.before[f"{part}.{name}"] = tensor.clone()
        for part in ("unet", "text_encoder"):
            calls = getattr(seen, part)
            getattr(seen.base, part).register_forward_pre_hook(
                lambda model, inputs, calls=calls: calls.append(
                    ({module.training for module in model.modules()}, inputs)
                )
            )
        return seen.base

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lora, "load_base", load_and_watch)
        train(base, data, run, *more, **options)
    return seen
