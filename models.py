"""Students: a backbone is stages in a row, a branch is the remaining stages again.

    images -> stem -> stage 1 -> stage 2 -> ... -> stage L -> tail -> pool = f^L -> classifier = logits^L
                         |          '--> branch 2: stage 3 .. L (fresh copies), tail, pool = f^2, classifier
                         '-------------> branch 1: stage 2 .. L (fresh copies), tail, pool = f^1, classifier

so that every stage's feature f^l has the same width d and a classifier of its own.
An architecture is one small class with a stem, a stage, a tail and a width, see `ResNet` below; or an existing
network cut into stages by the names of its modules, see `ExistingNetwork`: torchvision's ResNets and ShuffleNetV2.
`python models.py` prints every student's parameters and multiply-adds.

symbol   meaning                                       shape
-------  --------------------------------------------  --------------------------------------
N, L     students, stages of a student
f_a^l    feature of student a at stage l               [B, d_a]; features: N tensors [L, B, d_a]
logits   classifier on f_a^l                           [N, L, B, C]
z_a^l    embedding = unit(MLP_a^l(f_a^l))              [N, L, B, 128]
agg_a    sum_l g_l * logits_a^l, g = softmax(MLP_a)    [N, B, C]
n, K, D  training images, negatives, embedding width   memory bank: rows [N, L, n, D]
"""

import copy
import functools
import hashlib
import importlib.machinery
import importlib.util
import re
import traceback
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.shufflenetv2 import InvertedResidual
from torchvision.transforms.v2 import functional as transforms

# ---------------------------------------------------------------- architectures

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
        return F.relu(self.body(x).add_(self.shortcut(x)), inplace=True)  # in place: BN keeps its input, not its output


def basic_block(inputs, planes, stride):
    return Residual(inputs, planes, stride, [
        conv(inputs, planes, 3, stride), nn.BatchNorm2d(planes), nn.ReLU(inplace=True),
        conv(planes, planes, 3), nn.BatchNorm2d(planes)])


def bottleneck_block(inputs, planes, stride):
    return Residual(inputs, 4 * planes, stride, [
        conv(inputs, planes, 1), nn.BatchNorm2d(planes), nn.ReLU(inplace=True),
        conv(planes, planes, 3, stride), nn.BatchNorm2d(planes), nn.ReLU(inplace=True),
        conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)])


class ResNet:
    """CIFAR ResNet: depth 6n+2 of basic blocks, or 9n+2 of bottlenecks; 16, 32, 64 planes."""

    stages = 3

    def __init__(self, depth, bottleneck=False):
        self.block, self.expansion = (bottleneck_block, 4) if bottleneck else (basic_block, 1)
        self.blocks = (depth - 2) // (9 if bottleneck else 6)
        self.width = 64 * self.expansion

    def stem(self):
        return nn.Sequential(conv(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True))

    def stage(self, s):
        """Stage s = 0 .. 2, a fresh copy at each call."""
        planes, outputs = 16 * 2 ** s, 16 * 2 ** s * self.expansion
        inputs = outputs // 2 if s else 16
        first = self.block(inputs, planes, stride=2 if s else 1)
        return nn.Sequential(first, *(self.block(outputs, planes, 1) for _ in range(self.blocks - 1)))

    def tail(self):
        return nn.Sequential()

    def initialise(self, module):
        he_normal(module)


