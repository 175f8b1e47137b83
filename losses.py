"""Mutual contrastive losses: VCL, ICL, Soft VCL, Soft ICL, their sums MCL and L-MCL, and logit distillation.

Yang et al., "Online Knowledge Distillation via Mutual Contrastive Learning for Visual Recognition"
(TPAMI 2023, arXiv 2207.11518: L-MCL) and "Mutual Contrastive Learning for Visual Representation
Learning" (AAAI 2022, arXiv 2104.12565: MCL).

symbol   variable     meaning                                        shape / default
-------  -----------  ---------------------------------------------  --------------------------------
N        N            students trained together
L        L            stages of a student whose features contrast    3 on CIFAR students
S        S            embedding sets, one per student and stage      N * L
B, D     B, D         batch size, embedding dimension                128, 128
C        C            classes; the last dimension of logits           100
K        log_K        negatives of an anchor: other classes' samples  126 in a batch of 64 pairs
z_a^l    embeddings   unit embedding of student a at stage l         [N, L, B, D]
y        labels       class of each sample                           [B], int64
tau      tau          temperature of the contrastive distributions   0.1
T        T            extra temperature of every KL term             3
S(u,v)   scores       u v^T / tau; row i belongs to anchor i         [..., B, B]
P(i)     positives    1 where j is another sample of i's class       [B, B]; the diagonal is always 0
lambda   weights      layer-matching weight (see meta.py)            [N, L, N, L, B]
alpha, beta, gamma, lam: the weights of VCL, ICL, Soft VCL, Soft ICL; train.weighted applies them (0.1, 0.1, 1, 1)

Conventions. Anchors are rows, contrasts are columns. The hard losses (VCL, ICL) leave column j = i out
of positives and negatives alike, whether both sets come from one student or from two; the soft losses
keep all B columns. Per-anchor values come first; the batch mean is taken last, and leaves out anchors
that have no positive in the batch (hard losses only). Everything runs in float32 or wider.
"""

import math

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------- scores and the two per-anchor losses

def similarity(u, v, tau):
    """S(u, v) = u v^T / tau in float32 or wider, whatever the autocast type.  [..., B, D] twice -> [..., B, B]."""
    with torch.autocast(u.device.type, enabled=False):
        return _wide(u) @ _wide(v).mT / tau


def positives(labels):
    """P: true where column j is another sample of anchor i's class.  labels [B] -> [B, B] bool."""
    same = labels[:, None] == labels[None, :]                             # [B, B]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)


def nce(scores, positive):
    """Supervised InfoNCE of each anchor.

        nce_i = - mean_{j in P(i)} log [ exp S_ij / sum_{k != i} exp S_ik ]
              = logsumexp_{k != i} S_ik - mean_{j in P(i)} S_ij

    scores [..., B, B], positive [B, B] bool -> [..., B]. Anchors without a positive give 0.
    """
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    # The lowest finite number instead of -inf: exp gives the same 0, and B = 1 stays finite.
    partition = scores.masked_fill(itself, torch.finfo(scores.dtype).min).logsumexp(-1)   # [..., B]
    count = positive.sum(-1, dtype=scores.dtype)                          # [B]
    target = positive / count.clamp(min=1)[:, None]                       # [B, B], rows sum to 1 or 0
    attraction = (scores * target).sum(-1)                                # [..., B]
    return (partition - attraction) * (count > 0)


def log_probabilities(scores, T):
    """log softmax(scores / T) over the last dimension, which keeps all its columns (the diagonal too)."""
    return F.log_softmax(scores / T, -1)


def kl(log_p, log_q, T):
    """Distillation of p towards the constant q, both at temperature T.

        kl_i = T^2 * sum_j q_ij (log q_ij - log p_ij)

    log_p, log_q [..., B, C], leading dimensions broadcast -> [..., B]. No gradient flows into q.
    T^2 keeps the gradient's size independent of T (Hinton et al. 2015).
    """
    log_p, log_q = torch.broadcast_tensors(log_p, log_q)
    return T ** 2 * Towards.apply(log_p, log_q, log_q.exp())


