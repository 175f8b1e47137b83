"""Mutual contrastive losses: VCL, ICL, Soft VCL, Soft ICL, MCL, L-MCL. Losses on logits and maps.

Yang et al., "Online Knowledge Distillation via Mutual Contrastive Learning for Visual Recognition"
(TPAMI 2023, arXiv 2207.11518: L-MCL) and "Mutual Contrastive Learning for Visual Representation
Learning" (AAAI 2022, arXiv 2104.12565: MCL).

symbol    variable    meaning                                       shape / default
--------  ----------  --------------------------------------------  -----------------------------
N         N           students trained together                     2
L         L           stages of a student whose features contrast   3 on CIFAR, 4 on ImageNet
S         S           embedding sets, one per student and stage     N * L
B, D      B, D        batch size, embedding dimension               128, 128
C         C           classes; the last dimension of logits         100
K         K, log_K    negatives; those of the anchor's class are    126 in a batch of 64 pairs;
                      left out                                      8192 drawn from a bank
z_a^l     embeddings  unit embedding of student a at stage l        [N, L, B, D]
y         labels      class of each sample                          [B], int64
tau       tau         temperature of contrastive distributions      0.1 CIFAR, 0.07 ImageNet
T         T           extra temperature of every KL term            3
sim(u,v)  scores      u v^T / tau, entries s_ij; row i is anchor i  [..., B, M]; M = B in the batch,
                                                                    a bank's K + 2, in one set K + 1
P(i)      positive    true where column j is a positive of i        [B, M]
          excluded    true where column j is no candidate of i      [B, M]
lambda    weights     layer-matching weight (see meta.py)           [N, L, N, L, B]
a <- b                a learns from b, which is constant

Conventions. Anchors are rows, contrasts are columns. Every loss is computed per anchor; the batch
mean is taken at the end. Everything runs in float32 or wider. The terms come unweighted: the
classes in methods.py apply alpha, beta, gamma, lam to VCL, ICL, Soft VCL, Soft ICL.
In the batch, column j is sample j. The hard losses (VCL, ICL) exclude j = i, of one student or two,
and their mean leaves out anchors without a positive. The soft losses keep all columns and anchors.
With a memory bank, the columns are rows of the bank. Hard and soft losses exclude the same columns,
the negatives of the anchor's own class, and every anchor has a positive.
"""

import math

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- scores, losses of an anchor

def similarity(u, v, tau):
    """sim(u, v) = u v^T / tau in float32 or wider, under autocast too.

    u [..., B, D], v [..., M, D] -> [..., B, M]. Raises ValueError for a tau that is not above 0.
    """
    _check_positive("tau", tau)
    with torch.autocast(u.device.type, enabled=False):
        return at_least_float32(u) @ at_least_float32(v).mT / tau


