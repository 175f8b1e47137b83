"""The methods: one class each, from networks to weighted loss terms. train.py runs any of them.

A method is a module. `forward` runs its students, `terms` is one batch's loss, `second` is what
some methods do after the SGD step, `add_options` its part of the command line. METHODS names
them; adding a class there adds it to the command line.

Yang et al., TPAMI 2023 (arXiv 2207.11518): L-MCL; AAAI 2022 (arXiv 2104.12565): MCL.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import losses
import meta
import models
from support import arguments
from support.console import UserError


class Outputs(NamedTuple):
    """What the students give for one batch; every call of the step gets it.

    features    N tensors [L, B, d_a]
    logits      [N, L, B, C]
    embeddings  [N, L, B, D], unit rows; None without embedding MLPs
    maps        afd: N tensors [B, c, h, w], the last stages' maps at one size
    extra       what else a method's `forward` hands to its `terms`: tensors, in any nesting
    """

    features: list
    logits: Tensor
    embeddings: Tensor | None = None
    maps: list | None = None
    extra: object = None


class SecondStep(NamedTuple):
    """What a method does after every so-many-th SGD step.

    It trains a network that `terms` does not train.

    name   for the progress line
    every  after each so-many-th step
    network, optimizer(parameters, **sgd)  what is trained, and how: a part of the method; SGD and
           AdamW follow the schedule, in proportion to the rates that they begin at
    first  the first epoch that has them
    step(optimizer, lr, average, images, labels, rows, outputs)
           lr: the present rate; average: mean over processes of a flat vector, or None for one
           process; images, labels, rows: the batch; outputs: of the ordinary step on it, detached
    """

    name: str
    every: int
    network: nn.Module
    step: callable
    optimizer: callable = torch.optim.SGD
    first: int = 0

    def is_due(self, epoch, step):
        """Whether it is made in this epoch, counted from 0, after so many steps in all."""
        return epoch >= self.first and step % self.every == 0


class Method(nn.Module):
    """The base of all methods: a cohort of students, and one cross-entropy for every head."""

    branches = embeddings = False  # what the cohort has beside its backbones
    T = None  # the KL terms' temperature, where it is no option
    mutual = True  # students teach each other, so one alone learns nothing from it

    @staticmethod
    def add_options(group):
        """Add the method's own options to an argparse group.

        They arrive in args, in the log and in the folder's name.
        """

    def __init__(self, args, num_classes, train_labels=None):
        """args: the options. train_labels: int64 [n], for a memory bank; without them none is made.

        Raises UserError where a student's parts do not fit.
        """
        super().__init__()
        self.args = args
        self.gather = None  # set where several processes train
        cohort = models.Cohort(args.arch, num_classes, branches=self.branches)
        cohort.check(args.image_size)
        self.students = models.EmbeddedCohort(cohort) if self.embeddings else cohort
        self.bank = None
        self.second = None  # a SecondStep, or nothing
        self.phase = None  # a CUDA graph is captured for each value

    @property
    def cohort(self):
        return self.students.cohort if self.embeddings else self.students

    def forward(self, images):
        """images [B, 3, H, W] -> Outputs."""
        if self.embeddings:
            features, embeddings, logits = self.students(images)
            return Outputs(features, logits, embeddings)
        return Outputs(*self.students(images))

    def start_epoch(self, epoch):
        """Before each epoch, a resumed one too.

        A number that a step reads must be a tensor, changed in place.
        """

    def terms(self, outputs, labels, rows):
        """One batch's loss, the sum of weight * value in {name: (weight, value)}.

        A weight of None: logged, not in the loss. outputs: Outputs; labels [B] int64; rows:
        models.BankRows if there is a bank, else None.
        """
        return {"ce": (1, losses.cross_entropy(outputs.logits, labels))}

    def after_step(self, outputs, rows):
        """After the SGD step; may be captured in a CUDA graph."""

    def check(self):
        """Before the first step: whether the method can train its students. Raises UserError."""

    def schedule(self):
        """What changes from epoch to epoch, in words, for the report at the start; or nothing."""

    def warning(self, line):
        """What is wrong with an epoch and what to try, in words, or nothing. line: the log's."""

    def statistics(self):
        """The floating buffers that several processes average; not what is equal in all of them."""
        equal = ("bank.", "soft_share", "discriminators.average")
        named = self.named_buffers()
        return [b for name, b in named if b.is_floating_point() and not name.startswith(equal)]

    def optimizers(self):
        """[--optimizer for what `terms` trains], and the second step's own if there is one."""
        args = self.args
        sgd = dict(lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
                   nesterov=True, fused=True)
        others = set(self.second.network.parameters()) if self.second else set()
        trained = [p for p in self.parameters() if p not in others]
        if args.no_decay_1d:
            trained = [dict(params=[p for p in trained if p.dim() > 1]),
                       dict(params=[p for p in trained if p.dim() <= 1], weight_decay=0.0)]
        if args.optimizer == "adamw":
            ordinary = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay,
                                         fused=True)
        else:
            ordinary = torch.optim.SGD(trained, **sgd)
        if not self.second:
            return [ordinary]
        return [ordinary, self.second.optimizer(self.second.network.parameters(), **sgd)]


