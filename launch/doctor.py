"""One screen about this machine: what it has, what the scripts will use of it, and what is broken, with the line that mends it.

    python launch/doctor.py              # exit status 1 where something has to be mended first
    python launch/doctor.py --command    # nothing but the command that trains on this machine: for a cell of a notebook
    python launch/doctor.py --command --run out/fold2    # the same, in the precision that this run began in
    python launch/doctor.py -- --pretrained_model_name_or_path assets/cxr-tiny    # where train_lora.py will get that

It starts without any package, so that it can say which ones are missing.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from anywhere

import utils.quiet  # noqa: E402, F401

from utils.refusal import ArgumentParser, Refused, run  # noqa: E402

FILMS_A_STEP = 16  # the same on every card, so that its curve is the same
OPTIONAL = ("bitsandbytes", "xformers")
BASE_BYTES = 6e9  # Stable Diffusion 1.5 on the disk, in fp32, and a run's files


@dataclass(frozen=True)
class Card:
    """A CUDA device: its name, its memory in GiB, and whether it computes in bf16."""

    name: str
    memory: float
    bf16: bool


@dataclass(frozen=True)
class Finding:
    """A line of the screen.

    Attributes:
        what: it is about.
        found: what there is.
        mend: what makes it better, None where all is well.
        fatal: whether training fails without that.
    """

    what: str
    found: str
    mend: str | None = None
    fatal: bool = False

    def __str__(self) -> str:
        mark = "!!" if self.fatal else "--" if self.mend else "ok"
        return f"{mark}  {self.what:<15} {self.found}" + (f"\n      mend it: {self.mend}" if self.mend else "")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--command", action="store_true", help="print the command that trains here, and nothing else")
    add("--no_launcher", action="store_true", help="for one GPU, by python itself: it gets the signals of a scheduler")
    add("--run", type=Path, help="a run's folder: where it began in another precision, on another card, go on in that")
    add(
        "training",
        nargs="*",
        metavar="FLAG",
        help="after --: what train_lora.py will get, for the base named there",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    begun = begun_precision(args.run) if args.run else None
    if args.command:
        cards = find_cards()
        for why in check_cards(cards):
            if why.fatal:
                raise Refused(f"{why.found}; {why.mend}; or train on the CPU: ACCELERATE_USE_CPU=true")
        is_finished = args.run and (args.run / "README.md").is_file()
        if begun == "bf16" and not all(card.bf16 for card in cards) and not is_finished:
            raise Refused(
                f"{args.run} began in bf16, which {cards[0].name} has no hardware for (attention would take many times the "
                "memory): go on with it on an L4 or A100, or begin another (--output_dir; in fp16 runs go on on any GPU)"
            )
        print(training_command(cards, begun, not args.no_launcher))
        return 0
    print(Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"))
    findings = []
    for finding in examine(named_base(args.training)):
        print(finding, flush=True)
        findings.append(finding)
    if fatal := [finding.what for finding in findings if finding.fatal]:
        print(f"\nbroken: {', '.join(fatal)}. Mend it, then run this again.")
        return 1
    print(f"\ntrain with: {training_command(find_cards(), begun, not args.no_launcher)} --fold 0")
    return 0


def named_base(flags: Sequence[str]) -> str | None:
    """Return the base that flags of train_lora.py name, None where they leave it to the script."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pretrained_model_name_or_path")
    return parser.parse_known_args(flags)[0].pretrained_model_name_or_path


