"""The autoencoder's decoder, fitted to radiographs while encoder, latents and UNet stay what they are.

A decoder that learnt from photographs loses the fine structure of a film, and no UNet in front of it can win it back:
its round trip is the ceiling of all that is generated. The latents do not depend on it, so it can be trained after the
encoder and put in the base's place (Rombach et al. 2022, arXiv:2112.10752, Sec. 3.1; Stability AI did so for photographs
in sd-vae-ft-mse, there too with the encoder frozen).
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from utils.checkpoint import checkpoint_steps, delete_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from utils.files import append_jsonl, canonical_json, write_bytes
from utils.images import to_pixel_values
from utils.latents import FilmDataset, Posteriors, epoch_order, hash_weights
from utils.metadata import dataset_hash
from utils.metrics import ssim_of_grey
from utils.refusal import Refused
from utils.release import DECODER_NAME
from utils.runlog import cut_back, differences
from utils.seeding import derive_seed
from utils.validation import PAIRED, FilmBank, Scores, decode

HEADER_KEY = "chest_radiograph_vae_decoder"
PARTS = ("decoder.", "post_quant_conv.")
GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue in a film (ITU-R 601-2, as `images.to_films`)
WARMUP = 0.05  # of the steps
MAX_GRAD_NORM = 1.0
# Of AdamW. The gradient of the attention's key bias is nought but for rounding (softmax does not see it), about 1e-9; with
# the usual 1e-8 it would be moved at the full rate, differently on another number of processes
EPSILON = 1e-6


def decoder_state(vae: AutoencoderKL) -> dict[str, Tensor]:
    """Return a copy of an autoencoder's weights behind the latents, fp32 on the CPU, by their names in its state."""
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in vae.state_dict().items()
        if name.startswith(PARTS)
    }


def put_on_decoder(vae: AutoencoderKL, state: dict[str, Tensor]) -> None:
    """Put the decoder of a file in the place of an autoencoder's own.

    Raises:
        Refused: where it does not fit; the autoencoder is then as it was.
    """
    own = {name: tensor for name, tensor in vae.state_dict().items() if name.startswith(PARTS)}
    wrong = [name for name in sorted(own.keys() | state.keys())
             if name not in own or name not in state or own[name].shape != state[name].shape]  # fmt: skip
    if wrong:
        raise Refused(
            f"the adapted decoder does not fit this base model ({len(wrong)} tensors, the first {wrong[0]}); name the base "
            "that it was made for, or decode with the base's own: --no_vae_decoder"
        )
    vae.load_state_dict(state, strict=False)


def find_decoder(path: Path) -> Path | None:
    """Return the adapted decoder in a run's folder, or beside an adapter file; None where there is none."""
    decoder = (path if path.is_dir() else path.parent) / DECODER_NAME
    return decoder if decoder.exists() else None


