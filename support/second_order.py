"""Second derivatives of convolution and batch normalisation in a few operations.

Needs torch alone; copy it as it is.

    with FastSecondDerivatives():               # the forward pass and the first backward pass
        gradient, = torch.autograd.grad(loss(theta), [theta], create_graph=True)
    torch.autograd.grad(gradient @ u, [theta])  # the second one uses the formulas below

Values and derivatives are PyTorch's up to rounding: leaving the mode out changes speed and memory
only, but for F.hardsigmoid and F.normalize, see the next paragraph. PyTorch differentiates the
backward pass of batch normalisation by dozens of operations on the feature map, and that of a
convolution's weight by a convolution whose kernel is as large as the map. Here the same takes seven
operations on the map, and four ordinary convolutions.

Covered: nn.Conv2d on a batch with padding given in numbers; nn.BatchNorm with weight and bias that
normalises by the batch's statistics and tracks none (running_mean is None or track_running_stats is
False). Forward mode (jvp) too. PyTorch has no second derivative of F.hardsigmoid, which MobileNetV3
uses, and that of F.normalize is NaN for vectors of zeros, which Swin v2 has as keys
[B, heads, n, d] of padded positions: here both have one, F.normalize in four dimensions.
All else stays PyTorch's: padding by name, single images, evaluation mode, running statistics, no
weight or bias. Third derivatives raise a RuntimeError. Not for use under autocast.

Derivation. The backward pass of y = f(x, w) gives gx, gw from g = dL/dy. Let hx, hw be the
gradients that arrive for gx, gw, and T the derivative of f in the direction (hx, hw). Then

    X = <hx, gx> + <hw, gw> = <g, T>,

so the gradient of X for g is T, and that for x and w is what a backward pass of T gives.
"""

