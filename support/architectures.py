"""The zoo of students: each is a stem, stages in a row, a tail before pooling, and a width.

An architecture is one small class, see `ResNet`; or an existing network cut into stages by its
modules' names, see `ExistingNetwork`. `python models.py` prints what those in ARCHITECTURES cost.
"""

import functools
import itertools
import re
import traceback
import types
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.overrides import TorchFunctionMode
from torchvision.models.shufflenetv2 import InvertedResidual

from support.console import UserError, first_line


def conv(inputs, outputs, kernel, stride=1, groups=1, dilation=1):
    padding = kernel // 2 * dilation
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)


def conv_bn_relu(inputs, outputs, kernel, stride=1):
    return conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


class Residual(nn.Module):
    """ReLU(body(x) + shortcut(x)); a 1x1 convolution where shapes change (He et al. 2016)."""

    def __init__(self, inputs, outputs, stride, body):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        total = self.body(x).add_(self.shortcut(x))  # in place: BN keeps its input, not its output
        return F.relu(total, inplace=True)


def basic_block(inputs, planes, stride):
    return Residual(inputs, planes, stride, [
        *conv_bn_relu(inputs, planes, 3, stride), conv(planes, planes, 3), nn.BatchNorm2d(planes)])


def bottleneck_block(inputs, planes, stride):
    return Residual(inputs, 4 * planes, stride, [
        *conv_bn_relu(inputs, planes, 1), *conv_bn_relu(planes, planes, 3, stride),
        conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)])


class ResNet:
    """CIFAR ResNet: depth 6n+2 of basic blocks, or 9n+2 of bottlenecks; 16, 32, 64 planes."""

    stages = 3

    def __init__(self, depth, bottleneck=False):
        self.block, self.expansion = (bottleneck_block, 4) if bottleneck else (basic_block, 1)
        self.blocks = (depth - 2) // (9 if bottleneck else 6)
        self.width = 64 * self.expansion

    def stem(self):
        return nn.Sequential(*conv_bn_relu(3, 16, 3))

    def stage(self, s):
        """Stage s = 0 .. 2, a fresh copy at each call."""
        planes, outputs = 16 * 2 ** s, 16 * 2 ** s * self.expansion
        inputs = outputs // 2 if s else 16
        first = self.block(inputs, planes, stride=2 if s else 1)
        others = [self.block(outputs, planes, 1) for _ in range(self.blocks - 1)]
        return nn.Sequential(first, *others)

    def tail(self):
        return nn.Sequential()

    def initialise(self, module):
        he_normal(module)


