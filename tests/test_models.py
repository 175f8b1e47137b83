"""models.py: the networks are those of the published tables, and a cohort computes what it says."""

import copy
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps

import models
from conftest import FAMILIES
from predict import load_student
from support import architectures
from support.architectures import ARCHITECTURES, ExistingNetwork, architecture, load_model_file
from support.console import UserError
from support.files import load_pretrained, names_in_files, student_file

# As published: width, backbone and branch parameters,
# multiply-adds in millions of the backbone and with branches.
TABLE = {
    "resnet32": (64, 472_756, 809_096, 69.1, 136.8),
    "resnet56": (64, 861_620, 1_475_208, 125.8, 250.0),
    "resnet110": (256, 1_170_868, 2_011_080, 167.5, 337.4),
    "wrn_16_2": (128, 703_284, 1_208_200, 101.1, 201.8),
    "wrn_40_2": (128, 2_255_156, 3_867_528, 327.6, 654.8),
    "wrn_28_4": (256, 5_872_180, 10_089_032, 845.6, 1701.3),
    "shufflenetv2_0.5": (1024, 444_292, 827_768, 11.0, 24.4),
    "shufflenetv2_1": (1024, 1_356_104, 2_406_252, 45.1, 99.3),
    "hcgnet_a1": (414, 1_102_651, 1_478_429, 154.7, 271.2),
    "hcgnet_a2": (716, 3_133_679, 4_114_546, 489.4, 808.1),
    "resnet18": (512, 11_689_512, 14_626_488, 1814.1, 2894.6),  # ImageNet from here on
    "resnet34": (512, 21_797_672, 14_626_488, 3663.8, 4744.3),
    "resnet50": (2048, 25_557_032, 27_669_944, 4089.2, 6330.4),
    "shufflenet_v2_x1_0": (1024, 2_278_604, 6_119_796, 144.9, 394.2),
}
TORCHVISION = [name for name, found in ARCHITECTURES.items() if isinstance(found, ExistingNetwork)]
TORCHVISION_SMALL = ["resnet18", "shufflenet_v2_x0_5"]
ONE_OF_EACH_KIND = ["resnet8", "resnet110", "wrn_16_2", "shufflenetv2_0.5", "hcgnet_a1",
                    *TORCHVISION_SMALL]
FACTS = dict(classes="abc", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), image_size=32, resize=36)


@pytest.mark.parametrize("name", TABLE)
def test_counts_of_the_published_table(name):
    width, *published = TABLE[name]
    classes, size, device = (1000, 224, "meta") if name in TORCHVISION else (100, 32, "cpu")
    with torch.device(device):  # meta: shapes without numbers
        student = models.Cohort([name], classes).students[0]
    assert student.backbone.classifier.in_features == architecture(name).width == width
    # the published HCGNet figures take a dilated convolution's output for 2 pixels larger
    surplus = []
    for m in (m for m in student.modules() if isinstance(m, nn.Conv2d) and m.dilation[0] == 2):
        m.register_forward_hook(
            lambda m, _, y: surplus.append(m.weight.numel() * 4 * (y.shape[2] + 1)))
    own, backbone = models.cost(student.backbone, size)
    backbone += sum(surplus)
    surplus.clear()
    whole, both = models.cost(student, size)
    both += sum(surplus)
    assert [own, whole - own, round(backbone / 1e6, 1), round(both / 1e6, 1)] == published
    assert models.parameters(student.branches) == whole - own


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_a_student_forward_and_backward(name):
    """Every convolution and linear layer gets gradient, and a seed draws the same student."""
    L, size = architecture(name).stages, 32 if name in TORCHVISION else 16
    torch.manual_seed(0)
    cohort = models.Cohort([name], 7)
    cohort.check(size)
    x = torch.randn(3, 3, size, size)
    features, logits = cohort(x)
    assert features[0].shape == (L, 3, architecture(name).width) and logits.shape == (1, L, 3, 7)
    assert features[0].dtype == logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() and (p.dim() == 1 or p.grad.any())
               for p in cohort.parameters())
    torch.manual_seed(0)
    assert torch.equal(models.Cohort([name], 7)(x)[1], logits)


ONE_OF_EACH_LAYOUT = ["resnet34", "resnext50_32x4d", "wide_resnet50_2", "shufflenet_v2_x2_0",
                      "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
                      "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "mnasnet1_3",
                      "convnext_tiny", "swin_t", "swin_v2_t"]