def batch_masks(labels):
    """positive: j is of i's class, not i; excluded: j = i.  labels [B] -> bool [B, B] each."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = labels[:, None] == labels[None, :]  # [B, B]
    return same & ~itself, itself


def nce(scores, positive, excluded):
    """Supervised InfoNCE of each anchor, over the candidate columns k, those not excluded.

        nce_i = - mean_{j in P(i)} log [ exp s_ij / sum_k exp s_ik ]
              = logsumexp_k s_ik - mean_{j in P(i)} s_ij

    scores [..., B, M], excluded bool [B, M], positive bool [B, M'] or [1, M'] -> [..., B], not
    reduced. With M' < M the columns from M' on are never positive: a bank's negatives are not
    multiplied by zeros. Anchors without a positive give 0. The masks are constant; gradient goes
    into the scores. Source: arXiv 2104.12565, with the class mean of SupCon (arXiv 2004.11362).
    """
    lowest = torch.finfo(scores.dtype).min  # not -inf: a row without candidates stays finite
    partition = scores.masked_fill(excluded, lowest).logsumexp(-1)  # [..., B]
    count = positive.sum(-1, dtype=scores.dtype)  # [B] or [1]
    target = positive / count.clamp(min=1)[:, None]  # [B, M'] or [1, M'], rows sum to 1 or 0
    attraction = (scores[..., :target.shape[-1]] * target).sum(-1)  # [..., B]
    return (partition - attraction) * (count > 0)


def log_probabilities(scores, T, excluded=None):
    """log softmax(scores / T) over the last dimension.  [..., B, M] -> [..., B, M].

    Excluded columns [B, M] get probability 0 and a finite logarithm: they add 0 to kl, not NaN.
    Raises ValueError for a T that is not above 0.
    """
    _check_positive("T", T)
    scores = scores / T
    if excluded is not None:
        scores = scores.masked_fill(excluded, torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, -1)


def kl(student, teacher, T):
    """KL(teacher || student) times T^2, the teacher q constant, both log-probabilities at T.

        kl_i = T^2 * sum_j q_ij (log q_ij - log p_ij),   log p = student, log q = teacher

    student, teacher [..., B, M], leading dimensions broadcast -> [..., B]. No gradient into the
    teacher. T^2 keeps the gradient's size independent of T (Hinton et al. 2015).
    """
    student, teacher = torch.broadcast_tensors(student, teacher)
    function = KLToConstant if torch.compiler.is_compiling() else KLToConstantForward
    return T ** 2 * function.apply(student, teacher, teacher.exp())


class KLToConstant(torch.autograd.Function):
    """sum_j q_j (log q_j - log p_j) with the gradient -q for log p and none for q.

    q.detach() would give the same gradient, but its derivative would miss that q moves with theta.
    The meta step differentiates through updates, and each update has another q: with q.detach() its
    hypergradient is tens of per cent off at initialisation. No function of ordinary operations does
    this: the Jacobian of its gradient is symmetric in log p and q, or, with detach, lacks q's part.
    """

    generate_vmap_rule = True  # torch.func

    @staticmethod
    def forward(log_p, log_q, q):
        return (q * (log_q - log_p)).sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        return -grad[..., None] * ctx.saved_tensors[0], None, None


class KLToConstantForward(KLToConstant):
    """With forward mode, too; torch.compile takes no Function that has it."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def jvp(ctx, tangent_p, tangent_log_q, tangent_q):
        return -(ctx.saved_tensors[0] * tangent_p).sum(-1)


def mean_over_anchors(per_anchor, valid):
    """Mean over the valid anchors; 0 if none is.  [..., B], valid [B] -> [...]."""
    return (per_anchor * valid).sum(-1) / valid.sum().clamp(min=1)


# ---------------------------------------------------------------- the four losses of a pair

def vcl(z, labels, tau=0.1):
    """Vanilla contrastive loss: mean over i of nce(similarity(z, z, tau), positive, excluded)_i.

    positive, excluded = batch_masks(labels): column j is sample j, never i itself. z [B, D],
    labels [B] -> scalar, the mean over the anchors that have a positive. Source: arXiv 2104.12565.
    """
    _check("vcl", z=(z, "B D"), labels=(labels, "B"))
    positive, excluded = batch_masks(labels)
    per_anchor = nce(similarity(z, z, tau), positive, excluded)  # [B]
    return mean_over_anchors(per_anchor, positive.any(-1))


def icl(z_a, z_b, labels, tau=0.1):
    """Interactive contrastive loss: anchor from a, contrast from b; gradient into both.

        ICL = mean over i of nce(similarity(z_a, z_b, tau), positive, excluded)_i

    positive, excluded = batch_masks(labels): column j is sample j of b, and j = i, the same image
    seen by the other student, is neither positive nor negative. So labels that are all different
    give 0. For two views of each image, where view i of b is the positive of view i of a, give both
    views to vcl: vcl(torch.cat([z_a, z_b]), torch.arange(B).repeat(2)).
    Minimising ICL maximises a lower bound of the mutual information of the two embeddings:
    I(z_a; z_b) >= log K - ICL, K the number of negatives.
    z_a, z_b [B, D], labels [B] -> scalar, over anchors with a positive. Source: arXiv 2104.12565.
    """
    _check("icl", z_a=(z_a, "B D"), z_b=(z_b, "B D"), labels=(labels, "B"))
    positive, excluded = batch_masks(labels)
    per_anchor = nce(similarity(z_a, z_b, tau), positive, excluded)  # [B]
    return mean_over_anchors(per_anchor, positive.any(-1))


