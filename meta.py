"""Layer matching: the meta-network, its exact gradient through virtual SGD steps, the meta step.

Yang et al., TPAMI 2023 (arXiv 2207.11518).

symbol  variable      meaning                                              shape / default
------  ------------  ---------------------------------------------------  ---------------------
f_a^l   features      pooled features of student a at stage l              N tensors [L, B, d_a]
lambda  matching      sigmoid(<unit(W_a^l f_a^l), unit(W_b^m f_b^m)>)      [N, L, N, L, B]
phi     meta_params   the meta-network's parameters W
theta   params        students, branches and embedding MLPs
v       v             momentum buffers of the virtual steps, 0 at first    as theta
Q       inner_steps   virtual steps on the contrastive loss; one more on   2
                      the task loss follows, so k = 0 .. Q
eta     lr            learning rate of the virtual steps, which are plain  0.1, by the schedule
                      momentum SGD; ordinary and phi's are Nesterov
mu      momentum                                                           0.9
wd      weight_decay                                                       5e-4
"""

import copy
import warnings
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from support import seeds
from support.console import UserError, first_line
from support.second_order import FastSecondDerivatives


class MatchingNetwork(nn.Module):
    """lambda^{l,m}_{a,b}(x) = sigmoid(< unit(W_a^l f_a^l(x)), unit(W_b^m f_b^m(x)) >).

    In (0.27, 0.73).
    widths: d_a of each student; stages: L. Called with features, a list over students of [L, B,
    d_a]; returns lambda [N, L, N, L, B], symmetric. The a = b blocks are there and mean nothing.
    """

    def __init__(self, widths, stages, dim=128):
        super().__init__()
        self.projections = nn.ModuleList(
            nn.ModuleList(nn.Linear(d, dim) for _ in range(stages)) for d in widths)

    def forward(self, features):
        u = []
        for W_a, f_a in zip(self.projections, features, strict=True):
            u.append(torch.stack([W(f_al) for W, f_al in zip(W_a, f_a, strict=True)]))
        u = torch.stack(u)  # [N, L, B, dim]
        with torch.autocast(u.device.type, enabled=False):
            u = F.normalize(u.to(torch.promote_types(u.dtype, torch.float32)), dim=-1)
            return torch.einsum("albd,cmbd->alcmb", u, u).sigmoid()  # [N, L, N, L, B]


# ---------------------------------------------------------------- the exact hypergradient

