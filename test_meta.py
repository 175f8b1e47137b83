"""meta.py: the hypergradient by independent roads, the meta step's absence of traces, the matching network."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import meta

HYPER = dict(lr=0.1, momentum=0.9, weight_decay=0.05)


def problem(seed=0):
    """A small net whose inner loss is weighted per sample by phi, in float64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    X, Y, W = draw(8, 3), draw(8, 2), draw(2, 4)
    params, phi = [draw(4, 3), draw(2, 4)], [draw(3).requires_grad_(), draw(2).requires_grad_()]
    net = lambda p: torch.tanh(X @ p[0].T) @ p[1].T
    weight = lambda: torch.sigmoid(X @ phi[0])
    inner = lambda p: (weight() * ((net(p) - Y) ** 2).sum(1)).mean() + (phi[1] * (W * p[1]).sum(1)).sum().tanh()
    outer = lambda p: ((net(p) - Y.flip(0)) ** 2).mean()
    return inner, outer, params, phi


def unrolled(inner, outer, params, phi, inner_steps, lr, momentum, weight_decay):
    """The definition: one graph through all virtual steps. Returns the final loss."""
    theta, v = [p.clone().requires_grad_() for p in params], [torch.zeros_like(p) for p in params]
    for loss in [inner] * inner_steps + [outer]:
        g = torch.autograd.grad(loss(theta), theta, create_graph=True, materialize_grads=True)
        v = [momentum * v_i + g_i + weight_decay * p for v_i, g_i, p in zip(v, g, theta)]
        theta = [p - lr * v_i for p, v_i in zip(theta, v)]
    return outer(theta)


def distance(a, b):
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("inner_steps", range(1, 9))
def test_hypergradient_equals_unrolled_autograd(inner_steps):
    inner, outer, params, phi = problem()
    before = [p.clone() for p in params]
    ours = meta.hypergradient(inner, outer, params, phi, inner_steps=inner_steps, **HYPER)
    exact = torch.autograd.grad(unrolled(inner, outer, params, phi, inner_steps, **HYPER), phi)
    assert distance(ours, exact) < 1e-12
    assert all(torch.equal(p, q) for p, q in zip(params, before)) and all(x.grad is None for x in phi)


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
    for x, g in zip(phi, ours):
        for i in range(len(x)):
            x.data[i] += 1e-5
            high = final_loss()
            x.data[i] -= 2e-5
            low = final_loss()
            x.data[i] += 1e-5
            assert g[i].item() == pytest.approx((high - low) / 2e-5, rel=1e-6, abs=1e-10)


def test_hypergradient_notices_momentum_and_weight_decay():
    """The oracle tests would pass without them if they did not matter here."""
    inner, outer, params, phi = problem()
    full = meta.hypergradient(inner, outer, params, phi, inner_steps=4, **HYPER)
    for name in ("momentum", "weight_decay"):
        without = meta.hypergradient(inner, outer, params, phi, inner_steps=4, **{**HYPER, name: 0.0})
        assert distance(without, full) > 1e-3


def test_the_authors_recursion_is_off():
    """README section 7, row 1: b added with factor 1 instead of wd, at lr 0.1, momentum 0.9, weight decay 5e-4."""
    derivative = lambda y, x, **kwargs: torch.autograd.grad(y, x, materialize_grads=True, **kwargs)
    leaves = lambda theta: [p.detach().requires_grad_() for p in theta]

    def with_factor_one(inner, outer, params, phi, inner_steps, lr, momentum, weight_decay):
        theta, v, path = params, [torch.zeros_like(p) for p in params], []
        for loss in [inner] * inner_steps + [outer]:
            theta = leaves(theta)
            path.append((loss, theta))
            g = derivative(loss(theta), theta)
            v = [momentum * v_i + g_i + weight_decay * p for v_i, g_i, p in zip(v, g, theta)]
            theta = [p - lr * v_i for p, v_i in zip(theta, v)]
        theta = leaves(theta)
        a, b, total = derivative(outer(theta), theta), [torch.zeros_like(p) for p in params], [torch.zeros_like(x) for x in phi]
        for loss, theta in reversed(path):
            u = [b_i - lr * a_i for b_i, a_i in zip(b, a)]
            X = sum((g * u_i).sum() for g, u_i in zip(derivative(loss(theta), theta, create_graph=True), u))
            Hu, part = derivative(X, theta, retain_graph=True), derivative(X, phi)
            a = [(1 - lr * weight_decay) * a_i + b_i + h for a_i, b_i, h in zip(a, b, Hu)]
            b, total = [momentum * u_i for u_i in u], [t + p for t, p in zip(total, part)]
        return total

    for seed in range(3):
        for steps, least, most in ((2, 0.015, 0.04), (5, 0.25, 1.5)):
            settings = dict(inner_steps=steps, lr=0.1, momentum=0.9, weight_decay=5e-4)
            off = distance(with_factor_one(*problem(seed), **settings), meta.hypergradient(*problem(seed), **settings))
            assert least < off < most


