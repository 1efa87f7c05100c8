"""What leaves for other programs, and the proof after a run that its file gives the model back. Hermetic."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.test_lora import outputs, trained
from utils.export import save_kohya, to_kohya, verify_adapter
from utils.lora import (
    UNET_TARGETS,
    adapter_state,
    add_lora,
    read_adapter,
    save_adapter,
)
from utils.pipeline import cast_frozen, load_base
from utils.refusal import Refused
from utils.release import HEADER_KEY, KOHYA_NAME, WEIGHTS_NAME

HEADER = {
    "base": "tiny", "fold": 2, "resolution": 64, "step": 100, "settings": {"prediction_type": "v_prediction"},
}  # fmt: skip


def metadata_of(path: Path) -> dict[str, str]:
    """Read a safetensors header as A1111 does: without the library."""
    data = path.read_bytes()
    assert data[8:10] == b'{"'
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.mark.parametrize(
    "variant", [dict(alpha=6.0), dict(alpha=6.0, use_rslora=True, rank=8)], ids=["alpha", "rslora"]
)
@pytest.mark.parametrize("targets", UNET_TARGETS)
def test_a_stock_pipeline_reads_the_kohya_file(tiny_base: Path, tmp_path: Path, targets: str, variant: dict) -> None:
    base = trained(tiny_base, targets=targets, **variant)
    save_kohya(tmp_path / KOHYA_NAME, adapter_state(base.unet, base.text_encoder), HEADER)
    stock = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    stock.load_lora_weights(tmp_path, weight_name=KOHYA_NAME)
    pairs = zip(outputs(stock.unet, stock.text_encoder), outputs(base.unet, base.text_encoder), strict=True)
    assert all((theirs - ours).abs().max() <= 1e-4 * ours.abs().max() for theirs, ours in pairs)


def test_a_kohya_file_of_the_unet_alone_leaves_the_text_encoder_bare(tiny_base: Path, tmp_path: Path) -> None:
    base = trained(tiny_base)
    add_lora(frozen := load_base(str(tiny_base)).text_encoder, 0, 0, seed=0)
    save_kohya(tmp_path / KOHYA_NAME, adapter_state(base.unet, frozen), {})
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / KOHYA_NAME))
    assert verify_adapter(tmp_path / KOHYA_NAME, str(tiny_base), base.unet, frozen)[0] < 1e-6


def test_dora_is_not_exported_as_other_programs_compute_it_otherwise(tiny_base: Path) -> None:
    base = trained(tiny_base, use_dora=True)
    with pytest.raises(Refused, match="DoRA"):
        to_kohya(adapter_state(base.unet, base.text_encoder))


def test_equal_exports_are_equal_bytes_and_say_what_other_programs_show(tiny_base: Path, tmp_path: Path) -> None:
    """safetensors writes several keys in an order of its own, which differs from call to call."""
    base = trained(tiny_base)
    state = adapter_state(base.unet, base.text_encoder)
    for name in ("a", "b", "c"):
        save_kohya(tmp_path / name, state, HEADER if name == "a" else dict(reversed(HEADER.items())))
    assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c")}) == 1
    tensors = load_file(tmp_path / "a")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in to_kohya(state).items())
    metadata = metadata_of(tmp_path / "a")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4")
    assert (metadata["modelspec.resolution"], metadata["modelspec.prediction_type"]) == ("64x64", "v")
    assert json.loads(metadata[HEADER_KEY]) == HEADER
    assert "ss_base_model_version" not in metadata  # it attends to no Stable Diffusion's text


@pytest.mark.parametrize("width, version", [(768, "v1"), (1024, "v2")])
def test_the_export_names_the_stable_diffusion_it_is_for(tmp_path: Path, width: int, version: str) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    state = {f"{layer}.lora_A.weight": torch.ones(4, width), f"{layer}.lora_B.weight": torch.ones(320, 4)}
    save_kohya(tmp_path / KOHYA_NAME, state, {"base": "é"})
    metadata = metadata_of(tmp_path / KOHYA_NAME)
    assert metadata["ss_base_model_version"] == f"sd_{version}"
    assert metadata["ss_v2"] == str(version == "v2")
    assert metadata["modelspec.architecture"] == f"stable-diffusion-{version}/lora"
    assert metadata["ss_sd_model_name"] == "é"
    assert load_file(tmp_path / KOHYA_NAME).keys() == to_kohya(state).keys()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_sound_file_is_verified_and_nothing_else_changes(
    tiny_base: Path, tmp_path: Path, mixed_precision: str
) -> None:
    """Of models in the state that training leaves them in: cast, wrapped, in train mode."""
    base = trained(tiny_base, targets="convolutions", alpha=6.0, dropout=0.1)
    cast_frozen(base.unet, mixed_precision)
    base.unet.enable_gradient_checkpointing()
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        unet = accelerator.unwrap_model(accelerator.prepare_model(base.unet)).train()
        text_encoder = accelerator.unwrap_model(accelerator.prepare_model(base.text_encoder)).train()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    state = adapter_state(unet, text_encoder)
    save_adapter(tmp_path / WEIGHTS_NAME, state, {})
    save_kohya(tmp_path / KOHYA_NAME, state, {})
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    for name in (WEIGHTS_NAME, KOHYA_NAME):
        difference, effect = verify_adapter(tmp_path / name, str(tiny_base), unet, text_encoder)
        assert difference < 1e-7 < 0.1 < effect, "by the same operations there is nothing to round in another way"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert {name: t.dtype for name, t in unet.state_dict().items()} == {name: t.dtype for name, t in before.items()}
    assert unet.training
    assert text_encoder.training
    assert unet.is_gradient_checkpointing


def test_compiled_models_are_verified_as_they_were_written(tiny_base: Path, tmp_path: Path) -> None:
    base = trained(tiny_base, alpha=6.0)
    state = adapter_state(base.unet, base.text_encoder)
    save_adapter(tmp_path / WEIGHTS_NAME, state, {})
    difference, _ = verify_adapter(
        tmp_path / WEIGHTS_NAME, str(tiny_base), torch.compile(base.unet), base.text_encoder
    )
    assert difference < 1e-4
    assert adapter_state(torch.compile(base.unet), base.text_encoder).keys() == state.keys()
    base.unet.compile()
    assert verify_adapter(tmp_path / WEIGHTS_NAME, str(tiny_base), base.unet, base.text_encoder)[0] < 1e-4


def lose_alpha(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor / 2 if ".lora_B." in name else tensor for name, tensor in state.items()}


def lose_text_encoder(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("unet.")}


def lose_magnitudes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if "lora_magnitude_vector" not in name}


def lose_one_layer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    layer = min(state).rpartition(".lora_")[0]
    return {name: tensor for name, tensor in state.items() if not name.startswith(layer)}


@pytest.mark.parametrize("share", [1.0, 2e-5])
@pytest.mark.parametrize("fault", [lose_alpha, lose_text_encoder, lose_magnitudes, lose_one_layer])
def test_a_file_that_lost_something_is_found_however_little_was_learnt(
    tiny_base: Path, tmp_path: Path, fault, share: float
) -> None:
    base = trained(tiny_base, alpha=8.0, use_dora=fault is lose_magnitudes)
    with torch.no_grad():
        for model in (base.unet, base.text_encoder):
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter *= share
    cast_frozen(base.unet, "bf16")
    save_adapter(tmp_path / WEIGHTS_NAME, adapter_state(base.unet, base.text_encoder), {})
    assert verify_adapter(tmp_path / WEIGHTS_NAME, str(tiny_base), base.unet, base.text_encoder)[0] < 1e-5
    state, _ = read_adapter(tmp_path / WEIGHTS_NAME)
    save_file(fault(state), tmp_path / WEIGHTS_NAME)
    with pytest.raises(RuntimeError, match="does not give the trained model back"):
        verify_adapter(tmp_path / WEIGHTS_NAME, str(tiny_base), base.unet, base.text_encoder)