def add_temperature(group):
    group.add_argument("--T", type=arguments.positive, default=3.0,
                       help="temperature of the KL terms (3)")


class Independent(Method):
    """backbones alone, cross-entropy: the published baseline"""

    mutual = False


class DeepSupervision(Method):
    """the students and branches of L-MCL, cross-entropy of every head, nothing mutual"""

    branches, mutual = True, False


class DML(Method):
    """backbones alone, deep mutual learning: KL towards every other's prediction, T = 1
    (CVPR 2018)
    """

    T = 1.0

    def terms(self, outputs, labels, rows):
        logits = outputs.logits
        return {"ce": (1, losses.cross_entropy(logits, labels)),
                "kd": (1, losses.mutual_distillation(logits[:, -1], self.T))}


class MCL(Method):
    """backbones alone, the four contrastive losses on the last stage (AAAI 2022)"""

    embeddings = True

    @staticmethod
    def add_options(group):
        add_contrast(group)
        group.add_argument("--logit-kd", action="store_true",
                           help="each student also distils the mean of all logits")

    def __init__(self, args, num_classes, train_labels=None):
        super().__init__(args, num_classes, train_labels)
        if args.contrast == "bank" and train_labels is not None:
            self.bank = models.MemoryBank(
                train_labels, len(args.arch), self.cohort.stages, negatives=args.negatives,
                momentum=args.bank_momentum, seed=args.seed)
        self.phase = "contrast"  # or "before it"
        if args.soft_ramp:  # the share of gamma and lam
            self.register_buffer("soft_share", torch.ones(()), persistent=False)
        else:
            self.soft_share = 1

    def start_epoch(self, epoch):
        """Contrast begins in epoch --contrast-start, its soft losses grow over --soft-ramp epochs.

        The soft losses are zero where all embeddings are equal. At full weight from the first step
        on, with a bank, they make all embeddings equal before contrast has told any apart.
        """
        done = epoch - self.args.contrast_start + 1
        self.phase = "contrast" if done > 0 else "before it"
        if self.args.soft_ramp:
            self.soft_share.fill_(min(1, max(0, done) / self.args.soft_ramp))

    def schedule(self):
        start, ramp = self.args.contrast_start, self.args.soft_ramp
        words = []
        if start:
            words.append(f"contrast from epoch {start + 1} on")
        if ramp:
            words.append(f"its soft losses grow to full weight in {ramp:g} epochs")
        if start >= self.args.epochs:
            words.append("never in this run: lower --contrast-start")
        return ", ".join(words)

    def warning(self, line):
        """Contrast that teaches nothing, from its second epoch on."""
        args = self.args
        if line["epoch"] < args.contrast_start + 2 or line.get("vcl_gain", 1) >= 0.01:
            return None
        if not args.weight_vcl + args.weight_icl:  # nobody wants it to
            return None
        return (f"contrast teaches nothing yet: vcl_gain is {line['vcl_gain']:.3f} nats; try a "
                "larger --weight-vcl and --weight-icl, a longer --soft-ramp, or more epochs "
                "(docs/RUNNING.md)")

    def weighted(self, values):
        """alpha VCL + beta ICL + r gamma Soft VCL + r lam Soft ICL, as {name: (weight, value)}.

        values: the dict of scalars of losses.mcl_loss, lmcl_loss or their bank forms; alpha, beta,
        gamma, lam: the --weight options; r: this epoch's share, see start_epoch. The gains get
        None: they are logged only. Source: arXiv 2207.11518, but for r.
        """
        weights = dict(vcl=self.args.weight_vcl, icl=self.args.weight_icl,
                       soft_vcl=self.soft_share * self.args.weight_soft_vcl,
                       soft_icl=self.soft_share * self.args.weight_soft_icl)
        return {name: (weights.get(name), value) for name, value in values.items()}

    def terms(self, outputs, labels, rows):
        """sum_a CE(logits_a, y) + the four losses.

        --logit-kd: + sum_a KL_T(logits_a <- mean of all).
        """
        logits, args = outputs.logits, self.args
        terms = {"ce": (1, losses.cross_entropy(logits, labels))}
        if self.phase == "contrast":
            terms |= self.contrastive_terms(outputs.embeddings, labels, None, rows, gains=True)
        if args.logit_kd:
            terms["kd"] = (1, losses.ensemble_distillation(logits[:, -1], args.T))
        return terms | self.monitored(outputs, labels, rows)

    def contrastive_terms(self, embeddings, labels, matching, rows, gains=False):
        """The four losses as terms, of the last stage's embeddings.

        In the batch, or against the bank's rows.
        embeddings [N, L, B, D], labels [B], rows: BankRows or None; gains: with those of
        losses.contrast_gains. matching: not used here, see LMCL.
        """
        z, args = embeddings[:, -1], self.args  # [N, B, D]
        if rows:
            last = rows.last_stage()
            values = losses.mcl_bank_loss(
                z, last.own, last.positive, last.negatives, last.same_class,
                args.tau, args.T, gains)
        else:
            values = losses.mcl_loss(z, labels, args.tau, args.T, gains)
        return self.weighted(values)

    def monitored(self, outputs, labels, rows):
        """Logged, not in the loss: the mutual information's bound, where it is defined."""
        if rows or len(outputs.logits) < 2:
            return {}
        z = outputs.embeddings[:, -1]  # [N, B, D]
        return {"mi_bound": (None, losses.mutual_information_bound(z, labels, self.args.tau))}

    def after_step(self, outputs, rows):
        """The batch's rows of the bank move; every process writes all processes' rows."""
        if not rows:
            return
        index, z = rows.index, outputs.embeddings.detach()  # [B], [N, L, B, D]
        if self.gather:
            index, z = self.gather(index), self.gather(z.movedim(2, 0)).movedim(0, 2)
        self.bank.update(index, z)