def read_decoder(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors of a decoder file and our header, {} where another tool wrote it.

    Raises:
        Refused: for a file that is no whole safetensors file, or one that holds anything but a decoder.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise Refused(
            f"{path} is no readable safetensors file ({error}); delete it, then train again or go without"
        ) from error
    strangers = [name for name in state if not name.startswith(PARTS)]
    if strangers or not state:
        raise Refused(f"{path} holds no decoder: expected decoder.* and post_quant_conv.*, found {strangers[:1]}")
    return state, header


@torch.no_grad()
def score_round_trip(
    bank: FilmBank,
    vae: AutoencoderKL,
    batch_size: int,
    indices: Sequence[int] | None = None,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = PAIRED,
) -> dict[str, Tensor]:
    """Score films after the autoencoder, by the name of each metric, float64 [N] each, 0 outside `indices`."""
    indices = range(len(bank)) if indices is None else indices
    scores = Scores(len(bank))
    for start in range(0, len(indices), batch_size):
        chunk = list(indices[start : start + batch_size])
        scores.put_all(metrics, "", chunk, decode(vae, bank.latents[chunk].to(vae.device)), bank.films[chunk])
    return scores.by_name


def reconstruction_loss(pixel_values: Tensor, films: Tensor, ssim_weight: float) -> Tensor:
    """Return L1 over the three channels plus `ssim_weight` times 1 - SSIM of their grey, float32 [B].

    Both, as the error by pixel alone is smallest for a blurred film (Zhao et al. 2017, IEEE TCI 3(1), Sec. III.D).

    Args:
        pixel_values: decoder output, about [-1, 1], [B, 3, H, W].
        films: uint8 [B, H, W], on its device.
        ssim_weight: 0 is L1 alone.
    """
    pixel_values, target = pixel_values.float(), to_pixel_values(films)
    loss = (pixel_values - target).abs().mean(dim=(1, 2, 3))
    if ssim_weight:
        grey = (pixel_values * pixel_values.new_tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)
        loss = loss + ssim_weight * (1 - ssim_of_grey(grey / 2 + 0.5, films[:, None].float() / 255))
    return loss


def adapt_decoder(
    run_dir: Path,
    vae: AutoencoderKL,
    films: FilmDataset,
    posteriors: Posteriors,
    places: Sequence[int],
    bank: FilmBank,
    record: dict,
    max_train_steps: int = 400,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    micro_batch_size: int = 8,
    seed: int = 0,
    ssim_weight: float = 1.0,
    num_looks: int = 5,
    checkpointing_steps: int = 100,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    process_index: int = 0,
    num_processes: int = 1,
    mean_over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict:
    """Fit an autoencoder's decoder to training films and leave the best one, by validation films, on it and in a file.

    Writes `run_dir/vae_decoder.safetensors`, and `run_dir/decoder/` with `log.jsonl` (a row a step), `validation.jsonl`
    (a row a look) and, until it is done, the checkpoint from which the same call goes on. A file of the same settings
    is put on as it is, one of others replaced. Neither processes nor micro-batches nor a resume change which films and
    which noise make up a step.

    Args:
        run_dir: the run's folder.
        vae: autoencoder on its device, in fp32.
        films, posteriors, places: the training films, the latent cache and the films' places in it.
        bank: validation films, of other patients. The base's own decoder is scored first: what is kept is never worse.
        record: what else the file's header should say (base, fold, data hash); a change of it is one of settings.
        max_train_steps: optimizer steps.
        learning_rate: of AdamW, at its highest; a warm-up of 5 % of the steps, then a cosine to zero.
        batch_size: films a step, over all processes.
        micro_batch_size: films at a time.
        seed: of film order and noise.
        ssim_weight: see `reconstruction_loss`.
        num_looks: how often the validation films are scored, evenly spread, the last step always.
        checkpointing_steps: steps from one checkpoint to the next.
        autocast: context of the decoder's arithmetic, as `accelerator.autocast`; bf16 at the least precise, as decoders
            overflow fp16.
        process_index, num_processes, mean_over_processes: which share is ours, and the mean of a tensor on the device of
            `vae` over all processes.

    Returns:
        The file's header.

    Raises:
        Refused: for a loss or gradient that is not finite, with its step, or fewer films a step than processes.
    """
    if batch_size < num_processes:
        raise Refused(f"{batch_size} films a step of the decoder for {num_processes} processes; expected one each")
    folder, path = run_dir / "decoder", run_dir / DECODER_NAME
    settings = {
        "max_train_steps": max_train_steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed,
        "ssim_weight": ssim_weight, "num_looks": num_looks, "training_data_hash": dataset_hash(films.rows),
        "validation_data_hash": hashlib.sha256(bank.films.numpy().tobytes()).hexdigest(),
        "vae": hash_weights(vae, ("",)),
    }  # fmt: skip
    start = _find_start(folder, path, record | {"settings": settings}) if process_index == 0 else 0
    # The first process alone looks what is there, as it may write before the others look
    start = round(mean_over_processes(torch.tensor(float(start), device=vae.device)).item() * num_processes)
    if start < 0:
        _remove_checkpoints(folder, process_index)
        state, header = read_decoder(path)
        put_on_decoder(vae, state)
        return header

    # All weights behind the latents are trained, none before them
    vae.requires_grad_(False).eval()
    named = {name: parameter for name, parameter in vae.named_parameters() if name.startswith(PARTS)}
    parameters = [parameter.requires_grad_(True) for parameter in named.values()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, eps=EPSILON, weight_decay=0.0)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * max_train_steps), max_train_steps)
    looks = {round(max_train_steps * (i + 1) / num_looks) for i in range(num_looks)}

    def look() -> dict[str, float]:
        shares = score_round_trip(bank, vae, micro_batch_size, range(process_index, len(bank), num_processes))
        sums = torch.stack([shares[name].sum().float() for name in ("ssim", "psnr")]).to(vae.device)
        ssim_sum, psnr_sum = (mean_over_processes(sums) * num_processes).tolist()
        return {"ssim": ssim_sum / len(bank), "psnr": psnr_sum / len(bank)}

    if start:
        progress, tensors = load_checkpoint(folder / f"checkpoint-{start}")
        put_on_decoder(vae, tensors["decoder"])
        optimizer.load_state_dict(tensors["optimizer"])
        lr_scheduler.load_state_dict(tensors["lr_scheduler"])
        best = tensors["best"]
    else:
        best, before = decoder_state(vae), look()
        progress = {"settings": settings, "record": record, "before": before, "best": before, "best_step": 0}
        if process_index == 0:
            append_jsonl(folder / "validation.jsonl", [{"step": 0} | before])

    pending = []
    bar = tqdm(range(start + 1, max_train_steps + 1), "adapting the decoder", max_train_steps, unit="step",
               initial=start, disable=process_index > 0)  # fmt: skip
    for step in bar:
        # Our share of the step's films, each with a latent drawn from its posterior
        loss = torch.zeros((), device=vae.device)
        share = range(process_index, batch_size, num_processes)
        for first in range(0, len(share), micro_batch_size):
            positions = [(step - 1) * batch_size + row for row in share[first : first + micro_batch_size]]
            drawn = [_draw(posteriors, places, position, seed) for position in positions]
            latents = torch.stack([latent for _, latent in drawn]).to(vae.device)
            target = torch.stack([films[film] for film, _ in drawn]).to(vae.device)
            with autocast():
                pixel_values = vae.decode(latents).sample
            part = reconstruction_loss(pixel_values, target, ssim_weight).sum() * num_processes / batch_size
            part.backward()
            loss += part.detach()

        # One reduction a step, of all gradients and the loss
        gradients = [parameter.grad for parameter in parameters]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss[None]])
        *means, loss = mean_over_processes(flat).split([*(gradient.numel() for gradient in gradients), 1])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).item()
        pending.append(
            {"step": step, "loss": loss.item(), "lr": lr_scheduler.get_last_lr()[0], "grad_norm": grad_norm}
        )
        if not math.isfinite(pending[-1]["loss"]) or not math.isfinite(grad_norm):
            raise Refused(
                f"step {step} of the decoder: loss {loss.item()}, gradient norm {grad_norm}; train it at a lower learning "
                f"rate than {learning_rate:g} or in fp32"
            )
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

        if step in looks:
            seen = look()
            if seen["ssim"] > progress["best"]["ssim"]:
                best, progress = decoder_state(vae), progress | {"best": seen, "best_step": step}
            bar.set_postfix(SSIM=f"{seen['ssim']:.4f}", base=f"{progress['before']['ssim']:.4f}")
        if process_index == 0 and step in looks:
            append_jsonl(folder / "validation.jsonl", [{"step": step} | seen])
        if process_index == 0 and (step in looks or step % checkpointing_steps == 0):
            append_jsonl(folder / "log.jsonl", pending)
            pending.clear()
        if process_index == 0 and step % checkpointing_steps == 0:
            moments = {"optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict()}
            save_checkpoint(folder, step, progress, {"decoder": decoder_state(vae), "best": best} | moments)
            prune_checkpoints(folder, keep=1)

    vae.requires_grad_(False)
    put_on_decoder(vae, best)
    header = record | {
        "settings": settings,
        "step": progress["best_step"],
        "validation": {"films": len(bank), "before": progress["before"], "after": progress["best"]},
    }
    if process_index == 0:
        write_bytes(path, save(best, metadata={HEADER_KEY: canonical_json(header)}))
    _remove_checkpoints(folder, process_index)
    return header


def _remove_checkpoints(folder: Path, process_index: int) -> None:
    """Delete what only an unfinished adaptation needs, the first process alone."""
    for step in checkpoint_steps(folder) if process_index == 0 else []:
        delete_checkpoint(folder / f"checkpoint-{step}")


def _find_start(folder: Path, path: Path, wanted: dict) -> int:
    """Return the step to go on from, -1 where the file is there already; what other settings left is deleted."""
    if path.exists():
        _, header = read_decoder(path)
        if not differences(wanted, {name: header.get(name) for name in wanted}):
            return -1
    for step in reversed(checkpoint_steps(folder)):
        try:
            progress, _ = load_checkpoint(folder / f"checkpoint-{step}")
        except Refused:  # torn: the one before may be whole
            continue
        if not differences(wanted, progress["record"] | {"settings": progress["settings"]}):
            for log in ("log.jsonl", "validation.jsonl"):
                cut_back(folder / log, step)
            return step
    path.unlink(missing_ok=True)
    _remove_checkpoints(folder, 0)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return 0


def _draw(posteriors: Posteriors, places: Sequence[int], position: int, seed: int) -> tuple[int, Tensor]:
    """Return which training film stands at a position of the stream, and a latent from its posterior, [C, h, w]."""
    epoch, offset = divmod(position, len(places))
    film = int(epoch_order(len(places), derive_seed(seed, "decoder"), epoch)[offset])
    mean, std = (values[0] for values in posteriors.read([places[film]]))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(derive_seed(seed, "decoder", position)))
    return film, mean + std * noise
