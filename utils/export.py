"""Adapters for other programs: the file that A1111 and ComfyUI read, and the proof that a file gives the model back."""

import copy
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTextModel

from utils.files import canonical_json, write_bytes
from utils.linear import FrozenLinear
from utils.lora import FusedLinear
from utils.pipeline import assemble, load_base
from utils.refusal import Refused
from utils.release import HEADER_KEY

PLAIN_TYPES = {FusedLinear: Linear, FrozenLinear: nn.Linear}
STABLE_DIFFUSIONS = {768: "v1", 1024: "v2"}  # by the width of the text that the UNet attends to
TOLERANCE = 1e-4  # of the adapter's effect on an output, or of a tenth of the output where that is more


def to_kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return adapters under the names of kohya's scripts, with alpha = rank beside each.

    Args:
        state: from `lora.adapter_state`, its scaling in B.

    Raises:
        Refused: for DoRA. peft divides the rows of W + B A by their lengths, ComfyUI by those of W, A1111 its columns.
    """
    if any("lora_magnitude_vector" in name for name in state):
        raise Refused(
            "A1111 and ComfyUI compute DoRA otherwise than it was trained; expected an adapter without it: leave out "
            "the export, or --use_dora"
        )
    # diffusers numbers text encoders as in SDXL; that of SD 1 and 2 has no number (ComfyUI finds SD 2's only so)
    return {
        name.replace("lora_te1_", "lora_te_"): tensor.float()
        for name, tensor in convert_state_dict_to_kohya(state).items()
    }


def save_kohya(path: Path, state: dict[str, Tensor], header: dict) -> None:
    """Write adapters for A1111 and ComfyUI, atomically; equal adapters and headers give equal bytes.

    Args:
        path: the safetensors file.
        state: from `lora.adapter_state`.
        header: that of the adapter file. `base`, `resolution` and `fold` are also written as these programs show them.
    """
    tensors = to_kohya(state)
    rank = str(max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_down.weight")))
    text_widths = {tensor.shape[1] for name, tensor in tensors.items() if name.endswith("attn2_to_k.lora_down.weight")}
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank,
        "modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "diffusers", HEADER_KEY: canonical_json(header),
    }  # fmt: skip
    if version := STABLE_DIFFUSIONS.get(max(text_widths, default=0)):
        metadata |= {"ss_base_model_version": f"sd_{version}", "ss_v2": str(version == "v2")}
        metadata |= {"modelspec.architecture": f"stable-diffusion-{version}/lora"}
    if "base" in header:
        metadata |= {"ss_sd_model_name": header["base"]}
    if predicts := header.get("settings", {}).get("prediction_type"):
        metadata |= {"modelspec.prediction_type": {"v_prediction": "v"}.get(predicts, predicts)}
    if "resolution" in header:
        metadata |= {"modelspec.resolution": f"{header['resolution']}x{header['resolution']}"}
    if "fold" in header:
        metadata |= {"modelspec.title": f"chest radiographs, fold {header['fold']}"}
    write_bytes(path, _with_metadata(save(tensors), metadata))


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """Put metadata into a safetensors file. The library itself writes several keys in random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    text = canonical_json({"__metadata__": metadata} | json.loads(data[8:end])).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[end:]


@torch.no_grad()
def verify_adapter(
    path: Path,
    base_name: str,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> tuple[float, float]:
    """Load an adapter file into a fresh stock pipeline and check that it computes what the trained models compute.

    Both sides are computed in fp32 on the CPU from frozen weights rounded as the live ones are, so that no kernel,
    autocast, compiler or TF32 stands between them: what they differ by is rounding, or a fault in the file. The live
    models are copied, not touched.

    Args:
        path: any file that `load_lora_weights` reads, ours or kohya's.
        base_name, revision, variant, cache_dir: of the base, as for `pipeline.load_base`.
        unet, text_encoder: with their adapters, in any precision, on any device, compiled or not.

    Returns:
        The largest difference of UNet or text encoder from the trained model, and the largest effect of the adapters,
        both as shares of the output's largest value.

    Raises:
        RuntimeError: where a difference is more than rounding. That is a fault of ours.
    """
    live = [getattr(model, "_orig_mod", model) for model in (text_encoder, unet)]
    trained = _outputs(*map(_plain, live))
    with torch.random.fork_rng(devices=[]):  # new adapters are drawn before the file's values replace them
        pipeline = assemble(load_base(base_name, revision, variant, cache_dir))
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="default")
    for model, live_model in zip((pipeline.text_encoder, pipeline.unet), live, strict=True):
        dtypes = {name: parameter.dtype for name, parameter in live_model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, torch.float32)).float()
    loaded = _outputs(pipeline.text_encoder, pipeline.unet)
    pipeline.disable_lora()
    bare = _outputs(pipeline.text_encoder, pipeline.unet)

    differences, effects = [], []
    for part, ours, theirs, base in zip(("text encoder", "UNet"), trained, loaded, bare, strict=True):
        size = ours.abs().max()
        differences.append(((theirs - ours).abs().max() / size).item())
        effects.append(((ours - base).abs().max() / size).item())
        if not differences[-1] <= TOLERANCE * max(effects[-1], 0.1):
            raise RuntimeError(
                f"{path} does not give the trained model back: loaded into {base_name}, the output of its {part} is off "
                f"by {differences[-1]:.1e} of its size, where the adapter's own effect is {effects[-1]:.1e}"
            )
    return max(differences), max(effects)


def _plain(model: nn.Module) -> nn.Module:
    """Return a copy of a model as it was before it was compiled and prepared, in fp32 on the CPU."""
    tensors = [*model.parameters(), *model.buffers()]
    on_cpu = {id(tensor): nn.Parameter(tensor.detach().cpu(), requires_grad=False) for tensor in tensors}
    plain = copy.deepcopy(model, on_cpu).float()  # never twice on the device; what compiled it is not copied
    plain.__dict__.pop("forward", None)  # accelerate's, which computes in its own precision
    # By the same operations as what is loaded: in other orders and layouts a deep network rounds by more than a fault weighs
    plain.to(memory_format=torch.contiguous_format)
    for module in plain.modules():
        if type(module) in PLAIN_TYPES:
            module.__class__ = PLAIN_TYPES[type(module)]
        if isinstance(module, LoraLayer):  # in the file alpha is folded into B
            for name, b in module.lora_B.items():
                b.weight = nn.Parameter(b.weight * module.scaling[name], requires_grad=False)  # the model's stays
                module.scaling[name] = 1.0
    if isinstance(plain, UNet2DConditionModel):
        plain.disable_xformers_memory_efficient_attention()
    return plain


def _outputs(text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> tuple[Tensor, Tensor]:
    """Return what both models make of two drawn captions, and the UNet of two drawn latents, late and early in time."""
    text_encoder.eval()
    unet.eval()
    generator = torch.Generator().manual_seed(0)
    config = text_encoder.config
    input_ids = torch.randint(config.vocab_size, (2, config.max_position_embeddings), generator=generator)
    side = 2 ** len(unet.config.block_out_channels)
    latents = torch.randn(2, unet.config.in_channels, side, side, generator=generator)  # [2, C, h, w]
    encoder_hidden_states = text_encoder(input_ids)[0]  # [2, L, D]
    return encoder_hidden_states, unet(latents, torch.tensor([100, 900]), encoder_hidden_states).sample
