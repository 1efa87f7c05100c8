"""What only a CUDA device can show: `pytest -m gpu`. Tiny models, seconds each."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn.attention import sdpa_kernel

import generate
import train_lora
from tests.conftest import HANG_S
from tests.training import flags, kill, read, start, train, wait_for_checkpoint
from utils import kernels
from utils.checkpoint import load_checkpoint
from utils.hardware import xformers_problem
from utils.kernels import CUDNN_LEAST, SDPA_KERNELS, capture_graph
from utils.provenance import read_png
from utils.release import WEIGHTS_NAME

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read(run / "log.jsonl")]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_fp32_learns(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, precision: str
) -> None:
    for name in ("no", precision):
        train(tiny_base, tiny_data, tmp_path / name, "--max_train_steps", "10", precision=name)
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "no"), rel=0.02)
    _, tensors = load_checkpoint(tmp_path / precision / "checkpoint-10")
    assert {tensor.dtype for tensor in tensors["adapters"].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("flag", "tolerance"),
    [("--gradient_checkpointing", 1e-4), ("--compile", 1e-3), ("--use_8bit_adam", 0.05), ("--cuda_graph", 1e-4)],
)
def test_what_only_saves_does_not_change_what_is_learnt(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, flag: str, tolerance: float
) -> None:
    more = ("--max_train_steps", "6", "--rank", "64", "--num_validation_images", "2", "--validation_steps", "3")
    train(tiny_base, tiny_data, tmp_path / "plain", *more)
    train(tiny_base, tiny_data, tmp_path / "saving", *more, flag)
    assert losses(tmp_path / "saving") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_replayed_step_adds_gradients_up_and_stops_the_text_encoder(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, precision: str
) -> None:
    more = ("--max_train_steps", "8", "--gradient_accumulation_steps", "2", "--train_text_encoder_frac", "0.5",
            "--use_ema", "--noise_offset", "0.1", "--checkpointing_steps", "4", "--validation_steps", "3",
            "--checkpoints_total_limit", "0")  # fmt: skip
    ends = []
    for name, flag in (("launched", ()), ("replayed", ("--cuda_graph",))):
        train(tiny_base, tiny_data, tmp_path / name, *more, *flag, precision=precision)
        ends.append([load_checkpoint(tmp_path / name / f"checkpoint-{step}")[1]["adapters"] for step in (4, 8)])
    assert losses(tmp_path / "replayed") == pytest.approx(losses(tmp_path / "launched"), rel=1e-3)
    # As a whole: Adam makes a step of the smallest gradients, too, whose sign is rounding
    launched, replayed = (torch.cat([tensor.flatten() for tensor in steps[1].values()]) for steps in ends)
    assert (replayed - launched).norm() <= 1e-2 * launched.norm()
    for steps in ends:
        still = [name for name in steps[0] if torch.equal(steps[0][name], steps[1][name])]
        assert still == [name for name in steps[0] if name.startswith("text_encoder.")]


@pytest.mark.skipif(xformers_problem() is not None, reason=str(xformers_problem()))
def test_xformers_and_sdpa_predict_the_same(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_base, tiny_data, tmp_path / "sdpa", "--max_train_steps", "3", precision="bf16")
    train(tiny_base, tiny_data, tmp_path / "xformers", "--max_train_steps", "3",
          "--enable_xformers_memory_efficient_attention", precision="bf16")  # fmt: skip
    assert losses(tmp_path / "xformers") == pytest.approx(losses(tmp_path / "sdpa"), rel=0.01)


def test_scores_far_below_zero_have_gradients_where_training_has_been(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """On Hopper cuDNN's attention makes NaN of some: see `leave_out_cudnn_attention`."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "1", precision="bf16")
    for tokens in (16, 64, 77, 192, 1024):
        query, key, value = (torch.randn(2, 4, tokens, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        query[..., 0], key[..., 0] = 1.0, -120 * 32**0.5  # after scaling every score is about -120
        inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
        for mask in (None, torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()):
            with nullcontext() if mask is not None or tokens < CUDNN_LEAST else sdpa_kernel(SDPA_KERNELS):
                output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            gradients = torch.autograd.grad(output, inputs, torch.randn_like(output))
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_step_never_waits_for_the_device(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that waits leaves the device without work. From the third step on, once tables have moved there."""
    steps, prefetch = 12, train_lora.prefetch

    def watched(batches: Iterable[dict]) -> Iterator[dict]:
        for step, batch in enumerate(prefetch(batches), 1):
            torch.cuda.set_sync_debug_mode("error" if 2 < step < steps else "default")  # the last one is logged
            yield batch

    monkeypatch.setattr(train_lora, "prefetch", watched)
    try:
        train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", str(steps), "--use_ema", precision="bf16")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses(tmp_path / "run")) == steps


@pytest.mark.parametrize("flag", [(), ("--cuda_graph",)])
def test_killed_and_resumed_it_ends_in_the_same_numbers(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, flag: tuple[str, ...]
) -> None:
    more = ["--max_train_steps", "60", "--checkpointing_steps", "7", "--validation_steps", "20", *flag]
    output = tmp_path / "output.txt"
    assert start(1, flags(tiny_base, tiny_data, tmp_path / "whole", *more), output, cpu=False).wait(HANG_S) == 0
    process = start(1, flags(tiny_base, tiny_data, tmp_path / "killed", *more), output, cpu=False)
    wait_for_checkpoint(process, tmp_path / "killed")
    kill(process)
    assert start(1, flags(tiny_base, tiny_data, tmp_path / "killed", *more), output, cpu=False).wait(HANG_S) == 0
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    assert (tmp_path / "killed" / WEIGHTS_NAME).exists()


@pytest.mark.parametrize(
    "flags", [("--guidance_scale", "3"), ("--scheduler", "PNDMScheduler", "--guidance_scale", "1"), ("--compile",)]
)
def test_replayed_images_are_those_launched(
    tiny_base: Path, tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Solvers that keep earlier predictions see none of them overwritten."""
    images, recorded = {}, []

    def watched(*args) -> Callable[..., torch.Tensor]:
        recorded.append(name)
        return capture_graph(*args)

    monkeypatch.setattr(kernels, "capture_graph", watched)
    for name, more in (("launched", ("--no_cuda_graph",)), ("replayed", ())):
        words = [
            "--pretrained_model_name_or_path",
            tiny_base,
            "--prompt",
            "Mass.",
            "--prompt",
            "Cardiomegaly.",
            *flags,
            *more,
        ]
        words += ["--num_images", "3", "--batch_size", "2", "--mixed_precision", "no", "--output_dir", tmp_path / name]
        generate.main(generate.parse_args(list(map(str, words))))
        images[name] = [read_png(path).astype(int) for path in sorted((tmp_path / name).glob("*_?_*.png"))]
    assert len(images["replayed"]) == 6 and recorded == ["replayed"]
    assert max(abs(a - b).max() for a, b in zip(images["launched"], images["replayed"], strict=True)) <= 1


def test_a_batch_that_does_not_fit_is_split(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """With a thousandth of the device's memory a large batch does not fit, and its micro-steps do."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total + 3e8 / total)
    try:
        train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "2", "--train_batch_size", "4096",
              "--auto_batch_size")  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(losses(tmp_path / "run")) == 2
