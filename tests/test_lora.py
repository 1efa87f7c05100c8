"""Adapters: what is trainable, what is saved, and that every loader gets the same model back. Hermetic."""

import copy
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from utils.export import to_kohya
from utils.images import load_film
from utils.lora import (
    UNET_TARGETS,
    FusedLinear,
    adapter_state,
    add_lora,
    find_adapter,
    parameter_groups,
    read_adapter,
    save_adapter,
    trainable_tensors,
)
from utils.pipeline import assemble, cast_frozen, load_base, merge_adapters, put_on_adapter, sample
from utils.refusal import Refused
from utils.release import WEIGHTS_NAME
from utils.validation import eval_mode


def trained(
    tiny_base: Path, rank: int = 4, alpha: float = 4.0, targets: str = "attention", use_dora: bool = False, **options
):
    """A base with adapters that do something: B is no longer zero."""
    base = load_base(str(tiny_base))
    parameters = add_lora(base.unet, rank, alpha, 1, targets, use_dora=use_dora, **options)
    parameters += add_lora(base.text_encoder, rank, alpha, seed=2, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return base


def generated(pipeline) -> torch.Tensor:
    return next(sample(pipeline, ["PA chest radiograph"], [3], 64, 4, 4.0, 1))


def test_trainable_parameters_are_a_list_of_fp32_on_a_bf16_base(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    parameters = add_lora(base.unet, 4, 4, seed=0)
    cast_frozen(base.unet, "bf16")
    assert isinstance(parameters, list)  # an iterator would be spent before clipping
    assert parameters
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert {p.dtype for p in base.unet.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_adapters_start_as_the_base_and_depend_on_the_seed_alone(tiny_base: Path) -> None:
    torch.manual_seed(5)
    one, bare = load_base(str(tiny_base)), load_base(str(tiny_base))
    add_lora(one.unet, 4, 4, seed=0)
    assert torch.equal(generated(assemble(one)), generated(assemble(bare)))
    torch.manual_seed(6)
    other = load_base(str(tiny_base))
    add_lora(other.unet, 4, 4, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(one.unet.parameters(), other.unet.parameters(), strict=True))


@pytest.mark.parametrize("targets", UNET_TARGETS)
def test_every_preset_of_layers_survives_its_file(tiny_base: Path, tmp_path: Path, targets: str) -> None:
    base = trained(tiny_base, targets=targets)
    save_adapter(tmp_path / WEIGHTS_NAME, adapter_state(base.unet, base.text_encoder), {})
    state, _ = read_adapter(tmp_path / WEIGHTS_NAME)
    pipeline = assemble(load_base(str(tiny_base)))
    put_on_adapter(pipeline, state)
    film = generated(assemble(base))
    assert torch.equal(generated(pipeline), film)
    assert not torch.equal(film, generated(assemble(load_base(str(tiny_base)))))


def test_presets_grow_to_every_layer_but_the_first_and_last(tiny_base: Path) -> None:
    adapted = {}
    for targets in UNET_TARGETS:
        unet = load_base(str(tiny_base)).unet
        add_lora(unet, 2, 2, 0, targets)
        adapted[targets] = {name.partition(".lora_")[0] for name, p in unet.named_parameters() if p.requires_grad}
    assert adapted["attention"] < adapted["feed_forward"] < adapted["convolutions"]
    weights = {name for name, module in unet.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)}
    layers = {name.removesuffix(".base_layer") for name in weights if ".lora_" not in name}
    left_out = layers - adapted["convolutions"]
    assert {name for name in left_out if "time" not in name} == {"conv_in", "conv_out"}


def test_rank_zero_freezes(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    assert add_lora(base.text_encoder, 0, 0, seed=0) == []
    assert not any(parameter.requires_grad for parameter in base.text_encoder.parameters())


def test_a_stock_pipeline_that_knows_nothing_of_us_draws_the_same_film(tiny_base: Path, tmp_path: Path) -> None:
    """Also where alpha is not the rank, which loaders that read no metadata get wrong."""
    bases = {alpha: trained(tiny_base, alpha=alpha) for alpha in (4.0, 6.0)}
    for alpha, base in bases.items():
        save_adapter(tmp_path / str(alpha) / WEIGHTS_NAME, adapter_state(base.unet, base.text_encoder), {"fold": 2})
    script = f"""
import sys
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
import torch
for alpha in ("4.0", "6.0"):
    pipeline = StableDiffusionPipeline.from_pretrained({str(tiny_base)!r}, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(alpha)
    image = pipeline("PA chest radiograph", num_inference_steps=4, guidance_scale=4.0, height=64, width=64,
                     generator=torch.Generator().manual_seed(3)).images[0]
    image.convert("L").save(alpha + ".png")
assert not any(name.split(".")[0] in ("utils", "train_lora") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True)
    bare = generated(assemble(load_base(str(tiny_base)))).int()
    for alpha, base in bases.items():
        ours, stock = generated(assemble(base)).int(), load_film(tmp_path / f"{alpha}.png", 64).int()
        # alpha / rank is folded into B: (1.5 b) a is 1.5 (b a) up to rounding
        assert (ours - stock).abs().max() <= (0 if alpha == 4.0 else 1)
        assert (ours - bare).abs().max() > 1


def test_names_are_canonical_and_both_models_are_there(tiny_base: Path, tmp_path: Path) -> None:
    base = trained(tiny_base)
    save_adapter(tmp_path / WEIGHTS_NAME, adapter_state(base.unet, base.text_encoder), {})
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as file:
        names = list(file.keys())
    assert {name.split(".")[0] for name in names} == {"unet", "text_encoder"}
    assert all(name.startswith(("unet.", "text_encoder.text_model.encoder.layers.")) for name in names)


def test_equal_adapters_are_equal_files_and_the_header_comes_back(tiny_base: Path, tmp_path: Path) -> None:
    base = trained(tiny_base)
    state, header = adapter_state(base.unet, base.text_encoder), {"fold": 2, "settings": {"rank": 4}, "base": "é"}
    for name in ("a", "b"):
        save_adapter(
            tmp_path / f"{name}.safetensors", state, dict(reversed(header.items())) if name == "b" else header
        )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    read_state, read_header = read_adapter(tmp_path / "a.safetensors")
    assert read_header == header
    assert all(torch.equal(read_state[name], state[name]) for name in state)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_with_weight_zero_there_is_the_bare_base_and_with_one_the_trained(
    tiny_base: Path, use_dora: bool
) -> None:
    trained_base = trained(tiny_base, use_dora=use_dora)
    state = adapter_state(trained_base.unet, trained_base.text_encoder)
    pipeline = assemble(load_base(str(tiny_base)))
    bare = generated(pipeline)
    merge_adapters(pipeline, [(state, 0.0)])
    assert torch.equal(generated(pipeline), bare)
    merge_adapters(pipeline, [(state, 1.0)])
    assert not [name for name, _ in pipeline.unet.named_parameters() if "lora" in name]
    apart = generated(pipeline).int() - generated(assemble(trained_base)).int()
    assert apart.abs().max() <= 1


def test_files_that_are_no_adapter_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no adapter at"):
        find_adapter(tmp_path)
    (tmp_path / "fold3" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "fold3" / "config.json").touch()
    for beside in (tmp_path, tmp_path / "fold3" / "checkpoint-9"):
        with pytest.raises(Refused, match=f"name a run: {tmp_path}/fold3, or train"):
            find_adapter(beside)
    (tmp_path / "adapter.bin").write_bytes(b"pickle")
    with pytest.raises(Refused, match="pickle"):
        find_adapter(tmp_path / "adapter.bin")
    (tmp_path / WEIGHTS_NAME).write_bytes(b"\x10\0\0\0\0\0\0\0 not safetensors")
    with pytest.raises(Refused, match="no readable safetensors"):
        read_adapter(find_adapter(tmp_path))
    with pytest.raises(Refused, match="holds no LoRA"):
        read_adapter(tiny_base / "unet" / "diffusion_pytorch_model.safetensors")


LAYER = "unet.mid_block.attentions.9.transformer_blocks.0.attn1.to_q"
MISFITS = {
    "of another width": (lambda state: {name: tensor.repeat(1, 2) for name, tensor in state.items()}, "size mismatch"),
    "peft's own": (lambda state: renamed(state, "base_model.model."), "64 tensors .* have 0; the first is base_model"),
    "of a transformer": (lambda state: renamed(state, "transformer."), "64 tensors .* have 0; the first is transformer"),
    "unknown to kohya": (lambda state: {"lora_foo.lora_up.weight": torch.ones(8, 4)}, "has 1 tensors .* have 0"),
    "with layers that are not there": (
        lambda state: state | {f"{LAYER}.lora_A.weight": torch.ones(4, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 4)},
        "82 tensors .* have 80",
    ),
    "with half a layer": (lambda state: {name: state[name] for name in sorted(state)[1:]}, "79 tensors .* have 80"),
    "dora in kohya's form": (lambda state: to_kohya(state) | {"lora_unet_x.dora_scale": torch.ones(1)}, "drops the lengths"),
}  # fmt: skip


def renamed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A UNet's adapters under names of another prefix."""
    return {name.replace("unet.", prefix): tensor for name, tensor in state.items() if name.startswith("unet.")}


@pytest.mark.parametrize("kind", MISFITS)
def test_an_adapter_of_which_a_part_does_not_fit_is_refused_and_no_library_says_more(
    tiny_base: Path, kind: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    base, (change, message) = trained(tiny_base), MISFITS[kind]
    state, pipeline = change(adapter_state(base.unet, base.text_encoder)), assemble(load_base(str(tiny_base)))
    recwarn.clear()
    for library in ("diffusers", "peft", "transformers"):  # the first and the last keep their messages from the root
        logging.getLogger(library).addHandler(caplog.handler)
    try:
        with pytest.raises(Refused, match=message):
            put_on_adapter(pipeline, state, "adapter0")
    finally:
        for library in ("diffusers", "peft", "transformers"):
            logging.getLogger(library).removeHandler(caplog.handler)
    assert not caplog.records and not recwarn.list


def test_pickled_bases_are_refused_and_folders_without_one(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    pickled = Path(shutil.copytree(tiny_base, tmp_path / "pickled"))
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(Refused, match="pickle"):
        load_base(str(pickled))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="no Stable Diffusion"):
        load_base(str(tmp_path / "empty"))


def test_stock_pipelines_are_saved_and_loaded_by_diffusers_itself(tiny_base: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny_base)
    assert torch.equal(stock.unet.conv_in.weight, load_base(str(tiny_base)).unet.conv_in.weight)


def outputs(unet, text_encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """What both models make of the same captions, latents and timesteps."""
    generator = torch.Generator().manual_seed(4)
    input_ids = torch.randint(text_encoder.config.vocab_size, (2, 77), generator=generator)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    with eval_mode(unet, text_encoder):
        encoder_hidden_states = text_encoder(input_ids)[0]
        return encoder_hidden_states, unet(latents, torch.tensor([20, 700]), encoder_hidden_states).sample


VARIANTS = {
    "alpha_is_twice_the_rank": dict(alpha=8.0),
    "rslora": dict(alpha=6.0, use_rslora=True),
    "dora": dict(use_dora=True),
    "dora_rslora_alpha_dropout": dict(alpha=6.0, use_rslora=True, use_dora=True, dropout=0.2),
    "averaged": dict(alpha=6.0),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", UNET_TARGETS)
def test_what_a_stock_pipeline_loads_computes_what_was_trained(
    tiny_base: Path, tmp_path: Path, targets: str, variant: str
) -> None:
    base = trained(tiny_base, targets=targets, **VARIANTS[variant])
    lora_parameters = list(trainable_tensors(unet=base.unet, text_encoder=base.text_encoder).values())
    if variant == "averaged":
        average = EMAModel(lora_parameters, decay=0.5)
        average.step(lora_parameters)  # its first step only copies
        with torch.no_grad():
            for parameter in lora_parameters:
                parameter.mul_(1.2)
        average.step(lora_parameters)
        live = outputs(base.unet, base.text_encoder)
        average.store(lora_parameters)
        average.copy_to(lora_parameters)
    ours = outputs(base.unet, base.text_encoder)
    save_adapter(tmp_path / WEIGHTS_NAME, adapter_state(base.unet, base.text_encoder), {})
    if variant == "averaged":
        average.restore(lora_parameters)
        assert all(map(torch.equal, outputs(base.unet, base.text_encoder), live))
        assert not any(map(torch.equal, ours, live))

    stock = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    bare = outputs(stock.unet, stock.text_encoder)
    stock.load_lora_weights(tmp_path)
    for theirs, our, base_output in zip(outputs(stock.unet, stock.text_encoder), ours, bare, strict=True):
        assert (theirs - our).abs().max() <= 1e-4 * our.abs().max()
        assert (base_output - our).abs().max() > 1e-1 * our.abs().max()


@pytest.mark.parametrize("convert", [dict, convert_state_dict_to_diffusers])
@pytest.mark.parametrize("options", [dict(alpha=16.0), dict(alpha=6.0, use_rslora=True)], ids=str)
def test_alpha_in_the_header_of_diffusers_own_files_is_heeded(
    tiny_base: Path, tmp_path: Path, options: dict, convert
) -> None:
    base = trained(tiny_base, **options)
    base.unet.peft_config["default"].alpha_pattern = {"to_k": 2.0}  # as if trained so: the file says it
    parts = {"unet": base.unet, "text_encoder": base.text_encoder}
    layers = {f"{name}_lora_layers": convert(get_peft_model_state_dict(part)) for name, part in parts.items()}
    told = {f"{name}_lora_adapter_metadata": part.peft_config["default"].to_dict() for name, part in parts.items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **told)
    stock = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    stock.load_lora_weights(tmp_path)
    pipeline = assemble(load_base(str(tiny_base)))
    put_on_adapter(pipeline, read_adapter(tmp_path / WEIGHTS_NAME)[0])
    pairs = zip(outputs(pipeline.unet, pipeline.text_encoder), outputs(stock.unet, stock.text_encoder), strict=True)
    assert all((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() for ours, theirs in pairs)


def test_dora_on_the_text_encoder_is_refused_as_loaders_drop_it(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    with pytest.raises(Refused, match="UNet only"):
        add_lora(base.text_encoder, 4, 4, seed=0, use_dora=True)
    assert add_lora(base.text_encoder, 0, 0, seed=0, use_dora=True) == []


@pytest.mark.parametrize("targets", UNET_TARGETS)
def test_dora_trains_in_fp32_on_a_bf16_base(tiny_base: Path, targets: str) -> None:
    unet = load_base(str(tiny_base)).unet
    parameters = add_lora(unet, 4, 4, 0, targets, dropout=0.1, use_dora=True)
    cast_frozen(unet, "bf16")
    kinds = {"lora_A", "lora_B", "lora_magnitude_vector"}
    by_kind = {kind: [p for name, p in unet.named_parameters() if f".{kind}." in name] for kind in kinds}
    assert sum(len(tensors) for tensors in by_kind.values()) == len(parameters) == 3 * len(by_kind["lora_A"])
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    unet.train()
    for _ in range(2):  # the first step leaves A where it is, as B is zero
        with torch.autocast("cpu", torch.bfloat16):
            model_pred = unet(torch.ones(1, 4, 8, 8), 500, torch.ones(1, 77, 32)).sample
        model_pred.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert not any(map(torch.equal, before, parameters))


def test_dropout_acts_in_training_alone(tiny_base: Path) -> None:
    unet = trained(tiny_base, dropout=0.5).unet
    inputs = torch.ones(1, 4, 8, 8), 500, torch.ones(1, 77, 32)
    with torch.no_grad():
        assert torch.equal(unet.eval()(*inputs).sample, unet(*inputs).sample)
        assert not torch.equal(unet.train()(*inputs).sample, unet(*inputs).sample)


def test_lora_plus_trains_b_alone_faster(tiny_base: Path) -> None:
    unet = load_base(str(tiny_base)).unet
    parameters = add_lora(unet, 4, 4, 0, "convolutions", use_dora=True)
    slow, fast = parameter_groups(unet, 1e-3, 16.0)
    names = {parameter: name for name, parameter in unet.named_parameters()}
    assert (slow["lr"], fast["lr"]) == (1e-3, 1.6e-2)
    assert all(".lora_B." in names[parameter] for parameter in fast["params"])
    assert not any(".lora_B." in names[parameter] for parameter in slow["params"])
    assert {*slow["params"], *fast["params"]} == set(parameters)
    torch.optim.AdamW([slow, fast])


def test_without_lora_plus_there_is_one_group_in_the_models_order(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    parameters = add_lora(base.unet, 4, 4, seed=0)
    (group,) = parameter_groups(base.unet, 1e-3)
    assert group["lr"] == 1e-3
    assert all(a is b for a, b in zip(group["params"], parameters, strict=True))
    add_lora(base.text_encoder, 0, 0, seed=0)
    assert parameter_groups(base.text_encoder, 1e-3, 16.0) == []


def with_and_without_bias(unet) -> tuple[FusedLinear, FusedLinear]:
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    return attention.to_out[0], attention.to_k


def pefts(layer: FusedLinear) -> Linear:
    """A copy of a layer that computes as peft does."""
    layer = copy.deepcopy(layer)
    layer.__class__ = Linear
    return layer


def computed(layer: torch.nn.Module, x: torch.Tensor, precision: str = "no") -> list[torch.Tensor]:
    """A layer's output, and the gradients of its input and of its adapters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        output = layer(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return [output, x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("options", [dict(), dict(alpha=6.0), dict(alpha=6.0, use_rslora=True)], ids=str)
def test_adapted_linear_layers_compute_what_pefts_do(tiny_base: Path, options: dict) -> None:
    torch.manual_seed(0)
    for layer in with_and_without_bias(trained(tiny_base, **options).unet):
        for shape in ((5,), (2, 3), (2, 2, 2), (0, 3)):
            x = torch.randn(*shape, layer.in_features)
            ours, theirs = computed(layer, x), computed(pefts(layer), x)
            assert len(ours) == 4
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Produced(TorchDispatchMode):
    """Collects the type and the size of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.tensors += [(tensor.dtype, tensor.numel()) for tensor in [result] if isinstance(tensor, torch.Tensor)]
        return result


def test_in_bf16_no_activation_is_ever_fp32(tiny_base: Path) -> None:
    torch.manual_seed(0)
    unet = trained(tiny_base, alpha=6.0).unet
    exact = copy.deepcopy(with_and_without_bias(unet))
    cast_frozen(unet, "bf16")
    for layer, exact_layer in zip(with_and_without_bias(unet), exact, strict=True):
        x = torch.randn(64, 16, layer.in_features, dtype=torch.bfloat16)
        least = 64 * 16 * min(layer.in_features, layer.out_features)
        assert least > layer.weight.numel()
        of_activations = {}
        for contender in (layer, pefts(layer)):
            with Produced() as produced:
                output, *gradients = computed(contender, x, "bf16")
            assert output.dtype == torch.bfloat16
            of_activations[type(contender)] = {dtype for dtype, size in produced.tensors if size >= least}
            assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]
            for ours, true in zip([output, *gradients], computed(exact_layer, x.float()), strict=True):
                assert (ours - true).norm() <= 1e-2 * true.norm()
        assert of_activations == {FusedLinear: {torch.bfloat16}, Linear: {torch.bfloat16, torch.float32}}
        assert computed(layer, x.float(), "bf16")[0].dtype == torch.bfloat16  # as after a norm


LEFT_TO_PEFT = {
    "dropout": lambda unet, layer: layer.lora_dropout.update({"default": torch.nn.Dropout(0.5)}),
    "disabled": lambda unet, layer: unet.disable_adapters(),
    "merged": lambda unet, layer: layer.merge(),
    "two": lambda unet, layer: unet.set_adapters(["default", "other"]),
    "frozen weights in bf16 without autocast": lambda unet, layer: cast_frozen(unet, "bf16"),
}


def pefts_calls(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The class of every layer that computes as peft does from here on."""
    calls, forward = [], Linear.forward

    def counted(self, *args, **kwargs):
        calls.append(type(self))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", counted)
    return calls


@pytest.mark.parametrize("change", LEFT_TO_PEFT)
def test_what_is_not_one_plain_adapter_is_left_to_peft(tiny_base: Path, monkeypatch, change: str) -> None:
    unet = trained(tiny_base).unet.train()
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=UNET_TARGETS["attention"]), "other")
    unet.set_adapter("default")
    layer, _ = with_and_without_bias(unet)
    calls = pefts_calls(monkeypatch)
    x = torch.randn(2, 3, layer.in_features)
    layer(x)
    assert calls == []
    LEFT_TO_PEFT[change](unet, layer)
    x = x.to(layer.weight.dtype)
    outputs = []
    for contender in (layer, pefts(layer)):
        torch.manual_seed(0)
        outputs.append(contender(x))
    assert calls == [FusedLinear, Linear]
    assert torch.equal(*outputs)
    assert outputs[0].dtype == x.dtype


def test_dora_and_mixed_batches_are_left_to_peft(tiny_base: Path, monkeypatch) -> None:
    calls = pefts_calls(monkeypatch)
    layer, _ = with_and_without_bias(trained(tiny_base, use_dora=True).unet)
    x = torch.randn(2, 3, layer.in_features)
    assert torch.equal(layer(x), pefts(layer)(x))
    layer, _ = with_and_without_bias(trained(tiny_base).unet)
    bare, adapted = layer.eval()(x, adapter_names=["__base__", "default"])
    assert calls == [FusedLinear, Linear, FusedLinear]
    assert torch.equal(bare, layer.base_layer(x)[0])
    torch.testing.assert_close(adapted, layer(x)[1])


def test_adapted_layers_are_copied_switched_and_compiled_whole(tiny_base: Path) -> None:
    torch.manual_seed(0)
    layer, _ = with_and_without_bias(trained(tiny_base).unet)
    assert type(copy.deepcopy(layer)) is FusedLinear
    x = torch.randn(2, 3, layer.in_features)
    expected = computed(layer, x)
    layer.merge()
    layer.unmerge()
    layer.enable_adapters(False)
    layer.enable_adapters(True)
    torch.testing.assert_close(computed(layer, x), expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(computed(compiled, x), expected)
    torch.testing.assert_close(computed(compiled, x, "bf16"), computed(layer, x, "bf16"), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_adapters_in_a_compiled_block_get_their_gradients(tiny_base: Path, precision: str) -> None:
    """PyTorch 2.11 compiled an autograd function of ours without them, and training went on without a word."""
    torch.manual_seed(0)
    unet = trained(tiny_base).unet
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    inputs = [torch.randn(2, 64, block.norm1.normalized_shape[0]), torch.randn(2, 7, unet.config.cross_attention_dim)]
    gradients = []
    for compiled in (False, True):
        unet.zero_grad()
        if compiled:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = block(inputs[0], encoder_hidden_states=inputs[1])
        output.float().square().sum().backward()
        gradients.append({name: p.grad for name, p in block.named_parameters() if p.requires_grad})
    eager, compiled = gradients
    assert len(eager) == 16
    for name, gradient in eager.items():
        assert (compiled[name] - gradient).norm() <= (0.02 if precision == "bf16" else 1e-4) * gradient.norm(), name
