"""Base models in, films out: loading a Stable Diffusion, an adapter on top, and sampling from both."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path

import diffusers
import peft
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from utils.hardware import is_cuda_used
from utils.hub import HUB_ERRORS, why_unreachable
from utils.images import grey_levels
from utils.refusal import Refused
from utils.tokens import fit_captions

BUNDLED_BASE = "assets/cxr-tiny"
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
ROOT = Path(__file__).resolve().parent.parent
SCHEDULERS = {
    "dpmsolver++": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}
# Noise of its own that no seed governs; timesteps and scales that no Stable Diffusion was trained with
UNSUITED = {"DPMSolverSDEScheduler", "EDMEulerScheduler"}
# For adapters distilled into few steps, beside ours by a second --lora; diffusers counts them as compatible with none
FEW_STEPS = {"LCMScheduler", "TCDScheduler"}


@dataclass(frozen=True)
class BaseModel:
    """The five parts of a Stable Diffusion, all in fp32, and the name they were loaded by."""

    name: str
    tokenizer: CLIPTokenizer
    noise_scheduler: DDPMScheduler
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """The side in pixels of the films that the UNet was trained on."""
        return self.unet.config.sample_size * self.vae_scale_factor

    @property
    def pixel_multiple(self) -> int:
        """What a film's side must be a multiple of, so that every level of autoencoder and UNet divides evenly."""
        return self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)


def canonical_name(name: str) -> str:
    """Return the one name of the bundled base for every way to write its folder, other names as they are."""
    return BUNDLED_BASE if Path(name).resolve() == ROOT / BUNDLED_BASE else name


def default_base() -> str:
    """Return the base model that is used where none is named: Stable Diffusion 1.5 on CUDA, else the bundled one."""
    return STABLE_DIFFUSION if is_cuda_used() else BUNDLED_BASE