def soft_vcl(z_a, z_b, tau=0.1, T=3.0):
    """Soft VCL, a learns from b: kl of softmax(sim(z_a,z_a)/T) towards softmax(sim(z_b,z_b)/T).

    Without labels: all B columns, the diagonal too, unlike batch_masks' hard losses.
    z_a, z_b [B, D] -> scalar, the mean over all anchors. z_b is constant; the reverse direction is
    soft_vcl(z_b, z_a). Source: arXiv 2104.12565.
    """
    _check("soft_vcl", z_a=(z_a, "B D"), z_b=(z_b, "B D"))
    student = log_probabilities(similarity(z_a, z_a, tau), T)  # [B, B]
    teacher = log_probabilities(similarity(z_b, z_b, tau), T)  # [B, B]
    return kl(student, teacher, T).mean()


def soft_icl(z_a, z_b, tau=0.1, T=3.0):
    """Soft ICL, a learns from b: kl of softmax(sim(z_a,z_b)/T) towards softmax(sim(z_b,z_a)/T).

    Without labels: all B columns, the diagonal too, unlike batch_masks' hard losses.
    z_a, z_b [B, D] -> scalar, the mean over all anchors. The second distribution is constant; both
    get gradient through the first. The reverse: soft_icl(z_b, z_a). Source: arXiv 2104.12565.
    """
    _check("soft_icl", z_a=(z_a, "B D"), z_b=(z_b, "B D"))
    student = log_probabilities(similarity(z_a, z_b, tau), T)  # [B, B]
    teacher = log_probabilities(similarity(z_b, z_a, tau), T)  # [B, B]
    return kl(student, teacher, T).mean()


# ---------------------------------------------------------------- all pairs, one matrix product

def batch_pairs(z, positive, excluded, tau, T):
    """The four losses of each anchor in the batch, for all ordered pairs (s, t) of S sets.

    s is the anchor's set and, for the soft losses, the one that learns. z [S, B, D], masks [B, B]
    -> dict: vcl [S, 1, B] (it depends on s alone), icl, soft_vcl, soft_icl [S, S, B].
    """
    S, B, _ = z.shape
    rows = z.flatten(0, 1)  # [S*B, D]
    gram = similarity(rows, rows, tau).view(S, B, S, B)
    gram = gram.transpose(1, 2)  # [S, S, B, B], block (s, t) = sim(z_s, z_t)
    hard = nce(gram, positive, excluded)  # [S, S, B]
    log_p = log_probabilities(gram, T)  # [S, S, B, B]
    within = log_p.diagonal(dim1=0, dim2=1).movedim(-1, 0)  # [S, B, B], the blocks (s, s)
    return dict(vcl=hard.diagonal(dim1=0, dim2=1).T[:, None],  # [S, 1, B]
                soft_vcl=kl(within[:, None], within[None, :], T),  # [S, S, B]
                icl=hard,
                soft_icl=kl(log_p, log_p.transpose(0, 1), T))  # [S, S, B]


