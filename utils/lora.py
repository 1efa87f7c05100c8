"""Low-rank adapters on the UNet and the text encoder: put on, saved, read (Hu et al. 2021, arXiv:2106.09685)."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTextModel

from utils.files import canonical_json, write_bytes
from utils.linear import FrozenLinear, low_rank_product
from utils.refusal import Refused
from utils.release import HEADER_KEY, WEIGHTS_NAME
from utils.runlog import which_run

# Each preset adds to the one before it
UNET_TARGETS = {"attention": ["to_q", "to_k", "to_v", "to_out.0"]}
UNET_TARGETS["feed_forward"] = [*UNET_TARGETS["attention"], "ff.net.0.proj", "ff.net.2"]
UNET_TARGETS["convolutions"] = [
    *UNET_TARGETS["feed_forward"], "conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out"
]  # fmt: skip
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class FusedLinear(Linear):
    """peft's linear layer with adapters, W x + s B (A x), computed as one product, `linear.low_rank_product`.

    peft passes over the output once each to multiply by B, by s, and to add, and where autocast computes in bf16 it
    first casts x to the adapters' fp32. What is not one plain adapter is left to peft.

    Takes x [..., in_features] and returns [..., out_features], in autocast's type where there is one, else in x's.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        plain = (
            not (args or kwargs or self.disable_adapters or self.merged)
            and (name in self.lora_A and name not in self.lora_variant and self.lora_B[name].bias is None)
            and (isinstance(self.lora_dropout[name], nn.Identity) or not self.lora_dropout[name].training)
            and (type(self.base_layer) in (nn.Linear, FrozenLinear) and x.dim() > 1 and not x.is_meta)
            and not self.base_layer.weight.requires_grad
        )
        if plain and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            plain = x.is_floating_point() and x.dtype != torch.float64  # which autocast leaves as it is
        elif plain:
            dtype = x.dtype
            plain = dtype == self.base_layer.weight.dtype == self.lora_A[name].weight.dtype
        if not plain:
            return super().forward(x, *args, **kwargs)

        rows = x.to(dtype).flatten(0, -2)  # cast once for W and A
        weight, bias = self.base_layer.weight.to(dtype), self.base_layer.bias
        bias = None if bias is None else bias.to(dtype)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        output = low_rank_product(rows, weight, bias, a, b, self.scaling[name])
        return output.unflatten(0, x.shape[:-1])