class PreActivation(nn.Module):
    """body(ReLU(BN(x))) + shortcut; a shortcut that changes the shape starts behind the ReLU (He et al. 2016b)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.body = nn.Sequential(conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
                                  conv(outputs, outputs, 3))
        self.shortcut = conv(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x):
        active = self.activation(x)
        return self.body(active).add_(self.shortcut(active) if self.shortcut else x)


class WRN:
    """Wide residual network (Zagoruyko & Komodakis 2016): depth 6n+4, 16k, 32k, 64k planes; no dropout."""

    stages = 3

    def __init__(self, depth, k):
        self.blocks, self.k, self.width = (depth - 4) // 6, k, 64 * k

    def stem(self):
        return conv(3, 16, 3)

    def stage(self, s):
        outputs = 16 * self.k * 2 ** s
        first = PreActivation(outputs // 2 if s else 16, outputs, stride=2 if s else 1)
        return nn.Sequential(first, *(PreActivation(outputs, outputs, 1) for _ in range(self.blocks - 1)))

    def tail(self):
        return nn.Sequential(nn.BatchNorm2d(self.width), nn.ReLU(inplace=True))

    def initialise(self, module):
        he_normal(module)


class ShuffleNetV2:
    """ShuffleNetV2 (Ma et al. 2018) of torchvision's units; on CIFAR the stem keeps the resolution."""

    stages, width = 3, 1024

    def __init__(self, *channels):
        self.channels = (24, *channels)

    def stem(self):
        return nn.Sequential(conv(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(inplace=True))

    def stage(self, s):
        inputs, outputs = self.channels[s:s + 2]
        return nn.Sequential(InvertedResidual(inputs, outputs, 2),
                             *(InvertedResidual(outputs, outputs, 1) for _ in range((3, 7, 3)[s])))

    def tail(self):
        return nn.Sequential(conv(self.channels[-1], 1024, 1), nn.BatchNorm2d(1024), nn.ReLU(inplace=True))

    def initialise(self, module):
        pass                                                              # PyTorch's own


def bn_relu_conv(inputs, outputs, kernel, stride=1, groups=1, dilation=1):
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2 * dilation, dilation=dilation, groups=groups, bias=False))


class AttentivePool(nn.Module):
    """Sum over positions, weighted by the spatial softmax of a 1x1 convolution.  [B, c, h, w] -> [B, c]."""

    def __init__(self, channels):
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        attention = self.score(x).flatten(2).softmax(-1)                  # [B, 1, h*w]
        return (x.flatten(2) * attention).sum(-1)


class Gate(nn.Module):
    """forget * h + update: both are vectors over channels, broadcast over positions.  [B, c, h, w] -> the same.

    forget = sigmoid(W2 tanh(BN(W1 pool(h)))); update mixes two pooled depthwise views of h, channel by channel.
    """

    def __init__(self, c, forget_width, update_width):
        super().__init__()
        self.forget = nn.Sequential(
            AttentivePool(c), nn.Linear(c, forget_width), nn.BatchNorm1d(forget_width), nn.Tanh(),
            nn.Linear(forget_width, c), nn.Sigmoid())
        self.views = nn.ModuleList(
            nn.Sequential(bn_relu_conv(c, c, 3, groups=c, dilation=d), AttentivePool(c)) for d in (1, 2))
        self.squeeze = nn.Sequential(nn.Linear(2 * c, update_width), nn.BatchNorm1d(update_width), nn.Tanh())
        self.excite = nn.ModuleList(nn.Linear(update_width, c) for _ in range(2))

    def forward(self, h):
        views = [view(h) for view in self.views]                          # two of [B, c]
        hidden = self.squeeze(torch.cat(views, 1))                        # [B, update_width]
        share = torch.stack([linear(hidden) for linear in self.excite]).softmax(0)        # [2, B, c]
        update = (share * torch.stack(views)).sum(0)                      # [B, c]
        return self.forget(h)[..., None, None] * h + update[..., None, None]