def hypergradient(inner_loss, outer_loss, params, meta_params, *, inner_steps, lr, momentum,
                  weight_decay, forward_mode=False, average=None):
    """d outer_loss(theta_{Q+1}) / d phi, the total derivative through Q + 1 virtual SGD steps.

    From theta_0 = params, v_0 = 0, and for k = 0 .. Q

        v_{k+1} = mu v_k + g_k(theta_k, phi) + wd theta_k,   theta_{k+1} = theta_k - eta v_{k+1}

    with g_k the gradient that autograd gives, of inner_loss for k < Q = inner_steps and of
    outer_loss for the last step, k = Q.

    Reverse recursion. Let d_theta and d_v be the derivatives of the result for theta_{k+1} and
    v_{k+1}, taken as two separate inputs of the steps after k. But theta_{k+1} contains v_{k+1}
    with factor -eta, so the full derivative for v_{k+1} is

        u = d_v - eta d_theta.

    v_{k+1} contains g_k, wd theta_k and mu v_k, and theta_{k+1} contains theta_k. With the Jacobian
    J_k = dg_k/dtheta_k (the Hessian, unless the loss holds a part of itself constant) therefore

        d_phi   += u^T dg_k/dphi
        d_theta  = d_theta + wd u + J_k^T u    (for theta_k)
        d_v      = mu u                        (for v_k)

    For k = Q the recursion starts from outer_loss(theta_{Q+1})'s own derivatives, as d_theta and
    d_phi, and from d_v = 0.

    J_k^T u and u^T dg_k/dphi are the gradients of the one scalar X = <g_k(theta_k, phi), u>, u
    constant. For k = 0 only the part for phi is needed. X is also the directional derivative of
    the loss along u, d/deps inner_loss(theta_0 + eps u): with forward_mode=True one forward pass
    with tangents replaces two backward passes. That is right where phi acts behind the last
    normalisation layer. In front of one it may be wrong: PyTorch's forward mode, differentiated
    again, takes the statistics of some for constants. And it is right where the loss holds things
    constant by .detach(), not by torch.no_grad(), which lets tangents through. Both hold in
    meta_step. What a loss detaches is constant in both modes; losses.py shows how a constant can
    still be seen to move from one step to the next.

    Only theta_0 .. theta_Q are kept, and each step is computed again, so the memory is that of
    one step.

    Several processes. inner_loss and outer_loss are this process's own, on its part of the batch;
    the losses of the formulas are their means over processes. average(vector) returns the mean
    over processes of a flat vector. It is called 2Q + 4 times (2Q + 3 with forward_mode): for
    g_k, the first d_theta, J_k^T u, and the result. So theta_k, d_theta, d_v and u are the same
    everywhere. The g_k inside X is this process's own: differentiation is linear, so the mean of
    the derivatives of the local X is the derivative of the mean X. An average inside X would put
    a collective call into the graph and count other processes' derivatives as constants.

    params, meta_params: tensors, in any iterable. inner_loss(params), outer_loss(params): take a
    list of tensors in the order of `params`, return a scalar; they reach phi by closure. params
    have one dtype and do not change. Returns one tensor for each meta parameter, zeros where the
    loss does not depend on it. Source: arXiv 2207.11518, with momentum and weight decay.
    """
    params, meta_params = list(params), list(meta_params)
    local = _local_hypergradient(inner_loss, outer_loss, params, meta_params, inner_steps, lr,
                                 momentum, weight_decay, forward_mode, average)
    return _mean(local, meta_params, average)


@torch.enable_grad()
def _local_hypergradient(inner_loss, outer_loss, params, meta_params, inner_steps, lr, momentum,
                         weight_decay, forward_mode, average):
    """This process's part of the hypergradient, which is the mean of all processes' parts."""
    flat = FlatVector(params)
    mean = average or (lambda vector: vector)
    inner = lambda theta: inner_loss(flat.views(theta))
    outer = lambda theta: outer_loss(flat.views(theta))
    losses = [inner] * inner_steps + [outer]

    theta, trajectory = flat.concatenate(params), []  # theta, v, d_theta, d_v, u: one vector each
    v = torch.zeros_like(theta)
    for loss in losses:
        trajectory.append(theta)
        g, = _gradients(loss, theta)
        v = momentum * v + mean(g) + weight_decay * theta
        theta = theta - lr * v

    d_theta, *d_phi = _gradients(losses[-1], theta, meta_params)
    d_theta = mean(d_theta)
    d_v = torch.zeros_like(d_theta)
    for k in reversed(range(len(losses))):
        u = d_v - lr * d_theta
        if k == 0 and forward_mode:
            through_g = _mixed_product(losses[k], trajectory[k], u, meta_params)
        else:
            JTu, *through_g = _second_order_products(losses[k], trajectory[k], u, meta_params)
            d_theta = d_theta + weight_decay * u + mean(JTu)
            d_v = momentum * u
        d_phi = [d + more for d, more in zip(d_phi, through_g, strict=True)]
    return d_phi


def _gradients(loss, theta, meta_params=()):
    theta = theta.detach().requires_grad_()
    return _grad(loss(theta), [theta, *meta_params])


def _second_order_products(loss, theta, u, meta_params):
    """J^T u and u^T dg/dphi: the gradients of X = <g, u> by a second backward pass."""
    theta = theta.detach().requires_grad_()
    with FastSecondDerivatives():
        g, = _grad(loss(theta), [theta], create_graph=True)
    return _grad(g @ u, [theta, *meta_params])