def examine(named: str | None = None) -> Iterator[Finding]:
    """Yield what there is to say, what others depend on first; what cannot be looked at without it is left out.

    Args:
        named: the base that is to be trained, None for the default of this machine.
    """
    packages = list(check_packages((ROOT / "requirements.txt").read_text().splitlines()))
    yield from packages
    if any(finding.fatal for finding in packages):
        return
    try:
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        import utils.pipeline

        utils.pipeline.check_peft()
        # Tried out: peft looks for the packages that it knows only where a layer gets its adapter
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(1, 1)))
    except Exception as error:  # whatever packages made for one another's older versions raise
        reason = " ".join(str(error).split())[:200]
        mend = "pip install --force-reinstall -r requirements.txt -c constraints.txt"
        if "COLAB_RELEASE_TAG" in os.environ:  # as the notebook does, which keeps Colab's torch
            mend = "pip install --upgrade -r requirements.txt -c cache/torch.txt"
        for package in ("torchvision", "torchao"):
            if package in reason:
                mend = f"pip uninstall -y {package}  # does not fit the others, and is not needed here"
        yield Finding("import", reason, mend, fatal=True)
        return
    cards = find_cards()
    yield from check_cards(cards)
    yield from check_kernels()
    yield check_memory()
    yield from check_bytecode()
    base = utils.pipeline.canonical_name(named or utils.pipeline.default_base())
    yield check_hub(base)
    yield from check_disks(0 if is_here(base) else BASE_BYTES)
    why = f"{'as there is a GPU' if cards else 'without a GPU'}, where you name no other"
    yield Finding("base", f"{base}, {'as you name it' if named else why}")


def check_packages(requirements: Iterable[str]) -> Iterator[Finding]:
    """Hold what is installed against the lines of a requirements file."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding("packages", "none of the requirements", "pip install -r requirements.txt", fatal=True)
        return
    names = []
    for line in requirements:
        if not (line := line.partition("#")[0].strip()):
            continue
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate():
            continue
        fatal, mend = wanted.name not in OPTIONAL, f'pip install "{wanted.name}{wanted.specifier}"'
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(wanted.name, f"missing, wanted {wanted.specifier}", mend, fatal)
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            yield Finding(wanted.name, f"{version}, wanted {wanted.specifier}", mend, fatal)
        elif wanted.name in ("torch", "diffusers", "transformers", "peft", "accelerate"):
            names.append(f"{wanted.name} {version}")
    yield Finding("packages", ", ".join(names))


def find_cards() -> list[Card]:
    """Return the CUDA devices that are used: none where accelerate is told to leave them. Refused where there is no torch."""
    try:
        import torch

        from utils.hardware import is_cuda_used
    except ImportError as error:
        raise Refused(f"{error}; install what is needed: pip install -r requirements.txt") from error

    properties = [torch.cuda.get_device_properties(i) for i in range(is_cuda_used() * torch.cuda.device_count())]
    return [Card(card.name, card.total_memory / 2**30, card.major >= 8) for card in properties]


def check_cards(cards: Sequence[Card]) -> Iterator[Finding]:
    """Say which cards there are and what is free on them; where there is none, whether there should be one."""
    import torch

    for number, card in enumerate(cards):
        if problem := kernel_problem(number):
            found = f"{card.name} computes nothing with torch {torch.__version__} ({problem})"
            mend = "a torch that was built for it (CUDA 12.6 for P100 and V100): pytorch.org/get-started/locally"
            yield Finding(f"GPU {number}", found, mend, fatal=True)
            continue
        free = torch.cuda.mem_get_info(number)[0] / 2**30
        found = f"{card.name}, {card.memory:.1f} GiB, {free:.1f} free, CUDA {torch.version.cuda}"
        taken = free < 0.9 * card.memory
        mend = "end what else uses it (nvidia-smi lists it), or restart the runtime" if taken else None
        yield Finding(f"GPU {number}", found, mend)
    if not cards:
        yield explain_no_card()


def kernel_problem(number: int) -> str | None:
    """Return why a card computes nothing, or None where it does: a build of torch lists cards that it has no kernels for."""
    import torch

    try:
        ones = torch.ones(8, 8, device=f"cuda:{number}")
        (ones @ ones).sum().item()
    except torch.OutOfMemoryError:  # what is free on it is said anyway
        return None
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def explain_no_card() -> Finding:
    """Say why no card is used: fatal where there is one that torch cannot use, not where the environment leaves it out."""
    import torch
    from accelerate.utils import parse_flag_from_env

    kind = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    build = f"torch {torch.__version__}, {kind}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    left_out_by = None
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        left_out_by = "ACCELERATE_USE_CPU"
    elif visible is not None and not re.match(r"\d|GPU-|MIG-", visible):  # a scheduler names cards by number or UUID
        left_out_by = "CUDA_VISIBLE_DEVICES"
    if seen := driver_sees():
        if left_out_by:
            found = f"{seen}, left out by {left_out_by}={os.environ[left_out_by]}"
            return Finding("GPU", found, f"unset {left_out_by}, to use it")
        mend = f"a driver for CUDA {torch.version.cuda}, or a torch for the driver's CUDA (nvidia-smi names it)"
        if not torch.version.cuda:
            mend = "a CUDA build of torch: pytorch.org/get-started/locally"
        elif visible:
            mend += f", or another CUDA_VISIBLE_DEVICES than {visible}"
        return Finding("GPU", f"{seen}, which torch cannot use ({build})", mend, fatal=True)
    if "COLAB_RELEASE_TAG" in os.environ:
        return Finding("GPU", f"none ({build})", "Runtime > Change runtime type > T4, L4 or A100")
    return Finding("GPU", f"none ({build}): the bundled base trains in minutes, Stable Diffusion needs one")


def driver_sees() -> str | None:
    """Return the cards that NVIDIA's driver lists, None where there is no driver or no card."""
    if shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    cards = [line.partition(":")[2].partition("(")[0].strip() for line in listed.stdout.splitlines()]
    return ", ".join(filter(None, cards)) or None


