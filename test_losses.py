"""losses.py against Python loops written from the formulas, in float64."""

import itertools
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import losses

LABELS = {
    "pairs": [0, 0, 1, 1, 2, 2, 3, 3],
    "unequal": [0, 0, 0, 0, 1, 1, 1, 2],  # one class of four, one of three, one alone
    "one class": [5] * 8,
    "no positive": list(range(8)),
}
SAME_CLASS = {  # [6, 10], the negatives that an anchor leaves out
    "none": torch.zeros(6, 10, dtype=torch.bool),
    "some": torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.4,
    "a row and a column": (torch.arange(6)[:, None] == 2) | (torch.arange(10) == 7),
    "all": torch.ones(6, 10, dtype=torch.bool),
}


def unit(*shape, dtype=torch.float64, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1).to(dtype)


def symmetric_weights(N, L, B, seed=0):
    w = torch.rand(N, L, N, L, B, generator=torch.Generator().manual_seed(seed),
                   dtype=torch.float64)
    return (w + w.permute(2, 3, 0, 1, 4)) / 2


def bank(*sets, B=6, K=10, D=5, dtype=torch.float64):
    """own, positive, negatives: rows of the bank for embedding sets of shape `sets`,
    [N] or [N, L]."""
    return [unit(*sets, rows, D, dtype=dtype, seed=rows + i) for i, rows in enumerate((B, B, K))]


def total(r):
    return 0.1 * r["vcl"] + r["soft_vcl"] + 0.3 * r["icl"] + 0.7 * r["soft_icl"]


# ------------------------------------------------------- the oracle: one pair, one anchor at a time
#
# columns(s, t, i) of anchor i of set s against set t: scores [M], the positives' indices,
# the hard losses' candidates.

def batch_columns(z, y, tau):
    def columns(s, t, i):
        others = [j for j in range(len(y)) if j != i]
        return z[t] @ z[s][i] / tau, [j for j in others if y[j] == y[i]], others
    return columns


def bank_columns(z, own, positive, negatives, same_class, tau):
    def columns(s, t, i):
        kept = [negatives[t][k] for k in range(negatives[t].shape[0]) if not same_class[i, k]]
        first = [positive[t][i]] if s == t else [own[t][i], positive[t][i]]
        rows = torch.stack(first + kept)
        return rows @ z[s][i] / tau, list(range(len(first))), list(range(len(rows)))
    return columns


def naive_nce(scores, positive, candidates):
    """None without a positive."""
    share = scores.exp() / scores[candidates].exp().sum()
    return -sum(share[j].log() for j in positive) / len(positive) if positive else None


def naive_kl(student, teacher, T):
    p, q = ((scores / T).exp() / (scores / T).exp().sum() for scores in (student, teacher.detach()))
    return T ** 2 * (q * (q / p).log()).sum()


def naive_mean(values, weights):
    kept = [w * x for x, w in zip(values, weights, strict=True) if x is not None]
    return sum(kept) / len(kept) if kept else torch.tensor(0.0, dtype=torch.float64)


def naive_terms(columns, s, t, w, T):
    """One direction of the pair: VCL_s, ICL_{s,t}, Soft VCL_{s<-t}, Soft ICL_{s<-t},
    weighted by w[i]."""
    values = dict(vcl=[], icl=[], soft_vcl=[], soft_icl=[])
    for i in range(len(w)):
        ss, st, ts, tt = columns(s, s, i), columns(s, t, i), columns(t, s, i), columns(t, t, i)
        values["vcl"].append(naive_nce(*ss))
        values["icl"].append(naive_nce(*st))
        values["soft_vcl"].append(naive_kl(ss[0], tt[0], T))
        values["soft_icl"].append(naive_kl(st[0], ts[0], T))
    return {name: naive_mean(anchors, w) for name, anchors in values.items()}


def naive_lmcl(columns, w, T):
    sets = list(itertools.product(*map(range, w.shape[:2])))
    result = dict(vcl=0, soft_vcl=0, icl=0, soft_icl=0)
    for s, t in itertools.product(sets, sets):
        if s[0] != t[0]:  # s = (a, l), t = (b, m), a != b
            for one, other in ((s, t), (t, s)):  # the pair's term holds both directions
                for k, v in naive_terms(columns, one, other, w[s + t], T).items():
                    result[k] = result[k] + v
    return result


