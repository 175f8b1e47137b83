"""models.py: the networks are those of the published tables, and a cohort computes what it says."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import models

# As published: width, backbone and branch parameters, multiply-adds in millions of the backbone and with branches.
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
}


def dilation_surplus(module):
    """The published HCGNet figures take a dilated 3x3 convolution's output for 2 pixels larger than it is."""
    surplus, hooks = [], []
    for m in module.modules():
        if isinstance(m, nn.Conv2d) and m.dilation[0] == 2:
            hooks.append(m.register_forward_hook(lambda m, _, y: surplus.append(
                m.weight.numel() * ((y.shape[2] + 2) ** 2 - y.shape[2] ** 2))))
    module.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return sum(surplus)


@pytest.mark.parametrize("name", TABLE)
def test_counts_of_the_published_table(name):
    student = models.Cohort([name], 100).students[0]
    width, backbone, branches, macs, macs_all = TABLE[name]
    assert student.backbone.classifier.in_features == models.family(name).width == width
    assert models.parameters(student.backbone) == backbone
    assert models.parameters(student.branches) == branches
    assert round((models.multiply_adds(student.backbone) + dilation_surplus(student.backbone)) / 1e6, 1) == macs
    assert round((models.multiply_adds(student) + dilation_surplus(student)) / 1e6, 1) == macs_all
    assert (dilation_surplus(student) > 0) == name.startswith("hcgnet")


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_student_forward_and_backward(name):
    torch.manual_seed(0)
    cohort = models.Cohort([name], 7)
    x = torch.randn(2, 3, 16, 16)
    features, logits = cohort(x)
    assert features[0].shape == (3, 2, models.family(name).width) and logits.shape == (1, 3, 2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cohort.parameters())
    torch.manual_seed(0)
    again = models.Cohort([name], 7)
    assert torch.equal(again(x)[1], logits)


def test_multiply_adds_of_a_known_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4, 5)).train()
    assert models.multiply_adds(net, 32) == 3 * 4 * 9 * 32 * 32 + 4 * 5
    assert net.training and torch.equal(net[1].running_mean, torch.zeros(4))


def test_a_branch_is_the_remaining_stages_again():
    student = models.Cohort(["resnet8"], 10).students[0].eval()
    x = torch.randn(2, 3, 32, 32)
    features, logits = student(x)
    h = student.backbone.stem(x)
    for l in range(3):
        h = student.backbone.stages[l](h)
        if l < 2:
            branch, y = student.branches[l], h
            for own, theirs in zip(branch.stages, student.backbone.stages[l + 1:], strict=True):
                assert [p.shape for p in own.parameters()] == [p.shape for p in theirs.parameters()]
                assert not torch.equal(next(own.parameters()), next(theirs.parameters()))           # fresh, not shared
                y = own(y)
        else:
            branch, y = student.backbone, h
        f = y.mean((2, 3))
        assert torch.allclose(features[l], f, atol=1e-6)
        assert torch.allclose(logits[l], branch.classifier(f), atol=1e-5)
    assert torch.equal(student.backbone(x), logits[-1])


def test_a_mixed_cohort():
    cohort = models.Cohort(["resnet8", "wrn_10_1", "shufflenetv2_0.5"], 10)
    features, logits = cohort(torch.randn(4, 3, 32, 32))
    assert [f.shape for f in features] == [(3, 4, 64), (3, 4, 64), (3, 4, 1024)] and logits.shape == (3, 3, 4, 10)
    net = models.EmbeddedCohort(cohort)
    _, z, _ = net(torch.randn(4, 3, 32, 32))
    assert z.shape == (3, 3, 4, 128) and torch.allclose(z.norm(dim=-1), torch.ones(3, 3, 4))
    agg = models.Aggregator(cohort.widths, 3)(features, logits)
    assert agg.shape == (3, 4, 10)


def test_aggregator_formula():
    f, logits = [torch.randn(3, 4, d) for d in (5, 6)], torch.randn(2, 3, 4, 7)
    aggregator = models.Aggregator([5, 6], 3)
    out = aggregator(f, logits)
    for a in range(2):
        for i in range(4):
            first, _, second = aggregator.mlps[a]
            hidden = F.relu(first(torch.cat([f[a][l, i] for l in range(3)])))
            g = second(hidden).softmax(0)
            assert torch.allclose(out[a, i], sum(g[l] * logits[a, l, i] for l in range(3)), atol=1e-6)
    assert [(first.in_features, first.out_features, second.out_features) for first, _, second in aggregator.mlps] == \
        [(15, 5, 3), (18, 6, 3)]


def test_embedding_is_one_mlp_per_student_and_stage():
    net = models.EmbeddedCohort(models.Cohort(["resnet8", "resnet8"], 10)).eval()
    features, z, _ = net(torch.randn(2, 3, 32, 32))
    for a in range(2):
        for l in range(3):
            assert torch.allclose(z[a, l], F.normalize(net.mlps[a][l](features[a][l]), dim=-1), atol=1e-6)
    assert len({id(m) for mlps in net.mlps for m in mlps}) == 6


def test_a_seed_gives_every_method_the_same_backbones():
    torch.manual_seed(3)
    full = models.Cohort(["resnet8", "resnet20"], 10)
    torch.manual_seed(3)
    alone = models.Cohort(["resnet8", "resnet20"], 10, branches=False)
    assert alone.stages == 1 and alone(torch.randn(2, 3, 32, 32))[1].shape == (2, 1, 2, 10)
    for a, b in zip(full.students, alone.students):
        assert all(torch.equal(p, q) for p, q in zip(a.backbone.parameters(), b.backbone.parameters(), strict=True))


def test_initialisation():
    torch.manual_seed(0)
    for name, he in (("resnet32", True), ("wrn_16_2", True), ("shufflenetv2_1", False), ("hcgnet_a1", False)):
        convs = [m for m in models.Cohort([name], 10).students[0].modules() if isinstance(m, nn.Conv2d)]
        for m in sorted(convs, key=lambda m: -m.weight.numel())[:8]:
            fan_out, fan_in = m.out_channels * m.kernel_size[0] ** 2, m.weight[0].numel()
            expected = (2 / fan_out) ** 0.5 if he else (1 / (3 * fan_in)) ** 0.5      # PyTorch: uniform, var 1 / (3 fan_in)
            assert m.weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["resnet33", "wrn_17_2", "wrn_4_1", "wrn_16_0", ""])
def test_unknown_student(name):
    with pytest.raises(ValueError, match="known: resnet8"):
        models.Cohort([name], 10)


class TwoStages:
    """A student of one's own, as the README shows: a stem, a stage, a tail, a width."""

    stages, width = 2, 12

    def stem(self):
        return nn.Conv2d(3, 6, 3, padding=1)

    def stage(self, l):
        return nn.Sequential(nn.Conv2d(6 if l == 0 else 12, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU())

    def tail(self):
        return nn.Identity()

    def initialise(self, module):
        pass


def test_a_student_of_ones_own(monkeypatch):
    monkeypatch.setitem(models.FAMILIES, "mine", TwoStages())
    features, logits = models.Cohort(["mine", "mine"], 5)(torch.randn(2, 3, 32, 32))
    assert features[1].shape == (2, 2, 12) and logits.shape == (2, 2, 2, 5)
    with pytest.raises(ValueError, match="same number of stages.*mine: 2, resnet8: 3"):
        models.Cohort(["mine", "resnet8"], 5)
