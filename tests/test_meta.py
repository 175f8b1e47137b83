"""meta.py: the hypergradient by independent roads, one and several processes;
the meta step; the picture."""

import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageChops
from torchvision.models import convnext, efficientnet, mobilenetv2, mobilenetv3, regnet
from torchvision.models import swin_transformer as swin
from torchvision.ops import Permute

import meta
import models
from conftest import bits
from support.console import UserError
from support.picture import matching_picture

HYPER = dict(lr=0.1, momentum=0.9, weight_decay=0.05)


def problem(seed=0, rows=slice(None)):
    """A small net whose inner loss is weighted per sample by phi, in float64;
    rows: the samples it sees."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    X, Y, W = draw(8, 3), draw(8, 2), draw(2, 4)
    params, phi = [draw(4, 3), draw(2, 4)], [draw(3).requires_grad_(), draw(2).requires_grad_()]
    X, Y = X[rows], Y[rows]
    net = lambda p: torch.tanh(X @ p[0].T) @ p[1].T
    weight = lambda: torch.sigmoid(X @ phi[0])
    fit = lambda p: (weight() * ((net(p) - Y) ** 2).sum(1)).mean()
    inner = lambda p: fit(p) + (phi[1] * (W * p[1]).sum(1)).sum().tanh()
    outer = lambda p: ((net(p) - Y.flip(0)) ** 2).mean()
    return inner, outer, params, phi


def unrolled(inner, outer, params, phi, inner_steps, lr, momentum, weight_decay):
    """The definition: one graph through all virtual steps. Returns the final loss."""
    theta, v = [p.clone().requires_grad_() for p in params], [torch.zeros_like(p) for p in params]
    for loss in [inner] * inner_steps + [outer]:
        g = torch.autograd.grad(loss(theta), theta, create_graph=True, materialize_grads=True)
        v = [momentum * v_i + g_i + weight_decay * p
             for v_i, g_i, p in zip(v, g, theta, strict=True)]
        theta = [p - lr * v_i for p, v_i in zip(theta, v, strict=True)]
    return outer(theta)


def distance(a, b):
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("inner_steps", range(1, 9))
def test_hypergradient_equals_unrolled_autograd(inner_steps):
    inner, outer, params, phi = problem()
    before = [p.clone() for p in params]
    ours = meta.hypergradient(
        inner, outer, iter(params), iter(phi), inner_steps=inner_steps, **HYPER)
    exact = torch.autograd.grad(unrolled(inner, outer, params, phi, inner_steps, **HYPER), phi)
    assert distance(ours, exact) < 1e-12
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    # no third derivatives
    assert all(x.grad is None for x in phi) and not any(g.requires_grad for g in ours)


def test_hypergradient_equals_the_optimizer_by_finite_differences():
    """torch.optim.SGD makes the steps, and phi is moved by hand: no autograd through anything."""
    inner, outer, params, phi = problem(1)

    def final_loss():
        theta = [nn.Parameter(p.clone()) for p in params]
        optimizer = torch.optim.SGD(theta, **HYPER)
        for loss in [inner] * 3 + [outer]:
            optimizer.zero_grad()
            loss(theta).backward()
            optimizer.step()
        return outer(theta).item()

    ours = meta.hypergradient(inner, outer, params, phi, inner_steps=3, **HYPER)
    for x, g in zip(phi, ours, strict=True):
        for i in range(len(x)):
            ends = []
            for shift in (1e-5, -2e-5, 1e-5):
                x.data[i] += shift
                ends.append(final_loss())
            assert g[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-10)


def test_hypergradient_notices_momentum_and_weight_decay():
    """The oracle tests would pass without them if they did not matter here."""
    inner, outer, params, phi = problem()
    full = meta.hypergradient(inner, outer, params, phi, inner_steps=4, **HYPER)
    for name in ("momentum", "weight_decay"):
        without = meta.hypergradient(
            inner, outer, params, phi, inner_steps=4, **{**HYPER, name: 0.0})
        assert distance(without, full) > 1e-3


def test_the_authors_recursion_is_off():
    """docs/DIFFERENCES.md: d_v added with factor 1 instead of wd;
    lr 0.1, momentum 0.9, weight decay 5e-4."""
    derivative = lambda y, x, **kwargs: torch.autograd.grad(y, x, materialize_grads=True, **kwargs)
    leaves = lambda theta: [p.detach().requires_grad_() for p in theta]

    def with_factor_one(inner, outer, params, phi, inner_steps, lr, momentum, weight_decay):
        theta, v, trajectory = params, [torch.zeros_like(p) for p in params], []
        for loss in [inner] * inner_steps + [outer]:
            theta = leaves(theta)
            trajectory.append((loss, theta))
            g = derivative(loss(theta), theta)
            v = [momentum * v_i + g_i + weight_decay * p
                 for v_i, g_i, p in zip(v, g, theta, strict=True)]
            theta = [p - lr * v_i for p, v_i in zip(theta, v, strict=True)]
        theta = leaves(theta)
        a, b, d_phi = derivative(outer(theta), theta), [torch.zeros_like(p) for p in params], 0
        for loss, theta in reversed(trajectory):
            u = [b_i - lr * a_i for b_i, a_i in zip(b, a, strict=True)]
            g = derivative(loss(theta), theta, create_graph=True)
            X = sum((g_i * u_i).sum() for g_i, u_i in zip(g, u, strict=True))
            Ju, part = derivative(X, theta, retain_graph=True), derivative(X, phi)
            a = [(1 - lr * weight_decay) * a_i + b_i + j
                 for a_i, b_i, j in zip(a, b, Ju, strict=True)]
            b, d_phi = [momentum * u_i for u_i in u], d_phi + torch.cat(part)
        return [d_phi]

    for seed in range(3):
        for steps, least, most in ((2, 0.015, 0.04), (5, 0.25, 1.5)):
            settings = dict(inner_steps=steps, lr=0.1, momentum=0.9, weight_decay=5e-4)
            exact = meta.hypergradient(*problem(seed), **settings)
            off = distance(with_factor_one(*problem(seed), **settings), exact)
            assert least < off < most


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_hypergradient_where_phi_acts_before_the_layers(affine, running):
    """phi scales the images;
    the losses run through convolution and batch normalisation behind it."""
    g = torch.Generator().manual_seed(0)
    x, t = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 2, 5, 5), (4, 3, 5, 5)))
    norm = nn.BatchNorm2d(3, affine=affine, track_running_stats=running)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), norm, nn.Tanh()).double()
    phi = torch.randn(4, generator=g, dtype=torch.float64).requires_grad_()
    params = dict(net.named_parameters())
    call = lambda p, x: torch.func.functional_call(net, dict(zip(params, p, strict=True)), (x,))
    inner = lambda p: ((call(p, x * (1 + phi[:, None, None, None].tanh())) - t) ** 2).mean()
    outer = lambda p: ((call(p, x) - t) ** 2).mean()
    for steps in (1, 2):
        start = [p.detach() for p in params.values()]
        exact = torch.autograd.grad(unrolled(inner, outer, start, None, steps, **HYPER), [phi])
        ours = meta.hypergradient(inner, outer, start, [phi], inner_steps=steps, **HYPER)
        assert distance(ours, exact) < 1e-10


def test_hypergradient_in_forward_mode_where_phi_acts_last_and_inside_no_grad_is_the_same():
    ours, forward = (meta.hypergradient(*problem(2), inner_steps=2, forward_mode=mode, **HYPER)
                     for mode in (False, True))
    assert distance(forward, ours) < 1e-12
    with torch.no_grad():
        assert distance(meta.hypergradient(*problem(2), inner_steps=2, **HYPER), ours) == 0


def test_hypergradient_of_what_the_loss_does_not_contain_is_zero():
    inner, outer, params, phi = problem()
    stranger = torch.ones(2, dtype=torch.float64, requires_grad=True)
    grads = meta.hypergradient(inner, outer, params, [phi[0], stranger], inner_steps=2, **HYPER)
    assert grads[0].abs().sum() > 0 and torch.equal(grads[1], torch.zeros_like(stranger))
    nothing = meta.hypergradient(outer, outer, params, [stranger], inner_steps=2, **HYPER)
    assert torch.equal(nothing[0], torch.zeros_like(stranger))


@pytest.mark.parametrize("shape,memory_format", [
    ((4, 3, 2, 5), torch.channels_last), ((4, 1, 3, 3), torch.channels_last),
    ((4, 3, 1, 1), torch.channels_last), ((1, 1, 1, 2), torch.channels_last),
    ((4, 1, 3, 3), torch.contiguous_format), ((), torch.preserve_format)])
def test_flat_vector_keeps_values_shapes_and_strides(shape, memory_format):
    params = [torch.randn(2, 3).T, torch.randn(shape).to(memory_format=memory_format)]
    flat = meta.FlatVector(params)
    for view, p in zip(
            flat.views(flat.concatenate([p.clone() for p in params])), params, strict=True):
        assert torch.equal(view, p) and view.stride() == p.stride()


def test_flat_vector_aligns_every_part():
    """To 16 bytes, whatever the sizes before it;
    what lies between is 0 and stays so through a step."""
    students = models.EmbeddedCohort(models.Cohort(["resnet8", "hcgnet_a1"], 7))
    params = [*students.parameters(), torch.ones(3), torch.ones(1)]
    flat = meta.FlatVector(params)
    vector = flat.concatenate(params).requires_grad_()
    offsets = [view.storage_offset() * view.element_size() % 16 for view in flat.views(vector)]
    assert any(p.numel() % 4 for p in params) and not any(offsets)
    sum(view.sum() for view in flat.views(vector)).backward()
    assert vector.grad.sum() == sum(p.numel() for p in params) == len(vector) - sum(flat.gaps)
    assert not vector[vector.grad == 0].any()


# ---------------------------------------------------------------- several processes

class Waiting(Exception):
    pass


def in_processes(*calls):
    """What the calls, functions of `average`, return as processes that meet at each average;
    how often.

    All run up to the first average whose mean is not known yet,
    then all again with this mean, until they end.
    """
    means = []
    while True:
        results, waiting = [], []
        for call in calls:
            known = iter(means)

            def average(vector, known=known):
                for mean in known:
                    return mean.clone()
                raise Waiting(vector)

            try:
                results.append(call(average))
            except Waiting as here:
                waiting.append(here.args[0])
        if not waiting:
            return results, len(means)
        assert len(waiting) == len(calls) and all(vector.dim() == 1 for vector in waiting)
        means.append(sum(waiting) / len(waiting))


def mean_of(*losses):
    return lambda p: sum(loss(p) for loss in losses) / len(losses)


HALVES = slice(0, 3), slice(3, None)


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("forward_mode", [False, True])
def test_hypergradient_of_two_processes(inner_steps, forward_mode):
    """Each with its samples: the derivative of the mean of their losses."""
    parts = [problem(rows=rows) for rows in HALVES]
    settings = dict(inner_steps=inner_steps, forward_mode=forward_mode, **HYPER)
    ours, count = in_processes(*(
        lambda average, part=part: meta.hypergradient(*part, average=average, **settings)
        for part in parts))
    (inner, outer, params, phi), (inner_2, outer_2, _, phi_2) = parts
    final = unrolled(mean_of(inner, inner_2), mean_of(outer, outer_2),
                     params, None, inner_steps, **HYPER)
    exact = [sum(torch.autograd.grad(final, pair, retain_graph=True))
             for pair in zip(phi, phi_2, strict=True)]
    assert distance(ours[0], exact) < 1e-12 and bits(ours[0]) == bits(ours[1])
    assert count == 2 * inner_steps + 4 - forward_mode


# ---------------------------------------------------------------- the matching network

def test_matching_network():
    f = [torch.randn(3, 5, d, generator=torch.Generator().manual_seed(d)) for d in (4, 6)]
    network = meta.MatchingNetwork([4, 6], 3, dim=16)
    w = network(f)
    assert w.shape == (2, 3, 2, 3, 5) and torch.allclose(w, w.permute(2, 3, 0, 1, 4))
    for a, stage, b, m, i in ((0, 0, 1, 2, 3), (1, 1, 0, 0, 4), (0, 2, 1, 2, 0)):
        u, v = network.projections[a][stage](f[a][stage, i]), network.projections[b][m](f[b][m, i])
        cosine = u @ v / u.norm() / v.norm()
        assert w[a, stage, b, m, i].item() == pytest.approx(torch.sigmoid(cosine).item(), rel=1e-5)
    assert 0.2689 <= w.min() and w.max() <= 0.7311 and w.std() > 0.01


# ---------------------------------------------------------------- the meta step

class TwoStudents(nn.Module):
    """The interface of meta_step on something small:
    convolution, batch normalisation, dropout-free."""

    def __init__(self):
        super().__init__()
        self.bodies = nn.ModuleList(nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh(),
            nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh()) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(4, 5) for _ in range(2))

    def forward(self, x):
        maps = [[body[:3](x), body(x)] for body in self.bodies]
        features = [torch.stack([m.mean((2, 3)) for m in two]) for two in maps]
        z = F.normalize(torch.stack(features), dim=-1)  # [2, 2, B, 4]
        return features, z, torch.stack(
            [head(f) for head, f in zip(self.heads, features, strict=True)])


def meta_setting(rows=slice(None)):
    torch.manual_seed(0)
    students, matching = TwoStudents().double(), meta.MatchingNetwork([4, 4], 2, dim=8).double()
    images = torch.randn(6, 3, 5, 5, dtype=torch.float64)[rows]
    labels = torch.tensor([0, 1, 2, 3, 4, 0])[rows]
    contrast = lambda z, w: (w * ((z[:, :, None, None] - z[None, None]) ** 2).sum(-1)).mean() * 20
    task = lambda logits: sum(F.cross_entropy(x, labels) for x in logits.flatten(0, 1))
    return students, matching, images, contrast, task


def runner(students):
    """Their trained parameters, and their call as a function of these."""
    params = {name: p for name, p in students.named_parameters() if p.requires_grad}
    named = lambda p: dict(zip(params, p, strict=True))
    call = lambda p, images: torch.func.functional_call(students, named(p), (images,))
    return list(params.values()), call


def sgd(matching):
    return torch.optim.SGD(
        matching.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def gradients(matching):
    return [p.grad for p in matching.parameters()]


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", [(), ("bodies.0.0.weight", "bodies.1.4.bias", "heads.0.weight")])
def test_meta_step_gradient_equals_the_definition(frozen, memory_format, moving):
    """Features at theta_0 constant, lambda the same for all virtual steps,
    or lambda of each step's features; momentum from zero, Nesterov step of phi;
    frozen parameters stay where they are."""
    students, matching, images, contrast, task = meta_setting()
    for name in frozen:
        students.get_parameter(name).requires_grad_(False)
    students, images = (
        students.to(memory_format=memory_format), images.to(memory_format=memory_format))
    reference, phi = copy.deepcopy(students), copy.deepcopy(matching)
    meta.meta_step(students, matching, sgd(matching), images, contrast, task,
                   inner_steps=2, moving=moving, **HYPER)

    params, call = runner(reference)
    weights = phi([f.detach() for f in call(params, images)[0]])

    def inner(p):
        features, z, _ = call(p, images)
        return contrast(z, phi(features) if moving else weights)

    outer = lambda p: task(call(p, images)[2])
    exact = torch.autograd.grad(
        unrolled(inner, outer, params, None, 2, **HYPER), list(phi.parameters()))
    assert distance(gradients(matching), exact) < 1e-10

    for p, g in zip(phi.parameters(), exact, strict=True):
        p.grad = g
    sgd(phi).step()
    pairs = zip(matching.parameters(), phi.parameters(), strict=True)
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in pairs)


def on_eight(block):
    """For blocks whose squeeze-excitation has eight channels at least."""
    return nn.Sequential(nn.Conv2d(4, 8, 1), block, nn.Conv2d(8, 4, 1))


def nhwc(block):
    """On maps [B, h, w, c], as Swin's blocks are."""
    return nn.Sequential(Permute([0, 2, 3, 1]), block, Permute([0, 3, 1, 2]))