@pytest.mark.parametrize("name", ONE_OF_EACH_LAYOUT)
def test_a_torchvision_backbone_has_torchvisions_tensors(name):
    """Names, shapes and the published number of parameters; four stages at strides 4 to 32."""
    with torch.device("meta"):
        ours = models.Backbone(name, 1000)
        theirs = torchvision.models.get_model(name, weights=None) if "regnet" not in name else ours
        maps = ours.eval().maps(torch.zeros(1, 3, 64, 64))
    names = names_in_files(ours, name)
    state = {names[key]: x.shape for key, x in ours.state_dict().items()}
    assert theirs is ours or state == {key: x.shape for key, x in theirs.state_dict().items()}
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    assert (models.parameters(ours) == published
            and [64 // m.shape[-1] for m in maps] == [4, 8, 16, 32])
    assert [m.shape[-2] for m in maps] == [16, 8, 4, 2]
    last = [m for m in ours.classifier.modules() if isinstance(m, nn.Linear)]
    assert last[0].in_features == architecture(name).width


def build(name, classes):
    """The network itself, without our stages."""
    return architecture(name).build(num_classes=classes)


@pytest.mark.parametrize("name", [*TORCHVISION_SMALL, *FAMILIES])
def test_a_torchvision_backbone_is_torchvisions(name, tmp_path):
    """To the last bit: drawn from a seed, a student file in their network,
    their weights in ours."""
    torch.manual_seed(0)
    theirs = build(name, 3).eval()
    torch.manual_seed(0)
    ours, other, third = (models.Backbone(name, 3).eval() for _ in range(3))
    x, n = torch.randn(2, 3, 64, 64), len(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))
    torch.save(student_file(other, name, FACTS), tmp_path / "ours.pt")
    theirs.load_state_dict(
        torch.load(tmp_path / "ours.pt", weights_only=True)["state_dict"], strict=True)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    content, words = load_pretrained(third, name, tmp_path / "theirs.pt")
    assert words == f"{n} of {n} tensors taken" and content.keys() == theirs.state_dict().keys()
    assert (all(torch.equal(net(x), theirs(x)) for net in (other, third))
            and not torch.equal(ours(x), theirs(x)))


def test_a_width_that_is_found_draws_no_other_student():
    """The first cohort finds width and blocks by a run, which must not move the seed."""
    name, found = "little_swin", architecture("little_swin")
    assert found.width == 64
    logits = []
    for measured in (found.measured, None):
        found.measured = measured
        torch.manual_seed(0)
        assert found.width == 64
        logits.append(models.Cohort([name], 3).eval()(torch.ones(1, 3, 32, 32))[1])
    assert torch.equal(*logits)


@pytest.mark.parametrize("name, blocks", list(zip(FAMILIES, [
    [1, 2, 2], [1, 2, 1], [1, 2, 2], [1, 2, 2], [1, 1, 1], [3, 3, 3], [4, 4, 4], [4, 4, 4]],
    strict=True)))
def test_branches_keep_the_fewest_blocks(name, blocks):
    """Those that change the shape, and one of each class:
    downsampling or permutations, then a block."""
    architecture(name).measured = None
    cohort = models.Cohort([name], 5)
    assert all(module.training for module in cohort.modules())
    cohort.check(32)
    kept = [[len(stage) for stage in branch.stages] for branch in cohort.students[0].branches]
    assert kept == [blocks, blocks[1:], blocks[2:]]
    cohort(torch.randn(2, 3, 32, 32))[1].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cohort.parameters())


def test_multiply_adds_of_a_known_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).train()
    assert models.multiply_adds(net, 32) == 3 * 4 * 9 * 32 * 32 + 4 * 5
    assert net.training and torch.equal(net[1].running_mean, torch.zeros(4))


def test_a_branch_is_the_remaining_stages_again():
    student = models.Cohort(["resnet8"], 10).students[0].eval()
    x = torch.randn(2, 3, 32, 32)
    features, logits = student(x)
    h = student.backbone.stem(x)
    for s in range(3):
        h = student.backbone.stages[s](h)
        branch, y = student.branches[s] if s < 2 else student.backbone, h
        for own, theirs in (
                zip(branch.stages, student.backbone.stages[s + 1:], strict=True) if s < 2 else ()):
            assert [p.shape for p in own.parameters()] == [p.shape for p in theirs.parameters()]
            # fresh, not shared
            assert not torch.equal(next(own.parameters()), next(theirs.parameters()))
            y = own(y)
        f = y.mean((2, 3))
        assert torch.allclose(features[s], f, atol=1e-6)
        assert torch.allclose(logits[s], branch.classifier(f), atol=1e-5)
    assert torch.equal(student.backbone(x), logits[-1])


