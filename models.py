"""Students: a backbone is stages in a row, a branch is the remaining stages again.

    images -> stem -> stage 1 -> stage 2 -> ... -> stage L -> tail, pool = f^L -> classifier
                         |          '--> branch 2: stage 3 .. L (fresh copies), tail, pool = f^2
                         '-------------> branch 1: stage 2 .. L (fresh copies), tail, pool = f^1

so that every stage's feature f^l has the same width d and a classifier of its own. The stages are
those of support/architectures.py. `python models.py` prints every student's parameters and
multiply-adds.

symbol   meaning                                       shape
-------  --------------------------------------------  --------------------------------------
N, L     students, stages of a student
f_a^l    feature of student a at stage l               [B, d_a]; features: N tensors [L, B, d_a]
logits   classifier on f_a^l                           [N, L, B, C]
z_a^l    embedding = unit(MLP_a^l(f_a^l))              [N, L, B, 128]
agg_a    sum_l g_l * logits_a^l, g = softmax(MLP_a)    [N, B, C]
n, K, D  training images, negatives, embedding width   memory bank: rows [N, L, n, D]
"""

import functools
import logging
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from support import seeds
from support.architectures import ARCHITECTURES, ExistingNetwork, architecture, conv, make_parts
from support.console import UserError, first_line

# ---------------------------------------------------------------- students from architectures

class Stages(nn.Module):
    """Stages in a row, then a tail, pooling to a feature, and a classifier."""

    def __init__(self, stages, tail, pool, classifier):
        super().__init__()
        self.stages, self.tail, self.pool, self.classifier = stages, tail, pool, classifier

    def forward_features(self, x):
        """Map [B, c, h, w] -> the map after each stage, feature [B, d], logits [B, C]."""
        maps = self.maps(x)
        feature = self.pool(self.tail(maps[-1]))  # [B, d]
        return maps, feature, self.classifier(feature)

    def maps(self, x):
        """Map [B, c, h, w] -> the map after each stage, a list."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x):
        return self.forward_features(x)[-1]


class Branch(Stages):
    """The stages of an architecture after number `branch` >= 1. Called with that stage's map."""

    def __init__(self, architecture, branch, num_classes):
        _, *parts = make_parts(architecture, branch, num_classes)
        super().__init__(*parts)


class Backbone(Stages):
    """The plain network. Called with images [B, 3, H, W], returns logits [B, C].

    name: of a student (see `architecture`), or an architecture itself.
    """

    def __init__(self, name, num_classes):
        found = architecture(name) if isinstance(name, str) else name
        stem, *parts = make_parts(found, 0, num_classes)
        super().__init__(*parts)
        self.stem = stem

    def maps(self, x):
        """Images [B, 3, H, W] -> the map after each stage, a list."""
        return super().maps(self.stem(x))


