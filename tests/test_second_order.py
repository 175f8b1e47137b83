"""support/second_order.py:
equal to PyTorch's derivatives and to finite differences, used where it says."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from support.second_order import FastSecondDerivatives


def distance(a, b):
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


LAYERS = {
    "convolution": (nn.Conv2d(2, 4, 3, padding=1, bias=False), (3, 2, 5, 5)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 6, 6)),
    "dilated depthwise": (nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3, bias=False),
                          (2, 3, 5, 5)),
    "pointwise": (nn.Conv2d(3, 2, 1, stride=2, bias=False), (2, 3, 4, 4)),
    "batch norm": (nn.BatchNorm2d(3, eps=0.1, track_running_stats=False), (4, 3, 2, 3)),
    "batch norm of vectors": (nn.BatchNorm1d(3, track_running_stats=False), (5, 3)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name,memory_format", [
    *((name, torch.contiguous_format) for name in LAYERS),
    *((name, torch.channels_last) for name, (_, shape) in LAYERS.items() if len(shape) == 4)])
def test_equal_to_pytorch_and_to_finite_differences(name, memory_format):
    """Derivatives of a nonlinear function of the layer, for everything that goes in."""
    layer, shape = LAYERS[name]
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    x = draw(*shape).contiguous(memory_format=memory_format)
    inputs = [t.requires_grad_() for t in (x, *(draw(*p.shape) for p in layer.parameters()))]
    names = [name for name, _ in layer.named_parameters()]
    plain = lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,))

    def fast(*inputs):
        with FastSecondDerivatives():
            return plain(*inputs)

    def derivatives(function):
        y = function(*inputs)
        first = torch.autograd.grad((y ** 3 + y).sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum((f ** 2).sum() for f in first), inputs)]

    used = type(fast(*inputs).grad_fn).__name__  # of this project, not PyTorch's
    assert used in ("ConvolutionBackward", "BatchNormBackward", "AddBackward0")
    assert distance(derivatives(fast), derivatives(plain)) < 1e-12
    assert torch.autograd.gradgradcheck(fast, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(fast, inputs, check_forward_ad=True, check_undefined_grad=False,
                                    fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_third_derivatives_raise(name):
    """For what was saved, too, where no gradient that arrives needs one;
    the second ones stay with create_graph."""
    layer, shape = LAYERS[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64,
                    requires_grad=True)
    layer = layer.double()
    with FastSecondDerivatives():
        first, = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
    constant = torch.ones_like(first)
    plain, = torch.autograd.grad((first * constant).sum(), x, retain_graph=True)
    second, = torch.autograd.grad((first * constant).sum(), x, create_graph=True)
    assert torch.equal(second, plain)
    with pytest.raises(RuntimeError, match="no third derivatives"):
        torch.autograd.grad(second.square().sum(), x)


def test_first_layer_and_calls_that_stay_pytorchs():
    """Images need no gradient.

    Padding by name, batch norms without weight or bias, with running statistics
    or in evaluation mode, and single images are PyTorch's own.
    """
    g = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 5, 5, generator=g, dtype=torch.float64)
    norm = lambda **settings: nn.BatchNorm2d(4, track_running_stats=False, **settings)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(), nn.Conv2d(4, 4, 3, padding="same"),
                        norm(affine=False), norm(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1),
                        nn.BatchNorm2d(2).eval()).double()
    net[4].bias = None
    params = list(net.parameters())
    u = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in params]

    def product():
        first = torch.autograd.grad((net(images) ** 3).sum(), params, create_graph=True)
        return torch.autograd.grad(
            sum((f * u_i).sum() for f, u_i in zip(first, u, strict=True)), params)

    single = nn.Conv2d(3, 4, 3).double()
    exact, expected = product(), single(images[0])
    with FastSecondDerivatives():
        assert distance(product(), exact) < 1e-12 and torch.equal(single(images[0]), expected)


class Gradients(TorchDispatchMode):
    """How many convolutions' backward passes compute the gradient of what goes in."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.count += op is torch.ops.aten.convolution_backward.default and result[0] is not None
        return result


@pytest.mark.parametrize("images_need_one, in_first_pass, in_both", [(False, 1, 2), (True, 2, 5)])
def test_no_gradient_of_images_is_computed(images_need_one, in_first_pass, in_both):
    """It would cost a convolution in each pass, and nothing reads it."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    images = torch.randn(2, 3, 6, 6, requires_grad=images_need_one)
    with FastSecondDerivatives(), Gradients() as computed:
        loss = (net(images) ** 2).sum()
        gradient, = torch.autograd.grad(loss, net[0].weight, create_graph=True)
        assert computed.count == in_first_pass
        (gradient ** 2).sum().backward()
    assert computed.count == in_both


def test_what_pytorch_cannot_differentiate_twice():
    """Hard-sigmoid and normalized zeros have PyTorch's values and first derivatives,
    and second ones."""
    x = torch.tensor([[-4.0, -3, -1, 2], [0, 0, 0, 0], [3, 0, 1, 5]],
                     dtype=torch.float64, requires_grad=True)

    def function(x):
        x = F.hardsigmoid(x) * F.normalize(x[None, None], dim=-1)[0, 0]
        return (x ** 2 + x).sum()

    expected = function(x), *torch.autograd.grad(function(x), x)
    with FastSecondDerivatives():
        value = function(x)
        first, = torch.autograd.grad(value, x, create_graph=True)
        second, = torch.autograd.grad(first.sum(), x)
        # its 1 / 6 is a float32
        torch.testing.assert_close((value, first), expected, rtol=1e-7, atol=0)
    moved, = torch.autograd.grad(function(x + 1e-6), x)
    slope = (moved - expected[1]) / 1e-6
    assert (second.isfinite().all()
            and torch.allclose(second[2, 1:3], slope[2, 1:3], rtol=1e-4, atol=1e-6))