def bank_pairs(z, own, positive, negatives, same_class, tau, T):
    """As batch_pairs, with the bank's rows as contrast: constant, so gradient goes into z alone.

    Row i of block (s, t) is z_s,i . [own_t,i ; positive_t,i ; negatives_t] / tau. Between two sets
    (ICL, Soft ICL) the first two columns are positives. Within one set (VCL, Soft VCL) column `own`
    is cut off, and one positive stays. Blocks of two stages of one student are computed too, though
    L-MCL does not use them: the price of one product.
    z, own, positive [S, B, D], negatives [S, K, D], same_class [B, K] -> dict as from batch_pairs.
    """
    S, B, _ = z.shape
    K, z = negatives.shape[1], at_least_float32(z)
    own, positive, negatives = (rows.detach().to(z.dtype) for rows in (own, positive, negatives))
    near = torch.cat([own, positive])  # [2*S, B, D]
    near = similarity(z.transpose(0, 1), near.transpose(0, 1), tau)  # [B, S, 2*S]
    near = near.view(B, S, 2, S).permute(1, 3, 0, 2)  # [S, S, B, 2]
    far = similarity(z.flatten(0, 1), negatives.flatten(0, 1), tau)  # [S*B, S*K]
    far = far.view(S, B, S, K).transpose(1, 2)  # [S, S, B, K]
    between = torch.cat([near, far], -1)  # [S, S, B, K+2]
    within = between.diagonal(dim1=0, dim2=1).movedim(-1, 0)  # [S, B, K+2], the blocks (s, s)
    within = within[..., 1:]  # [S, B, K+1]
    first = torch.ones(1, 2, dtype=torch.bool, device=z.device)  # [1, 2], the positives
    excluded = F.pad(same_class, (2, 0))  # [B, K+2], never excludes the first two
    log_p = log_probabilities(between, T, excluded)  # [S, S, B, K+2]
    log_p_within = log_probabilities(within, T, excluded[:, 1:])  # [S, B, K+1]
    return dict(vcl=nce(within, first[:, 1:], excluded[:, 1:])[:, None],  # [S, 1, B]
                soft_vcl=kl(log_p_within[:, None], log_p_within[None, :], T),  # [S, S, B]
                icl=nce(between, first, excluded),  # [S, S, B]
                soft_icl=kl(log_p, log_p.transpose(0, 1), T))  # [S, S, B]


def mcl_sums(values, valid):
    """MCL's sums of batch means, four scalars.  values: of batch_pairs, S = N; valid [B]."""
    others = ~torch.eye(len(values["icl"]), dtype=torch.bool, device=valid.device)  # [N, N], a != b
    others = others[..., None]  # [N, N, 1]
    return dict(vcl=mean_over_anchors(values["vcl"], valid).sum(),
                soft_vcl=(values["soft_vcl"] * others).mean(-1).sum(),
                icl=mean_over_anchors(values["icl"] * others, valid).sum(),
                soft_icl=(values["soft_icl"] * others).mean(-1).sum())


def lmcl_sums(values, weights, valid):
    """L-MCL's sums of weighted batch means; the soft terms keep all anchors.

    values: of batch_pairs, S = N * L; weights [N, L, N, L, B], valid [B] -> dict of four scalars.
    Each ordered pair's term holds both directions, so with s = (a, l), t = (b, m), a != b
    sum_{s,t} lambda_st (V_s + V_t) = sum_{s,t} (lambda_st + lambda_ts) V_s, and so on for the other
    three. lambda is symmetric, so this is 2 sum_{s,t} lambda_st V_s: each unordered pair once.
    """
    N, L, _, _, B = weights.shape
    same = torch.eye(N, dtype=torch.bool, device=weights.device)  # [N, N], a = b
    same = same[:, None, :, None, None]  # [N, 1, N, 1, 1]
    w = weights.masked_fill(same, 0).reshape(N * L, N * L, B)  # [S, S, B]
    w = w + w.transpose(0, 1)
    total = {k: (w * v).sum((0, 1)) for k, v in values.items()}  # [B] each
    return dict(vcl=mean_over_anchors(total["vcl"], valid), soft_vcl=total["soft_vcl"].mean(),
                icl=mean_over_anchors(total["icl"], valid), soft_icl=total["soft_icl"].mean())