def test_a_mixed_cohort():
    """Each student gives what it gives alone, the last stages' maps too."""
    cohort, x = (models.Cohort(["resnet8", "wrn_10_1", "shufflenetv2_0.5"], 10),
                 torch.randn(4, 3, 32, 32))
    features, logits = cohort(x)
    assert [f.shape for f in features] == [(3, 4, 64), (3, 4, 64), (3, 4, 1024)]
    assert logits.shape == (3, 3, 4, 10) and cohort.widths == [64, 64, 1024] and cohort.stages == 3
    maps, last = cohort.last_maps(x)
    for a, student in enumerate(cohort.students):
        alone = student(x)
        assert torch.equal(features[a], alone[0]) and torch.equal(logits[a], alone[1])
        assert torch.equal(last[a, 0], logits[a, -1])
        assert torch.allclose(
            student.backbone.tail(maps[a]).mean((2, 3)), features[a][-1], atol=1e-6)
    assert models.Cohort("resnet8", 10).names == ["resnet8"]


def test_aggregator_formula():
    f, logits = [torch.randn(3, 4, d) for d in (5, 6)], torch.randn(2, 3, 4, 7)
    aggregator = models.Aggregator([5, 6], 3)
    out = aggregator(f, logits)
    for a, i in itertools.product(range(2), range(4)):
        first, _, second = aggregator.mlps[a]
        g = second(F.relu(first(torch.cat([f[a][s, i] for s in range(3)])))).softmax(0)
        assert torch.allclose(out[a, i], sum(g[s] * logits[a, s, i] for s in range(3)), atol=1e-6)
    sizes = [(mlp[0].in_features, mlp[0].out_features, mlp[2].out_features)
             for mlp in aggregator.mlps]
    assert out.shape == (2, 4, 7) and sizes == [(15, 5, 3), (18, 6, 3)]


def test_embedding_is_one_mlp_per_student_and_stage():
    net = models.EmbeddedCohort(models.Cohort(["resnet8", "resnet8"], 10)).eval()
    features, z, _ = net(torch.randn(2, 3, 32, 32))
    for a, s in itertools.product(range(2), range(3)):
        assert torch.allclose(
            z[a, s], F.normalize(net.mlps[a][s](features[a][s]), dim=-1), atol=1e-6)
    assert z.shape == (2, 3, 2, 128) and torch.allclose(z.norm(dim=-1), torch.ones(2, 3, 2))
    assert len({id(m) for mlps in net.mlps for m in mlps}) == 6


def test_a_seed_gives_every_method_the_same_backbones():
    torch.manual_seed(3)
    full = models.Cohort(["resnet8", "resnet20"], 10)
    torch.manual_seed(3)
    alone = models.Cohort(["resnet8", "resnet20"], 10, branches=False)
    assert alone.stages == 1 and alone(torch.randn(2, 3, 32, 32))[1].shape == (2, 1, 2, 10)
    for a, b in zip(full.students, alone.students, strict=True):
        pairs = zip(a.backbone.parameters(), b.backbone.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


def test_initialisation():
    torch.manual_seed(0)
    for name, he in (("resnet32", True), ("wrn_16_2", True),
                     ("shufflenetv2_1", False), ("hcgnet_a1", False)):
        convs = [m for m in models.Cohort([name], 10).students[0].modules()
                 if isinstance(m, nn.Conv2d)]
        for m in sorted(convs, key=lambda m: -m.weight.numel())[:8]:
            fan_out, fan_in = m.out_channels * m.kernel_size[0] ** 2, m.weight[0].numel()
            expected = (2 / fan_out) ** 0.5 if he else (1 / (3 * fan_in)) ** 0.5  # PyTorch's
            assert m.weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("names", "classes", "message"), [
    *((name, 10, "known: resnet8") for name in ("resnet33", "wrn_17_2", "wrn_4_1", "wrn_16_0", "")),
    ("densenet121", 10, "not known here; declare them with ExistingNetwork in a --model-file"),
    ("vit_b_16", 10, "'vit_b_16' has no stages: all its blocks see maps of one size$"),
    ("resnet8", 0, "num_classes is 0"), ([], 10, "got none"),
    (["resnet18", "resnet32"], 10, "same number of stages, got resnet18: 4, resnet32: 3")])
def test_wrong_cohorts(names, classes, message):
    with pytest.raises(UserError, match=message):
        models.Cohort(names, classes)


