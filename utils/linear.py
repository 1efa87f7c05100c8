"""Products with weights that stay as they are: of frozen layers, and of frozen layers with a low-rank update.

On a CPU they are oneDNN's in fp32, too, as PyTorch's convolutions and its products in bf16 are, from PyTorch 2.12 on.
PyTorch itself takes MKL's there, which leave half of a processor's AVX-512 unused that is not Intel's (RESULTS.md,
training).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

# Before 2.12 (oneDNN 3.11) what a row gave depended on its place among the others, where a processor has no AVX-512
BY_ONEDNN = torch.backends.mkldnn.is_available() and torch.__version__ >= "2.12"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b as `torch.nn.functional.linear` does, but without gradients.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features] of x's type, in any order of its elements.
        bias: [out_features] or None.
    """
    if BY_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # as compiled models call it
    return F.linear(x, weight, bias)


class FrozenProduct(Function):
    """`product` with a gradient for x alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.t()), None, None


class LowRankProduct(Function):
    """W x + b + s B (A x) with gradients for x, A and B (Hu et al. 2021, arXiv:2106.09685, equation 3).

    The update is added to W x by the product with B itself, and so is its part of the gradient of x.

    Takes x [N, in_features], W [out_features, in_features], b [out_features] or None, A [rank, in_features],
    B [out_features, rank] and s, a number; x, W and b of one type, in which all is computed. The gradients of A and B
    are of the types of A and B. Returns [N, out_features].
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        down = x @ a.to(x.dtype).t()
        ctx.save_for_backward(x, weight, a, b, down)
        ctx.scaling = scaling
        return product(x, weight, bias).addmm_(down, b.to(x.dtype).t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, a, b, down = ctx.saved_tensors
        of_down = (gradient @ b.to(x.dtype)).mul_(ctx.scaling)  # [N, rank]
        of_a = of_down.t() @ x
        of_b = (gradient.t() @ down).mul_(ctx.scaling)
        of_x = product(gradient, weight.t()).addmm_(of_down, a.to(x.dtype)) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_a.to(a.dtype), of_b.to(b.dtype), None


def low_rank_product(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return what `LowRankProduct` computes, and with its gradients, also where it is compiled.

    There by operations that autograd knows: PyTorch 2.11 compiles the function without the gradients of A and B and
    says nothing, and what is compiled is fused anyway.
    """
    if torch.compiler.is_compiling():
        down = x @ a.to(x.dtype).t()
        return torch.addmm(F.linear(x, weight, bias), down, b.to(x.dtype).t(), alpha=scaling)
    return LowRankProduct.apply(x, weight, bias, a, b, scaling)


class FrozenLinear(nn.Linear):
    """A linear layer that does not learn."""

    def forward(self, x: Tensor) -> Tensor:
        by_pytorch = self.weight.requires_grad or torch.compiler.is_compiling()
        if by_pytorch or torch.is_autocast_enabled(x.device.type):  # which casts arguments
            return super().forward(x)
        return FrozenProduct.apply(x, self.weight, self.bias)


def use_frozen_products(*models: nn.Module) -> None:
    """Have all linear layers of models that do not learn compute by `product`, also those under adapters."""
    for module in (module for model in models for module in model.modules()):
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.__class__ = FrozenLinear