class PreActivation(nn.Module):
    """body(ReLU(BN(x))) + x, or a 1x1 convolution behind that ReLU for x (He et al. 2016b)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.body = nn.Sequential(
            *conv_bn_relu(inputs, outputs, 3, stride), conv(outputs, outputs, 3))
        same_shape = stride == 1 and inputs == outputs
        self.shortcut = None if same_shape else conv(inputs, outputs, 1, stride)

    def forward(self, x):
        active = self.activation(x)
        return self.body(active).add_(self.shortcut(active) if self.shortcut else x)


class WRN:
    """Wide residual network (Zagoruyko & Komodakis 2016): depth 6n+4; 16k, 32k, 64k planes."""

    stages = 3

    def __init__(self, depth, k):
        self.blocks, self.k, self.width = (depth - 4) // 6, k, 64 * k

    def stem(self):
        return conv(3, 16, 3)

    def stage(self, s):
        outputs = 16 * self.k * 2 ** s
        first = PreActivation(outputs // 2 if s else 16, outputs, stride=2 if s else 1)
        others = [PreActivation(outputs, outputs, 1) for _ in range(self.blocks - 1)]
        return nn.Sequential(first, *others)

    def tail(self):
        return nn.Sequential(nn.BatchNorm2d(self.width), nn.ReLU(inplace=True))

    def initialise(self, module):
        he_normal(module)


class ShuffleNetV2:
    """ShuffleNetV2 (Ma et al. 2018) of torchvision's units; the stem keeps CIFAR's resolution."""

    stages, width = 3, 1024

    def __init__(self, *channels):
        self.channels = (24, *channels)

    def stem(self):
        return nn.Sequential(*conv_bn_relu(3, 24, 3))

    def stage(self, s):
        inputs, outputs = self.channels[s:s + 2]
        first = InvertedResidual(inputs, outputs, 2)
        others = [InvertedResidual(outputs, outputs, 1) for _ in range((3, 7, 3)[s])]
        return nn.Sequential(first, *others)

    def tail(self):
        return nn.Sequential(*conv_bn_relu(self.channels[-1], 1024, 1))

    def initialise(self, module):
        pass  # PyTorch's own


def bn_relu_conv(inputs, outputs, kernel, **settings):
    convolution = conv(inputs, outputs, kernel, **settings)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), convolution)


class AttentivePool(nn.Module):
    """Sum over positions, weighted by the softmax of a 1x1 convolution: [B, c, h, w] -> [B, c]."""

    def __init__(self, channels):
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        attention = self.score(x).flatten(2).softmax(-1)  # [B, 1, h*w]
        return (x.flatten(2) * attention).sum(-1)


class Gate(nn.Module):
    """forget * h + update, both vectors over channels: [B, c, h, w] -> the same.

    forget = sigmoid(W2 tanh(BN(W1 pool(h)))), W1 of f rows; update mixes two pooled depthwise views
    of h by an MLP of u hidden units.
    """

    def __init__(self, c, f, u):
        super().__init__()
        self.forget = nn.Sequential(AttentivePool(c), nn.Linear(c, f), nn.BatchNorm1d(f), nn.Tanh(),
                                    nn.Linear(f, c), nn.Sigmoid())
        view = lambda d: bn_relu_conv(c, c, 3, groups=c, dilation=d)
        self.views = nn.ModuleList(nn.Sequential(view(d), AttentivePool(c)) for d in (1, 2))
        self.squeeze = nn.Sequential(nn.Linear(2 * c, u), nn.BatchNorm1d(u), nn.Tanh())
        self.excite = nn.ModuleList(nn.Linear(u, c) for _ in range(2))

    def forward(self, h):
        views = [view(h) for view in self.views]  # two of [B, c]
        hidden = self.squeeze(torch.cat(views, 1))  # [B, u]
        share = torch.stack([linear(hidden) for linear in self.excite]).softmax(0)  # [2, B, c]
        update = (share * torch.stack(views)).sum(0)  # [B, c]
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
    """Hybrid connectivity with gates (Yang et al., AAAI 2020): stages of 8 cells of growth k_s."""

    stages = 3

    def __init__(self, *growth):
        self.growth, self.inputs = growth, []
        c = 2 * growth[0]
        for k in growth:
            self.inputs.append(c)
            self.width = c + 8 * k
            c = self.width // 2

    def stem(self):
        return conv(3, self.inputs[0], 3)

    def stage(self, s):
        """Eight cells, then a transition to half the channels and resolution; none in the last."""
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
        pass  # PyTorch's own


def he_normal(module):
    """Convolutions He-normal, fan-out (He et al. 2015); everything else as PyTorch starts it."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Mean(nn.Module):
    """Global average pooling: [B, c, h, w] -> [B, c]."""

    def forward(self, x):
        return x.mean((2, 3))


