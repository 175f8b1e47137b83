"""Layer matching: the meta-network, its exact gradient through virtual SGD steps, and the picture of what it learned.

Yang et al., TPAMI 2023 (arXiv 2207.11518).

symbol       variable       meaning                                                     shape / default
-----------  -------------  ----------------------------------------------------------  ------------------
f_a^l        features       pooled features of student a at stage l                     N tensors [L, B, d_a]
lambda       weights        sigmoid(<unit(W_a^l f_a^l), unit(W_b^m f_b^m)>)              [N, L, N, L, B]
phi          meta_params    the meta-network's parameters W
theta        params         students, branches and embedding MLPs
v            v              momentum buffers of the virtual steps, 0 at first           as theta
K            inner_steps    virtual steps on the contrastive loss; one more follows on the    2
                            task loss, so k = 0 .. K
eta          lr             learning rate of the virtual steps                          0.1, by the schedule
mu           momentum                                                                   0.9
wd           weight_decay                                                               5e-4
"""

import warnings
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.overrides import TorchFunctionMode


class MatchingNetwork(nn.Module):
    """lambda^{l,m}_{a,b}(x) = sigmoid(< unit(W_a^l f_a^l(x)), unit(W_b^m f_b^m(x)) >), in (0.27, 0.73).

    widths: d_a of each student; stages: L. Called with features, a list over students of [L, B, d_a];
    returns weights [N, L, N, L, B], symmetric. The a = b blocks are there and mean nothing.
    """

    def __init__(self, widths, stages, dim=128):
        super().__init__()
        self.projections = nn.ModuleList(nn.ModuleList(nn.Linear(d, dim) for _ in range(stages)) for d in widths)

    def forward(self, features):
        u = torch.stack([torch.stack([W(f_al) for W, f_al in zip(W_a, f_a, strict=True)])
                         for W_a, f_a in zip(self.projections, features, strict=True)])   # [N, L, B, dim]
        with torch.autocast(u.device.type, enabled=False):
            u = F.normalize(u.to(torch.promote_types(u.dtype, torch.float32)), dim=-1)
            return torch.einsum("albd,cmbd->alcmb", u, u).sigmoid()                   # [N, L, N, L, B]


# ---------------------------------------------------------------- the exact hypergradient

@torch.enable_grad()
def hypergradient(inner_loss, outer_loss, params, meta_params, *, inner_steps, lr, momentum, weight_decay,
                  forward_mode=False):
    """d outer_loss(theta_{K+1}) / d phi, the total derivative through K + 1 virtual SGD steps from theta_0 = params:

        v_{k+1} = mu v_k + g_k(theta_k, phi) + wd theta_k,   theta_{k+1} = theta_k - eta v_{k+1},   v_0 = 0

    with g_k what autograd gives as the gradient of inner_loss for k < K = inner_steps, and of outer_loss
    for the last, k = K.

    Reverse recursion. Let a and b be the derivatives of the result for theta_{k+1} and v_{k+1}, taken as
    two separate inputs of the steps after k. But theta_{k+1} contains v_{k+1} with factor -eta, so the
    full derivative for v_{k+1} is

        u = b - eta a.

    v_{k+1} contains g_k, wd theta_k and mu v_k, and theta_{k+1} contains theta_k. With the Jacobian
    J_k = dg_k/dtheta_k (the Hessian, unless the loss holds a part of itself constant) therefore

        dL/dphi     += u^T dg_k/dphi
        dL/dtheta_k  = a + wd u + J_k^T u      (the next a)
        dL/dv_k      = mu u                    (the next b)

    J_k^T u and u^T dg_k/dphi are the gradients of the one scalar X = <g_k(theta_k, phi), u>, u constant.
    For k = 0 only the part for phi is needed. X is also the directional derivative of the loss along u,
    d/deps inner_loss(theta_0 + eps u): with forward_mode=True one forward pass with tangents instead of two
    backward passes. That is right only where phi acts behind the last normalisation layer (PyTorch's forward
    mode takes a batch's statistics for constants when it is differentiated again) and where the loss holds
    things constant by .detach(), not torch.no_grad(), which lets tangents through; as in meta_step.
    (What a loss detaches is constant in both; losses.Towards shows how a constant can still be seen to
    move from one step to the next.)

    Only theta_0 .. theta_K are kept, and each step is recomputed, so the memory is that of one step.

    inner_loss(params), outer_loss(params): take a list of tensors in the order of `params`, return a
    scalar; they reach phi by closure. params are of one dtype and are not changed. Returns one tensor per meta parameter,
    zeros where the loss does not depend on it. Source: arXiv 2207.11518, with momentum and weight decay.
    """
    shapes, sizes = [p.shape for p in params], [p.numel() for p in params]
    flat = lambda tensors: torch.cat([t.detach().reshape(-1) for t in tensors])
    cut = lambda vector: [part.view(shape) for part, shape in zip(vector.split(sizes), shapes)]
    steps = [lambda theta: inner_loss(cut(theta))] * inner_steps + [lambda theta: outer_loss(cut(theta))]

    theta, path = flat(params), []                                        # theta, v, a, b, u: one vector each
    v = torch.zeros_like(theta)
    for loss in steps:
        path.append(theta)
        g, = _gradients(loss, theta)
        v = momentum * v + g + weight_decay * theta
        theta = theta - lr * v

    a, *total = _gradients(steps[-1], theta, meta_params)
    b = torch.zeros_like(a)
    for k in reversed(range(len(steps))):
        u = b - lr * a
        if k == 0 and forward_mode:
            part = _mixed_product(steps[k], path[k], u, meta_params)
        else:
            Ju, *part = _second_order_products(steps[k], path[k], u, meta_params)
            a, b = a + weight_decay * u + Ju, momentum * u
        total = [t + p for t, p in zip(total, part)]
    return total