@torch.no_grad()
def contrast_gains(values, excluded, always, valid, N):
    """How far VCL and ICL are below chance, in nats an anchor, lambda left out; no gradient.

        vcl_gain = mean of  log M_i - nce(z_s, z_s)_i  over sets s and anchors i,
        icl_gain = mean of  log M_i - nce(z_s, z_t)_i  over pairs (s, t) of two students, and i

    0 is chance, where all embeddings are equal. M_i: anchor i's candidates, the columns that
    `excluded` leaves ([B, B] in the batch, same_class [B, K] with a bank), and always[0] more for
    VCL, always[1] for ICL. values: of batch_pairs; valid [B]; N: students -> dict of vcl_gain and,
    of several students, icl_gain.
    """
    left = (~excluded).sum(-1, dtype=values["vcl"].dtype)  # [B]
    chance = lambda more: (left + more).clamp(min=1).log()  # [B]
    within = values["vcl"].mean((0, 1))  # [B]
    gains = dict(vcl_gain=mean_over_anchors(chance(always[0]) - within, valid))
    if N > 1:
        icl = values["icl"].unflatten(1, (N, -1)).unflatten(0, (N, -1))  # [N, L, N, L, B]
        icl = icl.mean((1, 3))  # [N, N, B]
        between = (icl.sum((0, 1)) - icl.diagonal().sum(-1)) / (N * (N - 1))  # [B], over a != b
        gains["icl_gain"] = mean_over_anchors(chance(always[1]) - between, valid)
    return gains


def mcl_loss(embeddings, labels, tau=0.1, T=3.0, gains=False):
    """MCL (AAAI 2022): one embedding per student, no layer matching. Unweighted terms:

        vcl = sum_a VCL_a,   icl = sum_{a != b} ICL_{a,b},
        soft_vcl = sum_{a != b} SoftVCL_{a<-b},   soft_icl = sum_{a != b} SoftICL_{a<-b}

    over ordered pairs, each once, mean over the batch. Hard losses by batch_masks: j = i is no
    candidate, anchors without a positive are left out; soft losses have all columns and anchors.
    embeddings [N, B, D] unit rows, labels [B] int64 -> dict of four scalars; with gains, those of
    contrast_gains, too. Raises ValueError for other shapes and dtypes, on the CPU for other lengths
    too. Source: arXiv 2104.12565.
    """
    _check("mcl_loss", embeddings=(embeddings, "N B D"), labels=(labels, "B"))
    pairs = _in_batch(embeddings, labels, tau, T)
    return _terms(mcl_sums, len(embeddings), gains, *pairs)


def mcl_bank_loss(embeddings, own, positive, negatives, same_class, tau=0.07, T=3.0, gains=False):
    """mcl_loss against a memory bank's rows; gradient goes into the embeddings alone.

    embeddings [N, B, D] unit rows. From the bank, in float16 or wider: own [N, B, D], the rows of
    the batch's images; positive [N, B, D], rows of other images of the same classes; negatives
    [N, K, D]. same_class [B, K] bool: true where negative k is left out for anchor i.
    -> dict as from mcl_loss. Raises ValueError as mcl_loss. Source: arXiv 2207.11518.
    """
    _check("mcl_bank_loss", embeddings=(embeddings, "N B D"), own=(own, "N B D"),
           positive=(positive, "N B D"), negatives=(negatives, "N K D"),
           same_class=(same_class, "B K"))
    pairs = _against_bank(embeddings, own, positive, negatives, same_class, tau, T)
    return _terms(mcl_sums, len(embeddings), gains, *pairs)


def lmcl_loss(embeddings, labels, weights=None, tau=0.1, T=3.0, gains=False):
    """L-MCL (TPAMI 2023): every stage of each student with every stage of each other. Unweighted:

        sum over ordered pairs a != b and stages l, m of  mean_i lambda^{l,m}_{a,b}(x_i) * term_i,
        term = VCL_a^l + VCL_b^m,  ICL both ways,  Soft VCL both ways,  Soft ICL both ways.

    Columns and anchors are those of mcl_loss.
    embeddings [N, L, B, D] unit rows, labels [B] int64, weights [N, L, N, L, B], the a = b blocks
    unused, None for ones -> dict of four scalars; with gains, those of contrast_gains, too. lambda
    is symmetric; other weights are taken as they are, each ordered pair with its own. Gradient goes
    into the embeddings and, if they require it, into the weights. Raises ValueError as mcl_loss.
    Source: arXiv 2207.11518.
    """
    _check("lmcl_loss", embeddings=(embeddings, "N L B D"), labels=(labels, "B"),
           weights=(weights, "N L N L B"))
    N, L, B, _ = embeddings.shape
    weights = embeddings.new_ones(N, L, N, L, B) if weights is None else weights
    sums = lambda values, valid: lmcl_sums(values, weights, valid)
    pairs = _in_batch(embeddings.flatten(0, 1), labels, tau, T)
    return _terms(sums, len(embeddings), gains, *pairs)


