"""methods.py: each method's loss against its formula, its second step,
and a method of a user's own."""

import copy
import importlib
import itertools
import linecache
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
import meta
import options
import train
from conftest import Convolutions, bits
from methods import METHODS, Method, SecondStep
from support.console import UserError
from support.precision import mixed_precision
from support.processes import Processes
from support.run import Run
from support.terms import as_logged, check_terms, unreached
from test_losses import bank_columns, batch_columns, naive_lmcl, naive_mcl
from test_meta import distance, gradients, runner, unrolled
from tools.benchmark import operations

LABELS = torch.tensor([0, 0, 1, 1, 2, 3])
SMALL = ["small", "small_12", "small"]  # of conftest.py: two stages, widths 8 and 12
WEIGHTS = dict(vcl=0.3, icl=0.7, soft_vcl=1.1, soft_icl=1.9)
SIX = ["--weight-vcl", "0.3", "--weight-icl", "0.7",
       "--weight-soft-vcl", "1.1", "--weight-soft-icl", "1.9",
       "--tau", "0.25", "--T", "2.5"]  # no two alike, none the default
BANK = ["--contrast", "bank", "--negatives", "7", "--bank-momentum", "0.2"]
TRAIN_LABELS, INDEX = torch.arange(20) % 5, torch.tensor([3, 8, 0, 11, 19, 5])


def make(name, *flags, arch=SMALL, train_labels=None):
    args = options.parse("", ["--method", name, "--arch", *arch, "--image-size", "16", *flags])
    torch.manual_seed(args.seed)
    method = METHODS[name](args, 5, train_labels).train()
    torch.manual_seed(1)
    return method, torch.randn(6, 3, 16, 16), LABELS


def total(terms):
    return sum(weight * value for weight, value in terms.values() if weight is not None)


def kl(student, teacher, T):
    return T * T * F.kl_div((student / T).log_softmax(-1), (teacher / T).softmax(-1),
                            reduction="batchmean")


def with_weights(values):
    return {name: (WEIGHTS[name], value) for name, value in values.items()}


def cross_entropies(heads):
    return sum(F.cross_entropy(head, LABELS) for head in heads)


def assert_terms(terms, expected):
    """The same names, weights and values, and so the same loss.

    expected: {name: (weight, value)}.
    """
    weights = lambda terms: {name: weight for name, (weight, _) in terms.items()}
    assert weights(terms) == weights(expected)
    for name, (_, value) in expected.items():
        assert terms[name][1].item() == pytest.approx(value.item(), rel=1e-4), name
    assert total(terms).item() == pytest.approx(total(expected).item(), rel=1e-5)


# ---------------------------------------------------------------- the losses

def bound(z):
    """log K - ICL at tau 0.25, mean over all ordered pairs;
    K = 4 for each anchor that has a positive."""
    pairs = list(itertools.permutations(z, 2))
    return math.log(4) - sum(losses.icl(z_a, z_b, LABELS, 0.25) for z_a, z_b in pairs) / len(pairs)


@pytest.mark.parametrize("matching", ["learned", "uniform"])
def test_lmcl_is_the_sum_of_its_formula(matching):
    """The contrastive terms one pair of stages and one sample at a time."""
    method, x, y = make("lmcl", *SIX, "--matching", matching)
    terms = method.terms(method(x), y, None)
    features, z, logits = method.students(x)  # train-mode batch norm: the same again
    learned = matching == "learned"
    weights = method.matching_network(features) if learned else torch.full((3, 2, 3, 2, 6), 0.5)
    aggregated = method.aggregator(features, logits)
    name, value = list(terms)[-1], terms["matching"]
    assert name == "matching" and value[0] is None and torch.equal(value[1], weights.mean(-1))
    del terms["matching"], terms["vcl_gain"], terms["icl_gain"]  # the gains: test_losses.py
    assert_terms(terms, {
        "ce": (1, cross_entropies(logits.flatten(0, 1))),
        "ce_agg": (1, cross_entropies(aggregated)),
        "kd": (1, sum(kl(a, b, 2.5) for a, b in itertools.product(logits[:, -1], aggregated))),
        **with_weights(naive_lmcl(batch_columns(z, y.tolist(), 0.25), weights, 2.5)),
        "mi_bound": (None, bound(z[:, -1]))})
    assert (method.second.every if learned else method.second) == (50 if learned else None)