def add_contrast(group):
    """The options of both contrastive methods; options.complete fills in those that are None."""
    weight = arguments.not_negative
    group.add_argument("--weight-vcl", type=weight, metavar="ALPHA",
                       help="alpha, of VCL (0.1; lmcl on imagenet 0.01)")
    group.add_argument("--weight-icl", type=weight, metavar="BETA",
                       help="beta, of ICL (0.1; lmcl on imagenet 0.01)")
    group.add_argument("--weight-soft-vcl", type=weight, default=1.0, metavar="GAMMA",
                       help="gamma, of Soft VCL (1)")
    group.add_argument("--weight-soft-icl", type=weight, default=1.0, metavar="LAM",
                       help="lam, of Soft ICL (1)")
    group.add_argument("--tau", type=arguments.positive,
                       help="temperature of the contrastive distributions (0.1; imagenet 0.07)")
    add_temperature(group)
    group.add_argument("--contrast", choices=["batch", "bank"],
                       help="with the other images of the batch, or with a memory bank of all "
                       "training images' embeddings (batch; imagenet bank)")
    group.add_argument("--negatives", type=arguments.at_least_1, default=8192, metavar="K",
                       help="bank: rows drawn for each batch (8192)")
    group.add_argument("--bank-momentum", type=arguments.fraction, default=0.5, metavar="M",
                       help="bank: share of the old row (0.5)")
    group.add_argument("--contrast-start", type=arguments.at_least_0, metavar="EPOCH",
                       help="the first epoch, counted from 0, with the four losses and meta steps "
                       "(0; bank: 1, its rows are written before)")
    group.add_argument("--soft-ramp", type=arguments.not_negative, metavar="EPOCHS",
                       help="gamma and lam grow to their values in so many epochs; 0: at once "
                       "(0; bank: a tenth of --epochs, 8 at least)")