def naive_mcl(columns, N, B, T):
    one, result = torch.ones(B), dict(vcl=0, soft_vcl=0, icl=0, soft_icl=0)
    for a, b in itertools.permutations(range(N), 2):
        for k, v in naive_terms(columns, a, b, one, T).items():
            if k != "vcl" or b == (a + 1) % N:  # VCL once a student
                result[k] = result[k] + v
    return result


def assert_same(ours, naive, z):
    """Values, and the gradient of their weighted sum for z."""
    assert ours.keys() == naive.keys()
    for k in naive:
        assert ours[k].item() == pytest.approx(naive[k].item(), rel=1e-12, abs=1e-13), k
    (mine,), (true,) = (torch.autograd.grad(total(r), z, retain_graph=True) for r in (ours, naive))
    assert torch.allclose(mine, true, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- values and gradients

@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_batch_losses_equal_naive_loops(labels):
    y = torch.tensor(labels)
    for N, L, tau, T in ((2, 2, 0.1, 3.0), (3, 1, 0.07, 4.0)):
        z, w = unit(N, L, 8, 5).requires_grad_(), symmetric_weights(N, L, 8)
        for weights in (
                w,
                # or not symmetric
                w + torch.rand(N, L, N, L, 8, generator=torch.Generator().manual_seed(1))):
            naive = naive_lmcl(batch_columns(z, labels, tau), weights, T)
            assert_same(losses.lmcl_loss(z, y, weights, tau, T), naive, z)
    z, pairs, tau, T = (
        unit(3, 8, 5).requires_grad_(), list(itertools.permutations(range(3), 2)), 0.1, 3.0)
    naive = naive_mcl(batch_columns(z, labels, tau), 3, 8, T)
    assert_same(losses.mcl_loss(z, y, tau, T), naive, z)
    assert_same(dict(vcl=sum(losses.vcl(x, y, tau) for x in z),
                     soft_vcl=sum(losses.soft_vcl(z[a], z[b], tau, T) for a, b in pairs),
                     icl=sum(losses.icl(z[a], z[b], y, tau) for a, b in pairs),
                     soft_icl=sum(losses.soft_icl(z[a], z[b], tau, T) for a, b in pairs)),
                naive, z)


@pytest.mark.parametrize("same_class", SAME_CLASS.values(), ids=SAME_CLASS)
def test_bank_losses_equal_naive_loops(same_class):
    for N, L, tau, T in ((2, 2, 0.07, 3.0), (3, 1, 0.1, 0.5)):
        z, w, rows = unit(N, L, 6, 5).requires_grad_(), symmetric_weights(N, L, 6), bank(N, L)
        ours = losses.lmcl_bank_loss(z, *rows, same_class, w, tau, T)
        assert_same(ours, naive_lmcl(bank_columns(z, *rows, same_class, tau), w, T), z)
    z, rows = unit(3, 6, 5).requires_grad_(), bank(3)
    naive = naive_mcl(bank_columns(z, *rows, same_class, 0.07), 3, 6, 3.0)
    assert_same(losses.mcl_bank_loss(z, *rows, same_class), naive, z)


def test_identical_features_give_log_of_the_number_of_others():
    """All B embeddings equal: every candidate is as likely, nce = log(B - 1);
    SupContrast's known answer."""
    z, y = torch.ones(2, 1, 8, 4, dtype=torch.float64) / 2, torch.tensor(LABELS["pairs"])
    r = {k: v.item() for k, v in losses.mcl_loss(z[:, 0], y).items()}
    hard = 2 * math.log(7)
    assert r == pytest.approx(dict(vcl=hard, icl=hard, soft_vcl=0, soft_icl=0), rel=1e-12)


def naive_gains(columns, sets):
    """Mean over anchors with a positive of log(candidates) - nce,
    within sets and between those of two students."""
    def gain(pairs):
        scored = [columns(s, t, i) for s, t in pairs for i in range(6)]
        found = [(naive_nce(*anchor), len(anchor[2])) for anchor in scored]
        kept = [math.log(count) - value for value, count in found if value is not None]
        return sum(kept) / len(kept)

    between = [(s, t) for s, t in itertools.product(sets, sets) if s[0] != t[0]]
    return dict(vcl_gain=gain([(s, s) for s in sets]), icl_gain=gain(between))


def test_gains_equal_naive_loops():
    """And leave the four losses as they are.

    One student has no icl_gain; equal embeddings gain nothing.
    """
    y, w, same_class = (
        torch.tensor([0, 0, 0, 1, 1, 2]), symmetric_weights(3, 2, 6), SAME_CLASS["some"])
    z, rows, sets = (
        unit(3, 2, 6, 5).requires_grad_(), bank(3, 2), list(itertools.product(range(3), range(2))))
    last = [t[:, -1] for t in (z, *rows)]
    for loss, arguments, columns, of in (
            (losses.lmcl_loss, (z, y, w, 0.3), batch_columns(z, y, 0.3), sets),
            (losses.lmcl_bank_loss, (z, *rows, same_class, w, 0.3),
             bank_columns(z, *rows, same_class, 0.3), sets),
            (losses.mcl_loss, (last[0], y, 0.3), batch_columns(z, y, 0.3), sets[1::2]),
            (losses.mcl_bank_loss, (*last, same_class, 0.3),
             bank_columns(z, *rows, same_class, 0.3), sets[1::2])):
        plain, ours = loss(*arguments), loss(*arguments, gains=True)
        gains = {name: ours.pop(name) for name in ("vcl_gain", "icl_gain")}
        assert ours.keys() == plain.keys() and all(torch.equal(ours[k], plain[k]) for k in plain)
        assert not any(gain.requires_grad for gain in gains.values())
        expected = {name: value.item() for name, value in naive_gains(columns, of).items()}
        assert {name: gain.item() for name, gain in gains.items()} == pytest.approx(
            expected, rel=1e-12)
    assert (losses.lmcl_loss(z[:1], y, w[:1, :, :1], gains=True).keys()
            == plain.keys() | {"vcl_gain"})
    equal = torch.ones(2, 2, 6, 4, dtype=torch.float64) / 2
    for found in (losses.lmcl_loss(equal, y, gains=True), losses.lmcl_bank_loss(
            equal, equal, equal, equal[:, :, [0] * 10], same_class, gains=True)):
        assert [found[k].item() for k in gains] == pytest.approx([0, 0], abs=1e-12)
    assert losses.lmcl_loss(equal, torch.arange(6), gains=True)["vcl_gain"] == 0  # no positive


def in_batch(z, w):
    return losses.lmcl_loss(z, torch.tensor([0, 0, 0, 1, 1, 2]), w, tau=0.5)


def against_bank(z, w):
    return losses.lmcl_bank_loss(
        z, *bank(2, 2, dtype=torch.float16), SAME_CLASS["some"], w, tau=0.5)


@pytest.mark.parametrize("loss", [in_batch, against_bank])
def test_weights_none_means_ones_and_a_b_blocks_are_ignored(loss):
    z, w = unit(2, 2, 6, 5), symmetric_weights(2, 2, 6)
    spoiled = w.masked_fill(torch.eye(2, dtype=torch.bool)[:, None, :, None, None], math.nan)
    first, second, ones, none = (loss(z, x) for x in (w, spoiled, torch.ones_like(w), None))
    assert all(torch.equal(first[k], second[k]) and torch.equal(ones[k], none[k]) for k in first)


@pytest.mark.parametrize("labels, log_K", [
    ("pairs", math.log(6)),
    ("one class", 0), ("no positive", 0),  # without negatives or positives: 0
])
def test_mutual_information_bound(labels, log_K):
    z, y = unit(3, 8, 5), torch.tensor(LABELS[labels])
    icl = sum(losses.icl(z[a], z[b], y, tau=0.3)
              for a, b in itertools.permutations(range(3), 2)) / 6
    bound = losses.mutual_information_bound(z, y, tau=0.3)
    assert bound.item() == pytest.approx(log_K - icl.item(), rel=1e-12)
    assert losses.mutual_information_bound(z[:1], y).isfinite()


def test_distillation_and_cross_entropy():
    student, teacher = unit(2, 1, 8, 6) * 5, unit(1, 2, 8, 6, seed=1) * 5
    ours = losses.distillation(student, teacher, T=3.0)  # all pairs, [2, 2]
    for a, b in itertools.product(range(2), range(2)):
        naive = sum(naive_kl(student[a, 0, i], teacher[0, b, i], 3.0) for i in range(8)) / 8
        assert ours[a, b].item() == pytest.approx(naive.item(), rel=1e-12)
    y = torch.tensor(LABELS["unequal"])
    heads = [F.cross_entropy(student[a, 0], y).item() for a in range(2)]
    assert losses.cross_entropy(student, y).item() == pytest.approx(sum(heads), rel=1e-12)


def test_adversarial_losses_by_hand():
    own, peer = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert losses.generator_loss(own).item() == pytest.approx((1 + 0) / 2 + (0.25 + 0.25) / 2)
    assert losses.discriminator_loss(own, peer).item() == pytest.approx(
        (0 + 1) / 2 + 0.25 + 0.5 + 0.5)


# ---------------------------------------------------------------- derivatives

@pytest.mark.parametrize("loss", [
    *(lambda z, w, y=y: losses.lmcl_loss(z, torch.tensor(y[:6]), w, tau=0.5)
      for y in LABELS.values()),
    against_bank,
    lambda z, w: losses.lmcl_bank_loss(z, *bank(2, 2), SAME_CLASS["all"], w, tau=0.5)],
    ids=[*LABELS, "bank", "bank, all left out"])
def test_gradcheck_of_hard_terms_and_second_derivatives(loss):
    """The hard terms have no constant side, so finite differences must agree, twice:
    for the meta step.

    Nor have the soft terms one for the weights.
    """
    w, z = symmetric_weights(2, 2, 6).requires_grad_(), unit(2, 2, 6, 5).requires_grad_()
    hard = lambda z, w: (lambda r: r["vcl"] + r["icl"])(loss(z, w))
    assert torch.autograd.gradcheck(hard, (z, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(hard, (z, w), fast_mode=True)
    assert torch.autograd.gradcheck(lambda w: total(loss(z.detach(), w)), w, fast_mode=True)


def test_q_and_bank_rows_are_constant():
    """d kl_i / d scores_p = T (p - q), and nothing reaches q or the bank."""
    p, q = (unit(8, 6, seed=s).requires_grad_() for s in (0, 1))
    T = 3.0
    losses.distillation(p, q, T).backward()
    expected = T * ((p / T).softmax(-1) - (q / T).softmax(-1)).detach() / 8
    assert torch.allclose(p.grad, expected, rtol=1e-12, atol=1e-15)
    assert q.grad is None
    z_a, z_b = (unit(8, 5, seed=s).requires_grad_() for s in (0, 1))
    losses.soft_vcl(z_a, z_b).backward()
    assert z_a.grad.abs().sum() > 0 and z_b.grad is None
    z, *rows = (t.requires_grad_() for t in (unit(2, 6, 5), *bank(2)))
    total(losses.mcl_bank_loss(z, *rows, SAME_CLASS["some"])).backward()
    assert z.grad.abs().sum() > 0 and all(t.grad is None for t in rows)


# PyTorch's own forward mode uses it
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("loss", [
    lambda x: losses.distillation(x, x.flip(1).sin()).sum(),
    lambda x: total(in_batch(F.normalize(x, dim=-1), None)),
    lambda x: total(against_bank(F.normalize(x, dim=-1), None))],
    ids=["distillation", "in batch", "bank"])
def test_soft_targets_are_constant_for_the_gradient_and_move_for_its_derivative(loss):
    """The gradient field's derivative against finite differences of that field;
    forward mode gives it too."""
    x, u = unit(2, 2, 6, 5).requires_grad_(), unit(2, 2, 6, 5, seed=8)
    field = lambda x: torch.autograd.grad(loss(x), x, create_graph=True)[0]
    ours, = torch.autograd.grad((field(x) * u).sum(), x)
    for i in ((0, 0, 0, 0), (1, 0, 3, 2), (1, 1, 5, 1)):
        step = torch.zeros_like(x)
        step[i] = 1e-5
        difference = ((field(x + step) - field(x - step)) * u).sum().item() / 2e-5
        assert ours[i].item() == pytest.approx(difference, rel=1e-6, abs=1e-7)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x.detach(), u))).tangent.item()
    assert tangent == pytest.approx((field(x) * u).sum().item(), rel=1e-10)


