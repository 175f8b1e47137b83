"""methods.py: each method's loss against its formula, its second step, and a method of a user's own."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import losses
import meta
import models
import options
import train
from devices import Processes
from methods import METHODS

LABELS = torch.tensor([0, 0, 1, 1, 2, 3])


def make(name, *flags, arch=("resnet8", "resnet8"), classes=5, train_labels=None):
    args = options.parse("", ["--method", name, "--arch", *arch, "--image-size", "16", *flags])
    torch.manual_seed(args.seed)
    method = METHODS[name](args, classes, train_labels).train()
    torch.manual_seed(1)
    return method, torch.randn(6, 3, 16, 16), LABELS


def total(terms):
    return sum(weight * value for weight, value in terms.values() if weight is not None)


def kl(student, teacher, T):
    return T * T * F.kl_div((student / T).log_softmax(-1), (teacher / T).softmax(-1), reduction="batchmean")


def weighted(values, alpha=0.1, beta=0.1):
    return alpha * values["vcl"] + beta * values["icl"] + values["soft_vcl"] + values["soft_icl"]


@pytest.mark.parametrize("matching", ["learned", "uniform"])
def test_lmcl_is_the_sum_of_its_formula(matching):
    method, x, y = make("lmcl", "--matching", matching, arch=["resnet8", "resnet8", "wrn_10_1"])
    terms = method.terms(x, y)
    features, z, logits = method.students(x)                              # train-mode batch norm: the same again
    weights = method.matching_network(features) if matching == "learned" else torch.full((3, 3, 3, 3, 6), 0.5)
    agg, expected, N, L = method.aggregator(features, logits), 0, 3, 3
    for a in range(N):
        expected += F.cross_entropy(agg[a], y)
        for stage in range(L):
            expected += F.cross_entropy(logits[a, stage], y)
        for b in range(N):
            expected += kl(logits[a, -1], agg[b], 3)
            for s, m in itertools.product(range(L), range(L) if a != b else ()):
                w = weights[a, s, b, m].expand(2, 2, -1)[:, None, :, None]                        # [2, 1, 2, 1, B]
                two = torch.stack([z[a, s:s + 1], z[b, m:m + 1]])
                expected += 0.5 * weighted(losses.lmcl_loss(two, y, w))   # the two-student sum counts both orders: 0.5
    assert total(terms).item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(terms) == ["ce", "ce_agg", "kd", "vcl", "soft_vcl", "icl", "soft_icl", "mi_bound"]
    assert torch.allclose(method.lambda_sum, weights.mean(-1))
    assert method.second_every == (50 if matching == "learned" else 0)


def test_the_matching_network_gets_no_gradient_and_everything_else_does():
    """KD gives the aggregator, its teacher, none."""
    method, x, y = make("lmcl")
    total(method.terms(x, y)).backward()
    assert all(p.grad is None for p in method.matching_network.parameters())
    maps = [p for part in (method.students, method.aggregator) for p in part.parameters() if p.dim() > 1]
    assert all(p.grad.abs().sum() > 0 for p in maps)
    grad = torch.autograd.grad(method.terms(x, y)["kd"][1], list(method.aggregator.parameters()), allow_unused=True)
    assert grad == (None,) * len(grad)


def test_the_other_methods_are_the_sums_of_their_formulas():
    backbones = {}
    for name, *flags in (["mcl"], ["mcl", "--logit-kd"], ["deep-supervision"], ["independent"], ["dml"], ["afd"]):
        method, x, y = make(name, *flags, arch=["resnet8"] * 3)
        loss = total(method.terms(x, y))
        _, logits = method.cohort(x)
        expected = sum(F.cross_entropy(head, y) for head in logits.flatten(0, 1))
        assert len(logits[0]) == (3 if name == "deep-supervision" else 1)
        last = logits[:, -1]
        if name == "mcl":
            expected = expected + weighted(losses.mcl_loss(method.students(x)[1][:, -1], y))
        if flags:
            expected = expected + sum(kl(last[a], last.mean(0), 3) for a in range(3))
        if name in ("dml", "afd"):
            T = 1 if name == "dml" else 3
            expected = expected + sum(kl(a, b, T) / 2 for a, b in itertools.permutations(last, 2))
        if name == "afd":
            own = method.discriminators(method.discriminators.align(method.cohort.last_maps(x)[0]))
            expected = expected + 0.05 * (1 - own).square().mean(1).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5), name
        backbones[name, *flags] = [p for s in method.cohort.students for p in s.backbone.parameters()]
    for same in zip(*backbones.values(), strict=True):
        assert all(torch.equal(p, same[0]) for p in same)                 # one seed, the same initial backbones


@pytest.mark.parametrize("name", ["mcl", "lmcl"])
def test_contrast_against_the_bank(name):
    """The loss is the bank loss on the rows drawn; afterwards the batch's rows have moved, and nothing else."""
    train_labels = torch.arange(20) % 5
    method, x, _ = make(name, "--contrast", "bank", "--negatives", "7", train_labels=train_labels)
    index = torch.tensor([3, 8, 0, 11, 19, 5])
    rows, before, y = method.bank.draw(index, 0, 0), method.bank.rows.clone(), train_labels[index]
    terms = method.terms(x, y, *rows)
    features, z, _ = method.students(x)
    if name == "lmcl":
        values = losses.lmcl_bank_loss(z, *rows[1:], method.matching_network(features), tau=0.1)
    else:
        values = losses.mcl_bank_loss(z[:, -1], *(r[:, -1] for r in rows[1:4]), rows.same_class, tau=0.1)
    for k, (weight, value) in ((k, terms[k]) for k in ("vcl", "icl", "soft_vcl", "soft_icl")):
        assert value.item() == pytest.approx(values[k].item(), rel=1e-5) and weight == (1 if "soft" in k else 0.1)
    method.after_step(*rows)
    moved = (method.bank.rows != before).any(-1)                          # [N, L, n]
    expected = torch.zeros(20, dtype=torch.bool).index_fill(0, index, True)
    assert torch.equal(moved, expected.expand_as(moved))
    mean = F.normalize(0.5 * before[:, :, index].float() + 0.5 * z.detach(), dim=-1)
    assert torch.allclose(method.bank.rows[:, :, index].float(), mean, atol=1e-3)


