"""Products with frozen weights: PyTorch's own numbers and gradients, by oneDNN where that is quicker."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils import linear
from utils.linear import FrozenLinear, FrozenProduct, LowRankProduct, product, use_frozen_products
from utils.lora import FusedLinear, add_lora
from utils.pipeline import load_base

LAYOUTS = {
    "vector": lambda: torch.randn(16),
    "matrix": lambda: torch.randn(5, 16),
    "three axes": lambda: torch.randn(2, 3, 16),
    "turned": lambda: torch.randn(16, 5).t(),
    "axes swapped": lambda: torch.randn(3, 2, 16).transpose(0, 1),
    "every other row": lambda: torch.randn(6, 16)[::2],
    "a part of each row": lambda: torch.randn(5, 40)[:, 7:23],
    "one row repeated": lambda: torch.randn(1, 16).expand(5, 16),
    "one number repeated": lambda: torch.randn(1, 1).expand(5, 16),
    "no rows": lambda: torch.randn(0, 16),
}


class Calls(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def by_onednn(self) -> bool:
        return any("mkldnn" in name for name in self.names)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_products_are_pytorchs_in_any_layout(layout: str, has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, bias = LAYOUTS[layout]().to(dtype), torch.randn(8).to(dtype) if has_bias else None
    for weight in (
        torch.randn(8, 16).to(dtype),
        torch.randn(16, 8).to(dtype).t(),
        torch.randn(8, 32).to(dtype)[:, ::2],
    ):
        result = product(x, weight, bias)
        assert (result.dtype, result.shape) == (dtype, (*x.shape[:-1], 8))
        torch.testing.assert_close(result, F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"), [(64, 16, 16), (77, 32, 64), (1, 64, 16), (256, 320, 320)]
)
def test_a_row_gives_the_same_wherever_it_stands(rows: int, in_features: int, out_features: int) -> None:
    """An image is the same beside other images in a batch, to the byte."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, rows, in_features), torch.randn(out_features, in_features)
    assert torch.equal(product(x.flip(0), weight).flip(0), product(x, weight))


@pytest.mark.skipif(not linear.BY_ONEDNN, reason="a PyTorch whose oneDNN is not taken")
def test_onednn_computes_in_fp32_and_is_left_out_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(5, 16), torch.randn(8, 16)
    with Calls() as calls:
        product(x, weight)
    assert calls.by_onednn
    with Calls() as calls:
        product(x.double(), weight.double())
    assert not calls.by_onednn
    monkeypatch.setattr(linear, "BY_ONEDNN", False)
    with Calls() as calls:
        product(x, weight)
    assert not calls.by_onednn


def test_the_gradient_of_a_frozen_product_reaches_its_input_alone() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 16, requires_grad=True), torch.randn(8, 16), torch.randn(8)
    scale = torch.randn(2, 5, 8)
    (F.linear(x, weight, bias) * scale).sum().backward()
    expected, x.grad = x.grad, None
    (FrozenProduct.apply(x, weight, bias) * scale).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    x.grad = None
    FrozenProduct.apply(x, weight, bias).sum().backward()  # whose gradient is one number, repeated
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("learns", ["x, A and B", "A and B"])
def test_low_rank_products_have_the_gradients_of_their_formula(has_bias: bool, learns: str) -> None:
    torch.manual_seed(0)
    options = dict(dtype=torch.float64)
    x = torch.randn(5, 6, **options, requires_grad="x" in learns)
    weight, bias = torch.randn(4, 6, **options), torch.randn(4, **options) if has_bias else None
    a, b = torch.randn(3, 6, **options, requires_grad=True), torch.randn(4, 3, **options, requires_grad=True)

    def formula(x, weight, bias, a, b, scaling):
        return F.linear(x, weight, bias) + scaling * x @ a.t() @ b.t()

    inputs = (x, weight, bias, a, b, 0.7)
    torch.testing.assert_close(LowRankProduct.apply(*inputs), formula(*inputs))
    assert torch.autograd.gradcheck(LowRankProduct.apply, inputs)


def test_layers_that_do_not_learn_are_changed_and_no_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 8), nn.Conv2d(1, 1, 1))
    model[0].requires_grad_(False)
    x = torch.randn(5, 16)
    expected = model[:3](x)
    names = list(model.state_dict())
    use_frozen_products(model)
    assert [type(layer) for layer in model] == [FrozenLinear, nn.SiLU, nn.Linear, nn.Conv2d]
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model[:3](x), expected)


def test_adapted_layers_keep_their_product_over_a_frozen_one(tiny_base: Path) -> None:
    """As train_lora.py has them on a CPU."""
    base = load_base(str(tiny_base))
    add_lora(base.unet, 4, 4, seed=0)
    use_frozen_products(base.unet)
    layer = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert (type(layer), type(layer.base_layer)) == (FusedLinear, FrozenLinear)
    x = torch.randn(2, 5, layer.in_features)
    with Calls() as calls:
        result = layer(x)
    assert sum("_linear_pointwise" in name for name in calls.names) == linear.BY_ONEDNN
    assert any("addmm_" in name for name in calls.names)
    assert not any("mul" in name for name in calls.names), "as peft scales the update"
    torch.testing.assert_close(result, F.linear(x, layer.weight, layer.bias))  # B is zero at first


def test_a_layer_that_is_told_to_learn_again_learns() -> None:
    layer = nn.Linear(16, 8).requires_grad_(False)
    use_frozen_products(layer)
    layer.requires_grad_(True)
    layer(torch.randn(5, 16)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_autocast_and_compilers_see_an_ordinary_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8).requires_grad_(False)
    x = torch.randn(5, 16, requires_grad=True)
    expected = layer(x)
    use_frozen_products(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))