def _mixed_product(loss, theta, u, meta_params):
    """u^T dg/dphi alone: the gradient of X = d/deps loss(theta + eps u), given by forward mode."""
    with forward_ad.dual_level(), warnings.catch_warnings():
        # PyTorch's own forward mode uses it
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        with FastSecondDerivatives():
            X = forward_ad.unpack_dual(loss(forward_ad.make_dual(theta, u))).tangent
    return _grad(X, meta_params)


def _grad(scalar, inputs, create_graph=False):
    """torch.autograd.grad with zeros for what the scalar does not depend on."""
    if scalar is None or not scalar.requires_grad:
        return [torch.zeros_like(p) for p in inputs]
    return torch.autograd.grad(scalar, inputs, create_graph=create_graph, materialize_grads=True)


class FlatVector:
    """Tensors as one vector and back. The views have the shapes and strides of `params`.

    Each part starts at a multiple of ALIGNMENT numbers, with zeros in the gaps: cuDNN's fast
    kernels want 16 bytes. Each tensor goes in and out in the order of its parameter's memory: a
    channels_last weight cut out as NCHW would be converted again by every convolution.
    """

    ALIGNMENT = 4

    def __init__(self, params):
        params = list(params)
        self.sizes, self.places = [], []  # of the vector's parts; which of them are tensors
        self.gaps = [-p.numel() % self.ALIGNMENT for p in params]  # behind each tensor
        for p, gap in zip(params, self.gaps, strict=True):
            self.places.append(len(self.sizes))
            self.sizes += [p.numel(), gap] if gap else [p.numel()]
        self.orders, self.shapes, self.inverses = [], [], []
        for p in params:
            order = sorted(range(p.dim()), key=lambda axis: (-p.stride(axis), -p.shape[axis]))
            inverse = [order.index(axis) for axis in range(p.dim())]
            self.orders.append(order)
            self.shapes.append([p.shape[axis] for axis in order])
            self.inverses.append(inverse if order != sorted(order) else None)

    def concatenate(self, tensors):
        parts, gaps = [], {}
        for t, order, gap in zip(tensors, self.orders, self.gaps, strict=True):
            parts.append(t.detach().permute(order).reshape(-1))
            if gap:
                if gap not in gaps:
                    gaps[gap] = t.new_zeros(gap)
                parts.append(gaps[gap])
        return torch.cat(parts)

    def views(self, vector):
        views, parts = [], vector.split(self.sizes)
        parts = [parts[place] for place in self.places]
        for part, shape, inverse in zip(parts, self.shapes, self.inverses, strict=True):
            view = part.view(shape)
            views.append(view.permute(inverse) if inverse else view)
        return views


def _mean(tensors, params, average):
    """The means over processes of tensors shaped as `params`: one average of one flat vector."""
    if average is None:
        return list(tensors)
    flat = FlatVector(params)
    return flat.views(average(flat.concatenate(tensors)))


def average_gradients(module, average):
    """Each parameter's gradient becomes its mean over processes; average as in hypergradient."""
    params = [p for p in module.parameters() if p.grad is not None]
    for p, grad in zip(params, _mean([p.grad for p in params], params, average), strict=True):
        p.grad = grad


# ---------------------------------------------------------------- the meta step

