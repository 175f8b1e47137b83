"""The methods: one class each, from networks to weighted loss terms. train.py's loop runs any of them.

A method is a module. `students` is the cohort, with embedding MLPs where the method has them, `terms` one batch's
loss, `second_step` what some methods do after the SGD step. METHODS names them; adding a class there adds it to the
command line.

Yang et al., TPAMI 2023 (arXiv 2207.11518): L-MCL; AAAI 2022 (arXiv 2104.12565): MCL.
"""

import io

import torch
import torch.nn as nn

import losses
import meta
import models


class Independent(nn.Module):
    """backbones alone, cross-entropy: the published baseline"""

    branches = embeddings = False                          # what the cohort has beside its backbones
    T = 3.0                                                # --T where it is not given
    second_every, second_name = 0, ""                      # second_step after every so many steps; 0: never

    def __init__(self, args, num_classes, train_labels=None):
        """args: the options. train_labels: int64 [n], for a memory bank; without them there is none.

        Raises ValueError where a student's parts do not fit.
        """
        super().__init__()
        self.args, self.gather = args, None                # gather: set where several processes train
        cohort = models.Cohort(args.arch, num_classes, branches=self.branches)
        cohort.check(args.image_size)
        self.students = models.EmbeddedCohort(cohort) if self.embeddings else cohort
        self.bank = None

    @property
    def cohort(self):
        return self.students.cohort if self.embeddings else self.students

    def terms(self, images, labels, *rows):
        """One batch's loss: {name: (weight, value)}, loss = sum of weight * value; weight None: logged, not in it.

        images [B, 3, H, W], labels [B] int64, rows: what the bank drew (models.BankRows), if there is one.
        """
        _, logits = self.students(images)                                             # [N, L, B, C]
        return {"ce": (1, losses.cross_entropy(logits, labels))}                      # every head there is

    def after_step(self, *rows):
        """After the SGD step, with the same rows; may be captured in a CUDA graph."""

    def statistics(self):
        """The floating buffers that several processes average: running statistics, sums; not the bank's equal rows."""
        return [b for name, b in self.named_buffers() if b.is_floating_point() and not name.startswith("bank.")]

    def second_network(self):
        """The module that second_step trains; `terms` trains all the rest."""

    def second_optimizer(self, **sgd):
        return torch.optim.SGD(self.second_network().parameters(), **sgd)

    def optimizers(self, **sgd):
        """[for what `terms` trains] or [that, second_step's own]; sgd: the recipe's settings."""
        network = self.second_network()
        others = set(network.parameters()) if network else set()
        first = torch.optim.SGD([p for p in self.parameters() if p not in others], **sgd)
        return [first, self.second_optimizer(**sgd)] if network else [first]

    def second_step(self, optimizer, lr, average, images, labels, *rows):
        """lr: the present rate. average: mean over processes of a flat vector, or None for one process."""

    def picture(self, steps, total_steps):
        """A PNG, bytes, of what the method learned in the epoch's `steps` so far; None: there is nothing to show."""

    def end_epoch(self):
        """After the epoch's evaluation and picture."""


class DeepSupervision(Independent):
    """the students and branches of L-MCL, cross-entropy of every head, nothing mutual"""

    branches = True


class DML(Independent):
    """backbones alone, deep mutual learning: KL towards every other's prediction, T = 1 (CVPR 2018)"""

    T = 1.0

    def terms(self, images, labels, *rows):
        _, logits = self.students(images)
        return {"ce": (1, losses.cross_entropy(logits, labels)),
                "kd": (1, losses.mutual_distillation(logits[:, -1], self.args.T))}


class MCL(Independent):
    """backbones alone, the four contrastive losses on the last stage (AAAI 2022)"""

    embeddings = True

    def __init__(self, args, num_classes, train_labels=None):
        super().__init__(args, num_classes, train_labels)
        if args.contrast == "bank" and train_labels is not None:
            self.bank = models.MemoryBank(train_labels, len(args.arch), self.cohort.stages, negatives=args.negatives,
                                          momentum=args.bank_momentum, seed=args.seed)

    def weighted(self, values):
        """alpha VCL + gamma Soft VCL + beta ICL + lam Soft ICL, as terms."""
        args = self.args
        weights = dict(vcl=args.weight_vcl, soft_vcl=args.weight_soft_vcl,
                       icl=args.weight_icl, soft_icl=args.weight_soft_icl)
        return {name: (weights[name], value) for name, value in values.items()}

    def terms(self, images, labels, *rows):
        args = self.args
        _, embeddings, logits = self.students(images)                                 # [N, L, B, D], [N, L, B, C]
        self.embeddings_for_bank = embeddings.detach()
        terms = {"ce": (1, losses.cross_entropy(logits, labels))}
        if rows:
            _, own, positive, negatives, same_class = rows
            last = (r[:, -1] for r in (embeddings, own, positive, negatives))         # [N, ., D], of the last stage
            values = losses.mcl_bank_loss(*last, same_class, args.tau, args.T)
        else:
            values = losses.mcl_loss(embeddings[:, -1], labels, args.tau, args.T)
        terms |= self.weighted(values)
        if args.logit_kd:
            terms["kd"] = (1, losses.ensemble_distillation(logits[:, -1], args.T))
        return terms | self.monitored(embeddings, labels, rows)

    def monitored(self, embeddings, labels, rows):
        """The mutual information's bound, where it is defined."""
        if rows or len(embeddings) < 2:
            return {}
        return {"mi_bound": (None, losses.mutual_information_bound(embeddings[:, -1], labels, self.args.tau))}

    def after_step(self, *rows):
        if rows:                                           # every process writes all processes' rows
            index, z = rows[0], self.embeddings_for_bank                              # [B], [N, L, B, D]
            if self.gather:
                index, z = self.gather(index), self.gather(z.movedim(2, 0)).movedim(0, 2)
            self.bank.update(z, index)