class ExistingNetwork:
    """A network whose modules run in a row, cut into stages by their names.

    build: build(num_classes=C) makes the network, with its own initialisation.
    layout: names of its modules, "stem | stage 1 | ... | stage L | tail | classifier". 2-4 are the
    modules 2 3 4, a section may be empty, a module without parameters may come again.
    width: of the pooled feature. None: a run on 64 pixels finds it.
    blocks: {b: blocks that branch b keeps of each of its stages}, others keep all. "fewest": each
    branch leaves out all blocks that keep the shape of their map and follow one of their class.
    pool: names of modules between tail and classifier, whose output is flattened to [B, width].
    None: the mean over positions.
    """

    def __init__(self, build, layout, width=None, blocks=None, pool=""):
        self.build, self.blocks = build, blocks or {}
        self.measured = None if width is None else (width, [])
        *others, classifier = [module_names(section) for section in layout.split("|")]
        self.sections = [*others, module_names(pool), classifier]
        self.stages = len(self.sections) - 4
        parts = ["stem", *(f"stages.{s}" for s in range(self.stages)), "tail", "pool", "classifier"]
        self.prefixes = {}  # of tensors' names: in a Backbone -> in the network
        for part, names in zip(parts, self.sections, strict=True):
            for i, name in enumerate(names):  # several become a Sequential
                ours = f"{part}.{i}." if len(names) > 1 or part == "pool" else f"{part}."
                self.prefixes[ours] = f"{name}."

    @property
    def width(self):
        if self.measured is None:
            with torch.random.fork_rng([]):  # what a seed draws is the same, measured or not
                self.measure(self.build(num_classes=1))
        return self.measured[0]

    def parts(self, branch, num_classes):
        """As `make_parts`, with the stem; drawn as the network draws itself."""
        network = self.build(num_classes=num_classes)
        stem, *stages, tail, pool, classifier = self.find(network)
        rows = [in_a_row(stage) for stage in stages]
        if branch and self.blocks == "fewest":
            if not (self.measured and self.measured[1]):
                self.measure(network)
            pairs = zip(stages, self.measured[1], strict=True)
            rows = [nn.Sequential(*itertools.compress(blocks_of(s), keep)) for s, keep in pairs]
        elif branch and branch in self.blocks:
            rows = [nn.Sequential(*list(row)[:self.blocks[branch]]) for row in rows]
        pool = nn.Sequential(*pool, nn.Flatten()) if pool else Mean()
        stages = nn.ModuleList(rows[branch:])
        return in_a_row(stem), stages, in_a_row(tail), pool, in_a_row(classifier)

    def find(self, network):
        """The modules of each section, lists. Raises UserError where names and network differ."""
        modules = dict(network.named_modules())
        for name in itertools.chain(*self.sections):
            if name not in modules:
                raise UserError(f"{type(network).__name__} has no module {name!r}, "
                                "which its layout names")
        named = tuple(self.prefixes.values())
        for key in network.state_dict():
            if not key.startswith(named):
                raise UserError(f"the layout of {type(network).__name__} leaves out {key}")
        return [[modules[name] for name in section] for section in self.sections]

    def measure(self, network):
        """Find the width, and for each stage which blocks a branch keeps, from one image.

        Raises UserError where the parts in a row give other logits than the network.
        """
        stem, *stages, tail, pool, classifier = self.find(network)
        image, kept = next(network.parameters()).new_ones(1, 3, 64, 64), []
        image = image.cumsum(-1).sin()
        network.eval()
        try:
            with torch.no_grad():
                logits = image if image.is_meta else network(image)
                x = in_a_row(stem)(image)
                for stage in stages:
                    keep, before = [], None
                    for block in blocks_of(stage):
                        shape, x = x.shape, block(x)
                        keep.append(x.shape != shape or type(block) is not before)
                        before = type(block)
                    kept.append(keep)
                x = in_a_row([*tail, *(pool or [Mean()])])(x).flatten(1)
                same = image.is_meta or torch.allclose(in_a_row(classifier)(x), logits, 1e-3, 1e-4)
        except Exception as error:  # a user's module raises what it likes
            raise UserError(f"the parts of {type(network).__name__} do not run in a row on 64 "
                            f"pixels: {first_line(error)}") from error
        if not same:
            raise UserError(f"the parts of {type(network).__name__} in a row give other logits "
                            "than the network: its forward does what its layout leaves out, as a "
                            "ReLU or a pooling; name a module that does it")
        network.train()
        self.measured = x.shape[1], kept