def load_base(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> BaseModel:
    """Load a base model in diffusers layout from a folder or from the Hugging Face hub, safetensors only.

    Args:
        name: a folder, or a repository id on the hub. `assets/cxr-tiny` is found from any working directory.
        revision: branch, tag or commit on the hub.
        variant: infix of the weight files' names, such as "fp16".
        cache_dir: where hub files are kept; None is the hub's own cache.

    Raises:
        Refused: for a folder without a Stable Diffusion, another kind of one (XL, inpainting), one with pickled weights
            only, or an unreachable hub. And for a peft that is too old for transformers.
    """
    check_peft()
    location = Path(name)
    if name == BUNDLED_BASE:
        location = ROOT / BUNDLED_BASE
    if not location.is_dir() and (unreachable := why_unreachable()):
        try:
            location = Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True))
        except HUB_ERRORS as error:
            raise Refused(
                f"base model {name} is no folder here, the hub is not reached ({unreachable}), and its cache does not hold "
                f"it; try again online, or use the bundled one: --pretrained_model_name_or_path {BUNDLED_BASE}"
            ) from error
        warnings.warn(f"the hub is not reached ({unreachable}): {name} is taken from its cache", stacklevel=2)
    if location.is_dir():
        _check_folder(location, variant)
    where = str(location) if location.is_dir() else name
    options = dict(revision=revision, cache_dir=cache_dir)
    transformers.utils.logging.disable_progress_bar()
    weights = dict(options, variant=variant, use_safetensors=True)
    try:
        _check_kind(
            name,
            UNet2DConditionModel.load_config(where, subfolder="unet", **options),
            AutoencoderKL.load_config(where, subfolder="vae", **options),
            CLIPTextConfig.from_pretrained(where, subfolder="text_encoder", **options),
        )
        base = BaseModel(
            name=name,
            tokenizer=CLIPTokenizer.from_pretrained(where, subfolder="tokenizer", **options),
            noise_scheduler=DDPMScheduler.from_pretrained(where, subfolder="scheduler", **options),
            # transformers loads a model in the type it was saved in, diffusers in fp32
            text_encoder=CLIPTextModel.from_pretrained(
                where, subfolder="text_encoder", dtype=torch.float32, **weights
            ),
            vae=AutoencoderKL.from_pretrained(where, subfolder="vae", **weights),
            unet=UNet2DConditionModel.from_pretrained(where, subfolder="unet", **weights),
        )
    except Refused:
        raise
    except (  # also what a configuration of other types or of absurd numbers makes the libraries raise
        OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ArithmeticError, SafetensorError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        if location.is_dir():
            raise Refused(f"{name} cannot be loaded as a Stable Diffusion in diffusers layout: {reason}") from error
        raise Refused(
            f"base model {name} is no folder here and could not be had from the hub ({reason}); try again online, or "
            f"use the bundled one: --pretrained_model_name_or_path {BUNDLED_BASE}"
        ) from error
    if base.noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise Refused(
            f"{name} predicts {base.noise_scheduler.config.prediction_type}; expected epsilon or v_prediction"
        )
    words, vectors = len(base.tokenizer), base.text_encoder.config.vocab_size
    if words != vectors:  # without its files transformers makes up a tokenizer of two words
        raise Refused(f"{name}: its tokenizer has {words} words, its text encoder {vectors}; one of them is not whole")
    return base


def check_peft() -> None:
    """See whether transformers takes adapters on its text encoder from the peft that is installed.

    Raises:
        Refused: where it wants a newer one, which it would say only once all weights are loaded.
    """
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        raise Refused(
            f"transformers {transformers.__version__} needs peft {MIN_PEFT_VERSION} and finds {peft.__version__}; pip "
            f'install "peft>={MIN_PEFT_VERSION}", or where there is none yet, pip install -r requirements.txt'
        ) from error


def with_schedule(
    base: BaseModel, prediction_type: str | None = None, rescale_betas_zero_snr: bool = False
) -> BaseModel:
    """Return a base whose UNet is taken to predict something else, or whose noise schedule ends in noise alone.

    Args:
        base: as loaded.
        prediction_type: "epsilon" or "v_prediction"; None is what the base's scheduler says.
        rescale_betas_zero_snr: rescale the schedule to zero SNR at its last timestep, and sample from that one on
            (Lin et al. 2024, arXiv:2305.08891, Alg. 1 and Sec. 3.3): films may then be darker or brighter than average.

    Raises:
        Refused: for zero SNR with "epsilon": noise predicted from noise alone says nothing about a film.
    """
    config = base.noise_scheduler.config
    # As keywords: in a configuration changed by hand, diffusers drops what the base's own file did not name
    changes: dict = {"prediction_type": prediction_type or config.prediction_type}
    if rescale_betas_zero_snr:
        if changes["prediction_type"] != "v_prediction":
            raise Refused("--rescale_betas_zero_snr needs --prediction_type v_prediction; this base predicts epsilon")
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return replace(base, noise_scheduler=DDPMScheduler.from_config(config, **changes))


def _check_folder(folder: Path, variant: str | None) -> None:
    """Refuse a local base that lacks a part or holds one as a pickle, naming the file."""
    infix = f".{variant}" if variant else ""
    parts = {
        "unet": f"diffusion_pytorch_model{infix}.safetensors",
        "vae": f"diffusion_pytorch_model{infix}.safetensors",
        "text_encoder": f"model{infix}.safetensors",
    }
    for part, weights in parts.items():
        if not (folder / part / "config.json").is_file():
            raise Refused(f"{folder} is no Stable Diffusion in diffusers layout: {part}/config.json is missing")
        if list((folder / part).glob("*.safetensors*")):
            continue
        pickles = sorted((folder / part).glob("*.bin"))
        found = f"{pickles[0].name} is a pickle, which can run code when it is loaded" if pickles else "it is missing"
        raise Refused(f"{folder}/{part}: expected {weights}; {found}. Save the model with safe_serialization=True")


def _check_kind(name: str, unet: dict, vae: dict, text_encoder: CLIPTextConfig) -> None:
    """Refuse a base whose UNet does not take noisy latents, a timestep and this text encoder's output, and these alone.

    Args: its name, and its parts' configurations; a key that one leaves out is diffusers' default.
    """
    faults = [
        f"{key} {unet[key]}"
        for key in ("addition_embed_type", "class_embed_type", "num_class_embeds")
        if unet.get(key) is not None
    ]
    channels = unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)
    if len(set(channels)) > 1:
        faults.append("{} channels in and {} out where its autoencoder has {}".format(*channels))
    width = unet.get("cross_attention_dim", 1280)
    if width != text_encoder.hidden_size:
        faults.append(f"cross_attention_dim {width} where its text encoder has {text_encoder.hidden_size}")
    if faults:  # Stable Diffusion XL, inpainting, upscalers, unCLIP
        raise Refused(
            f"{name}: its UNet has {', and '.join(faults)}; expected a text-to-image model in the shape of Stable Diffusion "
            "1.5 or 2.1"
        )