def meta_step(students, matching_network, optimizer, images, inner_loss, outer_loss, *, inner_steps,
              lr, momentum, weight_decay, average=None, moving=False, forward_mode=True):
    """One step of the meta-network's optimizer along the exact hypergradient.

    Nothing else keeps a trace.
    students(images) -> (features, embeddings, logits): the module whose parameters are theta;
    frozen ones stay. inner_loss(embeddings, matching) -> scalar: of the virtual steps, the
    contrastive loss. outer_loss(logits) -> scalar: of the last virtual step and of the
    evaluation, the task's loss. lr, momentum, weight_decay: of the virtual steps. optimizer: the
    meta-network's own. average: as in hypergradient; images and losses are then this process's
    own.

    lambda is held: it is computed once, from the features at theta_0 taken as constants, and stays
    the same for all virtual steps, as it is constant in the ordinary step. g_k depends on phi by
    one road only, the values of lambda. So the recursion gives the derivative for these values,
    and one backward pass takes it on to phi. Each process has its own samples and so its own
    values: averages are taken of phi's gradient, never of lambda's.

    With moving=True, the published process, lambda = lambda(phi, features(theta_k)) in each
    virtual step. g_k then contains what the students gain by changing lambda through their
    features, and depends on phi by two roads, the values of lambda and their derivative for theta.
    The recursion is the same, with phi's parameters as meta_params. In both, phi acts behind the
    last normalisation layer, so the first step goes by forward mode, unless a layer lacks it
    (forward_mode=False).

    Batch normalisation uses the batch's statistics; dropout has the same masks in every pass; any
    other buffer that a forward pass moves has its present value at the start of each.
    Source: arXiv 2207.11518.
    """
    params = {name: p for name, p in students.named_parameters() if p.requires_grad}
    # a CUDA graph seeds no generator
    capturing = images.is_cuda and torch.cuda.is_current_stream_capturing()
    moved = buffers_in_training(students)

    def forward(theta):
        if not capturing:
            seeds.seed_own(0, images.device)
        tensors = dict(zip(params, theta, strict=True))
        tensors |= {name: b.clone() for name, b in moved.items()}
        return functional_call(students, tensors, (images,))

    def hypergradient_for(meta_params, matching):
        def inner(theta):
            features, embeddings, _ = forward(theta)
            return inner_loss(embeddings, matching(features))

        return _local_hypergradient(
            inner, lambda theta: outer_loss(forward(theta)[2]), list(params.values()), meta_params,
            inner_steps, lr, momentum, weight_decay, forward_mode, average)

    devices = [images.device] if images.is_cuda else []
    same_dropout = torch.random.fork_rng(devices, enabled=not capturing)
    with batch_statistics(students), no_tf32(), same_dropout, sdpa_kernel(SDPBackend.MATH):
        optimizer.zero_grad()
        if moving:
            phi = [p for p in matching_network.parameters() if p.requires_grad]
            for p, d_p in zip(phi, hypergradient_for(phi, matching_network), strict=True):
                p.grad = d_p
        else:
            with torch.no_grad():
                features, _, _ = forward(params.values())
            matching = matching_network(features)  # [N, L, N, L, B], a function of phi
            values = matching.detach().requires_grad_()  # [N, L, N, L, B], a leaf
            d_values, = hypergradient_for([values], lambda features: values)
            matching.backward(d_values)
    average_gradients(matching_network, average)
    optimizer.step()


def buffers_in_training(module):
    """The buffers that a forward pass in training may move, by name; not batch normalisation's."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    theirs = {id(b) for m in norms for b in m.buffers(recurse=False)}
    return {name: b for name, b in module.named_buffers() if id(b) not in theirs}


@contextmanager
def batch_statistics(module):
    """In training, batch normalisation leaves its running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [m for m in norms if m.track_running_stats]
    try:
        for m in tracking:
            m.track_running_stats = False
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True