def test_mcl_is_the_sum_of_its_formula():
    method, x, y = make("mcl", *SIX, "--logit-kd")
    terms = method.terms(method(x), y, None)
    _, z, logits = method.students(x)
    z, logits = z[:, 0], logits[:, 0]
    expected = {
        "ce": (1, cross_entropies(logits)),
        **with_weights(naive_mcl(batch_columns(z, y.tolist(), 0.25), 3, 6, 2.5)),
        "kd": (1, sum(kl(own, logits.mean(0), 2.5) for own in logits)),
        "mi_bound": (None, bound(z))}
    gains = [terms.pop(name) for name in ("vcl_gain", "icl_gain")]
    assert all(weight is None for weight, _ in gains)
    assert_terms(terms, expected)
    method, *_ = make("mcl", *SIX)
    del expected["kd"]
    terms = method.terms(method(x), y, None)
    assert_terms({name: terms[name] for name in expected}, expected)


@pytest.mark.parametrize("name", ["mcl", "lmcl"])
def test_contrast_against_the_bank(name):
    """Against loops over the rows drawn;
    afterwards the batch's rows have moved, and nothing else."""
    method, x, _ = make(name, *SIX, *BANK, train_labels=TRAIN_LABELS)
    y, before, rows = TRAIN_LABELS[INDEX], method.bank.rows.clone(), method.bank.sample(INDEX, 0, 0)
    outputs = method(x)
    terms, z, L = method.terms(outputs, y, rows), method.students(x)[1], method.cohort.stages
    assert L == (2 if name == "lmcl" else 1) and rows.negatives.shape == (3, L, 7, 128)
    contrast = [t.float() for t in (rows.own, rows.positive, rows.negatives)]
    if name == "lmcl":
        columns = bank_columns(z, *contrast, rows.same_class, 0.25)
        values = naive_lmcl(columns, method.matching_network(outputs.features), 2.5)
    else:
        columns = bank_columns(z[:, 0], *(t[:, 0] for t in contrast), rows.same_class, 0.25)
        values = naive_mcl(columns, 3, 6, 2.5)
    assert_terms({k: terms[k] for k in WEIGHTS}, with_weights(values))
    assert "mi_bound" not in terms and "vcl_gain" in terms

    method.bank.written.fill_(True)
    method.after_step(outputs, rows)
    moved = (method.bank.rows != before).any(-1)  # [N, L, n]
    expected = torch.zeros(20, dtype=torch.bool).index_fill(0, INDEX, True)
    assert torch.equal(moved, expected.expand_as(moved))
    mean = F.normalize(0.2 * before[:, :, INDEX].float() + 0.8 * z.detach(), dim=-1)
    assert torch.allclose(method.bank.rows[:, :, INDEX].float(), mean, atol=1e-3)
    # the rows are equal everywhere
    averaged = [b for b in method.statistics() if b is method.bank.stored]
    other, *_ = make(name, *BANK, "--seed", "1", train_labels=TRAIN_LABELS)
    assert averaged == [] and not torch.equal(other.bank.rows, before)


def test_the_other_methods_are_the_sums_of_their_formulas():
    """And one seed gives all methods the same initial backbones."""
    backbones = {}
    for name, *flags in (["deep-supervision"], ["independent"], ["dml"],
                         ["afd", "--T", "2.5", "--weight-adversarial", "0.3"], ["mcl"], ["lmcl"]):
        method, x, y = make(name, *flags)
        backbones[name] = [bits(student.backbone.state_dict())
                           for student in method.cohort.students]
        for student in method.cohort.students:  # of small logits T^2 KL hardly depends on T
            student.backbone.classifier.weight.data.mul_(20)
        terms = method.terms(method(x), y, None)
        _, logits = method.cohort(x)
        last, expected = logits[:, -1], {"ce": (1, cross_entropies(logits.flatten(0, 1)))}
        assert logits.shape == (3, 2 if name in ("deep-supervision", "lmcl") else 1, 6, 5)
        if name in ("dml", "afd"):
            T = 1 if name == "dml" else 2.5
            expected["kd"] = 1, sum(kl(a, b, T) / 2 for a, b in itertools.permutations(last, 2))
        if name == "afd":
            own = method.discriminators(method.discriminators.align(method.cohort.last_maps(x)[0]))
            expected["adversarial"] = 0.3, (1 - own).square().mean(1).sum()
        if name not in ("mcl", "lmcl"):
            assert_terms(terms, expected)
    assert all(b == backbones["independent"] for b in backbones.values())


@pytest.mark.parametrize("name", METHODS)
def test_one_student(name):
    """No second step; what is mutual is 0 or left out;
    lmcl's student has its aggregator for a teacher."""
    method, x, y = make(name, "--num-nets", "1", arch=["small"])
    terms = method.terms(method(x), y, None)
    assert method.second is None and len(method.optimizers()) == 1
    assert not terms.keys() & {"mi_bound", "matching", "adversarial"}
    mutual = {"icl", "soft_vcl", "soft_icl"} | ({"kd"} if name != "lmcl" else set())
    assert all(terms[k][1] == 0 for k in terms.keys() & mutual)


