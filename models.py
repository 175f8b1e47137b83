"""Students: a backbone is stages in a row, a branch is the remaining stages again.

    images -> stem -> stage 1 -> stage 2 -> ... -> stage L -> tail -> pool = f^L -> classifier = logits^L
                         |          '--> branch 2: stage 3 .. L (fresh copies), tail, pool = f^2, classifier
                         '-------------> branch 1: stage 2 .. L (fresh copies), tail, pool = f^1, classifier

so that every stage's feature f^l has the same width d and a classifier of its own.
A family of networks is one small class with a stem, a stage, a tail and a width; see `ResNet` below.
`python models.py` prints every student's parameters and multiply-adds.

symbol   meaning                                       shape
-------  --------------------------------------------  --------------------------------------
N, L     students, stages of a student
f_a^l    feature of student a at stage l               [B, d_a]; features: N tensors [L, B, d_a]
logits   classifier on f_a^l                           [N, L, B, C]
z_a^l    embedding = unit(MLP_a^l(f_a^l))              [N, L, B, 128]
agg_a    sum_l g_l * logits_a^l, g = softmax(MLP_a)    [N, B, C]
"""

import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.shufflenetv2 import InvertedResidual


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

    def stage(self, l):
        outputs = 16 * self.k * 2 ** l
        first = PreActivation(outputs // 2 if l else 16, outputs, stride=2 if l else 1)
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

    def stage(self, l):
        inputs, outputs = self.channels[l:l + 2]
        return nn.Sequential(InvertedResidual(inputs, outputs, 2),
                             *(InvertedResidual(outputs, outputs, 1) for _ in range((3, 7, 3)[l])))

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
        self.forget = nn.Sequential(AttentivePool(c), nn.Linear(c, forget_width), nn.BatchNorm1d(forget_width), nn.Tanh(),
                                    nn.Linear(forget_width, c), nn.Sigmoid())
        self.views = nn.ModuleList(nn.Sequential(bn_relu_conv(c, c, 3, groups=c, dilation=d), AttentivePool(c)) for d in (1, 2))
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
        self.body = nn.Sequential(bn_relu_conv(inputs, 4 * k, 1), bn_relu_conv(4 * k, k, 3, groups=4), Gate(k, k // 2, k))

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

    def stage(self, l):
        """Eight cells and, but for the last stage, the transition that halves channels and resolution."""
        c, k = self.inputs[l], self.growth[l]
        cells = [Cell(c + i * k, k) for i in range(8)]
        c, half = c + 8 * k, (c + 8 * k) // 2
        if l < self.stages - 1:
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


FAMILIES = {
    "resnet8": ResNet(8), "resnet20": ResNet(20), "resnet32": ResNet(32), "resnet44": ResNet(44),
    "resnet56": ResNet(56), "resnet110": ResNet(110, bottleneck=True),
    "wrn_16_2": WRN(16, 2), "wrn_40_2": WRN(40, 2), "wrn_28_4": WRN(28, 4),    # and any other wrn_D_K
    "shufflenetv2_0.5": ShuffleNetV2(48, 96, 192), "shufflenetv2_1": ShuffleNetV2(116, 232, 464),
    "hcgnet_a1": HCGNet(12, 24, 36), "hcgnet_a2": HCGNet(24, 36, 64),
}


def family(name):
    """The family of that name in FAMILIES, or wrn_D_K. Raises ValueError for any other."""
    wide = re.fullmatch(r"wrn_(\d{2,3})_(\d{1,2})", name)
    if name not in FAMILIES and wide and (int(wide[1]) - 4) % 6 == 0 and int(wide[1]) >= 10 and int(wide[2]) >= 1:
        return WRN(int(wide[1]), int(wide[2]))
    if name not in FAMILIES:
        raise ValueError(f"unknown student {name!r}; known: {', '.join(FAMILIES)}, and wrn_D_K with D = 6n+4")
    return FAMILIES[name]


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

    names: of students (see `family`), alike or different. branches=False leaves the backbones alone (L = 1).
    Called with images [B, 3, H, W], returns features, a list over students of [L, B, d_a], and logits
    [N, L, B, C]. Raises ValueError for an unknown name or students of unequal numbers of stages.

    All backbones are drawn before any branch, so that a seed gives every method the same backbones.
    """

    def __init__(self, names, num_classes, branches=True):
        super().__init__()
        families = [family(n) for n in names]
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

    def last_maps(self, x):
        """The backbones alone: the last stage's maps, N of [B, c_a, h_a, w_a], and logits [N, 1, B, C]."""
        maps, _, logits = zip(*(student.backbone.walk(x) for student in self.students))
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
            nn.ModuleList(nn.Sequential(nn.Linear(d, dim), nn.ReLU(), nn.Linear(dim, dim)) for _ in range(cohort.stages))
            for d in cohort.widths)

    def forward(self, x):
        features, logits = self.cohort(x)
        z = torch.stack([mlp(f_al) for f_a, mlps in zip(features, self.mlps) for f_al, mlp in zip(f_a, mlps)])
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
        g = torch.stack([mlp(f.transpose(0, 1).flatten(1)) for f, mlp in zip(features, self.mlps)])   # [N, B, L]
        g = g.to(torch.promote_types(g.dtype, torch.float32)).softmax(-1).mT          # [N, L, B]
        return (g[..., None] * logits).sum(1)                             # [N, B, C]


class Judges(nn.Module):
    """AFD's discriminators in a ring: D_a tells student a's last feature map (0) from student a+1's (1).

    The paper (Chung et al., ICML 2020) has no public code and leaves much open. Chosen here: all maps are
    brought to the smallest size by average pooling and to the smallest width by a transfer layer, 1x1
    convolution-BN-LeakyReLU, that learns with its student; a discriminator is two 3x3 convolutions with
    LeakyReLU, pooling and a linear map to one score, without BN, which would normalise own and peer maps
    apart and so hide what tells them apart; each student is judged against the next one only; least
    squares; a weight (--weight-fooling). Transfer layers and students minimise losses.fooling,
    discriminators losses.judging, with Adam(2e-4, betas 0.5 and 0.999).

    maps: one example per student, [B, c_a, h_a, w_a].
    """

    def __init__(self, maps):
        super().__init__()
        c, self.size = min(m.shape[1] for m in maps), min(m.shape[-1] for m in maps)
        self.transfer = nn.ModuleList(
            nn.Sequential(conv(m.shape[1], c, 1), nn.BatchNorm2d(c), nn.LeakyReLU(0.2)) if m.shape[1] != c else nn.Identity()
            for m in maps)
        self.discriminators = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(c, c, 3, padding=1),
                          nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1)) for _ in maps)

    def align(self, maps):
        """N maps [B, c_a, h_a, w_a] -> N maps [B, c, size, size]."""
        return [t(self.shrink(m)) for t, m in zip(self.transfer, maps)]

    def shrink(self, m):
        """[B, c, h, w] -> [B, c, size, size]; plain pooling where it divides, since CUDA's adaptive one is not deterministic."""
        factor, rest = divmod(m.shape[-1], self.size)
        return F.adaptive_avg_pool2d(m, self.size) if rest else m if factor == 1 else F.avg_pool2d(m, factor)

    def forward(self, maps):
        """N aligned maps -> scores [N, B], each map before the discriminator of the same place."""
        return torch.stack([d(m).squeeze(1) for d, m in zip(self.discriminators, maps)])


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


if __name__ == "__main__":
    print("student            width   backbone params   branches' params   multiply-adds: backbone   with branches")
    for name in FAMILIES:
        student = Cohort([name], num_classes=100).students[0]
        print(f"{name:17} {family(name).width:6}   {parameters(student.backbone):15,}   {parameters(student.branches):16,}"
              f"   {multiply_adds(student.backbone) / 1e6:22.1f}M   {multiply_adds(student) / 1e6:12.1f}M")