class LMCL(MCL):
    """layer-wise mutual contrastive learning: branches, aggregators, learned layer matching
    (TPAMI 2023)
    """

    branches = True

    @staticmethod
    def add_options(group):
        add_contrast(group)
        group.add_argument("--matching", choices=["learned", "uniform"], default="learned",
                           help="lambda from the matching network, or 0.5 for all, without a meta "
                           "step (learned)")
        group.add_argument("--meta-freq", type=arguments.at_least_1, metavar="STEPS",
                           help="a meta step every so many steps (50; imagenet 500)")
        group.add_argument("--meta-steps", type=arguments.at_least_1, default=2, metavar="STEPS",
                           help="virtual steps on the contrastive loss (2)")
        group.add_argument("--virtual-lambda", choices=["held", "moving"], default="held",
                           help="in the virtual steps lambda is held, as in the ordinary step, or "
                           "moves with the features, as published (held)")

    def __init__(self, args, num_classes, train_labels=None):
        super().__init__(args, num_classes, train_labels)
        widths, stages = self.cohort.widths, self.cohort.stages
        self.aggregator = models.Aggregator(widths, stages)
        self.matching_network = None
        if args.matching == "learned":
            self.matching_network = meta.MatchingNetwork(widths, stages)
            if len(args.arch) > 1:
                self.second = SecondStep("meta step", args.meta_freq, self.matching_network,
                                         self.meta_step, first=args.contrast_start)
        self.forward_mode = True

    def check(self):
        """Raises UserError where the meta step cannot differentiate the students twice.

        Sets forward_mode: whether all their layers have it, for the meta step's first step.
        """
        if self.second:
            trial = meta.DerivativeTrial()
            self.cohort.check(self.args.image_size, trial)
            self.forward_mode = trial.forward_mode

    def terms(self, outputs, labels, rows):
        """The whole loss; the four contrastive losses are L-MCL's.

        sum_{a,l} CE(logits_a^l, y) + sum_a CE(agg_a, y) + sum_{a,b} KL_T(logits_a^L <- agg_b)
        + L-MCL
        """
        features, logits = outputs.features, outputs.logits
        terms = {"ce": (1, losses.cross_entropy(logits, labels))}
        aggregated = self.aggregator(features, logits)  # [N, B, C]
        terms["ce_agg"] = (1, losses.cross_entropy(aggregated, labels))
        own = logits[:, -1, None]  # [N, 1, B, C]
        terms["kd"] = (1, losses.distillation(own, aggregated, self.args.T).sum())  # a = b too
        with torch.no_grad():  # lambda is a constant in the ordinary step
            matching = self.matching(features)  # [N, L, N, L, B]
        if self.phase == "contrast":
            terms |= self.contrastive_terms(outputs.embeddings, labels, matching, rows, gains=True)
        terms |= self.monitored(outputs, labels, rows)
        if len(logits) > 1:
            terms["matching"] = (None, matching.mean(-1))  # [N, L, N, L]
        return terms

    def contrastive_terms(self, embeddings, labels, matching, rows, gains=False):
        """As MCL's, between all stages. matching: lambda [N, L, N, L, B]."""
        args = self.args
        if rows:
            values = losses.lmcl_bank_loss(
                embeddings, rows.own, rows.positive, rows.negatives, rows.same_class, matching,
                args.tau, args.T, gains)
        else:
            values = losses.lmcl_loss(embeddings, labels, matching, args.tau, args.T, gains)
        return self.weighted(values)

    def matching(self, features):
        """lambda, from the matching network or 0.5.  N x [L, B, d_a] -> [N, L, N, L, B]."""
        if self.matching_network:
            return self.matching_network(features)
        N, (L, B, _) = len(features), features[0].shape
        return torch.full((N, L, N, L, B), 0.5, device=features[0].device)

    def meta_step(self, optimizer, lr, average, images, labels, rows, outputs):
        """One step of the matching network along its exact hypergradient, in float32."""
        args = self.args

        def inner_loss(embeddings, matching):
            terms = self.contrastive_terms(embeddings, labels, matching, rows)
            return sum(weight * value for weight, value in terms.values())

        meta.meta_step(
            self.students, self.matching_network, optimizer, images, inner_loss,
            outer_loss=lambda logits: losses.cross_entropy(logits, labels),
            inner_steps=args.meta_steps, lr=lr, momentum=args.momentum,
            weight_decay=args.weight_decay, average=average,
            moving=args.virtual_lambda == "moving", forward_mode=self.forward_mode)