def test_what_gets_gradient_from_lmcl():
    """Not the matching network; all the rest. KD gives the aggregator, its teacher, none."""
    method, x, y = make("lmcl")
    outputs = method(x)
    terms = method.terms(outputs, y, None)
    aggregator = list(method.aggregator.parameters())
    grad = torch.autograd.grad(terms["kd"][1], aggregator, retain_graph=True, allow_unused=True)
    assert grad == (None,) * len(grad)
    total(terms).backward()
    assert all(p.grad is None for p in method.matching_network.parameters())
    maps = [p for part in (method.students, method.aggregator)
            for p in part.parameters() if p.dim() > 1]
    assert all(p.grad.abs().sum() > 0 for p in maps)


@pytest.mark.parametrize(("name", "flags"), [
    ("independent", []), ("afd", []), ("mcl", ["--logit-kd"]), ("lmcl", []),
    ("lmcl", ["--contrast", "bank", "--negatives", "16"])])
def test_bfloat16(name, flags):
    """Networks in bfloat16, the loss in float32: shapes of float32 and, roughly, its values."""
    method, x, y = make(name, *flags, train_labels=TRAIN_LABELS)
    rows = method.bank.sample(INDEX, 0, 0) if method.bank else None
    y = TRAIN_LABELS[INDEX] if rows else y
    plain = method(x)
    expected = method.terms(plain, y, rows)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = method(x)
        terms = method.terms(outputs, y, rows)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.logits.shape == plain.logits.shape
    assert torch.allclose(outputs.logits.float(), plain.logits, atol=0.05)
    if name in ("mcl", "lmcl"):
        assert outputs.embeddings.dtype == torch.float32
        assert torch.allclose(outputs.embeddings, plain.embeddings, atol=0.02)
    assert terms.keys() == expected.keys()
    for k, (weight, value) in terms.items():
        assert value.dtype == torch.float32 and weight == expected[k][0]
        assert torch.allclose(value, expected[k][1], rtol=0.02, atol=0.02), k
    if name == "afd":
        grads = []
        for made in (outputs, plain):
            made = made._replace(maps=[m.detach() for m in made.maps])
            assert made.maps[0].dtype == made.logits.dtype
            method.second.step(method.optimizers()[1], 0.1, None, x, y, None, made)
            grads.append([g.clone() for g in gradients(method.second.network)])
        assert distance(*grads) < 0.05


@pytest.mark.parametrize("amp, expected", [
    ("bf16", {True: {torch.float32}, False: {torch.bfloat16}}),
    ("no", {True: {torch.float32}, False: {torch.float32}})])