def module_names(section):
    """"a.1-3 b" -> ["a.1", "a.2", "a.3", "b"]."""
    names = []
    for name in section.split():
        several = re.fullmatch(r"(.*\.)(\d+)-(\d+)", name)
        numbers = range(int(several[2]), int(several[3]) + 1) if several else ()
        names += [f"{several[1]}{i}" for i in numbers] or [name]
    return names


def blocks_of(modules):
    """A list of modules, with those in an nn.Sequential in its place."""
    is_row = lambda module: type(module).forward is nn.Sequential.forward
    return [block for module in modules for block in (module if is_row(module) else [module])]


def in_a_row(modules):
    """One module as it is, several as an nn.Sequential."""
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def make_parts(architecture, branch, num_classes):
    """Fresh stem (None for a branch), stages after number `branch`, tail, pooling, classifier."""
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}, must be at least 1")
    if isinstance(architecture, ExistingNetwork):
        return architecture.parts(branch, num_classes)
    stages = nn.ModuleList(architecture.stage(s) for s in range(branch, architecture.stages))
    tail = architecture.tail()
    classifier = nn.Linear(architecture.width, num_classes)
    for part in (stages, tail, classifier):
        part.apply(architecture.initialise)
    stem = None if branch else architecture.stem().apply(architecture.initialise)
    return stem, stages, tail, Mean(), classifier


# ---------------------------------------------------------------- torchvision's networks

# Swin's maps are [B, h, w, c]: a stage gets and gives [B, c, h, w],
# by the network's own permutations
SWIN = ("features.0 permute | features.0.1 features.1 permute | "
        "features.0.1 features.2-3 permute | features.0.1 features.4-5 permute | "
        "features.0.1 features.6-7 permute | features.0.1 norm permute | head")
MBCONV = ("features.0-1 | features.2 | features.3 | features.4-5 | features.6-7 | "
          "features.8 | classifier")
LAYOUTS = {  # pattern of names: stages at strides 4, 8, 16, 32, and pooling
    r"mobilenet_v2": ("features.0-1 | features.2-3 | features.4-6 | features.7-13 | features.14-17 "
                      "| features.18 | classifier", ""),
    r"mobilenet_v3_large": ("features.0-1 | features.2-3 | features.4-6 | features.7-12 | "
                            "features.13-15 | features.16 | classifier", "avgpool"),
    r"mobilenet_v3_small": ("features.0 | features.1 | features.2-3 | features.4-8 | "
                            "features.9-11 | features.12 | classifier", "avgpool"),
    r"efficientnet_v2_s": (MBCONV.replace("6-7 | features.8", "6 | features.7"), "avgpool"),
    r"efficientnet_.*": (MBCONV, "avgpool"),
    r"regnet_.*": ("stem | trunk_output.block1 | trunk_output.block2 | trunk_output.block3 | "
                   "trunk_output.block4 | | fc", "avgpool"),
    r"mnasnet.*": ("layers.0-7 | layers.8 | layers.9 | layers.10-11 | layers.12-13 | layers.14-16 "
                   "| classifier", ""),
    r"convnext_.*": ("features.0 | features.1 | features.2-3 | features.4-5 | features.6-7 | | "
                     "classifier.2", "avgpool classifier.0-1"),
    r"swin_.*": (SWIN, "avgpool"),
}


CLASSIFIERS = torchvision.models.list_models(torchvision.models)