class Towards(torch.autograd.Function):
    """sum_j q_j (log q_j - log p_j) with the gradient -q for log p and none for q.

    q.detach() would give the same gradient, but it would also hide from the *derivative* of that gradient
    that q moves with theta. The meta step differentiates through updates, and the next update's q is
    another one: without this its hypergradient is tens of per cent off at initialisation.
    """

    @staticmethod
    def forward(log_p, log_q, q):
        return (q * (log_q - log_p)).sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        return -grad[..., None] * ctx.saved_tensors[0], None, None

    @staticmethod
    def jvp(ctx, tangent_p, tangent_log_q, tangent_q):
        return -(ctx.saved_tensors[0] * tangent_p).sum(-1)


def mean_over_anchors(per_anchor, positive):
    """Mean over the anchors that have a positive; 0 if none has.  [..., B] -> [...]."""
    valid = positive.any(-1)                                              # [B]
    return (per_anchor * valid).sum(-1) / valid.sum().clamp(min=1)


# ---------------------------------------------------------------- the four losses on a pair of students

def vcl(z, labels, tau=0.1):
    """Vanilla contrastive loss: nce(z_a, z_a), anchor and contrast from one student.

    z [B, D] -> scalar, the mean over the anchors that have a positive. Source: arXiv 2104.12565.
    """
    _check_pair("vcl", z, z, labels)
    P = positives(labels)
    return mean_over_anchors(nce(similarity(z, z, tau), P), P)


def icl(z_a, z_b, labels, tau=0.1):
    """Interactive contrastive loss: nce(z_a, z_b), anchor from a, contrast from b; gradient into both.

    Minimising it maximises a lower bound of the mutual information of the two embeddings:
    I(z_a; z_b) >= log K - ICL, K the number of negatives.
    z_a, z_b [B, D] -> scalar, the mean over the anchors that have a positive. Source: arXiv 2104.12565.
    """
    _check_pair("icl", z_a, z_b, labels)
    P = positives(labels)
    return mean_over_anchors(nce(similarity(z_a, z_b, tau), P), P)


def soft_vcl(z_a, z_b, tau=0.1, T=3.0):
    """Soft VCL, a learns from b: kl of softmax(S(z_a,z_a)/T) towards softmax(S(z_b,z_b)/T).

    z_a, z_b [B, D] -> scalar, the mean over all anchors. z_b is constant; the reverse direction is
    soft_vcl(z_b, z_a). Source: arXiv 2104.12565.
    """
    _check_pair("soft_vcl", z_a, z_b)
    log_p, log_q = (log_probabilities(similarity(z, z, tau), T) for z in (z_a, z_b))
    return kl(log_p, log_q, T).mean()


def soft_icl(z_a, z_b, tau=0.1, T=3.0):
    """Soft ICL, a's view learns from b's: kl of softmax(S(z_a,z_b)/T) towards softmax(S(z_b,z_a)/T).

    z_a, z_b [B, D] -> scalar, the mean over all anchors. The second distribution is constant; both z_a
    and z_b get gradient through the first. The reverse direction is soft_icl(z_b, z_a). Source: arXiv 2104.12565.
    """
    _check_pair("soft_icl", z_a, z_b)
    log_p, log_q = (log_probabilities(similarity(u, v, tau), T) for u, v in ((z_a, z_b), (z_b, z_a)))
    return kl(log_p, log_q, T).mean()


# ---------------------------------------------------------------- all pairs at once, from one Gram tensor

