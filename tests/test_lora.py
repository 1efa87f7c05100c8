"""Adapters: what is trainable, what is saved, and that every loader gets the same model back. Hermetic."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from utils.images import load_film
from utils.lora import UNET_TARGETS, WEIGHTS_NAME, adapter_state, add_lora, find_adapter, read_adapter, save_adapter
from utils.pipeline import assemble, cast_frozen, load_base, put_on_adapter, sample
from utils.refusal import Refused


def trained(tiny_base: Path, rank: int = 4, alpha: float = 4.0, targets: str = "attention"):
    """A base with adapters that do something: B is no longer zero."""
    base = load_base(str(tiny_base))
    parameters = add_lora(base.unet, rank, alpha, 1, targets) + add_lora(base.text_encoder, rank, alpha, seed=2)
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


def test_scale_zero_is_the_bare_base(tiny_base: Path) -> None:
    trained_base = trained(tiny_base)
    pipeline = assemble(load_base(str(tiny_base)))
    bare = generated(pipeline)
    put_on_adapter(pipeline, adapter_state(trained_base.unet, trained_base.text_encoder), 0.0)
    assert torch.equal(generated(pipeline), bare)
    pipeline.set_adapters("adapter", 1.0)
    assert torch.equal(generated(pipeline), generated(assemble(trained_base)))


def test_files_that_are_no_adapter_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no adapter at"):
        find_adapter(tmp_path)
    (tmp_path / "adapter.bin").write_bytes(b"pickle")
    with pytest.raises(Refused, match="pickle"):
        find_adapter(tmp_path / "adapter.bin")
    (tmp_path / WEIGHTS_NAME).write_bytes(b"\x10\0\0\0\0\0\0\0 not safetensors")
    with pytest.raises(Refused, match="no readable safetensors"):
        read_adapter(find_adapter(tmp_path))
    with pytest.raises(Refused, match="holds no LoRA"):
        read_adapter(tiny_base / "unet" / "diffusion_pytorch_model.safetensors")


def test_an_adapter_of_another_base_is_refused(tiny_base: Path) -> None:
    base = trained(tiny_base)
    state = {name: tensor.repeat(1, 2) for name, tensor in adapter_state(base.unet, base.text_encoder).items()}
    with pytest.raises(Refused, match="does not fit"):
        put_on_adapter(assemble(load_base(str(tiny_base))), state)


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