def cast_frozen(unet: UNet2DConditionModel, mixed_precision: str) -> None:
    """Cast a UNet's own weights to "fp16" or "bf16" ("no" leaves fp32), not those of adapters on it.

    Text encoder and autoencoder are not cast at all: they are a hundredth of the arithmetic. The autoencoder computes in fp32,
    which gives latents and films their precision; the text encoder's products are autocast, as accelerate prepares it.
    """
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    for name, parameter in unet.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def put_on_adapter(pipeline: StableDiffusionPipeline, state: dict[str, Tensor], name: str = "adapter") -> None:
    """Load adapters into a pipeline's UNet and text encoder with diffusers' own loader.

    Args:
        pipeline: in fp32.
        state: tensors of an adapter file, from `lora.read_adapter`.
        name: that it is called by in the pipeline.

    Raises:
        Refused: where not all of the adapter fits the base.
    """
    if any("dora_scale" in key for key in state):
        raise Refused(
            "the adapter is DoRA in kohya's form, of which diffusers drops the lengths; expected diffusers' form"
        )
    verbosity = diffusers.utils.logging.get_verbosity()
    # It has a line for each layer that does not fit, where ours says it once
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    try:
        pipeline.load_lora_weights(dict(state), adapter_name=name)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise Refused(f"the adapter does not fit this base model ({reason}); name its own base") from error
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
    models = (pipeline.unet, pipeline.text_encoder)
    placed = sum(f".{name}." in key for model in models for key, _ in model.named_parameters())
    given = [key for key in state if not key.endswith(".alpha")]
    if placed != len(given):  # what has no place is left out by diffusers, what is missing drawn at random
        raise Refused(
            f"the adapter does not fit this base model (it has {len(given)} tensors where its layers in this base have "
            f"{placed}; the first is {min(given)}); expected LoRA of a Stable Diffusion: name its own base"
        )
    pipeline.set_adapters(name)


def merge_adapters(pipeline: StableDiffusionPipeline, adapters: Sequence[tuple[dict[str, Tensor], float]]) -> None:
    """Add the weighted sum of some adapters to a pipeline's own weights, where it costs nothing in sampling.

    Args:
        pipeline: in fp32.
        adapters: tensors of an adapter file, and the factor of their update; 1 as trained, 0 the bare base.

    Raises:
        Refused: where one does not fit the base, or holds numbers that are not finite.
    """
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, (state, _) in zip(names, adapters, strict=True):
        put_on_adapter(pipeline, state, name)
    # Those of weight 0 not at all: DoRA renormalises the base's weights at any
    weights = {name: scale for name, (_, scale) in zip(names, adapters, strict=True) if scale}
    if weights:
        pipeline.set_adapters(list(weights), list(weights.values()))
        try:
            pipeline.fuse_lora(adapter_names=list(weights), safe_fusing=True)
        except ValueError as error:
            raise Refused(f"an adapter whose numbers are not finite ({error}); train it again") from error
    pipeline.unload_lora_weights()


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """Return a solver by its short name, a key of SCHEDULERS, or by that of its class in diffusers.

    Raises:
        Refused: for one that there is not, or that Stable Diffusion cannot be sampled with.
    """
    known = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    found = SCHEDULERS.get(name, known)
    usable = {kind.__name__ for kind in DDPMScheduler().compatibles} - UNSUITED | FEW_STEPS
    if found is None or found.__name__ not in usable:
        raise Refused(f"--scheduler {name}; expected {', '.join(SCHEDULERS)}, or {', '.join(sorted(usable))}")
    return found