# ---------------------------------------------------------------- students of one's own

OWN = """
import torch.nn as nn
from support.architectures import ARCHITECTURES, ExistingNetwork

class TwoStages:
    stages, width = 2, 12
    def stem(self): return nn.Conv2d(3, 6, 3, padding=1)
    def stage(self, s):
        convolution = nn.Conv2d((6, 12)[s], 12, 3, stride=2, padding=1)
        return nn.Sequential(convolution, nn.ReLU())
    def tail(self): return nn.Identity()
    def initialise(self, module): pass

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        convolution = lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3)
        self.features = nn.Sequential(
            convolution(3, 6), nn.ReLU(), convolution(6, 12), convolution(12, 12))
        self.head = nn.Linear(12, num_classes)

LAYOUT = "features.0 features.1 | features.2 | features.3 | | head"
ARCHITECTURES.update(own=TwoStages(), net=ExistingNetwork(Net, LAYOUT, width=12))
"""


def test_a_model_file_that_was_edited_is_read_anew(tmp_path, monkeypatch):
    """Also where the edit leaves size and time as they were,
    which bytecode in a cache is told by."""
    monkeypatch.setitem(ARCHITECTURES, "edited", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for depth in (20, 32):
        path = tmp_path / "edited.py"
        path.write_text("from support.architectures import ARCHITECTURES, ResNet\n"
                        f"ARCHITECTURES['edited'] = ResNet({depth})\n")
        os.utime(path, (1e9, 1e9))
        load_model_file(path)
        assert ARCHITECTURES["edited"].blocks == (depth - 2) // 6


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function from text to what load_model_file makes of it."""
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(ARCHITECTURES))

    def load(text):
        (tmp_path / "own.py").write_text(text)
        load_model_file(tmp_path / "own.py")

    return load


def test_the_readmes_network_of_torchvision(own):
    """Its width is found; to the last bit torchvision's, of fewer and narrower layers here."""
    text = (Path(models.__file__).parent / "README.md").read_text()
    block, = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
              if "ExistingNetwork" in b)
    small = dict(growth_rate=4, block_config=(1, 2, 1, 1), num_init_features=8)
    own(block.replace("densenet121,",
                      f"lambda num_classes: DenseNet(num_classes=num_classes, **{small}),")
        .replace("import densenet121", "import DenseNet"))
    torch.manual_seed(0)
    theirs = build("densenet121", 3).eval()
    torch.manual_seed(0)
    ours, x = models.Backbone("densenet121", 3).eval(), torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x)) and [m.shape[-1] for m in ours.maps(x)] == [16, 8, 4, 2]
    models.Cohort(["densenet121", "little_swin"], 3).check(32)
    models.Cohort(["tiny", "resnet8"], 3).check(32)


class Forgetful(nn.Module):
    """Its forward has a ReLU that no module is."""

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x))).mean((2, 3)))


def test_a_layout_that_is_another_network_than_its_own(monkeypatch):
    row = ExistingNetwork(Forgetful, "| a | b | | head")
    monkeypatch.setitem(ARCHITECTURES, "forgetful", row)
    with pytest.raises(UserError, match="the parts of Forgetful in a row give other logits"):
        models.Cohort(["forgetful"], 3)
    monkeypatch.setattr(F, "relu", lambda x: x)
    models.Cohort(["forgetful"], 3).check(16)


def test_a_classifier_of_other_classes_and_a_stage_of_two_maps(monkeypatch):
    class Twice(nn.Module):
        def forward(self, x):
            return x, x

    fixed = ExistingNetwork(lambda num_classes: Forgetful(10), "| a | b | | head", width=4)
    monkeypatch.setitem(ARCHITECTURES, "fixed", fixed)
    with pytest.raises(UserError, match="its classifier is for 10 classes, should be for 3"):
        models.Cohort(["fixed"], 3).check(16)
    cohort = models.Cohort(["resnet8"], 3)
    cohort.students[0].backbone.stages[1] = Twice()
    with pytest.raises(UserError, match="stage 2 gives a tuple, should give a map"):
        cohort.check(16)


def test_students_of_ones_own(own):
    own(OWN)
    cohort = models.Cohort(["own", "net"], 5).train()
    cohort.check(32)
    assert cohort.training
    features, logits = cohort(torch.randn(2, 3, 32, 32))
    assert features[1].shape == (2, 2, 12) and logits.shape == (2, 2, 2, 5)
    net, x = cohort.students[1].backbone, torch.ones(1, 3, 9, 9)
    file = student_file(net, "net", {**FACTS, "classes": "abcde"})
    assert set(file["state_dict"]) >= {"features.0.weight", "features.3.bias", "head.bias"}
    assert torch.equal(load_student(file)(x), net(x))