def add_lora(
    model: UNet2DConditionModel | CLIPTextModel,
    rank: int,
    alpha: float,
    seed: int,
    targets: str = "attention",
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> list[nn.Parameter]:
    """Freeze a model and put adapters on its layers, W + alpha / rank * B A, with B = 0 and A ~ N(0, 1 / rank^2).

    Args:
        model: UNet or text encoder; adapters are fp32 whatever its own type, as bf16 loses most of Adam's small steps.
        rank: columns of B. 0 freezes the model and adds nothing.
        alpha: the update is scaled by alpha / rank.
        seed: of A.
        targets: which layers of a UNet: a key of UNET_TARGETS. Of a text encoder it is always the attention.
        dropout: share of the inputs of A that training sets to zero, in [0, 1).
        use_rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
        use_dora: also train the length of each row of W + B A (Liu et al. 2024, arXiv:2402.09353). Of a UNet only.

    Returns:
        The trainable parameters, a list: an iterator would be empty by the time gradients are clipped.

    Raises:
        Refused: for DoRA on a text encoder, whose lengths every loader of Stable Diffusion drops without a word.
    """
    model.requires_grad_(False)
    if rank == 0:
        return []
    is_unet = isinstance(model, UNet2DConditionModel)
    if use_dora and not is_unet:
        raise Refused("DoRA on a text encoder is lost when diffusers loads it; expected DoRA on the UNet only")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=use_rslora, use_dora=use_dora,
        init_lora_weights="gaussian", target_modules=UNET_TARGETS[targets] if is_unet else TEXT_ENCODER_TARGETS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config)
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear
    cast_training_params(model, dtype=torch.float32)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_groups(model: nn.Module, learning_rate: float, loraplus_ratio: float = 1.0) -> list[dict]:
    """Return an optimizer's groups for the adapters of a model, none where nothing is trained.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) trains B, which starts at zero, faster than A.

    Args:
        model: with adapters.
        learning_rate: of A and of the lengths of DoRA.
        loraplus_ratio: the rate of B over that of A. 1 keeps one group, in the order of `model.parameters()`.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rates = {name: learning_rate * (loraplus_ratio if ".lora_B." in name else 1) for name, _ in trained}
    return [
        {"params": [parameter for name, parameter in trained if rates[name] == rate], "lr": rate}
        for rate in dict.fromkeys(rates.values())
    ]


def trainable_tensors(**models: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of some models, each under "<keyword>.<its name>"."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, model in models.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adapter_state(unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """Return the adapters under the names that every loader knows, fp32 on the CPU, B scaled so that alpha = rank.

    Weights are those of the moment: for averaged ones call it while they are copied in.
    transformers from 5.6 on names `encoder...` what files name `text_model.encoder...`; the latter is written.
    """
    state = {}
    for prefix, model in (("unet.", unet), ("text_encoder.", text_encoder)):
        config = getattr(model, "peft_config", {}).get("default")
        if config is None:
            continue
        scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False, unwrap_compiled=True)
        for name, tensor in tensors.items():
            if prefix == "text_encoder." and not name.startswith("text_model."):
                name = f"text_model.{name}"
            factor = scaling if ".lora_B." in name else 1
            state[prefix + name] = (tensor.detach().float().cpu() * factor).contiguous()
    return state


def save_adapter(path: Path, state: dict[str, Tensor], header: dict) -> None:
    """Write adapters and `header` (in one key, as canonical JSON) to a safetensors file, atomically.

    Equal adapters and headers give equal bytes: safetensors orders tensors by name but several header keys at random.
    """
    write_bytes(path, save(state, metadata={HEADER_KEY: canonical_json(header)}))


def find_adapter(path: Path) -> Path:
    """Return the adapter file that a run's folder, or the file itself, stands for.

    Raises:
        Refused: where there is none, or only a pickle.
    """
    run_dir = path
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.exists():
        raise Refused(
            f"no adapter at {path}; {which_run(run_dir)}, or train one: accelerate launch train_lora.py --fold 2"
        )
    if path.suffix != ".safetensors":
        raise Refused(f"{path} is no safetensors file; others are pickles, which can run code when they are loaded")
    return path


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors of an adapter file, B scaled so that alpha = rank, and our header, {} where another tool wrote it.

    Raises:
        Refused: for a file that is no whole safetensors file, or one that holds no LoRA.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = file.metadata() or {}
        header = json.loads(told.get(HEADER_KEY, "{}"))
        state = fold_alphas(state, json.loads(told.get(LORA_ADAPTER_METADATA_KEY, "{}")))
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise Refused(f"{path} is no readable safetensors file ({error}); copy or train it again") from error
    if not any("lora" in name for name in state):
        raise Refused(f"{path} holds no LoRA: its first tensor is {min(state, default='missing')}")
    return state, header


def fold_alphas(state: dict[str, Tensor], told: Mapping) -> dict[str, Tensor]:
    """Return adapters with B scaled so that alpha = rank, which is what loaders take of tensors without a header.

    Args:
        state: tensors in any of the forms that diffusers writes, or in kohya's, with an alpha beside each layer: diffusers
            would take the commonest for all.
        told: peft's settings as diffusers puts them into a header, such as "unet.lora_alpha"; {} where there are none.
    """
    folded = dict(state)
    for name, tensor in state.items():
        found = re.fullmatch(r"(\w+)\.(.+)\.(?:lora_B|lora\.up|lora_linear_layer\.up)\.(?:weight|bias)", name)
        if found is None or (alpha := told.get(f"{found[1]}.lora_alpha")) is None:
            continue
        alphas = told.get(f"{found[1]}.alpha_pattern") or {}
        alpha = alphas.get(get_pattern_key(alphas, found[2]), alpha)
        rank = state[name.removesuffix("bias").removesuffix("weight") + "weight"].shape[1]
        scaling = alpha / (math.sqrt(rank) if told.get(f"{found[1]}.use_rslora") else rank)
        folded[name] = tensor * scaling
    for name in [name for name in state if name.endswith(".alpha")]:
        up = f"{name.removesuffix('.alpha')}.lora_up.weight"
        if up in folded:
            folded[up] = folded[up] * (float(folded.pop(name)) / folded[up].shape[1])
    return folded