class Student(nn.Module):
    """A backbone and, for each stage but the last, a refinement branch."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.branches = nn.ModuleList()

    def forward(self, x):
        """images [B, 3, H, W] -> features [L, B, d], logits [L, B, C]; L = 1 without branches."""
        maps, *own = self.backbone.forward_features(x)
        heads = []
        for branch, m in zip(self.branches, maps, strict=False):
            _, *head = branch.forward_features(m)
            heads.append(head)
        features, logits = zip(*heads, own, strict=True)
        return torch.stack(features), torch.stack(logits)


def run_part(title, module, x, form="a map [B, c, h, w]"):
    """module(x), of that form. Raises UserError in one line for any failure."""
    try:
        y = module(x)
    except Exception as error:  # a user's module raises what it likes
        what = "a map" if x.dim() == 4 else "features"
        raise UserError(f"{title} fails on {what} {list(x.shape)}: {first_line(error)}") from error
    if not torch.is_tensor(y) or y.dim() != form.count(",") + 1:
        found = list(y.shape) if torch.is_tensor(y) else f"a {type(y).__name__}"
        raise UserError(f"{title} gives {found}, should give {form}")
    return y


class Cohort(nn.Module):
    """N students on the same images.

    names: of students (see `architecture`), alike or different. branches=False leaves the
    backbones alone (L = 1). Called with images [B, 3, H, W], returns features, a list over
    students of [L, B, d_a], and logits [N, L, B, C]. Raises UserError for an unknown name or
    students of unequal numbers of stages.

    All backbones are drawn before any branch, so that a seed gives every method the same backbones.
    """

    def __init__(self, names, num_classes, branches=True):
        super().__init__()
        self.names = [names] if isinstance(names, str) else list(names)
        found = [architecture(name) for name in self.names]
        if len({a.stages for a in found}) != 1:
            stages = [f"{name}: {a.stages}" for name, a in zip(self.names, found, strict=True)]
            raise UserError("students of one cohort must have the same number of stages, got "
                            + (", ".join(stages) or "none"))
        self.stages, self.num_classes = found[0].stages if branches else 1, num_classes
        self.students = nn.ModuleList(Student(Backbone(a, num_classes)) for a in found)
        for student, a in zip(self.students, found, strict=True):
            numbers = range(1, a.stages) if branches else ()
            student.branches.extend(Branch(a, b, num_classes) for b in numbers)
        self.widths = [a.width for a in found]

    def forward(self, x):
        features, logits = zip(*side_by_side(self.students, x), strict=True)
        return list(features), torch.stack(logits)  # [L, B, d_a] each; [N, L, B, C]

    def check(self, image_size, trial=None):
        """Run every part once, in eval mode. Raises UserError where parts or the width do not fit.

        trial(title, module, x): called for each part of a backbone, too, with what goes into it.
        """
        images = next(self.parameters()).new_zeros(2, 3, image_size, image_size)
        with evaluation(self):
            found = zip(self.names, self.widths, self.students, strict=True)
            for name, width, student in {name: (name, *rest) for name, *rest in found}.values():
                check_student(name, width, self.num_classes, student, images, trial)

    def last_maps(self, x):
        """The backbones alone: the last maps, N of [B, c_a, h_a, w_a], and logits [N, 1, B, C]."""
        found = [student.backbone.forward_features(x) for student in self.students]
        maps, _, logits = zip(*found, strict=True)
        return [m[-1] for m in maps], torch.stack(logits)[:, None]


def side_by_side(networks, x):
    """[network(x) for each], on a GPU each on a stream of its own: one network does not fill it.

    Autograd runs each backward pass on its forward pass's stream, and a CUDA graph takes the
    streams in.
    """
    if not x.is_cuda or len(networks) == 1:
        return [network(x) for network in networks]
    current, outputs = torch.cuda.current_stream(), []
    for network, stream in zip(networks, streams(x.device, len(networks)), strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs.append(network(x))
    for stream in streams(x.device, len(networks)):
        current.wait_stream(stream)
    return outputs


@functools.cache
def streams(device, count):
    """The same ones for each call: their memory is used again."""
    return [torch.cuda.Stream(device) for _ in range(count)]


def check_student(name, width, num_classes, student, images, trial):
    """Run each part of the backbone and of each branch. Raises UserError where one does not fit."""
    backbone = student.backbone
    parts = ["stem", *(f"stage {s + 1}" for s in range(len(backbone.stages))), "tail"]
    for b, network in enumerate([backbone, *student.branches]):
        def run(part, module, x, *form, tries=trial and b == 0):  # a branch has the same layers
            title = f"student {name!r}: {part}"
            if tries:
                trial(title, module, x)
            return run_part(title, module, x, *form)

        modules = [backbone.stem, *backbone.stages[:b], *network.stages, network.tail]
        x = images
        for part, module in zip(parts, modules, strict=True):
            x = run(part, module, x)
        feature = run("pooling", network.pool, x, "features [B, d]")
        if feature.shape[1] != width:
            raise UserError(f"student {name!r}: width is {width}, should be {feature.shape[1]}")
        logits = run("classifier", network.classifier, feature, "logits [B, C]")
        if logits.shape[1] != num_classes:
            raise UserError(f"student {name!r}: its classifier is for {logits.shape[1]} classes, "
                            f"should be for {num_classes}: build takes num_classes")


def count_no_batches(module):
    """Batch normalisation counts no batches in training, a launch each.

    Files hold its number as it is now. Momentum is set, so nothing reads the number. It stands in
    state dictionaries, since torchvision's networks load strictly.
    """
    for norm in module.modules():
        if getattr(norm, "num_batches_tracked", None) is None or norm.momentum is None:
            continue
        count, norm.num_batches_tracked = norm.num_batches_tracked.cpu(), None

        def put(norm, state, prefix, metadata, count=count):
            state[f"{prefix}num_batches_tracked"] = count.clone()

        def take(norm, state, prefix, *_):
            state.pop(f"{prefix}num_batches_tracked", None)

        norm.register_state_dict_post_hook(put)
        norm.register_load_state_dict_pre_hook(take)


# ---------------------------------------------------------------- what training adds

class EmbeddedCohort(nn.Module):
    """theta: students with branches and embedding MLPs, Linear(d_a, dim)-ReLU-Linear(dim, dim).

    Called with images [B, 3, H, W], returns features (list of [L, B, d_a]), embeddings [N, L, B,
    dim] with unit rows, and logits [N, L, B, C].
    """

    def __init__(self, cohort, dim=128):
        super().__init__()
        self.cohort = cohort
        mlp = lambda d: nn.Sequential(nn.Linear(d, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.mlps = nn.ModuleList(
            nn.ModuleList(mlp(d) for _ in range(cohort.stages)) for d in cohort.widths)

    def forward(self, x):
        features, logits = self.cohort(x)
        z = []
        for f_a, mlps in zip(features, self.mlps, strict=True):
            z += [mlp(f_al) for f_al, mlp in zip(f_a, mlps, strict=True)]
        z = torch.stack(z)  # [N*L, B, dim]
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
        return features, z.unflatten(0, (len(features), -1)), logits  # embeddings [N, L, B, dim]


class Aggregator(nn.Module):
    """agg_a = sum_l g_l logits_a^l, g = softmax(Linear(L*d, d)-ReLU-Linear(d, L) (f_a^1 .. f_a^L)).

    Called with features (list of [L, B, d_a]) and logits [N, L, B, C], returns [N, B, C].
    """

    def __init__(self, widths, stages):
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(stages * d, d), nn.ReLU(), nn.Linear(d, stages))
            for d in widths)

    def forward(self, features, logits):
        scores = []
        for f_a, mlp in zip(features, self.mlps, strict=True):
            together = f_a.transpose(0, 1).flatten(1)  # [B, L*d_a]
            scores.append(mlp(together))  # [B, L]
        scores = torch.stack(scores)  # [N, B, L]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        g = scores.softmax(-1).mT  # [N, L, B]
        return (g[..., None] * logits).sum(1)  # [N, B, C]


class Discriminators(nn.Module):
    """AFD's discriminators in a ring: D_a tells student a's last map (0) from student a+1's (1).

    The paper (Chung et al., ICML 2020) has no public code and leaves much open. Chosen here: all
    maps are brought to the smallest size by average pooling and to the smallest width by a
    transfer layer, 1x1 convolution-BN-LeakyReLU, that learns with its student; a discriminator is
    two 3x3 convolutions with LeakyReLU, pooling and a linear map to one score, without BN, which
    would normalise own and peer maps apart and so hide what tells them apart; each student is
    compared with the next one only; least squares; a weight (--weight-adversarial). Transfer
    layers and students minimise losses.generator_loss, discriminators losses.discriminator_loss,
    with Adam(2e-4, betas 0.5 and 0.999).

    maps: one example per student, [B, c_a, h_a, w_a].
    """

    def __init__(self, maps):
        super().__init__()
        c, self.size = min(m.shape[1] for m in maps), min(m.shape[-1] for m in maps)
        relu = nn.LeakyReLU(0.2)
        self.transfer, self.discriminators = nn.ModuleList(), nn.ModuleList()
        for a, m in enumerate(maps):
            if m.shape[-1] % self.size:
                eye = torch.eye(m.shape[-1])  # [h, h]
                average = F.adaptive_avg_pool1d(eye[None], self.size)[0]  # [h, size]
                self.register_buffer(f"average_{a}", average, persistent=False)
            layers = [conv(m.shape[1], c, 1), nn.BatchNorm2d(c), relu] if m.shape[1] != c else []
            self.transfer.append(nn.Sequential(*layers))
        for _ in maps:
            self.discriminators.append(nn.Sequential(
                nn.Conv2d(c, c, 3, stride=2, padding=1), relu, nn.Conv2d(c, c, 3, padding=1), relu,
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1)))

    def align(self, maps):
        """N maps [B, c_a, h_a, w_a] -> N maps [B, c, size, size]."""
        maps = [self.shrink(a, m) for a, m in enumerate(maps)]
        return [transfer(m) for transfer, m in zip(self.transfer, maps, strict=True)]

    def shrink(self, a, m):
        """[B, c, h, h] -> [B, c, size, size]: adaptive average pooling by deterministic operations.

        PyTorch's own is not deterministic on CUDA.
        """
        factor, rest = divmod(m.shape[-1], self.size)
        if rest:
            average = getattr(self, f"average_{a}").to(m.dtype)  # [h, size]
            return average.mT @ m @ average
        return m if factor == 1 else F.avg_pool2d(m, factor)

    def forward(self, maps):
        """N aligned maps -> scores [N, B], each map before the discriminator of the same place."""
        pairs = zip(self.discriminators, maps, strict=True)
        return torch.stack([d(m).squeeze(1) for d, m in pairs])


# ---------------------------------------------------------------- the memory bank

class BankRows(NamedTuple):
    """What one batch is contrasted with: copies of bank rows (float16, constant), and a mask.

    index       int64 [B], the batch's images among all training images
    own         [N, L, B, D], the images' rows
    positive    [N, L, B, D], the row of another image of the class, its own if it is alone
    negatives   [N, L, K, D], drawn once for the whole batch, with replacement
    same_class  bool [B, K], true where a negative is of the anchor's class: left out
    """

    index: Tensor
    own: Tensor
    positive: Tensor
    negatives: Tensor
    same_class: Tensor

    def last_stage(self):
        """The rows of the last stage alone, without the L axis."""
        own, positive, negatives = self.own[:, -1], self.positive[:, -1], self.negatives[:, -1]
        return BankRows(self.index, own, positive, negatives, self.same_class)


class MemoryBank(nn.Module):
    """A unit row for each training image, student and stage: the moving average of its embedding.

    labels: int64 [n], of all training images. Rows start random; a row's first write replaces it
    whole, later ones move it. Negatives are a function of (seed, epoch, step), partners of (seed,
    epoch), so that resuming needs the rows alone, and which of them are written. float16: rms error
    of a score 2.6e-4 at tau 0.07.
    """

    def __init__(self, labels, students, stages, dim=128, negatives=8192, momentum=0.5, seed=0):
        super().__init__()
        self.students, self.negatives = students, negatives
        self.momentum, self.seed = momentum, seed
        stored = torch.empty(students * stages, len(labels), dim, dtype=torch.float16)
        generator = self.generator("rows")
        for rows in stored:
            for chunk in rows.split(2 ** 16):  # small: never a float32 copy of all
                chunk.copy_(F.normalize(torch.randn(chunk.shape, generator=generator), dim=-1))
        # 3-D: .to(memory_format=channels_last) reorders what is 4-D
        self.register_buffer("stored", stored)
        self.register_buffer("written", torch.zeros(len(labels), dtype=torch.bool))
        self.register_buffer("labels", labels.clone(), persistent=False)
        self.register_buffer("partner", torch.empty_like(labels), persistent=False)
        self.partner_epoch = None
        labels = labels.cpu()
        sizes = labels.bincount()  # [classes]
        starts = sizes.cumsum(0) - sizes  # [classes]
        self.by_class = labels.argsort(stable=True)  # [n], images, one class after the other
        self.size = sizes[labels[self.by_class]]  # [n], of that image's class
        self.start = starts[labels[self.by_class]]  # [n], where it starts in by_class

    @property
    def rows(self):
        """[N, L, n, D], a view."""
        return self.stored.unflatten(0, (self.students, -1))

    def generator(self, *what):
        return seeds.generator(repr(("bank", self.seed, *what)))

    def to_device(self, x):
        """A copy for which the host does not wait."""
        x = x.pin_memory() if self.stored.is_cuda else x
        return x.to(self.stored.device, non_blocking=True)

    def sample(self, index, epoch, step):
        """BankRows for the images index, int64 [B] into the training set, on the rows' device."""
        if self.partner_epoch != epoch:  # each image comes once an epoch
            self.partner.copy_(self.to_device(self.sample_partners(epoch)), non_blocking=True)
            self.partner_epoch = epoch
        generator = self.generator(epoch, step)
        drawn = torch.randint(len(self.labels), (self.negatives,), generator=generator)
        drawn = self.to_device(drawn)  # [K]
        same_class = self.labels[index][:, None] == self.labels[drawn]  # [B, K]
        select = lambda images: self.rows.index_select(2, images)
        own, positive, negatives = select(index), select(self.partner[index]), select(drawn)
        return BankRows(index, own, positive, negatives, same_class)

    def sample_partners(self, epoch):
        """int64 [n]: for each image another one of its class, equally likely; itself if alone."""
        share = torch.rand(len(self.size), generator=self.generator(epoch), dtype=torch.float64)
        shift = 1 + (share * (self.size - 1)).long()  # [n], 1 .. size - 1
        place = torch.arange(len(self.size)) - self.start  # [n], within the class
        partner = torch.empty_like(self.by_class)
        partner[self.by_class] = self.by_class[self.start + (place + shift) % self.size]
        return partner

    @torch.no_grad()
    def update(self, index, z):
        """rows[:, :, index] = unit(momentum * row + (1 - momentum) * z); z at the first write.

        index int64 [B], z [N, L, B, D].
        """
        old = self.stored.index_select(1, index).float()  # [N*L, B, D]
        z = z.flatten(0, 1).float()  # [N*L, B, D]
        mixed = F.normalize(self.momentum * old + (1 - self.momentum) * z, dim=-1)
        written = self.written.index_select(0, index)[:, None]  # [B, 1]
        self.stored.index_copy_(1, index, torch.where(written, mixed, z).half())
        self.written.index_fill_(0, index, True)