class Cell(nn.Module):
    """1x1 to 4k, 3x3 with 4 groups to k, gate; the k new channels are appended to the input's."""

    def __init__(self, inputs, k):
        super().__init__()
        self.body = nn.Sequential(
            bn_relu_conv(inputs, 4 * k, 1), bn_relu_conv(4 * k, k, 3, groups=4), Gate(k, k // 2, k))

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


class HCGNet:
    """Hybrid connectivity with gates (Yang et al., AAAI 2020): three stages of eight cells with growth k_s."""

    stages = 3

    def __init__(self, *growth):
        self.growth, c, self.inputs = growth, 2 * growth[0], []
        for k in growth:
            self.inputs.append(c)
            self.width = c + 8 * k
            c = self.width // 2

    def stem(self):
        return conv(3, self.inputs[0], 3)

    def stage(self, s):
        """Eight cells and, but for the last stage, the transition that halves channels and resolution."""
        c, k = self.inputs[s], self.growth[s]
        cells = [Cell(c + i * k, k) for i in range(8)]
        c, half = c + 8 * k, (c + 8 * k) // 2
        if s < self.stages - 1:
            between = c - (c - half) // 2
            cells += [bn_relu_conv(c, between, 1), bn_relu_conv(between, half, 3, stride=2),
                      Gate(half, half // 4, 2 * half // 4)]
        return nn.Sequential(*cells)

    def tail(self):
        return nn.Sequential(nn.BatchNorm2d(self.width), nn.ReLU(inplace=True))

    def initialise(self, module):
        pass                                                              # PyTorch's own


def he_normal(module):
    """Convolutions He-normal, fan-out (He et al. 2015); everything else as PyTorch starts it."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ExistingNetwork:
    """A network whose modules run in a row, cut into stages by their names.

    build: build(num_classes=C) makes the network, with its own initialisation.
    layout: names of its modules, "stem | stage 1 | ... | stage L | tail | classifier". Pooling before the classifier
    is understood, a section may be empty.
    width: channels after the tail. blocks: {b: blocks that branch b keeps of each of its stages}, others keep all.
    """

    def __init__(self, build, layout, width, blocks=None):
        self.build, self.width, self.blocks = build, width, blocks or {}
        self.sections = [section.split() for section in layout.split("|")]
        self.stages = len(self.sections) - 3
        ours = ["stem.", *(f"stages.{s}." for s in range(self.stages)), "tail.", "classifier."]
        self.prefixes = {                                                 # of a tensor's name here: in the network
            prefix + (f"{i}." if len(section) > 1 else ""): name + "."
            for prefix, section in zip(ours, self.sections, strict=True) for i, name in enumerate(section)}

    def parts(self, branch, num_classes):
        """Fresh (stem, [the stages after number `branch`], tail, classifier), drawn as the network draws itself."""
        network = self.build(num_classes=num_classes)
        sections = [[network.get_submodule(name) for name in section] for section in self.sections]
        stem, *stages, tail, classifier = (s[0] if len(s) == 1 else nn.Sequential(*s) for s in sections)
        keep = self.blocks.get(branch)
        return stem, [stage[:keep] if keep else stage for stage in stages[branch:]], tail, classifier


def torchvision_network(name):
    """torchvision's. ResNet's branches keep one block a stage, ShuffleNetV2's first one two units, its others all."""
    build = functools.partial(torchvision.models.get_model, name, weights=None)
    if name.startswith("shufflenet"):
        return ExistingNetwork(build, "| conv1 maxpool | stage2 | stage3 | stage4 | conv5 | fc",
                               width=2048 if name.endswith("x2_0") else 1024, blocks={1: 2})
    return ExistingNetwork(build, "conv1 bn1 relu maxpool | layer1 | layer2 | layer3 | layer4 | | fc",
                           width=512 if name in ("resnet18", "resnet34") else 2048, blocks={1: 1, 2: 1, 3: 1})


ARCHITECTURES = {
    "resnet8": ResNet(8), "resnet20": ResNet(20), "resnet32": ResNet(32), "resnet44": ResNet(44),
    "resnet56": ResNet(56), "resnet110": ResNet(110, bottleneck=True),
    "wrn_16_2": WRN(16, 2), "wrn_40_2": WRN(40, 2), "wrn_28_4": WRN(28, 4),    # and any other wrn_D_K
    "shufflenetv2_0.5": ShuffleNetV2(48, 96, 192), "shufflenetv2_1": ShuffleNetV2(116, 232, 464),
    "hcgnet_a1": HCGNet(12, 24, 36), "hcgnet_a2": HCGNet(24, 36, 64),
    **{name: torchvision_network(name) for name in (                      # ImageNet, by torchvision's names
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
        "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
        "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0")},
}


def architecture(name):
    """The architecture of that name in ARCHITECTURES, or wrn_D_K. Raises ValueError for any other, or a wrong one."""
    wide = re.fullmatch(r"wrn_(\d{2,3})_(\d{1,2})", name)
    if name not in ARCHITECTURES and wide and (int(wide[1]) - 4) % 6 == 0 and int(wide[1]) >= 10 and int(wide[2]) >= 1:
        return WRN(int(wide[1]), int(wide[2]))
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown student {name!r}; known: {', '.join(ARCHITECTURES)}, wrn_D_K with D = 6n+4, "
                         "and what --model-file adds")
    found = ARCHITECTURES[name]
    if isinstance(found, type):
        raise ValueError(f"student {name!r} is the class {found.__name__}: register an instance, {found.__name__}()")
    wanted = () if isinstance(found, ExistingNetwork) else ("stages", "width", "stem", "stage", "tail", "initialise")
    if missing := [attribute for attribute in wanted if not hasattr(found, attribute)]:
        raise ValueError(f"student {name!r} lacks {', '.join(missing)}; an architecture has {', '.join(wanted)}")
    return found


def load_model_file(path):
    """Run a Python file that adds to models.ARCHITECTURES. Raises ValueError for anything wrong in it."""
    loader = importlib.machinery.SourceFileLoader("model_file", str(path))
    try:
        loader.exec_module(importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader)))
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}" for frame in frames if frame.filename == str(path)]
        raise ValueError(f"{path}{''.join(lines[-1:])}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error):
    return next(iter(str(error).strip().splitlines()), "")[:200]


# ---------------------------------------------------------------- students from architectures

class Branch(nn.Module):
    """The stages after number `branch` (0: all of them), then tail, global average pooling and a classifier."""

    def __init__(self, architecture, branch, num_classes):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, must be at least 1")
        if isinstance(architecture, ExistingNetwork):
            stem, stages, tail, classifier = architecture.parts(branch, num_classes)
            self.stages, self.tail, self.classifier = nn.ModuleList(stages), tail, classifier
        else:
            self.stages = nn.ModuleList(architecture.stage(s) for s in range(branch, architecture.stages))
            self.tail = architecture.tail()
            self.classifier = nn.Linear(architecture.width, num_classes)
            self.apply(architecture.initialise)
            stem = None if branch else architecture.stem().apply(architecture.initialise)
        if branch == 0:
            self.stem = stem

    def forward_features(self, x):
        """Map [B, c, h, w] -> the map after each stage, feature [B, d], logits [B, C]."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        feature = self.tail(x).mean((2, 3))                               # [B, d]
        return maps, feature, self.classifier(feature)

    def forward(self, x):
        return self.forward_features(x)[-1]


class Backbone(Branch):
    """The plain network: a stem before all stages. Called with images [B, 3, H, W], returns logits [B, C].

    name: of a student (see `architecture`), or an architecture itself.
    """

    def __init__(self, name, num_classes):
        super().__init__(architecture(name) if isinstance(name, str) else name, 0, num_classes)

    def forward_features(self, x):
        return super().forward_features(self.stem(x))


class Student(nn.Module):
    """A backbone and, for each stage but the last, a refinement branch."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.branches = nn.ModuleList()

    def forward(self, x):
        """images [B, 3, H, W] -> features [L, B, d], logits [L, B, C]; L = 1 without branches."""
        maps, feature, logits = self.backbone.forward_features(x)
        heads = [branch.forward_features(m)[1:] for branch, m in zip(self.branches, maps, strict=False)]
        heads.append((feature, logits))
        features, logits = zip(*heads, strict=True)
        return torch.stack(features), torch.stack(logits)


def run_part(title, module, x):
    """module(x), a map [B, c, h, w]. Raises ValueError in one line for any failure."""
    try:
        y = module(x)
    except Exception as error:                                            # a user's module raises what it likes
        raise ValueError(f"{title} fails on a map {list(x.shape)}: {first_line(error)}") from error
    if y.dim() != 4:
        raise ValueError(f"{title} gives {list(y.shape)}, should give a map [B, c, h, w]")
    return y


class Cohort(nn.Module):
    """N students on the same images.

    names: of students (see `architecture`), alike or different. branches=False leaves the backbones alone (L = 1).
    Called with images [B, 3, H, W], returns features, a list over students of [L, B, d_a], and logits
    [N, L, B, C]. Raises ValueError for an unknown name or students of unequal numbers of stages.

    All backbones are drawn before any branch, so that a seed gives every method the same backbones.
    """

    def __init__(self, names, num_classes, branches=True):
        super().__init__()
        self.names = [names] if isinstance(names, str) else list(names)
        found = [architecture(name) for name in self.names]
        if len({a.stages for a in found}) != 1:
            stages = ", ".join(f"{name}: {a.stages}" for name, a in zip(self.names, found, strict=True))
            raise ValueError(f"students of one cohort must have the same number of stages, got {stages or 'none'}")
        self.widths = [a.width for a in found]
        self.stages = found[0].stages if branches else 1
        self.students = nn.ModuleList(Student(Backbone(a, num_classes)) for a in found)
        if branches:
            for student, a in zip(self.students, found, strict=True):
                student.branches.extend(Branch(a, b, num_classes) for b in range(1, a.stages))

    def forward(self, x):
        features, logits = zip(*(student(x) for student in self.students), strict=True)
        return list(features), torch.stack(logits)                        # [L, B, d_a] each; [N, L, B, C]

    def check(self, image_size):
        """Run every part once, in eval mode. Raises ValueError where a student's parts or its width do not fit."""
        images = next(self.parameters()).new_zeros(2, 3, image_size, image_size)
        with evaluation(self):
            for name, width, student in zip(self.names, self.widths, self.students, strict=True):
                backbone = student.backbone
                parts = ["stem", *(f"stage {s + 1}" for s in range(len(backbone.stages))), "tail"]
                for b, net in enumerate([backbone, *student.branches]):
                    row, x = [backbone.stem, *backbone.stages[:b], *net.stages, net.tail], images
                    for part, module in zip(parts, row, strict=True):
                        x = run_part(f"student {name!r}: {part}", module, x)
                    if x.shape[1] != width:
                        raise ValueError(f"student {name!r}: width is {width}, should be {x.shape[1]}")

    def last_maps(self, x):
        """The backbones alone: the last stage's maps, N of [B, c_a, h_a, w_a], and logits [N, 1, B, C]."""
        maps, _, logits = zip(*(student.backbone.forward_features(x) for student in self.students), strict=True)
        return [m[-1] for m in maps], torch.stack(logits)[:, None]


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
            nn.ModuleList(nn.Sequential(nn.Linear(d, dim), nn.ReLU(), nn.Linear(dim, dim))
                          for _ in range(cohort.stages)) for d in cohort.widths)

    def forward(self, x):
        features, logits = self.cohort(x)
        z = torch.stack([mlp(f_al) for f_a, mlps in zip(features, self.mlps, strict=True)
                         for f_al, mlp in zip(f_a, mlps, strict=True)])
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)    # [N*L, B, dim]
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
        g = torch.stack([mlp(f.transpose(0, 1).flatten(1))
                         for f, mlp in zip(features, self.mlps, strict=True)])        # [N, B, L]
        g = g.to(torch.promote_types(g.dtype, torch.float32)).softmax(-1).mT          # [N, L, B]
        return (g[..., None] * logits).sum(1)                             # [N, B, C]