def check_kernels() -> Iterator[Finding]:
    """Say in which precision training will compute and by which kernels."""
    import torch

    from utils import hardware
    from utils.runlog import precision_name

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the screen says it
        precision = hardware.choose_mixed_precision(None)
    why = {"bf16": "this hardware computes in it", "fp16": "accelerate was told so", "no": "no hardware for bf16"}
    mend = None
    if hardware.is_cuda_used() and precision == "no":
        mend = "--mixed_precision fp16: this card has no bf16, and fp32 takes twice the time and memory"
    yield Finding("precision", f"{precision_name(precision)} ({why[precision]})", mend)
    problem = hardware.xformers_problem()
    yield Finding("attention", f"PyTorch's SDPA; {problem or 'xformers would run, too'}")
    device = torch.device("cuda" if hardware.is_cuda_used() else "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_8bit = hardware.choose_adamw(True, device) is not torch.optim.AdamW
    yield Finding("8-bit AdamW", "runs, where --use_8bit_adam asks for it" if has_8bit else str(caught[-1].message))
    problem = hardware.compile_problem(device)
    yield Finding("torch.compile", f"does not run: {problem}" if problem else "runs, where --compile asks for it")


def check_memory() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("CPU", f"{cores} cores, {gib:.0f} GiB", None if gib > 6 else "a machine with 8 GiB or more")


def check_bytecode() -> Iterator[Finding]:
    """Say where every start compiles thousands of modules anew, which takes longer than all else that it does."""
    import torch

    if sys.dont_write_bytecode and not os.path.exists(importlib.util.cache_from_source(torch.__file__)):
        mend = "unset PYTHONDONTWRITEBYTECODE"
        yield Finding(
            "start", "slow: packages are not compiled, and Python is told not to keep what it compiles", mend
        )


def check_disks(needed: float) -> Iterator[Finding]:
    """Look at the disk of this repository, and at that of out/ where it is another's, such as a mounted Drive."""
    yield check_disk(ROOT, needed)
    out = (ROOT / "out").resolve()
    if out.exists() and out.stat().st_dev != ROOT.stat().st_dev:
        yield check_disk(out, 0)


def check_disk(folder: Path, needed: float) -> Finding:
    """Say what is free where data and runs go, against the bytes that a first run needs."""
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.0f} GB free in {folder}"
    if free < max(needed, 1e9):
        return Finding("disk", found, f"make room: a first run needs {max(needed, 1e9) / 1e9:.0f} GB", fatal=True)
    return Finding("disk", found)