# ---------------------------------------------------------------- precision, cost

def assert_as_in_float32(loss, z):
    """float32 values, exactly those of z.float(), and its gradient, rounded to z's precision."""
    wide = z.detach().float().requires_grad_()
    r, wider = loss(z), loss(wide)
    assert all(v.dtype == torch.float32 and torch.equal(v, wider[k]) and v.isfinite()
               for k, v in r.items())
    total(r).backward()
    total(wider).backward()
    assert (z.grad.dtype == z.dtype
            and (z.grad.float() - wide.grad).norm() <= 0.005 * wide.grad.norm())
    return r


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_every_precision_is_computed_in_float32(dtype, labels, tau):
    z, w = unit(2, 3, 8, 16, dtype=dtype).requires_grad_(), torch.full((2, 3, 2, 3, 8), 0.5)
    r = assert_as_in_float32(lambda z: losses.lmcl_loss(z, torch.tensor(labels), w, tau=tau), z)
    if labels == LABELS["no positive"]:
        assert r["vcl"] == 0 and r["icl"] == 0 and r["soft_icl"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("same_class", SAME_CLASS.values(), ids=SAME_CLASS)
def test_float16_rows_of_the_bank_give_float32(dtype, same_class):
    z, rows = unit(2, 3, 6, 5, dtype=dtype).requires_grad_(), bank(2, 3, dtype=torch.float16)
    loss = lambda z, rows=rows: losses.lmcl_bank_loss(z, *rows, same_class, T=0.1)
    r = assert_as_in_float32(loss, z)  # at T = 0.1 the lowest finite number / T would overflow
    wider = loss(z, [t.float() for t in rows])
    assert all(torch.equal(r[k], wider[k]) for k in r)


def test_a_batch_of_one():
    """No positive, and one column: nothing to learn."""
    z = unit(2, 1, 1, 4).requires_grad_()
    r = losses.lmcl_loss(z, torch.tensor([3]), torch.ones(2, 1, 2, 1, 1))
    total(r).backward()
    assert all(v == 0 for v in r.values()) and torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("loss", [in_batch, against_bank])
def test_autocast_does_not_lower_the_precision(loss):
    z, w = unit(2, 2, 6, 5, dtype=torch.float32), symmetric_weights(2, 2, 6).float()
    plain = loss(z, w)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(z, w)
    assert all(torch.equal(plain[k], cast[k]) for k in plain)


class Operations(TorchDispatchMode):
    """Names of dispatched operations, views left out: what a GPU has to launch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not (op.is_view or "detach" in str(op)):
            self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss, rows, most", [
    (losses.lmcl_loss, lambda N: [torch.arange(8).repeat_interleave(2)], 120),
    (losses.lmcl_bank_loss,
     lambda N: [*bank(N, 3, B=16, D=8, dtype=torch.float16), torch.rand(16, 10) < 0.1], 155)],
    ids=["in batch", "bank"])
@pytest.mark.parametrize("N", [2, 4])
def test_operations_forward_and_backward(loss, rows, most, N):
    """The number is the same for any number of students: launches bound this loss on a GPU.

    No host waits.
    """
    z, rows, w = (unit(N, 3, 16, 8, dtype=torch.float32).requires_grad_(), rows(N),
                  torch.rand(N, 3, N, 3, 16))
    total(loss(z, *rows, w)).backward()
    with Operations() as operations:
        total(loss(z, *rows, w)).backward()
    assert len(operations.names) <= most
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name in operations.names)


def test_bank_keeps_few_full_size_tensors():
    """Backward keeps four [S, S, B, K+2]: candidates' scores, log p,
    the constants of the two soft losses."""
    z, rows, kept = (unit(2, 2, 4, 5, dtype=torch.float32).requires_grad_(),
                     bank(2, 2, B=4, K=500), {})

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = losses.lmcl_bank_loss(z, *rows, torch.zeros(4, 500, dtype=torch.bool))
    assert sum(n >= 4 * 4 * 4 * 501 * z.element_size() for n in kept.values()) == 4
    assert loss["icl"].requires_grad


# ---------------------------------------------------------------- wrong arguments

@pytest.mark.parametrize("call, words", [
    (lambda z, y, w: losses.lmcl_loss(z[0], y, w), "[3, 8, 5]"),
    (lambda z, y, w: losses.lmcl_loss(z, y[:5], w), "labels must be [B] = [8], got [5]"),
    (lambda z, y, w: losses.lmcl_loss(z, y, w[:1]),
     "weights must be [N, L, N, L, B] = [2, 3, 2, 3, 8], got [1,"),
    (lambda z, y, w: losses.mcl_loss(z, y), "embeddings must be [N, B, D], got [2, 3, 8, 5]"),
    (lambda z, y, w: losses.vcl(z[0, 0], y[:5]), "[5]"),
    (lambda z, y, w: losses.icl(z[0, 0], z[1, 0, :6], y), "[6, 5]"),
    (lambda z, y, w: losses.soft_vcl(z[0, 0], z[1, 0, :1]), "[1, 5]"),
    (lambda z, y, w: losses.soft_icl(z[0], z[1]), "[3, 8, 5]"),
    (lambda z, y, w: losses.mcl_loss(z[:, 0], y[:5]), "[5]"),
    (lambda z, y, w: losses.mutual_information_bound(z, y), "[2, 3, 8, 5]"),
    (lambda z, y, w: losses.mcl_loss(z[:, 0].tolist(), y), "embeddings must be a tensor, got list"),
    (lambda z, y, w: losses.lmcl_loss(z, y.tolist(), w), "labels must be a tensor, got list"),
    (lambda z, y, w: losses.lmcl_loss(z, y, w.tolist()), "weights must be a tensor, got list"),
    (lambda z, y, w: losses.lmcl_loss(z, y.double(), w),
     "labels must be integers, got torch.float64"),
    (lambda z, y, w: losses.lmcl_loss(z.long(), y, w),
     "embeddings must be floats, got torch.int64"),
    (lambda z, y, w: losses.lmcl_loss(1.1 * z, y, w), "lmcl_loss: embeddings must be unit vectors"),
    (lambda z, y, w: losses.soft_vcl(z[0, 0], 0.9 * z[1, 0]),
     "z_b must be unit vectors (F.normalize), got length 0.9"),
    (lambda z, y, w: losses.lmcl_loss(z, y, w, tau=0), "tau must be above 0, got 0"),
    (lambda z, y, w: losses.vcl(z[0, 0], y, tau=-0.1), "tau must be above 0, got -0.1"),
    (lambda z, y, w: losses.soft_icl(z[0, 0], z[1, 0], T=0), "T must be above 0, got 0"),
    (lambda z, y, w: losses.mutual_distillation(z[:, 0], T=math.nan), "T must be above 0, got nan"),
])
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError) as error:
        call(unit(2, 3, 8, 5), torch.tensor(LABELS["pairs"]), symmetric_weights(2, 3, 8))
    assert words in str(error.value)


@pytest.mark.parametrize("name, wrong, words", [
    ("embeddings", unit(2, 6, 5), "embeddings must be [N, L, B, D], got [2, 6, 5]"),
    ("embeddings", 2 * unit(2, 3, 6, 5), "embeddings must be unit vectors"),
    ("own", bank(3)[0], "own must be [N, L, B, D] = [2, 3, 6, 5], got [3, 6, 5]"),
    ("positive", bank(2, 3, B=4)[1],
     "positive must be [N, L, B, D] = [2, 3, 6, 5], got [2, 3, 4, 5]"),
    ("negatives", bank(2, 3, D=4)[2],
     "negatives must be [N, L, K, D] = [2, 3, 10, 5], got [2, 3, 10, 4]"),
    ("same_class", SAME_CLASS["all"][:, 1:], "same_class must be [B, K] = [6, 10], got [6, 9]"),
    ("same_class", SAME_CLASS["all"].long(), "same_class must be booleans, got torch.int64"),
    ("weights", symmetric_weights(2, 3, 6)[:1],
     "weights must be [N, L, N, L, B] = [2, 3, 2, 3, 6], got [1,"),
])
def test_wrong_bank_arguments_are_named(name, wrong, words):
    right = dict(zip(("embeddings", "own", "positive", "negatives", "same_class"),
                     (unit(2, 3, 6, 5), *bank(2, 3), SAME_CLASS["some"]), strict=True))
    with pytest.raises(ValueError) as error:
        losses.lmcl_bank_loss(**{**right, name: wrong})
    assert words in str(error.value)
    right = {k: v[:, 0] if v.dim() == 4 else v for k, v in right.items()}
    losses.mcl_bank_loss(**right)
    if name != "weights":
        with pytest.raises(ValueError, match=f"mcl_bank_loss: {name} must be"):
            wrong = wrong[..., :1] if wrong.dim() < 4 else 2 * wrong[:, 0, 1:]
            losses.mcl_bank_loss(**{**right, name: wrong})


def test_two_views_of_each_image():
    """icl is for two students: its positives are other images.

    vcl's docstring call is the two-view loss.
    """
    one, two, B = unit(8, 5), unit(8, 5, seed=1), 8
    assert losses.icl(one, two, torch.arange(B)) == 0
    both = torch.cat([one, two])
    scores = (both @ both.T / 0.1).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(scores, torch.arange(2 * B).roll(B)).item()  # SimCLR's NT-Xent
    assert losses.vcl(both, torch.arange(B).repeat(2)).item() == pytest.approx(expected, rel=1e-12)


def test_torch_compile_and_torch_func():
    """One graph without a break; per-sample values and the Hessian by vmap, equal to plain ones."""
    z, y = unit(2, 2, 8, 5).requires_grad_(), torch.tensor(LABELS["pairs"])
    compiled = torch.compile(losses.lmcl_loss, fullgraph=True, backend="eager")
    for gains in (False, True):
        ours, plain = compiled(z, y, gains=gains), losses.lmcl_loss(z, y, gains=gains)
        assert ours.keys() == plain.keys() and all(torch.equal(ours[k], plain[k]) for k in plain)
    mine, true = (torch.autograd.grad(total(r), z)[0] for r in (ours, plain))
    assert torch.equal(mine, true)

    soft = lambda x: losses.soft_vcl(
        F.normalize(x, dim=-1), F.normalize(x.flip(0) + x ** 2, dim=-1))
    x = unit(3, 6, 4)
    each = torch.stack([soft(one) for one in x])
    assert torch.allclose(torch.func.vmap(soft)(x), each, rtol=1e-12)
    hessian = torch.autograd.functional.hessian(soft, x[0])
    assert torch.allclose(torch.func.hessian(soft)(x[0]), hessian, atol=1e-12)


def test_lengths_are_checked_only_where_data_are_at_hand():
    """Not inside torch.func or FakeTensor;
    zero rows (of F.normalize) and NaN (the loss shows it) pass."""
    y, long = torch.tensor(LABELS["pairs"]), 2 * unit(2, 8, 5)
    assert torch.func.grad(lambda z: total(losses.mcl_loss(z, y)))(long).isfinite().all()
    with FakeTensorMode() as mode:
        assert losses.mcl_loss(mode.from_tensor(long), mode.from_tensor(y))["icl"].shape == ()
    with forward_ad.dual_level(), pytest.raises(ValueError, match="unit vectors"):
        losses.mcl_loss(forward_ad.make_dual(long, long), y)
    zero, nan = unit(2, 8, 5), unit(2, 8, 5)
    zero[0, 3], nan[0, 3] = 0, math.nan
    assert total(losses.mcl_loss(zero, y)).isfinite()
    assert total(losses.mcl_loss(nan, y)).isnan()