class Discriminators(nn.Module):
    """AFD's discriminators in a ring: D_a tells student a's last feature map (0) from student a+1's (1).

    The paper (Chung et al., ICML 2020) has no public code and leaves much open. Chosen here: all maps are
    brought to the smallest size by average pooling and to the smallest width by a transfer layer, 1x1
    convolution-BN-LeakyReLU, that learns with its student; a discriminator is two 3x3 convolutions with
    LeakyReLU, pooling and a linear map to one score, without BN, which would normalise own and peer maps
    apart and so hide what tells them apart; each student is compared with the next one only; least
    squares; a weight (--weight-adversarial). Transfer layers and students minimise losses.generator_loss,
    discriminators losses.discriminator_loss, with Adam(2e-4, betas 0.5 and 0.999).

    maps: one example per student, [B, c_a, h_a, w_a].
    """

    def __init__(self, maps):
        super().__init__()
        c, self.size = min(m.shape[1] for m in maps), min(m.shape[-1] for m in maps)
        self.transfer = nn.ModuleList(
            nn.Sequential(conv(m.shape[1], c, 1), nn.BatchNorm2d(c), nn.LeakyReLU(0.2)) if m.shape[1] != c
            else nn.Identity() for m in maps)
        self.discriminators = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(c, c, 3, padding=1),
                          nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1)) for _ in maps)

    def align(self, maps):
        """N maps [B, c_a, h_a, w_a] -> N maps [B, c, size, size]."""
        return [t(self.shrink(m)) for t, m in zip(self.transfer, maps, strict=True)]

    def shrink(self, m):
        """[B, c, h, w] -> [B, c, size, size]; plain pooling where it divides: CUDA's adaptive is not deterministic."""
        factor, rest = divmod(m.shape[-1], self.size)
        return F.adaptive_avg_pool2d(m, self.size) if rest else m if factor == 1 else F.avg_pool2d(m, factor)

    def forward(self, maps):
        """N aligned maps -> scores [N, B], each map before the discriminator of the same place."""
        return torch.stack([d(m).squeeze(1) for d, m in zip(self.discriminators, maps, strict=True)])