def test_depthwise_convolutions_stay_in_float32(amp, expected):
    """On the CPU: their backward pass in bfloat16 may take 20 times as long."""
    method, _, y = make("independent", "--amp", amp,
                        arch=["little_mobilenet_v3_small", "little_regnet"])
    method.args.device, x = torch.device("cpu"), torch.randn(6, 3, 32, 32)
    run = SimpleNamespace(optimizers=method.optimizers(), processes=Processes({}))
    with Convolutions() as convolutions:
        _, outputs = train.train_step(method.args, method, run, x, y, None)
    assert convolutions.seen == expected
    assert outputs.logits.dtype == (torch.bfloat16 if amp == "bf16" else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_depthwise_convolution_is_rounded_at_its_end_alone(dtype):
    args = SimpleNamespace(amp="bf16", device=torch.device("cpu"))
    conv = nn.Conv2d(4, 8, 3, stride=2, groups=4)
    x = torch.randn(2, 4, 6, 6).to(dtype)
    with mixed_precision(args):
        found = conv(x)
        with torch.autocast("cpu", enabled=False):
            assert conv(x.float()).dtype == torch.float32
    assert torch.equal(found, conv(x.float()).bfloat16())


# ---------------------------------------------------------------- when contrast begins

@pytest.mark.parametrize("name", ["mcl", "lmcl"])
def test_contrast_begins_late_and_its_soft_losses_grow(name):
    """Start 2, ramp 4: none of the four before epoch 2,
    then gamma and lam times 1/4, 2/4, 3/4, 1, 1."""
    method, x, _ = make(name, *SIX, *BANK, "--contrast-start", "2", "--soft-ramp", "4",
                        train_labels=TRAIN_LABELS)
    y, rows = TRAIN_LABELS[INDEX], method.bank.sample(INDEX, 0, 0)
    outputs, share = method(x), method.soft_share
    full = method.terms(outputs, y, rows)
    for epoch, expected in enumerate([0, 0, 0.25, 0.5, 0.75, 1, 1]):
        method.start_epoch(epoch)
        terms = method.terms(outputs, y, rows)
        assert method.soft_share is share  # in place: a captured step reads it
        if not expected:
            assert full.keys() - terms.keys() == {*WEIGHTS, "vcl_gain", "icl_gain"}
            assert all(torch.equal(terms[k][1], full[k][1]) for k in terms)
            continue
        for k, weight in WEIGHTS.items():
            assert terms[k][0] == pytest.approx(weight * (expected if "soft" in k else 1), rel=1e-6)
            assert torch.equal(terms[k][1], full[k][1])
        inner = method.contrastive_terms(outputs.embeddings, y, torch.ones(3, 2, 3, 2, 6), rows)
        assert {k: weight for k, (weight, _) in inner.items()} == {k: terms[k][0] for k in WEIGHTS}
    if name == "lmcl":
        due = [[method.second.is_due(epoch, step) for epoch in (0, 1, 2)] for step in (49, 50)]
        assert due == [[False, False, False], [False, False, True]]
    else:
        assert method.second is None
    words = method.schedule()
    assert words == "contrast from epoch 3 on, its soft losses grow to full weight in 4 epochs"
    method.start_epoch(2)
    logged = as_logged(torch.zeros(()), method.terms(outputs, y, rows))
    assert torch.equal(logged["soft_vcl"],
                       0.25 * WEIGHTS["soft_vcl"] * logged["unweighted_soft_vcl"])
    method.args.epochs = 2
    assert method.schedule().endswith(", never in this run: lower --contrast-start")


def test_published_contrast_is_at_full_weight_at_once():
    """Plain numbers, as without these options; the defaults in the batch."""
    method, *_ = make("lmcl", *SIX)
    same, *_ = make("lmcl", *SIX, "--contrast-start", "0", "--soft-ramp", "0")
    for m in (method, same):
        m.start_epoch(0)
        weights = {k: weight for k, (weight, _) in m.weighted(dict.fromkeys(WEIGHTS)).items()}
        assert weights == WEIGHTS and all(type(w) is float for w in weights.values())
        assert m.phase == "contrast" and not m.schedule() and m.second.first == 0


def test_the_warning_that_contrast_teaches_nothing():
    # starts with epoch 1, the log's second
    method, *_ = make("lmcl", *BANK, train_labels=TRAIN_LABELS)
    line = lambda epoch, gain: dict(epoch=epoch, vcl_gain=gain)
    assert not any(method.warning(x) for x in (dict(epoch=1), line(2, 0.0), line(3, 0.011)))
    assert "vcl_gain is 0.009 nats; try a larger --weight-vcl" in method.warning(line(3, 0.009))
    silent, *_ = make("mcl", "--weight-vcl", "0", "--weight-icl", "0")
    assert not silent.warning(line(9, 0.0)) and not make("independent")[0].warning(dict(epoch=9))


# --------------------------------------------------------------- what is trained after the SGD step

@pytest.mark.parametrize(("arch", "steps"), [
    (["small", "small_12"], 4), (["resnet8", "resnet8"], 1), (SMALL, 2)],
    ids=["two", "resnet8", "three"])
@pytest.mark.parametrize("lam", ["held", "moving"])
@pytest.mark.parametrize("contrast", ["batch", "bank"])
def test_the_meta_step_is_that_of_the_options(contrast, lam, arch, steps):
    """Its gradient equals autograd through the unrolled virtual steps;
    the matching network alone moves."""
    method, x, y = make("lmcl", *SIX, *(BANK if contrast == "bank" else ()),
                        "--momentum", "0.5", "--weight-decay", "0.01",
                        "--meta-steps", str(steps), "--virtual-lambda", lam,
                        arch=arch, train_labels=TRAIN_LABELS)
    method, x, rows = method.double(), x.double(), None
    loss = lambda z, weights: losses.lmcl_loss(z, y, weights, 0.25, 2.5)
    if contrast == "bank":
        y, rows = TRAIN_LABELS[INDEX], method.bank.sample(INDEX, 0, 0)
        loss = lambda z, weights: losses.lmcl_bank_loss(z, *rows[1:], weights, 0.25, 2.5)
    params, call = runner(copy.deepcopy(method.students))
    phi = method.matching_network
    held = phi([f.detach() for f in call(params, x)[0]])

    def inner(p):
        features, z, _ = call(p, x)
        return total(with_weights(loss(z, phi(features) if lam == "moving" else held)))

    outer = lambda p: losses.cross_entropy(call(p, x)[2], y)
    final = unrolled(inner, outer, params, None, steps, lr=0.05, momentum=0.5, weight_decay=0.01)
    exact = torch.autograd.grad(final, list(phi.parameters()))

    before, averages = copy.deepcopy(method.state_dict()), []
    average = lambda vector: averages.append(vector) or vector
    method.second.step(method.optimizers()[1], 0.05, average, x, y, rows, None)
    assert averages and distance(gradients(method.matching_network), exact) < 1e-12
    changed = {k for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.startswith("matching_network.")}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_hypergradient_of_the_contrastive_losses_by_finite_differences(steps):
    """lambda moved by hand, steps made by torch.optim.SGD: the soft losses' targets are constant
    in each step's gradient, but they are other constants in the next step,
    and the hypergradient must know."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    start = [torch.randn(s, generator=draw, dtype=torch.float64) for s in ((2, 2, 5, 4), (5, 4))]
    start[0] *= 0.5
    weights = torch.full((2, 2, 2, 2, 6), 0.5, dtype=torch.float64, requires_grad=True)
    features = lambda p: torch.einsum("nldk,bk->nlbd", p[0], x).tanh()
    contrast = lambda p: losses.lmcl_loss(F.normalize(features(p), dim=-1), LABELS, weights)
    inner = lambda p: total(with_weights(contrast(p)))
    outer = lambda p: losses.cross_entropy(features(p) @ p[1], LABELS)
    sgd = dict(lr=0.02, momentum=0.9, weight_decay=5e-4)

    def final_loss():
        theta = [nn.Parameter(p.clone()) for p in start]
        optimizer = torch.optim.SGD(theta, **sgd)
        for loss in [inner] * steps + [outer]:
            for p in theta:
                p.grad = torch.zeros_like(p)  # not None: that would spare it the decay
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


def test_afd_students_and_discriminators_oppose_each_other():
    """Each side, moved alone, lowers its own loss and raises the other's."""
    method, x, y = make("afd", arch=["resnet8", "shufflenetv2_0.5", "wrn_10_1"])
    outputs, judges = method(x), method.discriminators
    maps = outputs.maps
    assert {m.shape for m in maps} == {(6, 64, 2, 2)}  # the smallest width and size of the three
    own = method.optimizers()[1]
    assert isinstance(own, torch.optim.Adam)
    assert (own.defaults["lr"], own.defaults["betas"]) == (2e-4, (0.5, 0.999))
    adam = torch.optim.Adam(method.second.network.parameters(), lr=2e-3)
    students = [p.clone() for p in method.students.parameters()]
    moving = [m.detach().clone().requires_grad_() for m in maps]  # stands for the students
    sgd = torch.optim.SGD(moving, lr=1.0)

    def losses_now():
        with torch.no_grad():
            own, peer = judges(moving), judges(maps[1:] + maps[:1])
            return (losses.generator_loss(own).item(),
                    losses.discriminator_loss(own, peer).item())

    def discriminators_move():
        made = outputs._replace(maps=[m.detach() for m in moving])
        for _ in range(20):
            method.second.step(adam, 0.1, None, x, y, None, made)

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
    assert method.second.every == 1 and discriminator[1] < discriminator[0]
    assert generator[2] < generator[1] and discriminator[2] > discriminator[1]  # the students gain
    assert generator[3] > generator[2] and discriminator[3] < discriminator[2]  # and lose again
    assert all(torch.equal(p, q)
               for p, q in zip(method.students.parameters(), students, strict=True))


# ---------------------------------------------------------------- optimizers and cost

@pytest.mark.parametrize(("name", "arch"), [
    ("lmcl", ["small", "small_12"]), ("mcl", ["wrn_10_1", "shufflenetv2_0.5", "hcgnet_a1"])])
def test_optimizers_are_those_of_the_options(name, arch):
    """Plain SGD makes the same steps.

    PyTorch's fused SGD on the CPU takes a gradient of other strides than the parameter's
    for one of the same.
    """
    method, x, y = make(
        name, "--lr", "0.01", "--momentum", "0.6", "--weight-decay", "0.02", arch=arch)
    method = method.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(method)
    trained = [p for k, p in twin.named_parameters() if not k.startswith("matching_network.")]
    plain = torch.optim.SGD(trained, lr=0.01, momentum=0.6, weight_decay=0.02,
                            nesterov=True, foreach=False)
    ours, *others = method.optimizers()
    for model, sgd in ((method, ours), (twin, plain)):
        for _ in range(2):
            sgd.zero_grad()
            total(model.terms(model(x), y, None)).backward()
            sgd.step()
    for (key, p), q in zip(method.named_parameters(), twin.named_parameters(), strict=True):
        assert (p - q[1]).norm() <= 1e-3 * q[1].norm() + 1e-6, key
    if name == "lmcl":
        theirs = others[0].param_groups[0]
        assert (list(map(id, theirs["params"]))
                == list(map(id, method.matching_network.parameters())))
        assert [theirs[k] for k in ("lr", "momentum", "weight_decay", "nesterov")] == [
            0.01, 0.6, 0.02, True]


def test_adamw_and_no_decay_of_vectors():
    """AdamW trains what the loss trains, SGD the matching network;
    both have the options' rate and decay."""
    method, _, _ = make("lmcl", "--optimizer", "adamw", "--no-decay-1d", arch=["small"])
    ours, second = method.optimizers()
    matrices, vectors = ours.param_groups
    assert type(ours) is torch.optim.AdamW and type(second) is torch.optim.SGD
    assert ({p.dim() for p in vectors["params"]} == {1}
            and min(p.dim() for p in matrices["params"]) == 2)
    trained = {p for k, p in method.named_parameters() if not k.startswith("matching_network.")}
    assert {*matrices["params"], *vectors["params"]} == trained
    settings = [(g["lr"], g["weight_decay"]) for g in (matrices, vectors, *second.param_groups)]
    assert settings == [(0.001, 0.05), (0.001, 0), (0.001, 0.05)]
    plain, = make("mcl", "--no-decay-1d", "--lr", "0.2", arch=["small"])[0].optimizers()
    assert type(plain) is torch.optim.SGD
    assert [(g["lr"], g["weight_decay"]) for g in plain.param_groups] == [(0.2, 5e-4), (0.2, 0)]


def test_operations_of_a_step():
    """Ordinary step with its optimizer, and meta step, of resnet8 x 2, views aside:
    they do not creep up."""
    method, x, y = make("lmcl", "--device", "cpu", arch=["resnet8"])
    args, batch = method.args, (x, y, None)
    args.device = torch.device("cpu")
    run = Run(args, None, method, method.optimizers(), metadata={}, steps_per_epoch=3,
              images_per_epoch=18, processes=Processes({}), signals=None)
    _, outputs = train.train_step(args, method, run, *batch)  # the first makes the momentum buffers
    assert operations(lambda: train.train_step(args, method, run, *batch)) <= 710
    assert operations(
        lambda: method.second.step(run.optimizers[1], 0.1, None, *batch, outputs)) <= 8400


# ---------------------------------------------------------------- a method of a user's own

def readmes_method():
    """KDCL, as README has it: KL towards the smallest of all students' logits, each less its true
    class's (CVPR 2020)."""
    readme = Path(train.__file__).with_name("README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    block, = (block for block in blocks if "class KDCL" in block)
    space = {"__name__": "my_method"}
    exec(block, space)
    return METHODS.pop("kdcl")


KDCL = readmes_method()


SECOND = """
import torch, methods
class Mine(methods.Method):
    margin = {margin}
    def __init__(self, *args):
        super().__init__(*args)
        self.second = {second}
"""


def test_an_edited_method_is_another_one(run, capsys, monkeypatch, tmp_path):
    """The log's first line has a digest of the method's file; --resume names the change."""
    def define(margin):
        Path("mine.py").write_text(SECOND.format(margin=margin, second=None))
        sys.modules.pop("mine", None)
        importlib.invalidate_caches()
        monkeypatch.setitem(METHODS, "mine", importlib.import_module("mine").Mine)

    monkeypatch.syspath_prepend(tmp_path)
    # it would outlive an edit in the same second
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    codes = []
    for margin, out in ((1, "a"), (1, "b"), (2, "c")):
        linecache.clearcache()
        define(margin)
        codes.append(run("--method", "mine", "--max-steps", 1, out=out)[0]["code"])
    assert codes[0] == codes[1] != codes[2]
    with pytest.raises(SystemExit):
        run("--method", "mine", "--resume", out="a")
    error = capsys.readouterr().err
    assert ("own method or students has changed since a/last.pt was made" in error
            and error.count("\n") == 1)
    run("--method", "mine", "--resume", out="c", epochs=2)
    assert run("--method", "dml", "--max-steps", 1, out="ours")[0]["code"] is None
    sys.modules.pop("mine")


@pytest.mark.parametrize(("second", "words"), [
    (lambda: "step", "is a str"), (lambda: SecondStep("s", 1, None, print), "has no network"),
    (lambda: SecondStep("s", 1, torch.nn.ReLU(), print), "has no network with parameters"),
    (lambda: SecondStep("s", 0, torch.nn.Linear(1, 1), print), "is made after every 0 steps"),
    (lambda: SecondStep("s", 1, torch.nn.Linear(1, 1), print), "trains a network that is no part")])
def test_a_wrong_second_step_is_said_at_the_start(kdcl, run, monkeypatch, capsys, second, words):
    true = KDCL.__init__
    monkeypatch.setattr(KDCL, "__init__",
                        lambda self, *a: (true(self, *a), setattr(self, "second", second()))[0])
    with pytest.raises(SystemExit):
        run("--method", "kdcl")
    error = capsys.readouterr().err
    assert (f"KDCL.second {words}" in error and error.count("\n") == 1
            and not Path("out/last.pt").exists())


@pytest.fixture
def kdcl(monkeypatch):
    monkeypatch.setitem(METHODS, "kdcl", KDCL)


def test_a_method_of_ones_own(kdcl, run, monkeypatch, capsys):
    """The loss by hand, and a run."""
    monkeypatch.setattr(KDCL, "__doc__", None)  # a user may leave it out
    method, x, y = make("kdcl", "--weight-kd", "0.5")
    logits = method.students(x)[1][:, -1]
    # [N, C] each
    less_true = [torch.stack([own[i] - own[i, y[i]] for own in logits]) for i in range(6)]
    by_hand = torch.stack([smallest.min(0).values for smallest in less_true])
    assert_terms(method.terms(method(x), y, None), {
        "ce": (1, cross_entropies(logits)),
        "kd": (0.5, sum(kl(own, by_hand, 3) for own in logits))})
    first, line = run("--method", "kdcl", "--weight-kd", "0.5", epochs=1)
    assert first["args"]["weight_kd"] == 0.5
    assert line["kd"] == pytest.approx(0.5 * line["unweighted_kd"], rel=1e-4)  # the log rounds
    assert line["loss"] == pytest.approx(line["ce"] + line["kd"], rel=1e-4)
    assert not Path("out/matching.png").exists()
    printed = capsys.readouterr().out
    assert "loss       kdcl: ce + 0.5 kd; T 3.0\n" in printed
    run("--method", "dml", "--max-steps", 1, out="dml")
    assert "loss       dml: ce + kd; T 1.0\n" in capsys.readouterr().out


def test_options_of_a_method_of_ones_own(kdcl, capsys):
    parse = lambda *flags: options.parse("", ["--arch", "small", "--method", *flags])
    default, given = parse("kdcl"), parse("kdcl", "--weight-kd", "0.5")
    assert (default.weight_kd, given.weight_kd) == (1.0, 0.5)
    assert given.out_dir == default.out_dir + "-weight-kd-0.5" and "weight_kd" not in parse("dml")
    for name, flag, owners in ("dml", "--weight-kd", "kdcl"), ("kdcl", "--tau", "lmcl or mcl"):
        with pytest.raises(SystemExit) as end:
            parse(name, flag, "1")
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1
        assert (f"argument {flag}: {name} has no such option, "
                f"it goes with --method {owners} ") in error


def test_options_that_argparse_allows_in_a_method(kdcl, monkeypatch, capsys):
    """Short flags, groups, required ones, a % in the docstring;
    but no type that a checkpoint cannot hold."""
    def add_options(group):
        either = group.add_mutually_exclusive_group()
        either.add_argument("-w", "--weight-kd", type=float, default=1.0)
        either.add_argument("--no-kd", action="store_true")
        group.add_argument("--teacher", type=Path)
        group.add_argument("--grade", required=True)

    monkeypatch.setattr(KDCL, "add_options", staticmethod(add_options))
    monkeypatch.setattr(KDCL, "__doc__", "90% of KDCL")
    parse = lambda *flags: options.parse("", ["--arch", "small", "--method", *flags])
    assert parse("kdcl", "--grade", "a", "-w", "2").out_dir.endswith("-grade-a-weight-kd-2.0")
    for flags, words in (
            (["kdcl", "--grade", "a", "--teacher", "x"],
             "--teacher: a checkpoint cannot hold a PosixPath"),
            (["dml", "--no-kd"], "--no-kd: dml has no such option, it goes with --method kdcl"),
            (["kdcl", "--grade", "a", "--no-such"], "unrecognized argument --no-such")):
        with pytest.raises(SystemExit):
            parse(*flags)
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        parse("kdcl", "--help")
    assert "90% of KDCL" in " ".join(capsys.readouterr().out.split())


ONE = torch.ones(())


@pytest.mark.parametrize(("terms", "words"), [
    (ONE, "returns a Tensor"), ({}, "returns a dict"), (None, "returns a NoneType"),
    ({"ce": ONE}, "'ce' is no pair"), ({"ce": (1, ONE, ONE)}, "'ce' is no pair"),
    ({"ce": (1, ONE), "kd": (1, 0.5)}, "value of 'kd' is no tensor"),
    ({"ce": (1, torch.ones(1))}, "value of 'ce' is no tensor with one number"),
    ({"ce": (None, 0.5)}, "value of 'ce' is no tensor"),
    ({"ce": (torch.ones(1), ONE)}, "weight of 'ce' is a Tensor"),
    ({"ce": (None, ONE), "kd": (None, ONE)}, "no weight but None"),
    ({"ce": (1, ONE), "step": (None, ONE)}, "another use for 'step'"),
    ({"loss": (1, ONE)}, "another use for 'loss'"),
    ({"ce": (1, ONE), "matching": (None, ONE)}, "'matching' is drawn"),
    ({"my_top1": (1, ONE)}, "another use for 'my_top1'")])
def test_wrong_terms_are_one_line(kdcl, terms, words):
    method, *_ = make("kdcl", arch=["small"])
    with pytest.raises(UserError) as error:
        check_terms(method, terms)
    message = str(error.value)
    assert message.startswith("KDCL.terms") and words in message and "\n" not in message


def test_right_terms(kdcl):
    method, *_ = make("kdcl", arch=["small"])
    check_terms(method, {"ce": (1, ONE), "kd": (0.5, ONE), "seen": (None, torch.ones(2, 3))})


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_every_method_reaches_all_that_it_trains(name):
    method, x, y = make(name)
    assert unreached(method, method.terms(method(x), y, None)) == []


class Odd(Method):
    """A learned weight, a table of five axes, a teacher that only no_grad protects."""

    def __init__(self, *args):
        super().__init__(*args)
        self.share = torch.nn.Parameter(torch.tensor(0.5))
        self.table = torch.nn.Parameter(torch.ones(1, 2, 1, 2, 3))
        self.teacher = torch.nn.Linear(1, 1)

    def terms(self, outputs, labels, rows):
        with torch.no_grad():
            self.teacher(torch.ones(1, 1))
        terms = super().terms(outputs, labels, rows)
        return terms | {"kd": (self.share, self.table.square().mean())}


def test_convolutions_alone_are_channels_last(monkeypatch):
    monkeypatch.setitem(METHODS, "odd", Odd)
    args = options.parse("", ["--method", "odd", "--arch", *SMALL])
    args.device = torch.device("cpu")
    dataset = SimpleNamespace(classes="abc", train_labels=torch.zeros(2))
    built = train.build(args, dataset)
    weights = [m.weight for m in built.modules() if isinstance(m, torch.nn.Conv2d)]
    assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert built.table.is_contiguous()


def test_a_network_that_no_optimizer_holds_is_not_missed():
    class Mine(METHODS["independent"]):
        def __init__(self, *args):
            super().__init__(*args)
            self.extra = torch.nn.Linear(1, 1)

        def optimizers(self):
            return [torch.optim.SGD(self.students.parameters(), self.args.lr)]

    method = Mine(make("independent")[0].args, 5)
    x, y = torch.randn(6, 3, 16, 16), LABELS
    assert unreached(method, method.terms(method(x), y, None)) == []


def test_what_no_term_reaches_is_said_at_the_start(run, monkeypatch, capsys):
    """Weight decay would shrink it, step by step."""
    monkeypatch.setitem(METHODS, "odd", Odd)
    run("--method", "odd", "--max-steps", 1)
    printed = capsys.readouterr().out
    assert "loss       odd: ce + 0.5 kd\n" in printed
    assert ("warning    no term of the loss, as it begins, reaches teacher.weight, teacher.bias: "
            "weight decay alone moves them; requires_grad_(False) keeps" in printed)
    method, x, y = make("odd")
    method.teacher.requires_grad_(False)
    assert unreached(method, method.terms(method(x), y, None)) == []
    with pytest.raises(UserError, match="^Odd.terms: no term with a weight depends on a param"):
        unreached(method, {"ce": (1, ONE)})


def test_a_run_ends_before_it_starts_where_a_method_gives_wrong_terms(kdcl, fails, monkeypatch):
    monkeypatch.setattr(KDCL, "terms", lambda self, outputs, labels, rows: {"ce": (1, 0.5)})
    fails(["--method", "kdcl"], "KDCL.terms", "'ce'")


def test_terms_that_change_within_an_epoch_end_a_run_in_one_line(kdcl, run, monkeypatch, capsys):
    """By name too: sums of equal sizes would take each other's place."""
    calls, terms = itertools.count(), KDCL.terms

    def renamed(*inputs):
        found = terms(*inputs)
        return found if next(calls) < 3 else {"ce": found["ce"], "other": found["kd"]}

    monkeypatch.setattr(KDCL, "terms", renamed)
    with pytest.raises(SystemExit):
        run("--method", "kdcl")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "from loss, ce, kd to loss, ce, other" in error