def _gradients(loss, theta, meta_params=()):
    theta = theta.detach().requires_grad_()
    return _grad(loss(theta), [theta, *meta_params])


def _second_order_products(loss, theta, u, meta_params):
    """J^T u and u^T dg/dphi: the gradients of X = <g, u> by a second backward pass."""
    theta = theta.detach().requires_grad_()
    with CheapSecondDerivatives():
        g, = _grad(loss(theta), [theta], create_graph=True)
    return _grad(g @ u, [theta, *meta_params])


def _mixed_product(loss, theta, u, meta_params):
    """u^T dg/dphi alone: the gradient of X = d/deps loss(theta + eps u), which forward mode gives."""
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")   # PyTorch's own forward mode uses it
        with CheapSecondDerivatives():
            X = forward_ad.unpack_dual(loss(forward_ad.make_dual(theta, u))).tangent
    return _grad(X, meta_params)


def _grad(scalar, inputs, create_graph=False):
    """torch.autograd.grad with zeros for what the scalar does not depend on."""
    if scalar is None or not scalar.requires_grad:
        return [torch.zeros_like(p) for p in inputs]
    return torch.autograd.grad(scalar, inputs, create_graph=create_graph, materialize_grads=True)


# ---------------------------------------------------------------- second derivatives of the two layers that cost
#
# PyTorch differentiates the backward pass of batch normalisation by dozens of operations on the map, and that of a
# convolution's weight by a convolution whose kernel is as large as the map. Below is the same in seven operations on
# the map and in four ordinary convolutions. For y = f(x, w) the backward pass gives gx, gw from g. With hx, hw the
# gradients that arrive for them,
#
#     X = <hx, gx> + <hw, gw> = <g, T>,    T = the derivative of f in the direction (hx, hw),
#
# so X's gradient for g is T, and for x and w it is what a backward pass of T gives.