def all_pairs(z, positive, tau, T):
    """The per-anchor values of the four losses for all ordered pairs (s, t) of S embedding sets.

    z [S, B, D], positive [B, B] -> dict: vcl [S, 1, B] (it depends on s alone), icl, soft_vcl, soft_icl [S, S, B], where s
    is the anchor's set and, for the soft losses, the one that learns.
    """
    S, B, _ = z.shape
    rows = z.flatten(0, 1)                                                # [S*B, D]
    gram = similarity(rows, rows, tau).view(S, B, S, B).transpose(1, 2)   # [S, S, B, B], block (s, t) = S(z_s, z_t)
    hard = nce(gram, positive)                                            # [S, S, B]
    log_p = log_probabilities(gram, T)                                    # [S, S, B, B]
    own = log_p.diagonal(dim1=0, dim2=1).movedim(-1, 0)                   # [S, B, B], the blocks (s, s)
    return dict(vcl=hard.diagonal(dim1=0, dim2=1).T[:, None],             # [S, 1, B]
                soft_vcl=kl(own[:, None], own[None, :], T),               # [S, S, B]
                icl=hard,
                soft_icl=kl(log_p, log_p.transpose(0, 1), T))             # [S, S, B]


def mcl_loss(embeddings, labels, tau=0.1, T=3.0):
    """MCL (AAAI 2022): one embedding per student, no layer matching. Unweighted terms:

        vcl = sum_a VCL_a,   icl = sum_{a != b} ICL_{a,b},
        soft_vcl = sum_{a != b} SoftVCL_{a<-b},   soft_icl = sum_{a != b} SoftICL_{a<-b}

    over ordered pairs, each once, mean over the batch.

    embeddings [N, B, D] unit rows, labels [B] int64 -> dict of four scalars.
    Raises ValueError for other shapes. Source: arXiv 2104.12565.
    """
    _check("mcl_loss", embeddings, "[N, B, D]", labels)
    P = positives(labels)
    values = all_pairs(embeddings, P, tau, T)
    others = ~torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)[..., None]   # [N, N, 1], a != b
    # The soft terms need no positive: all B anchors count.
    return dict(vcl=mean_over_anchors(values["vcl"], P).sum(),
                soft_vcl=(values["soft_vcl"] * others).mean(-1).sum(),
                icl=mean_over_anchors(values["icl"] * others, P).sum(),
                soft_icl=(values["soft_icl"] * others).mean(-1).sum())


def lmcl_loss(embeddings, labels, weights, tau=0.1, T=3.0):
    """L-MCL (TPAMI 2023): every stage of each student with every stage of each other. Unweighted terms:

        sum over ordered pairs a != b and stages l, m of  mean_i lambda^{l,m}_{a,b}(x_i) * term_i,
        term = VCL_a^l + VCL_b^m,  ICL both ways,  Soft VCL both ways,  Soft ICL both ways.

    lambda is symmetric, so both directions of a term have the same sum: with s = (a, l), t = (b, m),
    sum_{s,t} lambda_st (V_s + V_t) = 2 sum_{s,t} lambda_st V_s, and so on for ICL, Soft VCL and Soft ICL.

    embeddings [N, L, B, D] unit rows, labels [B] int64, weights [N, L, N, L, B], symmetric (not checked:
    the host would wait), the a = b blocks unused -> dict of four scalars. Gradient goes into the embeddings and, if they ask
    for it, into the weights.
    Raises ValueError for other shapes. Source: arXiv 2207.11518.
    """
    _check("lmcl_loss", embeddings, "[N, L, B, D]", labels, weights)
    N, L, B, _ = embeddings.shape
    P = positives(labels)
    values = all_pairs(embeddings.flatten(0, 1), P, tau, T)
    same = torch.eye(N, dtype=torch.bool, device=weights.device)[:, None, :, None, None]      # [N, 1, N, 1, 1], a = b
    w = weights.masked_fill(same, 0).reshape(N * L, N * L, B)             # [S, S, B]
    total = {k: 2 * (w * v).sum((0, 1)) for k, v in values.items()}       # [B] each
    # The soft terms need no positive: all B anchors count.
    return dict(vcl=mean_over_anchors(total["vcl"], P), soft_vcl=total["soft_vcl"].mean(),
                icl=mean_over_anchors(total["icl"], P), soft_icl=total["soft_icl"].mean())