@pytest.mark.parametrize(("old", "new", "message"), [
    ("from support", "from suport",
     r"own.py, line 3: ModuleNotFoundError: No module named 'suport'$"),
    ("stages, width =", "stages, width", "own.py: SyntaxError: "),
    ("from support", "exit(); from support", "own.py, line 3: SystemExit"),
    ("width = 2, 12", "width = 2, 13", "student 'own': width is 13, should be 12$"),
    ("(6, 12)[s]", "6", "student 'own': stage 2 fails on a map .2, 12, 16, 16.: "),
    ("nn.Identity()", "nn.Flatten()", r"student 'own': tail gives \[2, 768\], should give a map"),
    ("TwoStages()", "TwoStages", "student 'own' is the class TwoStages: register an instance"),
    ("| head", "| heat", "Net has no module 'heat', which its layout names$"),
    ("features.3 | |", "| |", "the layout of Net leaves out features.3.weight$"),
    ("nn.Linear(12, num", "nn.Linear(13, num",
     r"student 'net': classifier fails on features .2, 12.: "),
    ("LAYOUT, width=12", "LAYOUT.replace('| | head', '| head |')",
     "Net do not run in a row on 64 pixels: "),
    ("LAYOUT, width=12", "LAYOUT, width=12, pool='head'", "'net': pooling fails on a map "),
    ("def tail", "def tale", "student 'own' lacks tail; an architecture has stages, width, stem")])
def test_a_wrong_student_of_ones_own_is_one_line(own, old, new, message):
    with pytest.raises(UserError, match=message) as error:
        own(OWN.replace(old, new))
        models.Cohort(["own", "net"], 5).check(32)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- students as files

@pytest.fixture
def saved(tmp_path):
    """A backbone and its file: resnet8, 3 classes."""
    backbone = models.Backbone("resnet8", 3).eval()
    torch.save(student_file(backbone, "resnet8", FACTS), tmp_path / "student.pt")
    return backbone, tmp_path / "student.pt"


def test_load_student(saved):
    backbone, path = saved
    student = load_student(path)
    assert {fact: getattr(student, fact) for fact in FACTS} == {
        **FACTS, "classes": ["a", "b", "c"], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    x = torch.ones(2, 3, 32, 32)
    assert (student.architecture == "resnet8" and not student.training
            and torch.equal(student(x), backbone(x)))
    mean, std = torch.tensor([student.mean, student.std])[..., None, None]

    pixels = torch.randint(256, (3, 50, 40), dtype=torch.uint8)
    small = torchvision.transforms.v2.functional.resize(pixels, [36], antialias=True)  # [3, 45, 36]
    assert torch.allclose(
        student.transform(pixels), (small[:, 6:38, 2:34] / 255 - mean) / std, atol=1e-5)
    student.resize = 32  # a set in memory
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    fitted = np.array(ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC))
    fitted = torch.from_numpy(fitted).permute(2, 0, 1)
    assert torch.allclose(student.transform(image), (fitted / 255 - mean) / std, atol=1e-5)
    whites = dict(L=255, LA=(9, 0), RGBA=(1, 2, 3, 0), CMYK=(0, 0, 0, 0)) | {"I;16": 65535}
    for mode, white in whites.items():
        image = Image.new(mode, (50, 40), white)
        assert torch.allclose(
            student.transform(image), ((1 - mean) / std).expand(3, 32, 32), atol=1e-5), mode
    with pytest.raises(UserError, match="uint8"):
        student.transform(torch.zeros(3, 8, 8))


def test_load_pretrained_with_another_number_of_classes(saved):
    backbone, path = saved
    other = models.Backbone("resnet8", 5).eval()
    before = copy.deepcopy(other.state_dict())
    content, words = load_pretrained(other, "resnet8", path)
    assert words.startswith("54 of 56 tensors taken; the classifier stays")
    assert content["classes"] == ["a", "b", "c"] and content["resize"] == 36
    for key, value in other.state_dict().items():
        source = before if key.startswith("classifier.") else backbone.state_dict()
        assert torch.equal(value, source[key])


