"""losses.py against Python loops written from the formulas, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import losses
from train import CountOperations

LABELS = {
    "pairs": [0, 0, 1, 1, 2, 2, 3, 3],
    "unequal": [0, 0, 0, 0, 1, 1, 1, 2],        # one class of four, one of three, one alone
    "one class": [5] * 8,
    "no positive": list(range(8)),
}


def unit(*shape, dtype=torch.float64, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1).to(dtype)


def symmetric_weights(N, L, B, seed=0):
    w = torch.rand(N, L, N, L, B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (w + w.permute(2, 3, 0, 1, 4)) / 2


# ---------------------------------------------------------------- the oracle: one anchor, one sum at a time

def naive_nce(u, v, y, i, tau):
    """nce(u, v)_i, or None if anchor i has no positive."""
    s = [(u[i] @ v[j] / tau).item() for j in range(len(y))]
    positive = [j for j in range(len(y)) if j != i and y[j] == y[i]]
    denominator = sum(math.exp(s[k]) for k in range(len(y)) if k != i)
    return -sum(math.log(math.exp(s[j]) / denominator) for j in positive) / len(positive) if positive else None


def naive_kl(scores_p, scores_q, T):
    p, q = ([math.exp(x / T) for x in s.tolist()] for s in (scores_p, scores_q))
    return T ** 2 * sum(b / sum(q) * math.log(b / sum(q) / (a / sum(p))) for a, b in zip(p, q))


def naive_terms(z_a, z_b, y, tau, T):
    """Per-anchor lists of the pair term's four parts for the ordered pair (a, b): both VCL, both ways of the rest."""
    B, S = len(y), lambda u, v, i: u[i] @ v.T / tau
    hard = lambda u, v: [naive_nce(u, v, y, i, tau) for i in range(B)]
    add = lambda p, q: [None if x is None else x + w for x, w in zip(p, q)]
    return dict(
        vcl=add(hard(z_a, z_a), hard(z_b, z_b)),
        icl=add(hard(z_a, z_b), hard(z_b, z_a)),
        soft_vcl=[naive_kl(S(z_a, z_a, i), S(z_b, z_b, i), T) + naive_kl(S(z_b, z_b, i), S(z_a, z_a, i), T) for i in range(B)],
        soft_icl=[naive_kl(S(z_a, z_b, i), S(z_b, z_a, i), T) + naive_kl(S(z_b, z_a, i), S(z_a, z_b, i), T) for i in range(B)])


def naive_mean(values, weights):
    kept = [w * x for x, w in zip(values, weights) if x is not None]
    return sum(kept) / len(kept) if kept else 0.0


def naive_lmcl(z, y, w, tau, T):
    N, L = z.shape[:2]
    total = dict.fromkeys(("vcl", "soft_vcl", "icl", "soft_icl"), 0.0)
    for a in range(N):
        for b in range(N):
            for l in range(L):
                for m in range(L):
                    if a != b:
                        for k, values in naive_terms(z[a, l], z[b, m], y, tau, T).items():
                            total[k] += naive_mean(values, w[a, l, b, m].tolist())
    return total


# ---------------------------------------------------------------- values

@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("N, L, tau, T", [(2, 3, 0.1, 3.0), (3, 2, 0.07, 4.0)])
def test_lmcl_equals_naive_loops(labels, N, L, tau, T):
    z, w = unit(N, L, 8, 5), symmetric_weights(N, L, 8)
    ours, naive = losses.lmcl_loss(z, torch.tensor(labels), w, tau, T), naive_lmcl(z, labels, w, tau, T)
    assert ours.keys() == naive.keys()
    for k in naive:
        assert ours[k].item() == pytest.approx(naive[k], rel=1e-12, abs=1e-14), k


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_mcl_and_pair_functions_equal_naive_loops(labels):
    z, y, one, tau, T = unit(3, 8, 5), torch.tensor(labels), [1.0] * 8, 0.1, 3.0
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    hard = lambda u, v: naive_mean([naive_nce(u, v, labels, i, tau) for i in range(8)], one)
    soft = lambda u, v, s, t: naive_mean([naive_kl(u[i] @ v.T / tau, s[i] @ t.T / tau, T) for i in range(8)], one)
    naive = dict(vcl=sum(hard(x, x) for x in z), icl=sum(hard(z[a], z[b]) for a, b in pairs),
                 soft_vcl=sum(soft(z[a], z[a], z[b], z[b]) for a, b in pairs),
                 soft_icl=sum(soft(z[a], z[b], z[b], z[a]) for a, b in pairs))
    batched = losses.mcl_loss(z, y, tau, T)
    paired = dict(vcl=sum(losses.vcl(x, y, tau) for x in z), icl=sum(losses.icl(z[a], z[b], y, tau) for a, b in pairs),
                  soft_vcl=sum(losses.soft_vcl(z[a], z[b], tau, T) for a, b in pairs),
                  soft_icl=sum(losses.soft_icl(z[a], z[b], tau, T) for a, b in pairs))
    for k in naive:
        assert batched[k].item() == pytest.approx(naive[k], rel=1e-12, abs=1e-14), k
        assert paired[k].item() == pytest.approx(naive[k], rel=1e-12, abs=1e-14), k