LAYERS = {
    "convolution": (nn.Conv2d(2, 4, 3, padding=1, bias=False), (3, 2, 5, 5)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 6, 6)),
    "dilated depthwise": (nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3, bias=False), (2, 3, 5, 5)),
    "pointwise": (nn.Conv2d(3, 2, 1, stride=2, bias=False), (2, 3, 4, 4)),
    "batch norm": (nn.BatchNorm2d(3, eps=0.1, track_running_stats=False), (4, 3, 2, 3)),
    "batch norm of vectors": (nn.BatchNorm1d(3, track_running_stats=False), (5, 3)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name,memory_format", [
    (name, memory_format) for name, (_, shape) in LAYERS.items()
    for memory_format in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 or memory_format is torch.contiguous_format])
def test_cheap_second_derivatives_are_the_derivatives(name, memory_format):
    """Of a nonlinear function of the layer, for everything that goes in: equal to PyTorch's, and to finite differences."""
    layer, shape = LAYERS[name]
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()
    x = draw(*shape).detach().contiguous(memory_format=memory_format).requires_grad_()
    names, inputs = [k for k, _ in layer.named_parameters()], [x, *(draw(*p.shape) for p in layer.parameters())]
    call = lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p)), (x,))

    def cheap(*inputs):
        with meta.CheapSecondDerivatives():
            return call(*inputs)

    def second(function):
        y = function(*inputs)
        first = torch.autograd.grad((y ** 3 + y).sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum((f ** 2).sum() for f in first), inputs)]

    assert type(cheap(*inputs).grad_fn).__name__ in ("ConvolutionBackward", "BatchNormBackward", "AddBackward0")   # not PyTorch's
    assert distance(second(cheap), second(call)) < 1e-12
    assert torch.autograd.gradgradcheck(cheap, inputs) and torch.autograd.gradcheck(
        cheap, inputs, check_forward_ad=True, check_undefined_grad=False)