# ---------------------------------------------------------------- what it costs

def parameters(module):
    return sum(p.numel() for p in module.parameters())


@contextmanager
def evaluation(module):
    """In eval mode, without gradients."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def multiply_adds(module, image_size=32):
    """Multiply-adds of convolutions and linear layers for one image, by PyTorch's counter."""
    # "triton not found" on a CPU
    logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
    from torch.utils.flop_counter import FlopCounterMode
    with evaluation(module), FlopCounterMode(display=False) as counter:
        module(next(module.parameters()).new_zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


def map_sizes(backbone, image_size):
    """The sides of the maps after the stem and after the last stage, in pixels."""
    with evaluation(backbone):
        stem = backbone.stem(next(backbone.parameters()).new_zeros(2, 3, image_size, image_size))
        return stem.shape[-1], Stages.maps(backbone, stem)[-1].shape[-1]


def cost(module, image_size=32):
    """(parameters, multiply-adds for one image)."""
    return parameters(module), multiply_adds(module, image_size)


if __name__ == "__main__":
    print("student            width   backbone params   branches' params   "
          "multiply-adds: backbone   with branches")
    for name, found in ARCHITECTURES.items():
        classes, size = (1000, 224) if isinstance(found, ExistingNetwork) else (100, 32)
        with torch.device("meta"):  # shapes alone
            student = Cohort([name], classes).students[0]
        (own, adds), (whole, all_adds) = cost(student.backbone, size), cost(student, size)
        print(f"{name:17} {found.width:6}   {own:15,}   {whole - own:16,}   {adds / 1e6:22.1f}M   "
              f"{all_adds / 1e6:12.1f}M")