def assemble(base: BaseModel, scheduler: str = "dpmsolver++") -> StableDiffusionPipeline:
    """Return a stock pipeline over the given parts (live modules are shared, not copied), without a safety checker.

    The checker knows photographs only. `scheduler` is a name for `scheduler_class`; its noise schedule is the base's own.
    """
    solver, schedule = scheduler_class(scheduler), base.noise_scheduler.config
    if schedule.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in signature(solver.__init__).parameters:
        raise Refused(
            f"--scheduler {scheduler} knows no schedule that ends in noise alone, as this one does; take ddim"
        )
    # PNDM's first steps by Runge and Kutta are no steps of few: Stable Diffusion's own setting leaves them out
    few_steps = {"skip_prk_steps": True} if "skip_prk_steps" in signature(solver.__init__).parameters else {}
    pipeline = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=solver.from_config(schedule, **few_steps),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
) -> Iterator[Tensor]:
    """Yield one film a prompt, uint8 [resolution, resolution], in the order given; see `sample_pictures`."""
    for picture in sample_pictures(
        pipeline, prompts, seeds, resolution, num_inference_steps, guidance_scale, batch_size
    ):
        yield grey_levels(picture[None])[0].to(torch.uint8)


def sample_pictures(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    negative_prompts: Sequence[str] | None = None,
    init_image: Tensor | None = None,
    strength: float = 1.0,
) -> Iterator[Tensor]:
    """Yield one picture a prompt, float32 [3, resolution, resolution] in [0, 1] on the CPU, in the order given.

    Each has a CPU generator of its own and a short batch is filled up with copies of its last, so that a picture
    depends on its prompt and its seed, not on its neighbours. `StableDiffusionPipeline` called with the same
    prompt and `generator=torch.Generator().manual_seed(seed)` gives the same one. Prompts are fitted as captions are.

    Args:
        prompts, seeds: one of each a picture.
        resolution: side in pixels.
        num_inference_steps: solver steps.
        guidance_scale: weight of classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598); 1 is none.
        batch_size: pictures at a time.
        negative_prompts: what guidance leads away from, one a picture; None is the empty text.
        init_image: begin at this film with noise added instead of at noise (Meng et al. 2022, arXiv:2108.01073), uint8
            [resolution, resolution].
        strength: how far along the noise schedule it is taken for that, in (0, 1].
    """
    if init_image is None:
        draw = partial(pipeline, height=resolution, width=resolution)
    else:
        from_film = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
        from_film.set_progress_bar_config(disable=True)
        film = (init_image.float() / 255).expand(batch_size, 3, -1, -1)
        draw = partial(from_film, image=film, strength=strength)
    prompts = fit_captions(pipeline.tokenizer, prompts)
    negative_prompts = fit_captions(pipeline.tokenizer, negative_prompts or [""] * len(prompts))
    for start in range(0, len(prompts), batch_size):
        chunk = range(start, min(start + batch_size, len(prompts)))
        filled = [*chunk, *[chunk[-1]] * (batch_size - len(chunk))]
        pictures = draw(
            prompt=[prompts[i] for i in filled],
            negative_prompt=[negative_prompts[i] for i in filled],
            generator=[torch.Generator().manual_seed(seeds[i]) for i in filled],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        ).images
        yield from pictures[: len(chunk)].float().cpu()
