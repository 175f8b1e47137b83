"""Students: a backbone is stages in a row, a branch is the remaining stages again.

    images -> stem -> stage 1 -> stage 2 -> ... -> stage L -> tail -> pool = f^L -> classifier = logits^L
                         |          '--> branch 2: stage 3 .. L (fresh copies), tail, pool = f^2, classifier
                         '-------------> branch 1: stage 2 .. L (fresh copies), tail, pool = f^1, classifier

so that every stage's feature f^l has the same width d and a classifier of its own (SPEC sections 1 and 6).
A family of networks is one small class with a stem, a stage, a tail and a width; see `ResNet` below.

symbol   meaning                                       shape
-------  --------------------------------------------  --------------------------------------
N, L     students, stages of a student
f_a^l    feature of student a at stage l               [B, d_a]; features: N tensors [L, B, d_a]
logits   classifier on f_a^l                           [N, L, B, C]
z_a^l    embedding = unit(MLP_a^l(f_a^l))              [N, L, B, 128]
agg_a    sum_l g_l * logits_a^l, g = softmax(MLP_a)    [N, B, C]
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------- families

def conv(inputs, outputs, kernel, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class Residual(nn.Module):
    """ReLU(body(x) + shortcut(x)); He et al. 2016. The shortcut is a 1x1 convolution where shapes change."""

    def __init__(self, inputs, outputs, stride, body):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def basic_block(inputs, planes, stride):
    return Residual(inputs, planes, stride, [
        conv(inputs, planes, 3, stride), nn.BatchNorm2d(planes), nn.ReLU(),
        conv(planes, planes, 3), nn.BatchNorm2d(planes)])


def bottleneck_block(inputs, planes, stride):
    return Residual(inputs, 4 * planes, stride, [
        conv(inputs, planes, 1), nn.BatchNorm2d(planes), nn.ReLU(),
        conv(planes, planes, 3, stride), nn.BatchNorm2d(planes), nn.ReLU(),
        conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)])


class ResNet:
    """CIFAR ResNet: depth 6n+2 of basic blocks, or 9n+2 of bottlenecks; 16, 32, 64 planes."""

    stages = 3

    def __init__(self, depth, bottleneck=False):
        self.block, self.expansion = (bottleneck_block, 4) if bottleneck else (basic_block, 1)
        self.blocks = (depth - 2) // (9 if bottleneck else 6)
        self.width = 64 * self.expansion

    def stem(self):
        return nn.Sequential(conv(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())

    def stage(self, l):
        """Stage l = 0 .. 2, a fresh copy at each call."""
        planes, outputs = 16 * 2 ** l, 16 * 2 ** l * self.expansion
        inputs = outputs // 2 if l else 16
        first = self.block(inputs, planes, stride=2 if l else 1)
        return nn.Sequential(first, *(self.block(outputs, planes, 1) for _ in range(self.blocks - 1)))

    def tail(self):
        return nn.Sequential()

    def initialise(self, module):
        he_normal(module)


def he_normal(module):
    """Convolutions He-normal, fan-out (He et al. 2015); everything else as PyTorch starts it."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


FAMILIES = {
    "resnet8": ResNet(8), "resnet20": ResNet(20), "resnet32": ResNet(32), "resnet44": ResNet(44),
    "resnet56": ResNet(56), "resnet110": ResNet(110, bottleneck=True),
}


# ---------------------------------------------------------------- students from families

class Branch(nn.Module):
    """The stages from number `first` on, then tail, global average pooling and a classifier."""

    def __init__(self, family, first, num_classes):
        super().__init__()
        self.stages = nn.ModuleList(family.stage(l) for l in range(first, family.stages))
        self.tail = family.tail()
        self.classifier = nn.Linear(family.width, num_classes)
        self.apply(family.initialise)

    def walk(self, x):
        """Map [B, c, h, w] -> the map after each stage, feature [B, d], logits [B, C]."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        feature = self.tail(x).mean((2, 3))                               # [B, d]
        return maps, feature, self.classifier(feature)

    def forward(self, x):
        return self.walk(x)[-1]


class Backbone(Branch):
    """The plain network: a stem before all stages. Called with images [B, 3, H, W], returns logits [B, C]."""

    def __init__(self, family, num_classes):
        super().__init__(family, 0, num_classes)
        self.stem = family.stem().apply(family.initialise)

    def walk(self, x):
        return super().walk(self.stem(x))


class Student(nn.Module):
    """A backbone and, for each stage but the last, a refinement branch."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.branches = nn.ModuleList()

    def forward(self, x):
        """images [B, 3, H, W] -> features [L, B, d], logits [L, B, C]; L = 1 without branches."""
        maps, feature, logits = self.backbone.walk(x)
        heads = [branch.walk(m)[1:] for branch, m in zip(self.branches, maps)] + [(feature, logits)]
        features, logits = zip(*heads)
        return torch.stack(features), torch.stack(logits)