def test_identical_features_give_log_of_the_number_of_others():
    """All B embeddings equal: every candidate is as likely, so nce = log(B - 1); SupContrast's known answer."""
    z, y = torch.ones(2, 1, 8, 4, dtype=torch.float64) / 2, torch.tensor(LABELS["pairs"])
    r = losses.mcl_loss(z[:, 0], y)
    assert r["vcl"].item() == pytest.approx(2 * math.log(7), rel=1e-12)
    assert r["icl"].item() == pytest.approx(2 * math.log(7), rel=1e-12)
    assert r["soft_vcl"].item() == pytest.approx(0, abs=1e-12)


def test_a_b_blocks_are_ignored_and_term_is_linear_in_the_weights():
    z, y, w = unit(2, 3, 8, 5), torch.tensor(LABELS["unequal"]), symmetric_weights(2, 3, 8)
    spoiled = w.clone()
    for a in range(2):
        spoiled[a, :, a] = math.nan
    first, second, double = (losses.lmcl_loss(z, y, x) for x in (w, spoiled, 2 * w))
    for k in first:
        assert torch.equal(first[k], second[k])
        assert double[k].item() == pytest.approx(2 * first[k].item(), rel=1e-12)


def test_mutual_information_bound():
    z, y = unit(3, 8, 5), torch.tensor(LABELS["pairs"])
    icl = sum(losses.icl(z[a], z[b], y) for a in range(3) for b in range(3) if a != b) / 6
    assert losses.mutual_information_bound(z, y).item() == pytest.approx(math.log(6) - icl.item(), rel=1e-12)
    assert math.isfinite(losses.mutual_information_bound(z, torch.arange(8)).item())
    assert math.isfinite(losses.mutual_information_bound(z, torch.zeros(8).long()).item())


def test_distillation_and_cross_entropy():
    student, teacher = unit(2, 1, 8, 6) * 5, unit(1, 2, 8, 6, seed=1) * 5
    ours = losses.distillation(student, teacher, T=3.0)                   # all pairs, [2, 2]
    for a in range(2):
        for b in range(2):
            naive = sum(naive_kl(student[a, 0, i], teacher[0, b, i], 3.0) for i in range(8)) / 8
            assert ours[a, b].item() == pytest.approx(naive, rel=1e-12)
    y = torch.tensor(LABELS["unequal"])
    heads = [F.cross_entropy(student[a, 0], y).item() for a in range(2)]
    assert losses.cross_entropy(student, y).item() == pytest.approx(sum(heads), rel=1e-12)


# ---------------------------------------------------------------- gradients