LAYERS = {  # torchvision's blocks of four channels, by what they bring along
    "hard-swish, hard-sigmoid, squeeze-excitation": lambda: on_eight(mobilenetv3.InvertedResidual(
        mobilenetv3.InvertedResidualConfig(8, 3, 8, 8, True, "HS", 1, 1, 1.0), nn.BatchNorm2d)),
    "SiLU, squeeze-excitation, stochastic depth": lambda: on_eight(efficientnet.MBConv(
        efficientnet.MBConvConfig(2, 3, 1, 8, 8, 1), 0.5, nn.BatchNorm2d)),
    "fused MBConv": lambda: efficientnet.FusedMBConv(
        efficientnet.FusedMBConvConfig(2, 3, 1, 4, 4, 1), 0.5, nn.BatchNorm2d),
    "ReLU6, depthwise convolution": lambda: mobilenetv2.InvertedResidual(4, 4, 1, 2),
    "grouped convolution": lambda: regnet.ResBottleneckBlock(
        4, 4, 1, nn.BatchNorm2d, nn.ReLU, group_width=2, se_ratio=0.25),
    "LayerNorm, GELU, layer scale": lambda: convnext.CNBlock(
        4, layer_scale=0.5, stochastic_depth_prob=0.5),
    "LayerNorm on maps": lambda: convnext.LayerNorm2d(4),
    "shifted window attention": lambda: nhwc(swin.SwinTransformerBlock(
        4, 2, [2, 2], [1, 1], stochastic_depth_prob=0.5)),
    "shifted window attention, v2": lambda: nn.Sequential(nn.Conv2d(4, 4, 2), nhwc(
        swin.SwinTransformerBlockV2(4, 2, [2, 2], [1, 1])), nn.ZeroPad2d((0, 1, 0, 1))),
    "shifted window attention, v2, padded": lambda: nhwc(
        swin.SwinTransformerBlockV2(4, 2, [2, 2], [1, 1])),
    "patch merging": lambda: nn.Sequential(nn.Conv2d(4, 2, 1), nhwc(swin.PatchMerging(2))),
    "patch merging, v2": lambda: nn.Sequential(nn.Conv2d(4, 2, 1), nhwc(swin.PatchMergingV2(2))),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_meta_step_through_each_kind_of_layer(layer, monkeypatch):
    """Also by forward mode, which makes the first virtual step;
    stochastic depth leaves out the same samples.

    The oracle has two functions in words that PyTorch differentiates twice.
    """
    _, matching, images, contrast, task = meta_setting()
    students = TwoStudents()
    students.bodies = nn.ModuleList(
        nn.Sequential(*body[:2], LAYERS[layer](), LAYERS[layer]()) for body in students.bodies)
    students = students.double()
    phi, (params, call) = copy.deepcopy(matching), runner(copy.deepcopy(students))
    meta.meta_step(students, matching, sgd(matching), images, contrast, task,
                   inner_steps=2, **HYPER)

    def forward(p):
        torch.manual_seed(0)
        return call(p, images)

    norm = lambda x, dim: x.square().sum(dim, keepdim=True).clamp(min=1e-24).sqrt()
    monkeypatch.setattr(F, "normalize", lambda x, dim: x / norm(x, dim))
    monkeypatch.setattr(F, "hardsigmoid", lambda x, inplace: (x / 6 + 0.5).clamp(0, 1))

    weights = phi([f.detach() for f in forward(params)[0]])

    inner = lambda p: contrast(forward(p)[1], weights)
    outer = lambda p: task(forward(p)[2])
    exact = torch.autograd.grad(
        unrolled(inner, outer, params, None, 2, **HYPER), list(phi.parameters()))
    assert distance(gradients(matching), exact) < 1e-9


@pytest.mark.parametrize("moving", [False, True])
def test_meta_step_of_two_processes(moving):
    """Each with its images, batch statistics and values of lambda:
    the derivative of their losses' mean."""
    parts = [meta_setting(rows) for rows in HALVES]
    inners, outers, networks = [], [], []
    params, call = runner(copy.deepcopy(parts[0][0]))
    for _, matching, images, contrast, task in parts:
        networks.append(copy.deepcopy(matching))
        weights = networks[-1]([f.detach() for f in call(params, images)[0]])

        def inner(p, x=images, loss=contrast, weights=weights, phi=networks[-1]):
            features, z, _ = call(p, x)
            return loss(z, phi(features) if moving else weights)

        inners.append(inner)
        outers.append(lambda p, x=images, loss=task: loss(call(p, x)[2]))
    final = unrolled(mean_of(*inners), mean_of(*outers), params, None, 2, **HYPER)
    exact = [sum(torch.autograd.grad(final, pair, retain_graph=True))
             for pair in zip(*(network.parameters() for network in networks), strict=True)]

    def step(average, students, matching, images, contrast, task):
        meta.meta_step(students, matching, sgd(matching), images, contrast, task, inner_steps=2,
                       average=average, moving=moving, **HYPER)
        return gradients(matching), matching.state_dict()

    ours, count = in_processes(*(lambda average, part=part: step(average, *part) for part in parts))
    assert (distance(ours[0][0], exact) < 1e-10
            and bits(ours[0]) == bits(ours[1]) and count <= 2 * 2 + 5)


@pytest.mark.parametrize("moving", [False, True])
def test_meta_step_leaves_no_trace(moving):
    students, matching, images, contrast, task = meta_setting()
    optimizer = torch.optim.SGD(students.parameters(), lr=0.1, momentum=0.9)
    task(students(images)[2]).backward()
    optimizer.step()
    students.bodies[0][1].eval()  # modes are restored as they were, too
    frozen = nn.BatchNorm2d(4, track_running_stats=False)
    students.bodies[1].append(frozen.double())
    state = lambda: bits([students.state_dict(), optimizer.state_dict(), images,
                          torch.get_rng_state(), [p.grad for p in students.parameters()]])
    before, phi_before = state(), copy.deepcopy(matching.state_dict())
    meta.meta_step(students, matching, sgd(matching), images, contrast, task,
                   inner_steps=2, moving=moving, **HYPER)
    assert state() == before
    assert not students.bodies[0][1].training and students.training
    norms = [m for m in students.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.track_running_stats for m in norms] == [True] * 4 + [False]
    assert any(not torch.equal(p, phi_before[k]) for k, p in matching.state_dict().items())


def test_the_trial_draws_one_mask_and_leaves_no_trace():
    """Other masks in each pass would look like code that computes elsewhere."""
    part = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
    trial, before = meta.DerivativeTrial(), torch.get_rng_state()
    trial("a student with dropout", part, torch.randn(4, 3, 8, 8, generator=torch.Generator()))
    assert trial.forward_mode and torch.equal(torch.get_rng_state(), before)


def test_dropout_leaves_no_trace_and_has_one_mask(monkeypatch):
    students, matching, images, contrast, task = meta_setting()
    monkeypatch.setattr(torch, "manual_seed", None)  # it would seed other devices' generators too
    students.bodies[0].append(nn.Dropout(0.5))
    masks = set()
    students.bodies[0][-1].register_forward_hook(
        lambda module, inputs, output: masks.add(tuple((output != 0).flatten().tolist())))
    before = torch.get_rng_state()
    meta.meta_step(students, matching, sgd(matching), images, contrast, task,
                   inner_steps=2, **HYPER)
    assert torch.equal(torch.get_rng_state(), before) and len(masks) == 1


def test_no_tf32_inside_the_meta_step_and_an_error_restores_everything():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    students, matching, images, contrast, _ = meta_setting()
    original, seen = (conv.fp32_precision, matmul.fp32_precision), []

    def task(logits):
        seen.append((conv.fp32_precision, matmul.fp32_precision))
        raise RuntimeError

    try:
        conv.fp32_precision = matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            meta.meta_step(students, matching, sgd(matching), images, contrast, task,
                           inner_steps=2, **HYPER)
        assert (seen == [("ieee", "ieee")]
                and (conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32"))
        assert all(m.track_running_stats
                   for m in students.modules() if isinstance(m, nn.BatchNorm2d))
    finally:
        conv.fp32_precision, matmul.fp32_precision = original


def test_memory_does_not_grow_with_the_number_of_steps():
    """Most tensors that graphs hold at once: the same for 2 and 8 steps;
    the unrolled graph's grows."""
    g = torch.Generator().manual_seed(0)
    X, params = torch.randn(8, 3, generator=g), [torch.randn(4, 3, generator=g)]
    phi = torch.ones(8, requires_grad=True)
    # no operation that saves its own output: PyTorch's hooks would never let it go
    inner = lambda p: (phi.cos() * (X @ p[0].T).sin().sum(1)).mean()
    outer = lambda p: (X @ p[0].T).sin().mean()

    def peak(function, steps):
        held, most = set(), [0]

        class Handle:
            def __init__(self, tensor):
                self.tensor = tensor
                held.add(id(self))
                most[0] = max(most[0], len(held))

            def __del__(self):
                held.discard(id(self))

        with torch.autograd.graph.saved_tensors_hooks(Handle, lambda handle: handle.tensor):
            function(inner, outer, params, [phi], inner_steps=steps, **HYPER)
        return most[0]

    assert peak(meta.hypergradient, 2) == peak(meta.hypergradient, 8) > 0
    assert peak(unrolled, 8) > 2 * peak(unrolled, 2)


@pytest.mark.parametrize("names,L,value", [
    (["resnet8", "resnet110"], 3, 0.27),
    (["shufflenet_v2_x1_0"] * 5, 4, 0.73),
    (["a" * 60] * 3, 4, 0.5)])
def test_picture(names, L, value):
    """Colours by value alone, every panel there, no text cut off at the right, the step written."""
    N, pictures = len(names), []
    for step in (1, 78):
        matching = torch.full((N, L, N, L), value).tolist()
        file = io.BytesIO(matching_picture(matching, names, step))
        pictures.append(Image.open(file))
    picture, other = (p.convert("RGB") for p in pictures)
    assert pictures[0].format == "PNG" and picture.tobytes() != other.tobytes()
    colours = {colour: count for count, colour in picture.getcolors(2 ** 24)}
    colour = {0.27: (236, 244, 252), 0.5: (122, 152, 190), 0.73: (9, 61, 127)}[value]
    assert colours[colour] > N * (N - 1) / 2 * L ** 2 * 4000
    edge = picture.crop((picture.width - 8, 0, picture.width, picture.height))
    assert edge.getcolors() == [(8 * picture.height, (255, 255, 255))]


def test_picture_shows_row_stage_of_the_first_student_and_column_stage_of_the_second():
    """One value of lambda is changed, so the picture changes in one cell, and in no other place."""
    matching = [[[[0.5, 0.5, 0.5] for _ in range(2)] for _ in range(3)] for _ in range(2)]
    before = Image.open(io.BytesIO(matching_picture(matching, ["resnet8", "wrn_10_1"], 5)))
    matching[0][2][1][0] = 0.7
    after = Image.open(io.BytesIO(matching_picture(matching, ["resnet8", "wrn_10_1"], 5)))
    left, top, right, bottom = ImageChops.difference(before, after).getbbox()
    cell, x0, y0 = 72, 96, 64 + 92  # side, place of the panel
    assert x0 <= left and right <= x0 + cell  # stage 1 of the second
    assert y0 + 2 * cell <= top and bottom <= y0 + 3 * cell  # stage 3 of the first


# ------------------------------------------------ students whose code the meta step does not expect

class Scale(torch.autograd.Function):
    """x^2, without forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Once(Scale):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Layer(nn.Module):
    """A 1x1 convolution with something behind it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.convolution = nn.Conv2d(4, 4, 1)
        if kind == "weight_norm":
            self.convolution = nn.utils.parametrizations.weight_norm(self.convolution)
        if kind == "spectral_norm":
            self.convolution = nn.utils.parametrizations.spectral_norm(self.convolution)
        if kind == "instance":
            self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        if kind == "attention":
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        if self.kind == "checkpoint":
            return torch.utils.checkpoint.checkpoint(
                self.convolution, x.tanh(), use_reentrant=False)
        if self.kind == "random depth" and torch.rand(()) < 0.5:
            return x
        y = self.convolution(x)
        if self.kind == "instance":
            return self.norm(y)
        if self.kind == "attention":
            tokens = y.flatten(2).mT
            return self.attention(tokens, tokens, tokens, need_weights=False)[0].mT.view_as(y)
        if self.kind == "average":
            if self.training:
                self.average = 0.9 * self.average + 0.1 * y.detach().mean((0, 2, 3))
            return y - self.average[:, None, None]
        if self.kind == "moved in place":
            if self.training:
                self.average.mul_(0.9).add_(y.detach().mean((0, 2, 3)))
            return y - self.average[:, None, None]
        if self.kind == "nan":
            return y + F.normalize(0 * y.flatten(2), dim=1).view_as(y)
        if self.kind == "float32":
            return torch.einsum("bchw,cd->bdhw", y, torch.eye(4))
        return ({"no jvp": Scale, "raises": Once}[self.kind].apply(y)
                if self.kind in ("no jvp", "raises") else y)


@pytest.mark.parametrize("kind", [
    "no jvp", "weight_norm", "spectral_norm", "attention", "instance", "average",
    "moved in place", "random depth"])
def test_layers_that_the_meta_step_takes_as_they_are(kind):
    """The trial says whether forward mode is there;
    the gradient is the definition's and no buffer is moved."""
    students, matching, images, contrast, task = meta_setting()
    students.bodies[0].insert(5, Layer(kind).double())
    students.bodies[0].append(nn.Conv2d(4, 4, 1).double())
    trial = meta.DerivativeTrial()
    with torch.no_grad():
        trial("part", students.bodies[0].float(), images.float())
    assert not (trial.forward_mode and kind == "no jvp")
    students, phi = students.double(), copy.deepcopy(matching)
    reference, before = copy.deepcopy(students), copy.deepcopy(students.state_dict())
    meta.meta_step(students, matching, sgd(matching), images, contrast, task, inner_steps=2,
                   forward_mode=trial.forward_mode, **HYPER)
    assert bits(before) == bits(students.state_dict())

    params, _ = runner(reference)
    names = [name for name, _ in reference.named_parameters()]
    start = {name: b.clone() for name, b in reference.named_buffers()}

    def call(p):
        torch.manual_seed(0)
        tensors = dict(zip(names, p, strict=True)) | {name: b.clone() for name, b in start.items()}
        return torch.func.functional_call(reference, tensors, (images,))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        weights = phi([f.detach() for f in call(params)[0]])
        final = unrolled(lambda p: contrast(call(p)[1], weights), lambda p: task(call(p)[2]),
                         params, None, 2, **HYPER)
        exact = torch.autograd.grad(final, list(phi.parameters()))
    assert distance(gradients(matching), exact) < 1e-10


@pytest.mark.parametrize(("kind", "words"), [
    ("checkpoint", "computes in the backward pass"), ("raises", "cannot be differentiated twice"),
    ("nan", "cannot be differentiated twice, as the meta step wants .it is NaN or infinite")])
def test_layers_that_are_refused_at_the_start(kind, words):
    part, state = nn.Sequential(Layer(kind), nn.BatchNorm2d(4), nn.ReLU()), torch.get_rng_state()
    before = bits(part.state_dict())
    with pytest.raises(UserError, match=words) as error:
        meta.DerivativeTrial()("student 'mine': stage 2", part.eval(), torch.zeros(2, 4, 5, 5))
    assert (str(error.value).startswith("student 'mine': stage 2")
            and "--matching uniform" in str(error.value))
    assert (bits(part.state_dict()) == before
            and torch.equal(torch.get_rng_state(), state) and not part.training)


def test_a_layer_of_float32_alone_is_tried_in_float32():
    trial = meta.DerivativeTrial()
    trial("student 'mine': stage 2", nn.Sequential(Layer("float32"), nn.BatchNorm2d(4)),
          torch.zeros(2, 4, 5, 5))
    assert trial.forward_mode
    with pytest.raises(UserError, match="cannot be differentiated twice"):
        trial("student 'mine': stage 2", nn.Sequential(Layer("float32"), Layer("raises")),
              torch.zeros(2, 4, 5, 5))


@pytest.mark.parametrize("moving", [False, True])
def test_a_frozen_part_of_the_matching_network_stays(moving):
    students, matching, images, contrast, task = meta_setting()
    frozen = matching.projections[0][1].weight.requires_grad_(False)
    before = [p.clone() for p in matching.parameters()]
    meta.meta_step(students, matching, sgd(matching), images, contrast, task,
                   inner_steps=1, moving=moving, **HYPER)
    stays = [torch.equal(p, q) for p, q in zip(matching.parameters(), before, strict=True)]
    assert stays == [p is frozen for p in matching.parameters()]