class LMCL(MCL):
    """layer-wise mutual contrastive learning: branches, aggregators, learned layer matching (TPAMI 2023)"""

    branches, second_name = True, "meta step"

    def __init__(self, args, num_classes, train_labels=None):
        super().__init__(args, num_classes, train_labels)
        N, L = len(args.arch), self.cohort.stages
        self.aggregator = models.Aggregator(self.cohort.widths, L)
        self.matching_network = None
        if args.matching == "learned":
            self.matching_network = meta.MatchingNetwork(self.cohort.widths, L)
            self.second_every = args.meta_freq if N > 1 else 0
        self.register_buffer("lambda_sum", torch.zeros(N, L, N, L))                   # batch means, over an epoch

    def terms(self, images, labels, *rows):
        """sum_a sum_l CE(logits_a^l, y) + sum_a CE(agg_a, y) + sum_a sum_b KL_T(logits_a^L <- agg_b) + L_L-MCL."""
        features, embeddings, logits = self.students(images)    # N x [L, B, d_a], [N, L, B, D], [N, L, B, C]
        self.embeddings_for_bank = embeddings.detach()
        terms = {"ce": (1, losses.cross_entropy(logits, labels))}
        aggregated = self.aggregator(features, logits)                                # [N, B, C]
        terms["ce_agg"] = (1, losses.cross_entropy(aggregated, labels))
        terms["kd"] = (1, losses.distillation(logits[:, -1][:, None], aggregated, self.args.T).sum())     # a = b too
        with torch.no_grad():                              # lambda is a constant in the ordinary step
            matching = self.matching(features)                                        # [N, L, N, L, B]
            self.lambda_sum += matching.mean(-1)
        terms |= self.contrast(embeddings, labels, matching, rows)
        return terms | self.monitored(embeddings, labels, rows)

    def contrast(self, embeddings, labels, matching, rows):
        """L_L-MCL as terms: in the batch, or against the bank's rows. matching: lambda [N, L, N, L, B]."""
        loss, others = (losses.lmcl_bank_loss, rows[1:]) if rows else (losses.lmcl_loss, (labels,))
        return self.weighted(loss(embeddings, *others, matching, self.args.tau, self.args.T))

    def matching(self, features):
        """lambda, from the matching network or 0.5.  N x [L, B, d_a] -> [N, L, N, L, B]."""
        if self.matching_network:
            return self.matching_network(features)
        N, (L, B, _) = len(features), features[0].shape
        return torch.full((N, L, N, L, B), 0.5, device=features[0].device)

    def picture(self, steps, total_steps):
        """The mean lambda of each pair of stages."""
        if len(self.args.arch) < 2:
            return None
        file = io.BytesIO()
        meta_steps = total_steps // self.second_every if self.second_every else 0
        meta.draw_matching(self.lambda_sum / steps, self.args.arch, file, meta_steps)
        return file.getvalue()

    def end_epoch(self):
        self.lambda_sum.zero_()

    def second_network(self):
        return self.matching_network

    def second_step(self, optimizer, lr, average, images, labels, *rows):
        """The meta step: one step of the matching network along its exact hypergradient, in float32."""
        args = self.args

        def contrast(z, matching):
            return sum(weight * value for weight, value in self.contrast(z, labels, matching, rows).values())

        meta.meta_step(
            self.students, self.matching_network, optimizer, images, contrast,
            task=lambda logits: losses.cross_entropy(logits, labels),
            inner_steps=args.meta_steps, lr=lr, momentum=args.momentum, weight_decay=args.weight_decay, average=average)


class AFD(Independent):
    """backbones alone, adversarial distillation of feature maps and mutual KL (ICML 2020)"""

    second_name = "discriminators' step"

    def __init__(self, args, num_classes, train_labels=None):
        super().__init__(args, num_classes, train_labels)
        self.second_every = int(len(args.arch) > 1)
        with torch.no_grad():
            example = torch.zeros(1, 3, args.image_size, args.image_size)
            self.discriminators = models.Discriminators(self.cohort.eval().last_maps(example)[0])

    def terms(self, images, labels, *rows):
        maps, logits = self.students.last_maps(images)
        aligned = self.discriminators.align(maps)                                     # N x [B, c, h, w]
        # For second_step; in CUDA graphs too, since both steps are captured at the same call of each batch size.
        self.maps = [losses.at_least_float32(m.detach()) for m in aligned]
        terms = {"ce": (1, losses.cross_entropy(logits, labels)),
                 "kd": (1, losses.mutual_distillation(logits[:, -1], self.args.T))}
        if self.second_every:
            terms["adversarial"] = (self.args.weight_adversarial, losses.generator_loss(self.discriminators(aligned)))
        return terms

    def second_network(self):
        return self.discriminators.discriminators

    def second_optimizer(self, **sgd):
        # fused: its step counts never leave the GPU, in a resumed run neither
        return torch.optim.Adam(self.second_network().parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)

    def second_step(self, optimizer, lr, average, images, labels, *rows):
        """The discriminators learn to tell each student's map from the next one's; the maps are constant."""
        optimizer.param_groups[0]["capturable"] = self.args.cuda_graph     # here: --resume brings the earlier run's
        optimizer.zero_grad()                              # the students' step left some
        own, peer = (self.discriminators(maps) for maps in (self.maps, self.maps[1:] + self.maps[:1]))
        losses.discriminator_loss(own, peer).backward()
        meta.average_gradients(self.second_network(), average)
        optimizer.step()


METHODS = {"lmcl": LMCL, "mcl": MCL, "deep-supervision": DeepSupervision, "dml": DML, "afd": AFD,
           "independent": Independent}