class AFD(Method):
    """backbones alone, adversarial distillation of feature maps and mutual KL (ICML 2020)"""

    @staticmethod
    def add_options(group):
        add_temperature(group)
        group.add_argument("--weight-adversarial", type=arguments.not_negative, default=0.05,
                           metavar="W",
                           help="of the adversarial term; at 1 it drowns the others (0.05)")

    def __init__(self, args, num_classes, train_labels=None):
        super().__init__(args, num_classes, train_labels)
        with torch.no_grad():
            example = torch.zeros(1, 3, args.image_size, args.image_size)
            maps, _ = self.cohort.eval().last_maps(example)
        self.discriminators = models.Discriminators(maps)
        if len(args.arch) > 1:
            self.second = SecondStep("discriminators' step", 1, self.discriminators.discriminators,
                                     self.discriminators_step, self.adam)

    def forward(self, images):
        maps, logits = self.students.last_maps(images)
        return Outputs([], logits, maps=self.discriminators.align(maps))

    def terms(self, outputs, labels, rows):
        logits = outputs.logits
        terms = {"ce": (1, losses.cross_entropy(logits, labels)),
                 "kd": (1, losses.mutual_distillation(logits[:, -1], self.args.T))}
        if self.second:
            scores = self.discriminators(outputs.maps)  # [N, B]
            terms["adversarial"] = (self.args.weight_adversarial, losses.generator_loss(scores))
        return terms

    @staticmethod
    def adam(parameters, **sgd):
        # fused: its step counts never leave the GPU, in a resumed run neither
        return torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999), fused=True)

    def discriminators_step(self, optimizer, lr, average, images, labels, rows, outputs):
        """The discriminators learn to tell each student's map from the next one's, maps constant.
        """
        maps = [losses.at_least_float32(m) for m in outputs.maps]
        optimizer.zero_grad()  # the students' step left some
        own = self.discriminators(maps)  # [N, B]
        peer = self.discriminators(maps[1:] + maps[:1])  # [N, B]
        losses.discriminator_loss(own, peer).backward()
        meta.average_gradients(self.second.network, average)
        optimizer.step()


METHODS = {"lmcl": LMCL, "mcl": MCL, "deep-supervision": DeepSupervision, "dml": DML, "afd": AFD,
           "independent": Independent}


def check_second(method):
    """Raises UserError where a method's `second` is not what train.py's loop takes."""
    second, name = method.second, f"{type(method).__name__}.second"
    if second is None:
        return
    if not isinstance(second, SecondStep):
        raise UserError(f"{name} is a {type(second).__name__}: "
                        "it must be a methods.SecondStep, or None")
    network = second.network
    if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
        raise UserError(f"{name} has no network with parameters to train: "
                        "give it one, or do without the second step")
    if not isinstance(second.every, int) or second.every < 1:
        raise UserError(f"{name} is made after every {second.every!r} steps: "
                        "it must be a whole number from 1 on")
    own = set(method.parameters())
    if not all(p in own for p in network.parameters()):
        raise UserError(f"{name} trains a network that is no part of the method, so nothing saves "
                        "it: assign it first, self.NAME = network")