import functools

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class FastSecondDerivatives(TorchFunctionMode):
    """Inside `with FastSecondDerivatives():` the functions below stand in for PyTorch's.

    Which calls: the module's docstring names them.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        of_module = func is F.conv2d and len(args) == 7  # nn.Conv2d's call
        if of_module and isinstance(args[4], tuple) and args[0].dim() == 4:  # numeric padding
            x, w, bias, *geometry = args
            y = Convolution.apply(x, w, *geometry)
            return y if bias is None else y + bias[:, None, None]
        if (func is F.batch_norm and args[1] is None and kwargs["training"]
                and kwargs["weight"] is not None and kwargs["bias"] is not None):
            return BatchNorm.apply(args[0], kwargs["weight"], kwargs["bias"], kwargs["eps"])
        if func is F.normalize and args[0].dim() == 4 and kwargs.get("out") is None:
            return normalize(*args, **kwargs)
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return func(*args, **kwargs)


class Refuse(torch.autograd.Function):
    """Its outputs are its inputs after the first, which needs a gradient.

    A backward pass raises RuntimeError.
    """

    @staticmethod
    def forward(ctx, reason, *tensors):
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("FastSecondDerivatives has no third derivatives: "
                           "leave the mode out for them")


def no_third_derivatives(backward):
    """A second backward pass, whose results raise where they are differentiated again.

    torch.autograd.function.once_differentiable sees gradients that arrive, not the saved tensors.
    """
    @functools.wraps(backward)
    def second(ctx, *arriving):
        with torch.no_grad():
            results = list(backward(ctx, *arriving))
        needing = [t for t in (*arriving, *ctx.saved_tensors) if t is not None and t.requires_grad]
        if torch.is_grad_enabled() and needing:  # create_graph=True
            found = [i for i, t in enumerate(results) if t is not None]
            refusing = Refuse.apply(needing[0], *(results[i] for i in found))
            for i, t in zip(found, refusing, strict=True):
                results[i] = t
        return tuple(results)

    return second


def normalize(x, p=2.0, dim=1, eps=1e-12, out=None):
    """F.normalize(x, p, dim, eps), which is x / eps in a neighbourhood of 0."""
    is_zero = (x == 0).all(dim, keepdim=True)
    return torch.where(is_zero, x / eps, F.normalize(torch.where(is_zero, 1, x), p, dim, eps))


class Convolution(torch.autograd.Function):
    """F.conv2d(x, w, None, stride, padding, dilation, groups)."""

    @staticmethod
    def forward(ctx, x, w, *geometry):
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)
        ctx.geometry = geometry
        return F.conv2d(x, w, None, *geometry)

    @staticmethod
    def jvp(ctx, dx, dw, *_):
        x, w = ctx.saved_tensors
        return F.conv2d(dx, w, None, *ctx.geometry) + F.conv2d(x, dw, None, *ctx.geometry)

    @staticmethod
    def backward(ctx, g):
        want_gx = ctx.needs_input_grad[0]
        gradients = ConvolutionGradient.apply(g, *ctx.saved_tensors, want_gx, *ctx.geometry)
        return *gradients, *[None] * 4


class ConvolutionGradient(torch.autograd.Function):
    """gx, gw from g.

    T = conv(hx, w) + conv(x, hw);  dX/dx = gx of (g, hw),  dX/dw = gw of (g, hx).
    """

    @staticmethod
    def forward(ctx, g, x, w, want_gx, *geometry):
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        ctx.want_gx, ctx.geometry = want_gx, geometry
        return _convolution_gradients(g, x, w, want_gx, True, *geometry)

    @staticmethod
    @no_third_derivatives
    def backward(ctx, hx, hw):
        g, x, w = ctx.saved_tensors
        T = dx = dw = None
        if hw is not None:
            T = F.conv2d(x, hw, None, *ctx.geometry)
            if ctx.want_gx:
                dx, _ = _convolution_gradients(g, x, hw, True, False, *ctx.geometry)
        if hx is not None:
            T = F.conv2d(hx, w, None, *ctx.geometry) + (0 if T is None else T)
            _, dw = _convolution_gradients(g, hx, w, False, True, *ctx.geometry)
        return T, dx, dw, *[None] * 5


def _convolution_gradients(g, x, w, want_gx, want_gw, stride, padding, dilation, groups):
    return torch.ops.aten.convolution_backward(
        g, x, w, None, stride, padding, dilation, False, [0, 0], groups,
        [want_gx, want_gw, False])[:2]


class BatchNorm(torch.autograd.Function):
    """w x^ + b with x^ = (x - mean) r, r = 1 / sqrt(var + eps).

    Over all axes of x but the second; w, b: [channels].
    """

    @staticmethod
    def forward(ctx, x, w, b, eps):
        y, mean, r = torch.native_batch_norm(x, w, b, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, w, mean, r)
        ctx.save_for_forward(x, w, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def jvp(ctx, dx, dw, db, _):
        x, w, mean, r = ctx.saved_tensors
        along_x, _, _ = _batch_norm_gradients(dx, x, w, mean, r, [True, False, False])  # w r P dx
        along_wb, _, _ = torch.native_batch_norm(x, dw, db, None, None, True, 0.0, ctx.eps)
        return along_x.add_(along_wb)  # + dw x^ + db

    @staticmethod
    def backward(ctx, g):
        return *BatchNormGradient.apply(g, *ctx.saved_tensors), None


class BatchNormGradient(torch.autograd.Function):
    """gx, gw, gb from g.

    M values a channel; the projection P t = t - mean(t) - x^ mean(t x^) is its own adjoint:

    gx = w r P g,  gw = sum(g x^),  gb = sum(g);    T = w r P hx + hw x^ + hb.
    X = w r S + hw gw + hb gb  with  S = <hx, P g> = q - (s gb + p gw) / M,
        q = sum(hx g),  s = sum(hx),  p = sum(hx x^).
    Through x^ and through r, which pass a gradient on as r P(.) and as -r^2 x^ / M:

    dX/dx = r P(e) - w S r^2 x^ / M,    e = dX/dx^ = beta g - alpha hx,
        alpha = w r gw / M,  beta = hw - w r p / M.
    """

    @staticmethod
    def forward(ctx, g, x, w, mean, r):
        gx, gw, gb = _batch_norm_gradients(g, x, w, mean, r)
        ctx.save_for_backward(g, x, w, mean, r, gw, gb)
        return gx, gw, gb

    @staticmethod
    @no_third_derivatives
    def backward(ctx, hx, hw, hb):
        g, x, w, mean, r, gw, gb = ctx.saved_tensors
        M, each = x.numel() / len(w), (-1, *[1] * (x.dim() - 2))  # each: one value a channel
        T, p, s = _batch_norm_gradients(hx, x, w, mean, r)
        zeros, ones = torch.zeros_like(r), torch.ones_like(r)
        # q = sum(hx g)
        _, q, _ = _batch_norm_gradients(hx, g, w, zeros, ones, [False, True, False])
        wr, hr = w * r, hw * r
        T.addcmul_(x, hr.view(each)).add_(torch.addcmul(hb, hr, mean, value=-1).view(each))

        means = torch.stack([s, p, gb, gw]) / M  # of hx, hx x^, g, g x^
        s_, p_, gb_, gw_ = means
        S = q.addcmul(s, gb_, value=-1).addcmul_(p, gw_, value=-1)
        alpha, beta = wr * gw_, torch.addcmul(hw, wr, p_, value=-1)
        mean_e, mean_ex = (beta * means[2:]).addcmul_(alpha, means[:2], value=-1)  # of e, e x^
        slope = torch.addcmul(mean_ex, wr, S, value=1 / M).mul_(r * r)  # of -x in dX/dx
        of_hx, of_g, of_e = torch.stack([alpha, beta, mean_e]) * r
        dx = torch.addcmul((slope * mean - of_e).view(each), hx, of_hx.view(each), value=-1)
        dx.addcmul_(g, of_g.view(each)).addcmul_(x, slope.view(each), value=-1)
        return T, dx, r * S, None, None


def _batch_norm_gradients(g, x, w, mean, r, wanted=(True, True, True)):
    """w r P g, sum(g x^), sum(g)."""
    return torch.ops.aten.native_batch_norm_backward(
        g, x, w, None, None, mean, r, True, 0.0, wanted)
