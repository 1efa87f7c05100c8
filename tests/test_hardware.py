"""Precision, threads and memory: the flag wins, accelerate is heard, fallbacks are named."""

import platform
import resource
import subprocess
import sys
import warnings
from multiprocessing.queues import SimpleQueue

import pytest
import torch

from tests.conftest import HANG_S, ROOT
from tests.processes import SERVER
from utils import hardware, pipeline
from utils.refusal import Refused


@pytest.mark.parametrize(
    ("flag", "told", "native", "expected"),
    [
        ("no", "bf16", True, "no"),
        ("bf16", None, False, "bf16"),
        (None, "bf16", False, "bf16"),
        (None, "no", True, "bf16"),  # accelerate launch says "no" unasked
        (None, None, True, "bf16"),
        (None, None, False, "no"),
    ],
)
def test_precision_is_the_flag_then_accelerates_then_the_hardwares(
    flag, told, native, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_native_bf16", lambda: native)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if told:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    assert hardware.choose_mixed_precision(flag) == expected


@pytest.mark.parametrize(("flag", "warning"), [(None, "fp32 takes twice"), ("bf16", "bf16 is slow"), ("fp16", None)])
def test_a_gpu_without_bf16_is_told_of(flag: str | None, warning: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert hardware.choose_mixed_precision(flag) == (flag or "no")
    said = [str(each.message) for each in caught]
    assert (warning in said[0] and "--mixed_precision fp16" in said[0]) if warning else not said


def test_fp16_is_refused_without_cuda_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    for flag in (None, "fp16"):
        with pytest.raises(Refused, match="CUDA"):
            hardware.choose_mixed_precision(flag)
    assert hardware.choose_mixed_precision("no") == "no"


def test_a_gpu_that_accelerate_is_told_to_leave_alone_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As launch/cpu.yaml tells it: not Stable Diffusion on a CPU, nor in bf16 that only the GPU computes in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for told, on_gpu in (("false", True), ("true", False)):
        monkeypatch.setenv("ACCELERATE_USE_CPU", told)
        assert hardware.has_native_bf16() == on_gpu
        assert (pipeline.default_base() == pipeline.STABLE_DIFFUSION) == on_gpu
    with pytest.raises(Refused, match="CUDA device"):
        hardware.choose_mixed_precision("fp16")


def test_threads_are_shared_unless_the_user_said_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # accelerate launch says 1 unasked
    hardware.use_all_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    hardware.use_all_cores()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    hardware.use_all_cores()
    monkeypatch.delenv("OMP_NUM_THREADS")
    hardware.use_all_cores()
    monkeypatch.setenv("OMP_THREAD_LIMIT", "6")
    hardware.use_all_cores()
    assert asked == [4, 4, 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers may run here")
def test_without_a_kernel_xformers_is_named_and_not_fatal() -> None:
    problem = hardware.xformers_problem()
    assert "xformers" in problem
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hardware.warn_about_xformers(problem)
    assert "scaled_dot_product_attention" in str(caught[0].message)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_comes_back_without_the_system() -> None:
    """In a process of its own: what it sets stays set."""
    counts = SERVER.SimpleQueue()
    process = SERVER.Process(target=count_page_faults, args=(counts,))
    process.start()
    process.join(HANG_S)
    assert process.exitcode == 0
    before, after = counts.get()
    assert after < before / 10


def count_page_faults(counts: SimpleQueue) -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            tensors = [torch.ones(2**20 + i) for i in range(5)]
            del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    unlike = faults()
    hardware.keep_freed_memory()
    faults()
    counts.put((unlike, min(faults() for _ in range(5))))  # a system short of memory takes pages away meanwhile


def test_optional_accelerators_are_not_needed_to_start() -> None:
    code = "import sys; sys.modules['xformers'] = sys.modules['bitsandbytes'] = None; import train_lora, generate, evaluate"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("broken", [None, RuntimeError("no kernel image")])
def test_a_bitsandbytes_that_does_not_run_is_named_and_replaced(broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, or there and failing at its first step."""
    if broken is None:
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    else:
        from bitsandbytes.optim import AdamW8bit

        monkeypatch.setattr(AdamW8bit, "step", lambda *_: (_ for _ in ()).throw(broken))
    with pytest.warns(UserWarning, match="bitsandbytes does not run here"):
        assert hardware.choose_adamw(True, torch.device("cpu")) is torch.optim.AdamW


def test_the_largest_batch_that_fits_divides_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def attempt(batch_size: int) -> None:
        tried.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    assert hardware.largest_batch_size(attempt, films=12, most=12) == 4
    assert tried == [12, 6, 4]
    assert hardware.largest_batch_size(attempt, films=12, most=3) == 3


def test_a_film_that_does_not_fit_is_refused_and_other_errors_are_ours() -> None:
    def too_large(_: int) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(Refused, match="one film at a time"):
        hardware.largest_batch_size(too_large, films=4, most=4)

    def wrong(_: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        hardware.largest_batch_size(wrong, films=4, most=4)


def test_out_of_memory_says_what_to_lower() -> None:
    advise = hardware.explain_out_of_memory
    with pytest.raises(Refused, match="out of memory while training; lower --x"), advise("training", "lower --x"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    with pytest.raises(Refused, match="lower --x"), advise("training", "lower --x"):
        raise RuntimeError("CUDA error: out of memory")  # the driver's, of a graph that finds no room
    with pytest.raises(RuntimeError, match="shapes"), advise("training", "lower --x"):
        raise RuntimeError("shapes do not match")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_from_ampere_on_has_native_bf16() -> None:
    assert hardware.has_native_bf16() == (torch.cuda.get_device_capability()[0] >= 8)
