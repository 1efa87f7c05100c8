"""Kernels: cuDNN's attention where its tiles are full, and graphs that are recorded anew when shapes change."""

import pytest
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel

from utils import kernels


def unet_and_inputs() -> tuple[UNet2DConditionModel, tuple[torch.Tensor, ...]]:
    """Return a UNet of 1,024 and 256 tokens beside a text of 7, and what it takes."""
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=32, layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
    )  # fmt: skip
    return unet, (torch.randn(2, 4, 32, 32), torch.tensor([1, 500]), torch.randn(2, 7, 32))


def test_cudnns_attention_serves_many_tokens_in_full_tiles_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, attend = set(), torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        seen.add((query.shape[2], key.shape[2], torch.backends.cuda.cudnn_sdp_enabled()))
        return attend(query, key, *args, **kwargs)

    unet, inputs = unet_and_inputs()
    expected = unet(*inputs).sample
    kernels.leave_out_cudnn_attention(unet)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    assert torch.equal(unet(*inputs).sample, expected)
    assert seen == {(1024, 1024, True), (1024, 7, False), (256, 256, False), (256, 7, False)}
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_choice_of_kernels_is_traced_whole() -> None:
    unet, inputs = unet_and_inputs()
    expected = unet(*inputs).sample
    kernels.leave_out_cudnn_attention(unet)
    for block in (block for block in unet.modules() if isinstance(block, Transformer2DModel)):
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(unet(*inputs).sample, expected)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_replayed_unet_is_recorded_anew_when_shapes_change(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unet(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **others):
            told = others.get("timestep_cond")
            return (sample * timestep + encoder_hidden_states.mean() + (0 if told is None else told),)

    recorded, full = [], [True]

    def record(function, inputs):
        if full:
            full.clear()
            raise torch.OutOfMemoryError
        recorded.append([tuple(tensor.shape) for tensor in inputs])
        storage = torch.empty_like(inputs[0])
        return lambda *tensors: storage.copy_(function(*tensors))

    monkeypatch.setattr(kernels, "capture_graph", record)
    plain, unet = Unet(), Unet()
    kernels.replay_predictions(unet)
    with pytest.raises(torch.OutOfMemoryError):
        unet(torch.ones(2, 4), torch.tensor(3), torch.ones(2, 7), return_dict=False)
    kept = []
    for films in (2, 2, 3):
        inputs = torch.rand(films, 4), torch.tensor(3), torch.rand(films, 7)
        kept.append((unet(*inputs, timestep_cond=None, return_dict=False)[0], plain(*inputs)[0]))
    assert recorded == [[(2, 4), (), (2, 7)], [(3, 4), (), (3, 7)]]
    assert all(torch.equal(*pair) for pair in kept), "the next prediction overwrites one that a solver keeps"
    more = {"timestep_cond": torch.ones(1), "return_dict": False}
    assert torch.equal(unet(*inputs, **more)[0], plain(*inputs, **more)[0])