def lmcl_bank_loss(embeddings, own, positive, negatives, same_class, weights=None, tau=0.07, T=3.0,
                   gains=False):
    """lmcl_loss against a bank per student and stage; gradient into embeddings, weights alone.

    embeddings, own, positive [N, L, B, D], negatives [N, L, K, D], same_class [B, K] as in
    mcl_bank_loss, weights as in lmcl_loss -> dict as from lmcl_loss. Raises ValueError as
    lmcl_loss. Source: arXiv 2207.11518.
    """
    _check("lmcl_bank_loss", embeddings=(embeddings, "N L B D"), own=(own, "N L B D"),
           positive=(positive, "N L B D"), negatives=(negatives, "N L K D"),
           same_class=(same_class, "B K"), weights=(weights, "N L N L B"))
    N, L, B, _ = embeddings.shape
    weights = embeddings.new_ones(N, L, N, L, B) if weights is None else weights
    sets = (t.flatten(0, 1) for t in (embeddings, own, positive, negatives))  # [S, ., D]
    sums = lambda values, valid: lmcl_sums(values, weights, valid)
    pairs = _against_bank(*sets, same_class, tau, T)
    return _terms(sums, len(embeddings), gains, *pairs)


def _terms(sums, students, gains, values, excluded, always, valid):
    """sums(values, valid), and contrast_gains if they are wanted."""
    terms = sums(values, valid)
    if gains:
        terms |= contrast_gains(values, excluded, always, valid, students)
    return terms


def _in_batch(z, labels, tau, T):
    """batch_pairs of z [S, B, D], and contrast_gains' `excluded`, `always`, `valid`."""
    positive, excluded = batch_masks(labels)
    return batch_pairs(z, positive, excluded, tau, T), excluded, (0, 0), positive.any(-1)


def _against_bank(z, own, positive, negatives, same_class, tau, T):
    """As _in_batch, with bank_pairs: every anchor has a positive."""
    valid = same_class.new_ones(len(same_class))  # [B]
    return bank_pairs(z, own, positive, negatives, same_class, tau, T), same_class, (1, 2), valid


@torch.no_grad()
def mutual_information_bound(embeddings, labels, tau=0.1):
    """log K - mean ICL over ordered pairs of students, in nats; K: negatives in the batch.

    A lower bound of I(z_a; z_b), mean of pairs.  embeddings [N, B, D], labels [B] -> scalar.
    """
    _check("mutual_information_bound", embeddings=(embeddings, "N B D"), labels=(labels, "B"))
    positive, excluded = batch_masks(labels)
    values = nce(similarity(embeddings[:, None], embeddings, tau), positive, excluded)  # [N, N, B]
    pairs = values.sum((0, 1)) - values.diagonal().sum(-1)  # [B], over a != b
    N, B = embeddings.shape[:2]
    log_K = (B - 1 - positive.sum(-1, dtype=values.dtype)).clamp(min=1).log()  # [B]
    return mean_over_anchors(log_K - pairs / max(1, N * (N - 1)), positive.any(-1))


# ---------------------------------------------------------------- losses on the logits

def cross_entropy(logits, labels):
    """sum over the leading dimensions (students, stages) of the batch mean of CE(logits, y).

    logits [..., B, C], labels [B] int64 -> scalar, in float32 or wider.
    """
    rows = at_least_float32(logits).reshape(-1, logits.shape[-1])  # [heads*B, C]
    heads = math.prod(logits.shape[:-2])
    return heads * F.cross_entropy(rows, labels.repeat(heads))