class CheapSecondDerivatives(TorchFunctionMode):
    """Within it nn.Conv2d with numeric padding and affine nn.BatchNorm without running averages use the functions
    below; all else is PyTorch's. Not for use under autocast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.conv2d and len(args) == 7 and isinstance(args[4], tuple) and args[0].dim() == 4:   # nn.Conv2d's call
            x, w, bias, *geometry = args
            y = Convolution.apply(x, w, *geometry)
            return y if bias is None else y + bias[:, None, None]
        if (func is F.batch_norm and args[1] is None and kwargs["training"]
                and kwargs["weight"] is not None and kwargs["bias"] is not None):
            return BatchNorm.apply(args[0], kwargs["weight"], kwargs["bias"], kwargs["eps"])
        return func(*args, **kwargs)


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
        return *ConvolutionGradient.apply(g, *ctx.saved_tensors, ctx.needs_input_grad[0], *ctx.geometry), *[None] * 4


class ConvolutionGradient(torch.autograd.Function):
    """gx, gw from g. T = conv(hx, w) + conv(x, hw); dX/dx = gx of (g, hw), dX/dw = gw of (g, hx)."""

    @staticmethod
    def forward(ctx, g, x, w, want_gx, *geometry):
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        ctx.want_gx, ctx.geometry = want_gx, geometry
        return _convolution_gradients(g, x, w, want_gx, True, *geometry)

    @staticmethod
    @once_differentiable
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
    return torch.ops.aten.convolution_backward(g, x, w, None, stride, padding, dilation, False, [0, 0], groups,
                                               [want_gx, want_gw, False])[:2]


class BatchNorm(torch.autograd.Function):
    """w x^ + b with x^ = (x - mean) r, r = 1 / sqrt(var + eps), over all axes of x but the second; w, b: [channels]."""

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
        along_x, _, _ = _batch_norm_gradients(dx, x, w, mean, r, [True, False, False])          # w r P dx
        return along_x.add_(torch.native_batch_norm(x, dw, db, None, None, True, 0.0, ctx.eps)[0])     # + dw x^ + db

    @staticmethod
    def backward(ctx, g):
        return *BatchNormGradient.apply(g, *ctx.saved_tensors), None


class BatchNormGradient(torch.autograd.Function):
    """gx, gw, gb from g. With M values per channel and the projection P t = t - mean(t) - x^ mean(t x^), its own adjoint:

    gx = w r P g,  gw = sum(g x^),  gb = sum(g);    T = w r P hx + hw x^ + hb.
    X = w r S + hw gw + hb gb with S = <hx, P g> = <hx, g> - (s gb + p gw) / M,  s = sum(hx), p = sum(hx x^).
    Through x^ and through r, which pass a gradient on as r P(.) and as -r^2 x^ / M:

    dX/dx = r P(e) - w S r^2 x^ / M,    e = dX/dx^ = beta g - alpha hx,  alpha = w r gw / M,  beta = hw - w r p / M.
    """

    @staticmethod
    def forward(ctx, g, x, w, mean, r):
        gx, gw, gb = _batch_norm_gradients(g, x, w, mean, r)
        ctx.save_for_backward(g, x, w, mean, r, gw, gb)
        return gx, gw, gb

    @staticmethod
    @once_differentiable
    def backward(ctx, hx, hw, hb):
        g, x, w, mean, r, gw, gb = ctx.saved_tensors
        M, each = x.numel() / len(w), (-1, *[1] * (x.dim() - 2))          # each: one value a channel
        T, p, s = _batch_norm_gradients(hx, x, w, mean, r)
        _, q, _ = _batch_norm_gradients(hx, g, w, torch.zeros_like(r), torch.ones_like(r), [False, True, False])   # <hx, g>
        wr, hr = w * r, hw * r
        T.addcmul_(x, hr.view(each)).add_(torch.addcmul(hb, hr, mean, value=-1).view(each))

        p_, s_, gw_, gb_ = torch.stack([p, s, gw, gb]) / M
        S = q - s * gb_ - p * gw_
        alpha, beta = wr * gw_, hw - wr * p_
        mean_e, mean_ex = beta * gb_ - alpha * s_, beta * gw_ - alpha * p_
        slope = r * r * (mean_ex + wr * S / M)                            # of -x in dX/dx
        dx = torch.addcmul((slope * mean - r * mean_e).view(each), hx, (r * alpha).view(each), value=-1)
        dx.addcmul_(g, (r * beta).view(each)).addcmul_(x, slope.view(each), value=-1)
        return T, dx, r * S, None, None


def _batch_norm_gradients(g, x, w, mean, r, wanted=(True, True, True)):
    """w r P g, sum(g x^), sum(g)."""
    return torch.ops.aten.native_batch_norm_backward(g, x, w, None, None, mean, r, True, 0.0, wanted)


# ---------------------------------------------------------------- the meta step

def meta_step(students, matching, optimizer, images, contrast, task, *, inner_steps, lr, momentum, weight_decay):
    """One step of the meta-network's optimizer along the exact hypergradient; nothing else keeps a trace.

    students(images) -> (features, embeddings, logits): the module whose parameters are theta; frozen ones stay.
    contrast(embeddings, weights) -> scalar: the loss of the inner virtual steps, L_L-MCL.
    task(logits) -> scalar: the loss of the last virtual step and of the evaluation.
    lr, momentum, weight_decay: of the virtual steps. optimizer: the meta-network's own.

    lambda is computed once, from the features at theta_0 taken as constants, and held; phi acts through
    its values alone. So the hypergradient is taken for these values and handed on to phi by one backward.
    Batch normalisation uses the batch's statistics. Source: arXiv 2207.11518.
    """
    names, params = zip(*((name, p) for name, p in students.named_parameters() if p.requires_grad))

    seeded = not (images.is_cuda and torch.cuda.is_current_stream_capturing())    # a CUDA graph cannot be

    def run(theta):
        if seeded:
            torch.manual_seed(0)                                          # a student's dropout: the same masks each time
        return functional_call(students, dict(zip(names, theta)), (images,))

    with batch_statistics(students), torch.random.fork_rng([images.device] if images.is_cuda else [], enabled=seeded):
        with torch.no_grad():
            features, _, _ = run(params)
        weights = matching(features)                                      # [N, L, N, L, B], a function of phi
        held = weights.detach().requires_grad_()
        grad, = hypergradient(lambda theta: contrast(run(theta)[1], held), lambda theta: task(run(theta)[2]),
                              params, [held], inner_steps=inner_steps, lr=lr, momentum=momentum,
                              weight_decay=weight_decay, forward_mode=True)      # lambda acts on the embeddings
    optimizer.zero_grad()
    weights.backward(grad)
    optimizer.step()


@contextmanager
def batch_statistics(module):
    """Batch normalisation in training mode leaves its running averages alone; it does not use them anyway."""
    tracking = [m for m in module.modules() if getattr(m, "track_running_stats", False)]
    try:
        for m in tracking:
            m.track_running_stats = False
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True


# ---------------------------------------------------------------- the picture

def draw_matching(weights, names, file):
    """A PNG of the mean matching weights: one panel per pair of students, stage by stage, the values written in.

    weights [N, L, N, L], means of lambda over samples; names of the N students; file: a path or a binary file.
    """
    weights, N, L = weights.detach().cpu(), len(names), weights.shape[1]
    pairs = [(a, b) for a in range(N) for b in range(a + 1, N)]
    shown = torch.stack([weights[a, :, b] for a, b in pairs])             # [pairs, L, L]
    low, high = shown.min().item(), shown.max().item()
    cell, left, top, columns = 72, 96, 84, min(3, len(pairs))
    width, height = left + L * cell + 24, top + L * cell + 24
    picture = Image.new("RGB", (max(520, columns * width), 72 + -(-len(pairs) // columns) * height), "white")
    draw = ImageDraw.Draw(picture)
    write = lambda x, y, text, size, fill="black", anchor="mm": draw.text(
        (x, y), text, fill=fill, font=ImageFont.load_default(size), anchor=anchor)
    write(16, 22, "Mean layer-matching weight between stages of two students", 17, anchor="lm")
    write(16, 46, f"0.27: features opposed, 0.5: unrelated, 0.73: alike. Darkest {high:.4f}, lightest {low:.4f}", 13,
          fill="dimgray", anchor="lm")
    for i, ((a, b), block) in enumerate(zip(pairs, shown.tolist())):
        x0, y0 = left + i % columns * width, 72 + top + i // columns * height
        write(x0 + L * cell / 2, y0 - 60, f"rows: {a + 1} {names[a]},  columns: {b + 1} {names[b]}", 13)
        for l in range(L):
            write(x0 - 46, y0 + (l + 0.5) * cell, f"stage {l + 1}", 15)
            write(x0 + (l + 0.5) * cell, y0 - 22, f"stage {l + 1}", 15)
            for m in range(L):
                depth = (block[l][m] - low) / max(high - low, 1e-12)      # 0 lightest, 1 darkest
                box = (x0 + m * cell, y0 + l * cell, x0 + (m + 1) * cell - 3, y0 + (l + 1) * cell - 3)
                draw.rectangle(box, fill=tuple(round(light + depth * (dark - light))
                                               for light, dark in zip((237, 244, 252), (8, 61, 127))))
                write(box[0] + cell / 2 - 2, box[1] + cell / 2 - 2, f"{block[l][m]:.3f}", 16,
                      fill="white" if depth > 0.5 else "black")
    picture.save(file, format="PNG")