class EmptyOnMeta(TorchFunctionMode):
    """torch.empty without memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        more = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **more})


def build_torchvision(name, num_classes):
    """torchvision's network, drawn.

    RegNet computes its widths by tensors, also on the meta device.
    """
    build = functools.partial(torchvision.models.get_model, name, num_classes=num_classes)
    if name.startswith("regnet") and torch.empty(0).is_meta:
        with torch.device("cpu"), EmptyOnMeta():
            return build().to("meta")
    return build()


def torchvision_network(name):
    """Branches keep one block a stage (ResNet); the first two units, others all (ShuffleNetV2).

    Those of LAYOUTS keep the fewest blocks, each with the stochastic depth of its place.
    """
    build = functools.partial(build_torchvision, name)
    if name.startswith("shufflenet"):
        return ExistingNetwork(build, "| conv1 maxpool | stage2 | stage3 | stage4 | conv5 | fc",
                               width=2048 if name.endswith("x2_0") else 1024, blocks={1: 2})
    for pattern, (layout, pool) in LAYOUTS.items():
        if re.fullmatch(pattern, name):
            return ExistingNetwork(build, layout, blocks="fewest", pool=pool)
    layout = "conv1 bn1 relu maxpool | layer1 | layer2 | layer3 | layer4 | | fc"
    width = 512 if name in ("resnet18", "resnet34") else 2048
    return ExistingNetwork(build, layout, width, blocks={1: 1, 2: 1, 3: 1})


ARCHITECTURES = {
    "resnet8": ResNet(8), "resnet20": ResNet(20), "resnet32": ResNet(32), "resnet44": ResNet(44),
    "resnet56": ResNet(56), "resnet110": ResNet(110, bottleneck=True),
    "wrn_16_2": WRN(16, 2), "wrn_40_2": WRN(40, 2), "wrn_28_4": WRN(28, 4),  # and any other wrn_D_K
    "shufflenetv2_0.5": ShuffleNetV2(48, 96, 192), "shufflenetv2_1": ShuffleNetV2(116, 232, 464),
    "hcgnet_a1": HCGNet(12, 24, 36), "hcgnet_a2": HCGNet(24, 36, 64),
    **{name: torchvision_network(name) for name in (  # ImageNet, by torchvision's names
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
        "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
        "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
        *(name for name in CLASSIFIERS if re.fullmatch("|".join(LAYOUTS), name)))},
}


def architecture(name):
    """The architecture of that name in ARCHITECTURES, or wrn_D_K. Raises UserError for another."""
    if name in ARCHITECTURES:
        return check_architecture(name, ARCHITECTURES[name])
    if wide := re.fullmatch(r"wrn_(\d{2,3})_(\d{1,2})", name):
        depth, k = int(wide[1]), int(wide[2])
        if depth >= 10 and (depth - 4) % 6 == 0 and k >= 1:
            return WRN(depth, k)
    if name.startswith("vit_"):
        raise UserError(f"student {name!r} has no stages: all its blocks see maps of one size")
    if name in CLASSIFIERS:
        raise UserError(f"student {name!r}: the stages of this network of torchvision's are not "
                        "known here; declare them with ExistingNetwork in a --model-file (README, "
                        "Your own student)")
    raise UserError(f"unknown student {name!r}; known: {', '.join(ARCHITECTURES)}, wrn_D_K with "
                    "D = 6n+4, and what --model-file adds")


def check_architecture(name, found):
    """`found` itself. Raises UserError if a user's one is a class, or lacks a part."""
    if isinstance(found, type):
        kind = found.__name__
        raise UserError(f"student {name!r} is the class {kind}: register an instance, {kind}()")
    wanted = ("stages", "width", "stem", "stage", "tail", "initialise")
    if isinstance(found, ExistingNetwork):
        return found
    missing = [attribute for attribute in wanted if not hasattr(found, attribute)]
    if missing:
        raise UserError(f"student {name!r} lacks {', '.join(missing)}; an architecture has "
                        f"{', '.join(wanted)}")
    return found


def load_model_file(path):
    """Run a Python file that adds to ARCHITECTURES. Raises UserError for anything wrong in it."""
    module = types.ModuleType("model_file")
    module.__file__ = str(path)
    try:  # not by an importer: its cached bytecode would outlive an edit in the same second
        code = compile(Path(path).read_bytes(), str(path), "exec")
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}" for frame in frames if frame.filename == str(path)]
        where = f"{path}{''.join(lines[-1:])}"
        raise UserError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
