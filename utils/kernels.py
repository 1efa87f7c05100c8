"""Which kernels a UNet runs on, and how they are launched: attention's choice, compiled blocks, CUDA graphs."""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN_TILE, CUDNN_LEAST = 128, 1024  # tokens; of fewer flash attention takes half of cuDNN's time
SDPA_KERNELS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip


def leave_out_cudnn_attention(unet: UNet2DConditionModel) -> None:
    """Have PyTorch's attention choose among other kernels than cuDNN's, but for many tokens that fill their tiles.

    On Hopper it prefers cuDNN's, whose gradients can be NaN at a healthy loss. As reported with a mask
    (pytorch/pytorch#196678) and without (NVIDIA/cudnn-frontend#1072), they score what is empty in a tile of tokens 0:
    where all scores of a query are below -88, exp(0 - log-sum-exp) overflows fp32, and times an empty row's 0 is NaN.
    Full tiles have no such rows, and of 4,096 tokens cuDNN takes 0.6 of flash attention's time (RESULTS.md, attention).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    unet.set_attn_processor(FullTilesAttnProcessor())


class FullTilesAttnProcessor(AttnProcessor2_0):
    """diffusers' attention, for which cuDNN's kernels may be taken where queries and keys are many and fill their tiles."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args, **kwargs
    ) -> Tensor:
        queries = hidden_states.flatten(2).shape[-1] if hidden_states.ndim == 4 else hidden_states.shape[1]
        keys = queries if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        full = all(tokens >= CUDNN_LEAST and tokens % CUDNN_TILE == 0 for tokens in (queries, keys))
        with sdpa_kernel(SDPA_KERNELS) if full else nullcontext():
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def compile_blocks(unet: UNet2DConditionModel) -> None:
    """Have a UNet's transformers and residual blocks compiled when they are first called, each shape by itself.

    They are all but a few of its layers. Many are alike, so that they compile sooner one by one than as one whole.
    """
    torch._dynamo.config.recompile_limit = 128  # a graph for every width and side, once more where gradients differ
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            block.compile(fullgraph=True, dynamic=False)
        elif isinstance(block, Transformer2DModel):
            # For the convolutions at its ends PyTorch would copy all that has four dimensions into their layout, the
            # queries, keys and values of every head, too
            block.compile(fullgraph=True, dynamic=False, options={"layout_optimization": False})


def capture_graph(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()
) -> Callable[..., Tensor]:
    """Record what a function does on a CUDA device as a graph, and return a function that replays it in a single launch.

    A training step of Stable Diffusion launches some six thousand kernels. Where the host takes longer to launch them
    than the device to run them, small batches take as long as large ones. A graph runs the same kernels on the same
    storage (docs.pytorch.org, "CUDA semantics: CUDA Graphs"): parameters have to be changed in place, and gradients, to
    which it adds, zeroed in place. Activations stay reserved for as long as the returned function is kept.

    Args:
        function: takes tensors and returns one; with `parameters` a loss whose `backward` it has called. It must neither
            wait for the device nor touch the random state.
        inputs: tensors of the shapes and types that it will always be given.
        parameters: those that learn. Gradients are zero afterwards, also of one that the loss does not depend on.

    Returns:
        What stands in for `function`. The tensor it returns is overwritten by the next call.
    """
    buffers = [tensor.clone() for tensor in inputs]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    stream = side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose kernels and compilers compile in the first calls
            function(*buffers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be pinning a batch
        result = function(*buffers)
    for parameter in parameters:
        parameter.grad.zero_()

    def replay(*tensors: Tensor) -> Tensor:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return result

    return replay


@functools.cache
def side_stream(device: int) -> torch.cuda.Stream:
    """Return the one stream of a device that graphs are tried out on: libraries keep memory for each they have seen."""
    return torch.cuda.Stream(device)


def replay_predictions(unet: UNet2DConditionModel) -> None:
    """Have a UNet on a CUDA device predict by replaying a graph of itself, where text alone describes a picture.

    The graph is recorded for the first batch, and anew when shapes change. It keeps the memory of a prediction. Weights
    must stay where and as they are: adapters that are switched on or off afterwards go unnoticed.
    """
    forward, shapes, replay = unet.forward, None, None

    def predict(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return forward(sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]

    def replayed(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True, **more):
        nonlocal shapes, replay
        if return_dict or any(value is not None for value in more.values()):  # such as guidance told to an LCM
            return forward(sample, timestep, encoder_hidden_states, return_dict=return_dict, **more)
        inputs = sample, timestep.to(sample.device), encoder_hidden_states
        given = [(tensor.shape, tensor.dtype) for tensor in inputs]
        if given != shapes:
            shapes = replay = None  # gives its memory back first
            replay = capture_graph(predict, inputs)
            shapes = given
        return (replay(*inputs).clone(),)  # solvers keep predictions of earlier steps

    unet.forward = replayed