# ---------------------------------------------------------------- the memory bank

class BankRows(NamedTuple):
    """What one batch is contrasted with: its indices, copies of bank rows (float16, constant), and a mask."""

    index: Tensor       # int64 [B], the batch's images among all training images
    own: Tensor         # [N, L, B, D], the images' rows
    positive: Tensor    # [N, L, B, D], for each image the row of another image of its class, its own if it is alone
    negatives: Tensor   # [N, L, K, D], drawn once for the whole batch, with replacement
    same_class: Tensor  # bool [B, K], true where a negative is of the anchor's class: left out


class MemoryBank(nn.Module):
    """A unit row for each training image, student and stage: the moving average of its embedding.

    labels: int64 [n], of all training images. Rows start random. Negatives are a function of (seed, epoch,
    step), partners of (seed, epoch), so that resuming needs the rows alone.
    float16: rms error of a score 2.6e-4 at tau 0.07.
    """

    def __init__(self, labels, students, stages, dim=128, negatives=8192, momentum=0.5, seed=0):
        super().__init__()
        self.students, self.negatives, self.momentum, self.seed = students, negatives, momentum, seed
        stored = torch.empty(students * stages, len(labels), dim, dtype=torch.float16)
        generator = self.generator("rows")
        for rows in stored:
            for chunk in rows.split(2 ** 16):                             # small: never a float32 copy of all
                chunk.copy_(F.normalize(torch.randn(chunk.shape, generator=generator), dim=-1))
        self.register_buffer("stored", stored)             # 3-D: .to(memory_format=channels_last) reorders what is 4-D
        self.register_buffer("labels", labels.clone(), persistent=False)
        self.register_buffer("partner", torch.empty_like(labels), persistent=False)
        self.partner_epoch, labels = None, labels.cpu()
        sizes = labels.bincount()                                         # [classes]
        self.by_class = labels.argsort(stable=True)                       # [n], images, one class after the other
        self.size = sizes[labels[self.by_class]]                          # [n], of that image's class
        self.start = (sizes.cumsum(0) - sizes)[labels[self.by_class]]     # [n], where it starts in by_class

    @property
    def rows(self):
        """[N, L, n, D], a view."""
        return self.stored.unflatten(0, (self.students, -1))

    def generator(self, *what):
        digest = hashlib.sha256(repr(("bank", self.seed, *what)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

    def to_device(self, x):
        """A copy for which the host does not wait."""
        return (x.pin_memory() if self.stored.is_cuda else x).to(self.stored.device, non_blocking=True)

    def draw(self, index, epoch, step):
        """BankRows for the images index, int64 [B] into the training set, on the rows' device."""
        if self.partner_epoch != epoch:                                   # each image comes once an epoch
            self.partner.copy_(self.to_device(self.draw_partners(epoch)), non_blocking=True)
            self.partner_epoch = epoch
        drawn = torch.randint(len(self.labels), (self.negatives,), generator=self.generator(epoch, step))
        drawn = self.to_device(drawn)                                     # [K]
        own, positive, negatives = (self.rows.index_select(2, i) for i in (index, self.partner[index], drawn))
        return BankRows(index, own, positive, negatives, self.labels[index][:, None] == self.labels[drawn])

    def draw_partners(self, epoch):
        """int64 [n]: for each image another one of its class, all equally likely; itself if it is alone."""
        share = torch.rand(len(self.size), generator=self.generator(epoch), dtype=torch.float64)
        shift = 1 + (share * (self.size - 1)).long()                      # [n], 1 .. size - 1
        place = torch.arange(len(self.size)) - self.start                 # [n], within the class
        partner = torch.empty_like(self.by_class)
        partner[self.by_class] = self.by_class[self.start + (place + shift) % self.size]
        return partner

    @torch.no_grad()
    def update(self, z, index):
        """rows[:, :, index] = unit(momentum * row + (1 - momentum) * z), in float32.  z [N, L, B, D], index [B]."""
        old = self.stored.index_select(1, index).float()                  # [N*L, B, D]
        mixed = self.momentum * old + (1 - self.momentum) * z.flatten(0, 1).float()
        self.stored.index_copy_(1, index, F.normalize(mixed, dim=-1).half())


# ---------------------------------------------------------------- students as files

STUDENT_FILE = ("architecture", "classes", "mean", "std", "image_size", "resize", "state_dict")


def student_file(backbone, name, classes, mean, std, image_size, resize):
    """A trained student as a plain dict for torch.save.

    classes: names. mean, std: of the training images, per channel, in units of [0, 1]. resize: the shorter side at
    evaluation, before the centre crop of image_size. The state_dict of an `ExistingNetwork` loads into that network:
    torchvision.models.resnet18(num_classes=C).load_state_dict(torch.load(path)["state_dict"]).
    """
    tensors, names = backbone.state_dict(), names_in_files(backbone, name)
    state = {names[key]: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    values = name, list(classes), list(mean), list(std), image_size, resize, state
    return dict(zip(STUDENT_FILE, values, strict=True))


def names_in_files(backbone, name):
    """{name of a tensor in the backbone: in files, where an ExistingNetwork's have their own names}."""
    prefixes = getattr(architecture(name), "prefixes", {"": ""})
    found = {key: next(p for p in prefixes if key.startswith(p)) for key in backbone.state_dict()}
    return {key: prefixes[p] + key[len(p):] for key, p in found.items()}


def load_state(backbone, name, state, title):
    """Load a state_dict with the names of files. Raises ValueError, with nothing loaded, if it does not fit."""
    inside = {theirs: ours for ours, theirs in names_in_files(backbone, name).items()}
    state = {inside.get(key, key): tensor for key, tensor in state.items()}
    try:
        copy.deepcopy(backbone).load_state_dict(state)                    # it loads what fits before it raises
    except Exception as error:
        raise ValueError(f"{title} does not fit {name}: {' '.join(str(error).split())[:200]}") from error
    backbone.load_state_dict(state)


def read_weights(path):
    """torch.load of tensors and plain values. Raises ValueError for a file that cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:                                            # pickle and zip raise many kinds
        raise ValueError(f"{path} is no file of weights, or damaged") from error


def is_student_file(content):
    return isinstance(content, dict) and content.keys() >= set(STUDENT_FILE)


def load_weights(backbone, name, path):
    """Start a backbone from a student file of the same architecture, or an `ExistingNetwork`'s own state_dict.

    With another number of classes the classifier stays as drawn. Returns a sentence that says what was taken.
    Raises ValueError, with nothing loaded, for any other file.
    """
    state, names = read_weights(path), names_in_files(backbone, name)
    if is_student_file(state):
        if state["architecture"] != name:
            raise ValueError(f"{path} holds a {state['architecture']}, not a {name}")
        state = state["state_dict"]
    elif not (isinstance(architecture(name), ExistingNetwork) and isinstance(state, dict)):
        raise ValueError(f"{path} is no student file")
    head = {names[key]: tensor for key, tensor in backbone.state_dict().items() if key.startswith("classifier.")}
    drawn = {key: tensor for key, tensor in head.items() if key in state and state[key].shape != tensor.shape}
    load_state(backbone, name, {**state, **drawn}, path)
    return f"{len(names) - len(drawn)} of {len(names)} tensors taken" + (
        "; the classifier stays as drawn, the file has another number of classes" if drawn else "")


class TrainedStudent(Backbone):
    """A student of a file (see `student_file`), in eval mode: normalised images [B, 3, H, W] -> logits [B, C]."""

    def __init__(self, content):
        super().__init__(content["architecture"], len(content["classes"]))
        for fact in STUDENT_FILE[:-1]:                                    # classes, mean, ...
            setattr(self, fact, content[fact])
        load_state(self, self.architecture, content["state_dict"], "the student file")
        self.eval()

    def transform(self, image):
        """A Pillow image of any mode, or uint8 [3, H, W] -> float32 [3, image_size, image_size], as at evaluation."""
        pixels = image if isinstance(image, Tensor) else transforms.pil_to_tensor(to_rgb(image))
        if pixels.dtype != torch.uint8 or pixels.dim() != 3 or len(pixels) != 3:
            raise ValueError(f"an image must be uint8 [3, H, W], got {pixels.dtype} {list(pixels.shape)}")
        size = (self.image_size, self.image_size)
        if self.resize == self.image_size:                                # data.py's sets in memory
            fitted = ImageOps.fit(transforms.to_pil_image(pixels), size, Image.Resampling.BICUBIC)
            pixels = transforms.pil_to_tensor(fitted)                     # [3, size, size]
        else:                                                             # its streamed ones
            pixels = transforms.center_crop(transforms.resize(pixels, [self.resize], antialias=True), size)
        mean, std = torch.tensor([self.mean, self.std])[..., None, None]  # [3, 1, 1] each
        return (pixels - 255 * mean) / (255 * std)


def to_rgb(image):
    """Any Pillow mode to RGB, as data.py reads files: upright, 16-bit gray scaled, transparent parts white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def load_student(file):
    """The `TrainedStudent` of a path, or of student_file's dict. Raises ValueError for any other file."""
    content = file if isinstance(file, dict) else read_weights(file)
    if not is_student_file(content):
        raise ValueError(f"{file} is no student file")
    return TrainedStudent(content)


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
    """Multiply-adds of convolutions and linear layers for one image (PyTorch's counter, two operations each)."""
    with evaluation(module), FlopCounterMode(display=False) as counter:
        module(next(module.parameters()).new_zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


if __name__ == "__main__":
    print("student            width   backbone params   branches' params   multiply-adds: backbone   with branches")
    for name, found in ARCHITECTURES.items():
        classes, size = (1000, 224) if isinstance(found, ExistingNetwork) else (100, 32)
        with torch.device("meta"):                                        # shapes alone
            student = Cohort([name], classes).students[0]
        print(f"{name:17} {found.width:6}   {parameters(student.backbone):15,}   {parameters(student.branches):16,}"
              f"   {multiply_adds(student.backbone, size) / 1e6:22.1f}M   {multiply_adds(student, size) / 1e6:12.1f}M")