def total(r):
    return 0.1 * r["vcl"] + r["soft_vcl"] + 0.1 * r["icl"] + r["soft_icl"]


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_gradcheck_of_hard_terms_and_second_derivatives(labels):
    """The hard terms have no constant side, so finite differences must agree, twice (the meta step needs both)."""
    y, w = torch.tensor(labels), symmetric_weights(2, 2, 8).requires_grad_()
    z = unit(2, 2, 8, 3).requires_grad_()
    hard = lambda z, w: (lambda r: r["vcl"] + r["icl"])(losses.lmcl_loss(z, y, w, tau=0.5))
    assert torch.autograd.gradcheck(hard, (z, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(hard, (z, w), fast_mode=True)


def test_soft_terms_gradient_has_q_constant():
    """d kl_i / d scores_p = T (p - q), and nothing reaches q."""
    p, q = (unit(8, 6, seed=s).requires_grad_() for s in (0, 1))
    T = 3.0
    losses.distillation(p, q, T).backward()
    assert torch.allclose(p.grad, T * ((p / T).softmax(-1) - (q / T).softmax(-1)).detach() / 8, rtol=1e-12, atol=1e-15)
    assert q.grad is None
    z_a, z_b = (unit(8, 5, seed=s).requires_grad_() for s in (0, 1))
    losses.soft_vcl(z_a, z_b).backward()
    assert z_a.grad.abs().sum() > 0 and z_b.grad is None
    z_a.grad = None
    losses.soft_icl(z_a, z_b).backward()
    s_ab, s_ba = z_a @ z_b.T / 0.1, (z_b @ z_a.T / 0.1).detach()
    by_hand = torch.autograd.grad(s_ab, (z_a, z_b), T * ((s_ab / T).softmax(-1) - (s_ba / T).softmax(-1)).detach() / 8)
    assert torch.allclose(z_a.grad, by_hand[0], rtol=1e-10) and torch.allclose(z_b.grad, by_hand[1], rtol=1e-10)


def test_soft_targets_are_constant_for_the_gradient_and_move_for_its_derivative():
    """The derivative of the gradient field of distillation, against finite differences of that field."""
    draw = torch.Generator().manual_seed(0)
    w, x, u = (torch.randn(6, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    field = lambda w: torch.autograd.grad(losses.distillation(x * w, (x * w).flip(0).sin()), w, create_graph=True)[0]
    w.requires_grad_()
    ours, = torch.autograd.grad((field(w) * u).sum(), w)
    for i, j in ((0, 0), (3, 2), (5, 1)):
        step = torch.zeros_like(w)
        step[i, j] = 1e-5
        difference = ((field(w + step) - field(w - step)) * u).sum().item() / 2e-5
        assert ours[i, j].item() == pytest.approx(difference, rel=1e-6, abs=1e-9)


def test_lmcl_gradient_equals_the_sum_over_pair_functions():
    z, y = unit(2, 3, 8, 5).requires_grad_(), torch.tensor(LABELS["unequal"])
    total(losses.lmcl_loss(z, y, torch.full((2, 3, 2, 3, 8), 0.5))).backward()
    pairs = 0
    for a, b in ((0, 1), (1, 0)):
        for u in z[a]:
            for v in z[b]:
                pairs = pairs + 0.5 * (0.1 * (losses.vcl(u, y) + losses.vcl(v, y) + losses.icl(u, v, y) + losses.icl(v, u, y))
                                       + losses.soft_vcl(u, v) + losses.soft_vcl(v, u) + losses.soft_icl(u, v) + losses.soft_icl(v, u))
    by_pairs, = torch.autograd.grad(pairs, z)
    assert torch.allclose(z.grad, by_pairs, rtol=1e-10, atol=1e-13)


# ---------------------------------------------------------------- robustness

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_finite_in_every_precision(dtype, labels, tau):
    z = unit(2, 3, 8, 16, dtype=dtype).requires_grad_()
    r = losses.lmcl_loss(z, torch.tensor(labels), torch.full((2, 3, 2, 3, 8), 0.5), tau=tau)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in r.values())
    total(r).backward()
    assert z.grad.isfinite().all()
    if labels == LABELS["no positive"]:
        assert r["vcl"] == 0 and r["icl"] == 0 and r["soft_icl"] > 0


def test_a_batch_of_one():
    z = unit(2, 1, 1, 4).requires_grad_()
    total(losses.lmcl_loss(z, torch.tensor([3]), torch.ones(2, 1, 2, 1, 1))).backward()
    assert z.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    z, y, w = unit(2, 3, 8, 16, dtype=torch.float32), torch.tensor(LABELS["pairs"]), symmetric_weights(2, 3, 8).float()
    plain = losses.lmcl_loss(z, y, w)
    with torch.autocast("cpu", torch.bfloat16):
        cast = losses.lmcl_loss(z, y, w)
    assert all(torch.equal(plain[k], cast[k]) for k in plain)


@pytest.mark.parametrize("call, words", [
    (lambda z, y, w: losses.lmcl_loss(z[0], y, w), "[3, 8, 5]"),
    (lambda z, y, w: losses.lmcl_loss(z, y[:5], w), "[5]"),
    (lambda z, y, w: losses.lmcl_loss(z, y, w[:1]), "[1, 3, 2, 3, 8]"),
    (lambda z, y, w: losses.mcl_loss(z, y), "[2, 3, 8, 5]"),
    (lambda z, y, w: losses.vcl(z[0, 0], y[:5]), "[5]"),
    (lambda z, y, w: losses.icl(z[0, 0], z[1, 0, :6], y), "[6, 5]"),
    (lambda z, y, w: losses.soft_vcl(z[0, 0], z[1, 0, :1]), "[1, 5]"),
    (lambda z, y, w: losses.soft_icl(z[0], z[1]), "[3, 8, 5]"),
    (lambda z, y, w: losses.mcl_loss(z[:, 0], y[:5]), "[5]"),
])
def test_wrong_shapes_are_named(call, words):
    with pytest.raises(ValueError) as error:
        call(unit(2, 3, 8, 5), torch.tensor(LABELS["pairs"]), symmetric_weights(2, 3, 8))
    assert words in str(error.value)


@pytest.mark.parametrize("N", [2, 4])
def test_operations_forward_and_backward(N):
    """At most 120, whatever the number of students; on a GPU this loss is bound by launches."""
    z, w = unit(N, 3, 16, 8, dtype=torch.float32).requires_grad_(), torch.rand(N, 3, N, 3, 16)
    y = torch.arange(8).repeat_interleave(2)
    total(losses.lmcl_loss(z, y, w)).backward()
    with CountOperations() as counter:
        total(losses.lmcl_loss(z, y, w)).backward()
    assert counter.count <= 120