def test_cheap_second_derivatives_of_the_first_layer_and_of_unlike_calls():
    """Images need no gradient; padding by name, evaluation mode, batch norms without weight or bias and single images
    stay PyTorch's."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 5, 5, generator=g, dtype=torch.float64)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding="same"),
                        nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2).eval()).double()
    net[4].bias = None
    single = nn.Conv2d(3, 4, 3).double()
    params, u = zip(*((p, torch.randn(p.shape, generator=g, dtype=torch.float64)) for p in net.parameters()))

    def product():
        first = torch.autograd.grad((net(images) ** 3).sum(), params, create_graph=True)
        return torch.autograd.grad(sum((f * u_i).sum() for f, u_i in zip(first, u)), params)

    with meta.batch_statistics(net):
        exact = product()
        with meta.CheapSecondDerivatives():
            assert distance(product(), exact) < 1e-12
    expected = single(images[0])
    with meta.CheapSecondDerivatives():
        assert torch.equal(single(images[0]), expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_hypergradient_where_phi_acts_before_the_layers(affine, running):
    """phi scales the images; the losses run through convolution and batch normalisation behind it."""
    g = torch.Generator().manual_seed(0)
    x, t = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 2, 5, 5), (4, 3, 5, 5)))
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, affine=affine, track_running_stats=running), nn.Tanh())
    net, phi = net.double(), torch.randn(4, generator=g, dtype=torch.float64).requires_grad_()
    names, params = zip(*((k, p.detach()) for k, p in net.named_parameters()))
    call = lambda p, x: torch.func.functional_call(net, dict(zip(names, p)), (x,))
    inner = lambda p: ((call(p, x * (1 + phi[:, None, None, None].tanh())) - t) ** 2).mean()
    outer = lambda p: ((call(p, x) - t) ** 2).mean()
    for steps in (1, 2):
        exact = torch.autograd.grad(unrolled(inner, outer, params, None, steps, **HYPER), [phi])
        assert distance(meta.hypergradient(inner, outer, params, [phi], inner_steps=steps, **HYPER), exact) < 1e-10


def test_forward_mode_gives_the_same_where_phi_acts_last():
    inner, outer, params, phi = problem(2)
    ours = [meta.hypergradient(inner, outer, params, phi, inner_steps=2, forward_mode=mode, **HYPER) for mode in (False, True)]
    assert distance(*ours) < 1e-12


def test_hypergradient_inside_no_grad_is_the_same():
    inner, outer, params, phi = problem()
    ours = meta.hypergradient(inner, outer, params, phi, inner_steps=2, **HYPER)
    with torch.no_grad():
        assert distance(meta.hypergradient(inner, outer, params, phi, inner_steps=2, **HYPER), ours) == 0


def test_hypergradient_of_what_the_loss_does_not_contain_is_zero():
    inner, outer, params, phi = problem()
    stranger = torch.ones(2, dtype=torch.float64, requires_grad=True)
    grads = meta.hypergradient(inner, outer, params, [phi[0], stranger], inner_steps=2, **HYPER)
    assert grads[0].abs().sum() > 0 and torch.equal(grads[1], torch.zeros_like(stranger))
    nothing = meta.hypergradient(outer, outer, params, [stranger], inner_steps=2, **HYPER)
    assert torch.equal(nothing[0], torch.zeros_like(stranger))


# ---------------------------------------------------------------- the matching network

def test_matching_network():
    f = [torch.randn(3, 5, d, generator=torch.Generator().manual_seed(d)) for d in (4, 6)]
    network = meta.MatchingNetwork([4, 6], 3, dim=16)
    w = network(f)
    assert w.shape == (2, 3, 2, 3, 5) and torch.allclose(w, w.permute(2, 3, 0, 1, 4))
    for a, l, b, m, i in ((0, 0, 1, 2, 3), (1, 1, 0, 0, 4), (0, 2, 1, 2, 0)):
        u, v = network.projections[a][l](f[a][l, i]), network.projections[b][m](f[b][m, i])
        assert w[a, l, b, m, i].item() == pytest.approx(torch.sigmoid(u @ v / u.norm() / v.norm()).item(), rel=1e-5)
    assert 0.2689 <= w.min() and w.max() <= 0.7311 and w.std() > 0.01


# ---------------------------------------------------------------- the meta step

class TwoStudents(nn.Module):
    """The interface of meta_step on something small: convolution, batch normalisation, dropout-free."""

    def __init__(self):
        super().__init__()
        self.bodies = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh(),
                                                  nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh()) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(4, 5) for _ in range(2))

    def forward(self, x):
        maps = [[body[:3](x), body(x)] for body in self.bodies]
        features = [torch.stack([m.mean((2, 3)) for m in two]) for two in maps]
        z = F.normalize(torch.stack(features), dim=-1)                    # [2, 2, B, 4]
        return features, z, torch.stack([head(f) for head, f in zip(self.heads, features)])


def meta_setting():
    torch.manual_seed(0)
    students, matching = TwoStudents().double(), meta.MatchingNetwork([4, 4], 2, dim=8).double()
    images, labels = torch.randn(6, 3, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    contrast = lambda z, w: (w * ((z[:, :, None, None] - z[None, None]) ** 2).sum(-1)).mean() * 20
    task = lambda logits: sum(F.cross_entropy(x, labels) for x in logits.flatten(0, 1))
    return students, matching, images, contrast, task


@pytest.mark.parametrize("frozen", [(), ("bodies.0.0.weight", "bodies.1.4.bias", "heads.0.weight")])
def test_meta_step_gradient_equals_the_definition(frozen):
    """Features at theta_0 constant, lambda held for all virtual steps, momentum from zero, Nesterov step of phi;
    frozen parameters stay where they are."""
    students, matching, images, contrast, task = meta_setting()
    for name in frozen:
        students.get_parameter(name).requires_grad_(False)
    reference, phi = copy.deepcopy(students), copy.deepcopy(matching)
    optimizer = torch.optim.SGD(matching.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    meta.meta_step(students, matching, optimizer, images, contrast, task, inner_steps=2, **HYPER)

    names, params = zip(*((name, p) for name, p in reference.named_parameters() if name not in frozen))
    run = lambda p: torch.func.functional_call(reference, dict(zip(names, p)), (images,))
    weights = phi([f.detach() for f in run(params)[0]])
    final = unrolled(lambda p: contrast(run(p)[1], weights), lambda p: task(run(p)[2]), params, None, 2, **HYPER)
    exact = torch.autograd.grad(final, list(phi.parameters()))
    assert distance([p.grad for p in matching.parameters()], exact) < 1e-10

    by_hand = torch.optim.SGD(phi.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for p, g in zip(phi.parameters(), exact):
        p.grad = g
    by_hand.step()
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(matching.parameters(), phi.parameters()))


def test_meta_step_leaves_no_trace():
    students, matching, images, contrast, task = meta_setting()
    optimizer = torch.optim.SGD(students.parameters(), lr=0.1, momentum=0.9)
    task(students(images)[2]).backward()
    optimizer.step()
    students.bodies[0][1].eval()                                          # modes are restored as they were, too
    frozen = nn.BatchNorm2d(4, track_running_stats=False)
    students.bodies[1].append(frozen.double())
    before = copy.deepcopy((students.state_dict(), optimizer.state_dict(), [p.grad for p in students.parameters()]))
    images_before, random_before, phi_before = images.clone(), torch.get_rng_state(), copy.deepcopy(matching.state_dict())

    meta_optimizer = torch.optim.SGD(matching.parameters(), lr=0.1)
    meta.meta_step(students, matching, meta_optimizer, images, contrast, task, inner_steps=2, **HYPER)

    after = (students.state_dict(), optimizer.state_dict(), [p.grad for p in students.parameters()])
    assert_equal(before, after)
    assert torch.equal(images, images_before) and torch.equal(torch.get_rng_state(), random_before)
    assert not students.bodies[0][1].training and students.training
    assert [m.track_running_stats for m in students.modules() if isinstance(m, nn.BatchNorm2d)] == [True] * 4 + [False]
    assert any(not torch.equal(p, phi_before[k]) for k, p in matching.state_dict().items())


def assert_equal(a, b):
    if torch.is_tensor(a):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_equal(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


def test_dropout_leaves_no_trace_and_has_one_mask():
    students, matching, images, contrast, task = meta_setting()
    students.bodies[0].append(nn.Dropout(0.5))
    masks = set()
    students.bodies[0][-1].register_forward_hook(lambda module, inputs, output: masks.add(tuple((output != 0).flatten().tolist())))
    before = torch.get_rng_state()
    meta.meta_step(students, matching, torch.optim.SGD(matching.parameters(), lr=0.1), images, contrast, task,
                   inner_steps=2, **HYPER)
    assert torch.equal(torch.get_rng_state(), before) and len(masks) == 1


def test_batch_statistics_are_restored_after_an_error():
    students = TwoStudents()
    with pytest.raises(RuntimeError), meta.batch_statistics(students):
        raise RuntimeError
    assert all(m.track_running_stats for m in students.modules() if isinstance(m, nn.BatchNorm2d))


def test_memory_does_not_grow_with_the_number_of_steps():
    """Most tensors that graphs hold at any one time: the same for 2 and 8 steps; the unrolled graph's grows."""
    g = torch.Generator().manual_seed(0)
    X, params, phi = torch.randn(8, 3, generator=g), [torch.randn(4, 3, generator=g)], torch.ones(8, requires_grad=True)
    inner = lambda p: (phi.cos() * (X @ p[0].T).sin().sum(1)).mean()      # no operation that saves its own output:
    outer = lambda p: (X @ p[0].T).sin().mean()                           # PyTorch's hooks would never let it go

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


def test_picture(tmp_path):
    w = torch.rand(4, 3, 4, 3, generator=torch.Generator().manual_seed(0))
    meta.draw_matching(w, ["resnet8"] * 4, tmp_path / "four.png")
    meta.draw_matching(w[:2, :, :2], ["resnet8", "resnet110"], tmp_path / "two.png")
    four, two = Image.open(tmp_path / "four.png"), Image.open(tmp_path / "two.png")
    assert four.height > two.height and len(two.getcolors(100000)) > 9