@contextmanager
def no_tf32():
    """CUDA computes in full float32: TF32 takes most digits of an early hypergradient."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


# ---------------------------------------------------------------- the trial before the first step

class DerivativeTrial:
    """Tries on a part of a student what the meta step does. Raises UserError where that fails.

    trial(title, module, x), x what goes into the part; models.Cohort.check calls it. On a copy in
    training mode, in float64 where the part can: two backward passes must go, and the gradient at
    parameters that the part is called with, as in a virtual step, must be the one at the same
    parameters put into it. So it finds layers without a second derivative, and code that runs in
    the backward pass and sees other parameters there (activation checkpointing).

    forward_mode: whether forward mode gave the directional derivative in all parts.
    """

    def __init__(self):
        self.forward_mode = True

    def __call__(self, title, module, x):
        fork = torch.random.fork_rng([x.device] if x.is_cuda else [])
        with fork, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            part = CalledPart(module, x)
            with batch_statistics(part.module):
                if trouble := part.second_derivative_fails():
                    raise UserError(f"{title} cannot be differentiated twice, as the meta step "
                                    f"wants ({trouble}): use other layers, or --matching uniform")
                self.forward_mode = self.forward_mode and part.has_tangent()
                if part.computes_elsewhere():
                    raise UserError(f"{title} computes in the backward pass, as activation "
                                    "checkpointing does, where it does not see the meta step's "
                                    "parameters: leave that out, or --matching uniform")


class CalledPart:
    """A copy of a module on random inputs, its loss a function of one vector.

    The vector: parameters and inputs.
    """

    def __init__(self, module, x):
        self.module = copy.deepcopy(module).train()
        dtype = torch.float64 if runs_in_double(self.module, x) else x.dtype
        self.module.to(dtype)
        self.params = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.buffers = buffers_in_training(self.module)
        generator = torch.Generator().manual_seed(0)
        draw = lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(
            t.device, dtype)
        inputs = [*self.params.values(), draw(x)]
        self.flat = FlatVector(inputs)
        self.theta = self.flat.concatenate(inputs)
        self.u = draw(self.theta)  # a direction
        with torch.no_grad():
            self.target = draw(self.call(self.theta))

    def call(self, theta):
        *values, x = self.flat.views(theta)
        tensors = dict(zip(self.params, values, strict=True))
        tensors |= {name: b.clone() for name, b in self.buffers.items()}
        seeds.seed_own(0, x.device)
        return functional_call(self.module, tensors, (x.clone(),))  # it may work in place

    def loss(self, theta):
        """Not linear in the output, so that what arrives there in the backward pass moves, too."""
        return (self.call(theta) + self.target).square().sum()

    def second_derivative_fails(self):
        """Why, in words, or nothing."""
        theta = self.theta.clone().requires_grad_()
        try:
            with FastSecondDerivatives():
                g, = _grad(self.loss(theta), [theta], create_graph=True)
            second, = _grad(g @ self.u, [theta])
        except Exception as error:  # a user's layer raises what it likes
            return first_line(error)
        # once_differentiable's node raises when it is reached, but nothing leads on from it
        if any(node.name().endswith("Error") for node in nodes(g)):
            return "a layer is marked with once_differentiable"
        return None if second.isfinite().all() else "it is NaN or infinite"

    def has_tangent(self):
        """Whether forward mode gives the derivative of the loss along u."""
        try:
            with forward_ad.dual_level(), warnings.catch_warnings(), FastSecondDerivatives():
                warnings.simplefilter("ignore")
                dual = self.loss(forward_ad.make_dual(self.theta, self.u))
                tangent = forward_ad.unpack_dual(dual).tangent
        except Exception:  # a layer lacks it
            return False
        g, = _gradients(self.loss, self.theta)
        exact = g @ self.u
        return tangent is not None and bool((tangent - exact).abs() <= 1e-3 * (1 + exact.abs()))

    def computes_elsewhere(self):
        """Whether the gradient at other parameters is another one once these are in the module."""
        moved = self.theta + 0.1 * self.theta.abs().mean() * self.u
        called, = _gradients(self.loss, moved)
        *values, x = self.flat.views(moved)
        with torch.no_grad():
            for p, value in zip(self.params.values(), values, strict=True):
                p.copy_(value)
        x = x.detach().requires_grad_()
        seeds.seed_own(0, x.device)
        loss = (self.module(x.clone()) + self.target).square().sum()
        inside = self.flat.concatenate(_grad(loss, [*self.params.values(), x]))
        return bool((called - inside).norm() > 1e-3 * called.norm())


def nodes(tensor):
    """The nodes of a tensor's graph."""
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return found


def runs_in_double(module, x):
    try:
        with torch.no_grad():
            copy.deepcopy(module).double()(x.double())
    except Exception:  # a user's layer may make float32 tensors of its own
        return False
    return True