@pytest.mark.parametrize(("name", "content", "message"), [
    ("resnet20", None, "holds a resnet8, not a resnet20"),
    ("resnet8", b"PK no zip", "no file of weights, or damaged"),
    ("resnet8", {"conv1.weight": torch.ones(1)}, "is no student file"),
    ("resnet8", "missing", "cannot read .*No such file"),
    ("resnet18", {"conv1.weight": torch.ones(64, 3, 7, 7)},
     "does not fit resnet18: .*Missing key")])
def test_files_that_do_not_fit(saved, name, content, message):
    _, path = saved
    if content == "missing":
        path.unlink()
    elif content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    backbone = models.Backbone(name, 3)
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(backbone, name, path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    if content is not None:
        with pytest.raises(UserError, match="no student file|no file of weights|cannot read"):
            load_student(path)


def test_discriminators_pool_maps_of_any_size():
    """As adaptive average pooling, whose backward pass CUDA computes in no fixed order."""
    maps = [torch.randn(2, 4, side, side, dtype=torch.float64) for side in (3, 7, 6, 3)]
    discriminators = models.Discriminators(maps).double()
    for m, ours in zip(maps, discriminators.align(maps), strict=True):
        assert torch.allclose(ours, F.adaptive_avg_pool2d(m, 3), atol=1e-7)


# ---------------------------------------------------------------- the memory bank

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 0, 4])


def test_bank_update():
    bank, index = models.MemoryBank(LABELS, 2, 3, dim=4, momentum=0.3), [5, 1]
    bank = bank.to(memory_format=torch.channels_last)
    before, z = bank.rows.float(), torch.randn(2, 3, 2, 4, requires_grad=True)
    assert (bank.rows.is_contiguous()
            and torch.allclose(before.norm(dim=-1), torch.ones(2, 3, 8), atol=1e-3))
    bank.update(torch.tensor([5, 3]), z.flip(2))  # 5: first z1, whole, then z0 into the average
    bank.update(torch.tensor(index), z)
    for a, stage, i in itertools.product(range(2), range(3), range(8)):
        z0, z1, row = *z[a, stage].detach(), before[a, stage, i]
        if i == 5:
            row = F.normalize(0.3 * z1.half().float() + 0.7 * z0, dim=-1)
        elif i in (1, 3):
            row = z1 if i == 1 else z0
        assert torch.equal(bank.rows[a, stage, i], row.half())
    assert not bank.stored.requires_grad and list(bank.state_dict()) == ["stored", "written"]
    assert bank.written.tolist() == [i in (1, 3, 5) for i in range(8)]


def test_bank_sample():
    state = torch.random.get_rng_state()
    bank, again, other = (models.MemoryBank(LABELS, 1, 2, dim=4, negatives=4000, seed=s)
                          for s in (0, 0, 1))
    assert torch.equal(bank.rows, again.rows) and not torch.equal(bank.rows, other.rows)
    index, everyone = torch.tensor([3, 5, 1]), torch.arange(8)
    rows = bank.sample(index, 2, 7)
    again.sample(index, 1, 6)  # no trace of earlier draws
    assert all(torch.equal(x, y) for x, y in zip(rows, again.sample(index, 2, 7), strict=True))
    number = {tuple(row.tolist()): i for i, row in enumerate(bank.rows[0, 0])}
    drawn = torch.tensor([number[tuple(row.tolist())] for row in rows.negatives[0, 0]])  # [K]
    assert torch.equal(rows.index, index) and torch.equal(rows.own, bank.rows[:, :, index])
    assert torch.equal(rows.negatives, bank.rows[:, :, drawn])
    assert torch.equal(rows.same_class, LABELS[index][:, None] == LABELS[drawn])
    assert torch.allclose(drawn.bincount() / 4000, torch.full((8,), 1 / 8), atol=0.03)
    for changed in (bank.sample(index, 2, 8), bank.sample(index, 3, 7), other.sample(index, 2, 7)):
        assert not torch.equal(rows.negatives, changed.negatives)

    partners = torch.stack([bank.sample_partners(epoch) for epoch in range(600)])  # [600, n]
    for step in range(2):  # the same in every step of an epoch
        assert torch.equal(bank.sample(everyone, 4, step).positive, bank.rows[:, :, partners[4]])
    for i in range(8):
        others = [j for j in range(8) if LABELS[j] == LABELS[i] and j != i] or [i]
        share = partners[:, i].bincount(minlength=8) / 600
        assert share[others].sum() == 1
        assert torch.allclose(share[others], torch.tensor(1 / len(others)), atol=0.08)
    assert torch.equal(torch.random.get_rng_state(), state)