class Cohort(nn.Module):
    """N students on the same images.

    names: of students in FAMILIES, alike or different. branches=False leaves the backbones alone (L = 1).
    Called with images [B, 3, H, W], returns features, a list over students of [L, B, d_a], and logits
    [N, L, B, C]. Raises ValueError for an unknown name or students of unequal numbers of stages.

    All backbones are drawn before any branch, so that a seed gives every method the same backbones.
    """

    def __init__(self, names, num_classes, branches=True):
        super().__init__()
        unknown = [n for n in names if n not in FAMILIES]
        if unknown:
            raise ValueError(f"unknown student {unknown[0]!r}; known: {', '.join(FAMILIES)}")
        families = [FAMILIES[n] for n in names]
        if len({f.stages for f in families}) > 1:
            raise ValueError("students of one cohort must have the same number of stages, got "
                             + ", ".join(f"{n}: {f.stages}" for n, f in zip(names, families)))
        self.names = list(names)
        self.widths = [f.width for f in families]
        self.stages = families[0].stages if branches else 1
        self.students = nn.ModuleList(Student(Backbone(f, num_classes)) for f in families)
        if branches:
            for student, f in zip(self.students, families):
                student.branches.extend(Branch(f, l, num_classes) for l in range(1, f.stages))

    def forward(self, x):
        features, logits = zip(*(student(x) for student in self.students))
        return list(features), torch.stack(logits)                        # [L, B, d_a] each; [N, L, B, C]


# ---------------------------------------------------------------- what training adds to the students

class EmbeddedCohort(nn.Module):
    """theta: the students with their branches and embedding MLPs, Linear(d_a, dim)-ReLU-Linear(dim, dim).

    Called with images [B, 3, H, W], returns features (list of [L, B, d_a]), embeddings [N, L, B, dim] with
    unit rows, and logits [N, L, B, C].
    """

    def __init__(self, cohort, dim=128):
        super().__init__()
        self.cohort = cohort
        self.mlps = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(d, dim), nn.ReLU(), nn.Linear(dim, dim)) for _ in range(cohort.stages))
            for d in cohort.widths)

    def forward(self, x):
        features, logits = self.cohort(x)
        z = torch.stack([mlp(f_al) for f_a, mlps in zip(features, self.mlps) for f_al, mlp in zip(f_a, mlps)])
        z = F.normalize(z.float(), dim=-1)                                # [N*L, B, dim]
        return features, z.unflatten(0, (len(features), -1)), logits      # embeddings [N, L, B, dim]


class Aggregator(nn.Module):
    """agg_a = sum_l g_l logits_a^l, g = softmax(Linear(L*d_a, d_a)-ReLU-Linear(d_a, L) (concat_l f_a^l)).

    Called with features (list of [L, B, d_a]) and logits [N, L, B, C], returns [N, B, C].
    """

    def __init__(self, widths, stages):
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(stages * d, d), nn.ReLU(), nn.Linear(d, stages)) for d in widths)

    def forward(self, features, logits):
        g = torch.stack([mlp(f.transpose(0, 1).flatten(1)) for f, mlp in zip(features, self.mlps)])   # [N, B, L]
        return torch.einsum("nbl,nlbc->nbc", g.softmax(-1), logits)       # [N, B, C]


# ---------------------------------------------------------------- what it costs

def parameters(module):
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def multiply_adds(module, image_size=32):
    """Multiply-adds of convolutions and linear layers for one image (PyTorch's counter, two operations each)."""
    from torch.utils.flop_counter import FlopCounterMode
    training, example = module.training, next(module.parameters())
    with FlopCounterMode(display=False) as counter:
        module.eval()(torch.zeros(1, 3, image_size, image_size, device=example.device, dtype=example.dtype))
    module.train(training)
    return counter.get_total_flops() // 2