def test_afd_students_and_discriminators_oppose_each_other():
    """Each side, moved alone, lowers its own loss and raises the other's."""
    method, x, y = make("afd", arch=["resnet8", "shufflenetv2_0.5", "wrn_10_1"])
    method.terms(x, y)
    maps, judges = method.maps, method.discriminators
    assert {m.shape for m in maps} == {(6, 64, 2, 2)}                     # the smallest width and size of the three
    adam = torch.optim.Adam(method.second_network().parameters(), lr=2e-3)
    students = [p.clone() for p in method.students.parameters()]
    moving = [m.clone().requires_grad_() for m in maps]                   # stands for the students
    sgd = torch.optim.SGD(moving, lr=1.0)

    def losses_now():
        with torch.no_grad():
            return losses.generator_loss(judges(moving)).item(), \
                losses.discriminator_loss(judges(moving), judges(maps[1:] + maps[:1])).item()

    def discriminators_move():
        method.maps = [m.detach() for m in moving]
        for _ in range(20):
            method.second_step(adam, 0.1, None, x, y)

    def students_move():
        for _ in range(20):
            sgd.zero_grad()
            losses.generator_loss(judges(moving)).backward()
            sgd.step()

    history = [losses_now()]
    for move in (discriminators_move, students_move, discriminators_move):
        move()
        history.append(losses_now())
    generator, discriminator = zip(*history, strict=True)
    assert discriminator[1] < discriminator[0]
    assert generator[2] < generator[1] and discriminator[2] > discriminator[1]            # the students gain
    assert generator[3] > generator[2] and discriminator[3] < discriminator[2]            # and lose again
    assert all(torch.equal(p, q) for p, q in zip(method.students.parameters(), students, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_hypergradient_of_the_contrastive_losses_by_finite_differences(steps):
    """lambda moved by hand, steps made by torch.optim.SGD: the soft losses' targets are constant in each step's
    gradient, but they are other constants in the next step, and the hypergradient must know."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    start = [torch.randn(s, generator=draw, dtype=torch.float64) for s in ((2, 2, 5, 4), (5, 4))]
    start[0] *= 0.5
    weights = torch.full((2, 2, 2, 2, 6), 0.5, dtype=torch.float64, requires_grad=True)
    features = lambda p: torch.einsum("nldk,bk->nlbd", p[0], x).tanh()
    inner = lambda p: weighted(losses.lmcl_loss(F.normalize(features(p), dim=-1), LABELS, weights))
    outer = lambda p: losses.cross_entropy(features(p) @ p[1], LABELS)
    sgd = dict(lr=0.02, momentum=0.9, weight_decay=5e-4)

    def final_loss():
        theta = [nn.Parameter(p.clone()) for p in start]
        optimizer = torch.optim.SGD(theta, **sgd)
        for loss in [inner] * steps + [outer]:
            for p in theta:
                p.grad = torch.zeros_like(p)                              # not None: that would spare it the decay
            loss(theta).backward()
            optimizer.step()
        return outer(theta).item()

    ours, = meta.hypergradient(inner, outer, start, [weights], inner_steps=steps, **sgd)
    for place in ((0, 0, 1, 0, 0), (0, 1, 1, 0, 3), (1, 1, 0, 1, 5), (1, 0, 0, 0, 2)):
        ends = []
        for shift in (1e-5, -2e-5, 1e-5):
            weights.data[place] += shift
            ends.append(final_loss())
        assert ours[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9)


def test_the_meta_step_moves_the_matching_network_alone():
    method, x, y = make("lmcl")
    optimizer = method.optimizers(lr=0.1, momentum=0.9, weight_decay=5e-4)[1]
    before = copy.deepcopy(method.state_dict())
    method.second_step(optimizer, 0.1, None, x, y)
    changed = {k for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.startswith("matching_network.")}


def test_fused_optimizer_steps_as_the_plain_one():
    """PyTorch's fused SGD on the CPU takes a gradient of other strides than the parameter's for one of the same."""
    method, x, y = make("lmcl", arch=["resnet8", "wrn_10_1", "shufflenetv2_0.5", "hcgnet_a1"])
    method, x = method.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(method)
    for model, kind in ((method, {"fused": True}), (twin, {"foreach": False})):
        sgd = model.optimizers(lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, **kind)[0]
        for _ in range(2):
            sgd.zero_grad()
            total(model.terms(x, y)).backward()
            sgd.step()
    for (name, p), q in zip(method.named_parameters(), twin.parameters(), strict=True):
        assert (p - q).norm() <= 1e-3 * q.norm() + 1e-6, name


def test_a_method_of_ones_own(run, monkeypatch):
    """README's own method, KDCL (MinLogit), and its own student: the loss by hand, a run."""
    for registry, name in (METHODS, "kdcl"), (models.ARCHITECTURES, "tiny"):
        monkeypatch.setitem(registry, name, None)          # the blocks register themselves, for this test
    for block in (Path(__file__).parent / "README.md").read_text().split("```python\n")[1:3]:
        exec(block.split("```")[0], {"__name__": "block"})
    METHODS["kdcl"].__doc__ = None                         # a user may leave it out
    method, x, y = make("kdcl")
    logits = method.students(x)[1][:, -1]
    by_hand = torch.stack([torch.stack([own[i] - own[i, y[i]] for own in logits]).min(0).values for i in range(6)])
    expected = sum(F.cross_entropy(own, y) + kl(own, by_hand, 3) for own in logits)
    assert total(method.terms(x, y)).item() == pytest.approx(expected.item(), rel=1e-5)
    log = run("--method", "kdcl", "--arch", "tiny", epochs=1)
    assert math.isfinite(log[1]["kd"]) and not Path("out/matching.png").exists()


def test_operations_of_a_step(images):
    """Ordinary step with its optimizer, and meta step, of resnet32 x 2, views aside: no change lets them creep up."""
    from benchmark import operations
    from experiment import Run
    args = options.parse("", ["--arch", "resnet32", "--image-size", "16"])
    args.device, dataset = torch.device("cpu"), data.load("folder", images, 16)
    method = train.build(args, dataset)
    run = Run(args, None, method, train.make_optimizers(args, method), {}, 3, 54, Processes({}), None)
    run.start_epoch(0.1)
    first, second = [batch[:2] for epoch in (0, 1) for batch in dataset.train_batches(18, 0, epoch)][:2]
    train.train_step(args, method, run, *first)                           # the first makes the momentum buffers
    assert operations(lambda: train.train_step(args, method, run, *second)) <= 1560
    assert operations(lambda: method.second_step(run.optimizers[1], 0.1, None, *second)) <= 31000