def distillation(student_logits, teacher_logits, T=3.0):
    """KL_T = T^2 * KL(softmax(teacher/T) || softmax(student/T)), batch mean, the teacher constant.

    student_logits, teacher_logits [..., B, C], leading dimensions broadcast -> [...].
    Source: Hinton et al. 2015, arXiv 1503.02531.
    """
    student = log_probabilities(at_least_float32(student_logits), T)
    teacher = log_probabilities(at_least_float32(teacher_logits), T)
    return kl(student, teacher, T).mean(-1)


def mutual_distillation(logits, T=1.0):
    """sum_a of the mean over b != a of KL_T(logits_a <- logits_b), every teacher constant.

    logits [N, B, C] -> scalar; 0 for one student. T = 1: DML (Zhang et al., CVPR 2018).
    """
    N = len(logits)
    others = ~torch.eye(N, dtype=torch.bool, device=logits.device)  # [N, N], a != b
    return (distillation(logits[:, None], logits[None], T) * others).sum() / max(1, N - 1)


def ensemble_distillation(logits, T=3.0):
    """sum_a KL_T(logits_a <- mean_b logits_b), the mean constant.  logits [N, B, C] -> scalar."""
    return distillation(logits, at_least_float32(logits).mean(0, keepdim=True), T).sum()


# ---------------------------------------------------------------- feature maps: AFD

def generator_loss(own):
    """sum_a mean (1 - D_a(m_a))^2: a wants its map taken for a peer's.  own [N, B] -> scalar."""
    return (1 - at_least_float32(own)).square().mean(-1).sum()


def discriminator_loss(own, peer):
    """sum_a mean [ D_a(m_a)^2 + (1 - D_a(m_{a+1}))^2 ]: target 0 for a's map, 1 for its peer's.

    own, peer [N, B] -> scalar. Chung et al., ICML 2020, with the losses of LSGAN (Mao et al. 2017).
    """
    return (at_least_float32(own).square() + (1 - at_least_float32(peer)).square()).mean(-1).sum()


# ---------------------------------------------------------------- dtypes and arguments

def at_least_float32(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


DTYPES = {"labels": "integers", "same_class": "booleans"}  # all other arguments: floats


def _check(name, **arguments):
    """Raises ValueError where a (tensor, form) has not its form; a letter's first use sets it."""
    sizes = {}
    for key, (tensor, form) in arguments.items():
        if key == "weights" and tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: {key} must be a tensor, got {type(tensor).__name__}")
        wanted, shape = form.split(), list(tensor.shape)
        if len(wanted) == len(shape):
            sizes = dict(zip(wanted, shape, strict=True)) | sizes
        if shape != [sizes.get(letter) for letter in wanted]:
            known = sizes.keys() >= set(wanted)
            numbers = f" = {[sizes[letter] for letter in wanted]}" if known else ""
            raise ValueError(f"{name}: {key} must be [{', '.join(wanted)}]{numbers}, got {shape}")
        found = "floats" if tensor.is_floating_point() else "integers"
        found = "booleans" if tensor.dtype == torch.bool else found
        dtype = DTYPES.get(key, "floats")
        if found != dtype:
            raise ValueError(f"{name}: {key} must be {dtype}, got {tensor.dtype}")
        if key in ("embeddings", "z", "z_a", "z_b"):
            _check_lengths(name, key, tensor)


def _check_positive(name, temperature):
    if isinstance(temperature, (int, float)) and not temperature > 0:  # a tensor's host would wait
        raise ValueError(f"{name} must be above 0, got {temperature}")


def _check_lengths(name, key, z):
    """Rows are unit vectors, or zero as F.normalize leaves them. CPU only: else the host waits."""
    if z.device.type != "cpu" or torch.compiler.is_compiling():
        return
    try:
        z = z.detach().numpy().astype("float32")  # NumPy: no dispatched operation
    except (RuntimeError, TypeError):  # no data (torch.func, FakeTensor) or bfloat16
        return
    lengths = (z * z).sum(-1) ** 0.5
    wrong = lengths[(abs(lengths - 1) > 0.01) & (lengths > 0)]  # NaN passes: the loss shows it
    if len(wrong):
        raise ValueError(f"{name}: {key} must be unit vectors (F.normalize), "
                         f"got length {wrong[0]:.3g}")