def is_here(base: str) -> bool:
    """Return whether a base needs no hub: a folder, or one whose UNet, fetched last, is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    from utils.pipeline import BUNDLED_BASE

    if base == BUNDLED_BASE or Path(base).is_dir():
        return True
    try:
        config = try_to_load_from_cache(base, "unet/config.json")  # which comes before the weights
    except ValueError:  # neither a folder nor the name of a repository: train_lora.py says so
        return False
    return isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))


def check_hub(base: str) -> Finding:
    """Say whether the hub can be reached, and whether the base needs it."""
    from huggingface_hub import get_token

    from utils.hub import why_unreachable
    from utils.pipeline import BUNDLED_BASE

    account = "a token is there" if get_token() else "no token: hf auth login, for --push_to_hub and gated models"
    reason = why_unreachable()
    if reason is None:
        return Finding("hub", f"reached ({account})")
    found = f"not reached ({reason})"
    if is_here(base):
        return Finding("hub", f"{found}; {base} needs none")
    return Finding("hub", found, f"go online, or take --pretrained_model_name_or_path {BUNDLED_BASE}", fatal=True)


def begun_precision(run: Path) -> str | None:
    """Return the precision that a run began in, None where it has not begun. Refused where its record is damaged."""
    config = run / "config.json"
    if not config.is_file():
        return None
    try:
        return json.loads(config.read_text(encoding="utf-8"))["settings"]["mixed_precision"]
    except (ValueError, LookupError, TypeError) as error:
        raise Refused(f"{config} is damaged; expected what train_lora.py wrote, so name another --run") from error


def training_command(cards: Sequence[Card], begun: str | None = None, launcher: bool = True) -> str:
    """Return what trains on these cards: as many films at a time as fit, sixteen a step everywhere.

    Args:
        begun: the precision of the run that is to go on, which is part of what it learns: a card of another kind keeps it.
        launcher: whether accelerate starts it; else python, on the first card.

    `tests/benchmarks/RESULTS.md`, *training_cuda*, has the memory that Stable Diffusion 1.5 takes at 512 px: 6.8 GiB with 4
    films at a time, 11.1 GiB with 8.
    """
    launch = "accelerate launch --config_file launch/{}.yaml{} train_lora.py"
    kept = f" --mixed_precision {begun}" if begun else ""
    if not cards:
        return (launch.format("cpu", "") if launcher else "python train_lora.py") + kept
    processes = max(count for count in (1, 2, 4, 8, 16) if count <= len(cards)) if launcher else 1
    smallest = min(card.memory for card in cards)
    fitting = next(films for films, gib in ((8, 30), (4, 12), (2, 8), (1, 0)) if smallest >= gib)
    batch_size = min(fitting, FILMS_A_STEP // processes)
    bf16 = all(card.bf16 for card in cards)
    if not launcher:
        command = "python train_lora.py" + ("" if bf16 or begun else " --mixed_precision fp16")
    elif processes > 1:
        precision = "" if bf16 else " --mixed_precision fp16"
        command = launch.format("multi_gpu", f" --num_processes {processes}{precision}")
    else:
        command = launch.format("t4" if not bf16 else "a100" if fitting == 8 else "l4", "")
    command += f" --train_batch_size {batch_size}"
    if (accumulated := FILMS_A_STEP // (processes * batch_size)) > 1:
        command += f" --gradient_accumulation_steps {accumulated}"
    if smallest < 8:
        command += " --gradient_checkpointing"
    if processes == 1 and fitting == 8:
        command += " --cuda_graph"  # of one process, and memory to keep its activations
    return command + kept


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