@torch.no_grad()
def mutual_information_bound(embeddings, labels, tau=0.1):
    """log K - mean ICL over all ordered pairs of students, in nats; K = the negatives of an anchor.

    A lower bound of I(z_a; z_b), averaged over pairs.  embeddings [N, B, D] -> scalar.
    """
    P = positives(labels)
    values = nce(similarity(embeddings[:, None], embeddings, tau), P)     # [N, N, B]
    pairs = values.sum((0, 1)) - values.diagonal().sum(-1)                # [B], over a != b
    N, B = embeddings.shape[:2]
    log_K = (B - 1 - P.sum(-1, dtype=values.dtype)).clamp(min=1).log()   # [B]
    return mean_over_anchors(log_K - pairs / max(1, N * (N - 1)), P)


# ---------------------------------------------------------------- losses on the logits

def cross_entropy(logits, labels):
    """sum over the leading dimensions (students, stages) of the batch mean of CE(logits, y).

    logits [..., B, C], labels [B] int64 -> scalar, in float32 or wider.
    """
    rows = _wide(logits).reshape(-1, logits.shape[-1])                    # [heads*B, C]
    heads = math.prod(logits.shape[:-2])
    return heads * F.cross_entropy(rows, labels.repeat(heads))


def distillation(student_logits, teacher_logits, T=3.0):
    """KL_T = T^2 * KL(softmax(teacher/T) || softmax(student/T)), batch mean, the teacher constant.

    student_logits, teacher_logits [..., B, C], leading dimensions broadcast -> [...].
    Source: Hinton et al. 2015, arXiv 1503.02531.
    """
    student, teacher = (log_probabilities(_wide(logits), T) for logits in (student_logits, teacher_logits))
    return kl(student, teacher, T).mean(-1)


def mutual_distillation(logits, T=1.0):
    """sum_a of the mean over b != a of KL_T(logits_a <- logits_b), every teacher constant.

    logits [N, B, C] -> scalar; 0 for one student. T = 1: deep mutual learning (Zhang et al., CVPR 2018).
    """
    N = len(logits)
    others = ~torch.eye(N, dtype=torch.bool, device=logits.device)        # [N, N], a != b
    return (distillation(logits[:, None], logits[None], T) * others).sum() / max(1, N - 1)


def ensemble_distillation(logits, T=3.0):
    """sum_a KL_T(logits_a <- mean_b logits_b), the mean constant.  logits [N, B, C] -> scalar."""
    return distillation(logits, _wide(logits).mean(0, keepdim=True), T).sum()


# ---------------------------------------------------------------- adversarial distillation of feature maps (AFD)

def fooling(own):
    """sum_a mean (1 - D_a(m_a))^2: student a wants its map taken for a peer's.  own [N, B] = D_a(m_a) -> scalar."""
    return (1 - _wide(own)).square().mean(-1).sum()


def judging(own, peer):
    """sum_a mean [ D_a(m_a)^2 + (1 - D_a(m_{a+1}))^2 ]: least squares, 0 for one's own map and 1 for the peer's.

    own, peer [N, B] -> scalar. Chung et al., ICML 2020, with the losses of LSGAN (Mao et al. 2017).
    """
    return (_wide(own).square() + (1 - _wide(peer)).square()).mean(-1).sum()


def _wide(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _check_pair(name, z_a, z_b, labels=None):
    if z_a.dim() != 2 or z_a.shape != z_b.shape or labels is not None and labels.shape != z_a.shape[:1]:
        raise ValueError(f"{name}: embeddings must be [B, D] alike and labels [B], got {list(z_a.shape)}, {list(z_b.shape)}"
                         + (f" and {list(labels.shape)}" if labels is not None else ""))


def _check(name, embeddings, form, labels, weights=None):
    shape = list(embeddings.shape)
    if len(shape) != len(form.split(",")):
        raise ValueError(f"{name}: embeddings must be {form}, got {shape}")
    if list(labels.shape) != shape[-2:-1]:
        raise ValueError(f"{name}: labels must be [B] = {shape[-2:-1]} for embeddings {shape}, got {list(labels.shape)}")
    if weights is not None and list(weights.shape) != shape[:2] * 2 + shape[2:3]:
        raise ValueError(f"{name}: weights must be [N, L, N, L, B] = {shape[:2] * 2 + shape[2:3]} "
                         f"for embeddings {shape}, got {list(weights.shape)}")
