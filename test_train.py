"""train.py: the objective against its formula, the loop's schedule, resuming, outputs, and what users do wrong."""

import ast
import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import data
import losses
import meta
import models
import train

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder data set: 6 classes, 9 training and 3 test images each, 16x16."""
    root = tmp_path_factory.mktemp("images")
    draw = torch.Generator().manual_seed(0)
    for split, n in (("train", 9), ("test", 3)):
        for c in range(6):
            (root / split / f"class{c}").mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(0, 128, (16, 16, 3), generator=draw, dtype=torch.uint8) + 20 * c
                Image.fromarray(pixels.numpy()).save(root / split / f"class{c}" / f"{i}.png")
    return root


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    """Run train.py in this process on the tiny data set: 3 steps an epoch, a meta step at every second."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, out="out", epochs=2):
        train.main(["--dataset", "folder", "--data-dir", str(images), "--image-size", "16", "--arch", "resnet8",
                    "--batch-size", "18", "--meta-freq", "2", "--device", "cpu", "--epochs", str(epochs),
                    "--out-dir", out, *map(str, flags)])
        return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]

    return run


def without_times(log):
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "command", "args")} for line in log]


def state(path):
    """Everything in a checkpoint but times and the arguments."""
    s = checkpoint.load(path)
    return {**{k: v for k, v in s.items() if k not in ("seconds", "args")}, "log": without_times(s["log"])}


def assert_equal(a, b, where="state"):
    assert type(a) is type(b), where
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_equal(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


# ---------------------------------------------------------------- the objective

def make(method, *flags, arch=("resnet8", "resnet8"), classes=5):
    args = train.parse_arguments(["--method", method, "--arch", *arch, "--device", "cpu", *flags])
    net, cohort = train.build(args, classes)
    torch.manual_seed(1)
    return args, net, torch.randn(6, 3, 16, 16), torch.tensor([0, 0, 1, 1, 2, 3])


def test_lmcl_objective_is_the_sum_of_section_4():
    args, net, x, y = make("lmcl", arch=["resnet8", "resnet8", "wrn_10_1"])
    loss, terms, weights = train.objective(args, net, x, y)
    features, z, logits = net["students"](x)                              # train-mode batch norm: the same again
    agg, expected, N, L = net["aggregator"](features, logits), 0, 3, 3
    for a in range(N):
        expected += F.cross_entropy(agg[a], y)
        for l in range(L):
            expected += F.cross_entropy(logits[a, l], y)
        for b in range(N):
            expected += 9 * F.kl_div((logits[a, -1] / 3).log_softmax(-1), (agg[b] / 3).softmax(-1), reduction="batchmean")
            for l in range(L):
                for m in range(L):
                    if a != b:                                            # one weight per pair: the mean of per-anchor parts
                        pair = losses.lmcl_loss(torch.stack([z[a, l:l + 1], z[b, m:m + 1]]), y,
                                                pair_weights(weights[a, l, b, m]))
                        expected += 0.5 * (0.1 * pair["vcl"] + 0.1 * pair["icl"] + pair["soft_vcl"] + pair["soft_icl"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(terms) == ["loss", "ce", "ce_agg", "kd", "vcl", "soft_vcl", "icl", "soft_icl", "mi_bound"]
    assert not weights.requires_grad


def pair_weights(w):
    """lambda of one stage pair as [2, 1, 2, 1, B]; the 2-student sum counts both orders, hence the 0.5 above."""
    return w.expand(2, 2, -1)[:, None, :, None]


def test_the_meta_network_gets_no_gradient_and_everything_else_does():
    args, net, x, y = make("lmcl")
    train.objective(args, net, x, y)[0].backward()
    assert all(p.grad is None for p in net["matching"].parameters())
    assert all(p.grad.abs().sum() > 0 for name in ("students", "aggregator") for p in net[name].parameters() if p.dim() > 1)


def test_kd_teachers_are_constant():
    args, net, x, y = make("lmcl")
    grad = torch.autograd.grad(train.objective(args, net, x, y)[1]["kd"], list(net["aggregator"].parameters()), allow_unused=True)
    assert grad == (None,) * len(grad)


def test_objectives_of_the_other_methods():
    backbones = {}
    for method in ("mcl", "deep-supervision", "independent", "dml"):
        args, net, x, y = make(method)
        loss, terms, weights = train.objective(args, net, x, y)
        cohort = net["students"].cohort if method == "mcl" else net["students"]
        features, logits = cohort(x)
        ce = sum(F.cross_entropy(head, y) for head in logits.flatten(0, 1))
        assert len(logits[0]) == (3 if method == "deep-supervision" else 1) and weights is None
        if method == "mcl":
            r = losses.mcl_loss(net["students"](x)[1][:, -1], y)
            ce = ce + 0.1 * r["vcl"] + 0.1 * r["icl"] + r["soft_vcl"] + r["soft_icl"]
        if method == "dml":
            ce = ce + losses.mutual_distillation(logits[:, -1])
        assert loss.item() == pytest.approx(ce.item(), rel=1e-5)
        backbones[method] = [p for s in cohort.students for p in s.backbone.parameters()]
    for same in zip(*backbones.values(), strict=True):
        assert all(torch.equal(p, same[0]) for p in same)                 # one seed, the same initial backbones


def test_dml_and_logit_kd():
    for method, flags in (("dml", []), ("mcl", ["--logit-kd"])):
        args, net, x, y = make(method, *flags, arch=["resnet8"] * 3)
        loss, terms, _ = train.objective(args, net, x, y)
        logits = (net["students"].cohort if method == "mcl" else net["students"])(x)[1][:, 0]
        kl = lambda student, teacher, T: T * T * F.kl_div((student / T).log_softmax(-1), (teacher / T).softmax(-1), reduction="batchmean")
        if method == "dml":
            kd = sum(kl(logits[a], logits[b], 1) / 2 for a in range(3) for b in range(3) if a != b)
        else:
            kd = sum(kl(logits[a], logits.mean(0), 3) for a in range(3))
        assert terms["kd"].item() == pytest.approx(kd.item(), rel=1e-4)
        plain = make(method, arch=["resnet8"] * 3)
        without = train.objective(*plain)[0] if flags else terms["ce"]
        assert loss.item() == pytest.approx(without.item() + kd.item(), rel=1e-5)


def test_afd_students_and_discriminators_oppose_each_other():
    """Each side, moved alone, lowers its own loss and raises the other's."""
    args, net, x, y = make("afd", "--image-size", "16", arch=["resnet8", "shufflenetv2_0.5", "wrn_10_1"])
    judges = net["judges"]
    maps = [m.detach() for m in train.objective(args, net, x, y)[2]]
    assert {m.shape for m in maps} == {(6, 64, 2, 2)}                     # the smallest width and size of the three

    adam = torch.optim.Adam(judges.discriminators.parameters(), lr=2e-3)
    students = [p.clone() for p in net["students"].parameters()]
    moving = [m.clone().requires_grad_() for m in maps]                   # stands for the students
    sgd = torch.optim.SGD(moving, lr=1.0)

    def losses_now():
        with torch.no_grad():
            own, peer = judges(moving), judges(maps[1:] + maps[:1])
            return losses.fooling(own).item(), losses.judging(own, peer).item()

    def judges_move():
        for _ in range(20):
            train.judge_step(judges, adam, [m.detach() for m in moving])

    def students_move():
        for _ in range(20):
            sgd.zero_grad()
            losses.fooling(judges(moving)).backward()
            sgd.step()

    history = [losses_now()]
    for move in (judges_move, students_move, judges_move):
        move()
        history.append(losses_now())
    fooling, judging = zip(*history)
    assert judging[1] < judging[0]
    assert fooling[2] < fooling[1] and judging[2] > judging[1]            # the students gain, the judges lose
    assert fooling[3] > fooling[2] and judging[3] < judging[2]            # and back
    assert all(torch.equal(p, q) for p, q in zip(net["students"].parameters(), students))


def test_adversarial_losses_by_hand():
    own, peer = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert losses.fooling(own).item() == pytest.approx((1 + 0) / 2 + (0.25 + 0.25) / 2)
    assert losses.judging(own, peer).item() == pytest.approx((0 + 1) / 2 + (0.25 + 0.25) / 2 + 0 + (1 + 0) / 2)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_hypergradient_of_the_contrastive_losses_by_finite_differences(steps):
    """lambda moved by hand, steps made by torch.optim.SGD: the soft losses' targets are constant in each step's
    gradient, but they are other constants in the next step, and the hypergradient must know."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=draw, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 3])
    start = [torch.randn(2, 2, 5, 4, generator=draw, dtype=torch.float64) * 0.5, torch.randn(5, 4, generator=draw, dtype=torch.float64)]
    weights = torch.full((2, 2, 2, 2, 6), 0.5, dtype=torch.float64, requires_grad=True)
    features = lambda p: torch.einsum("nldk,bk->nlbd", p[0], x).tanh()
    args = train.parse_arguments([])
    inner = lambda p: train.weighted(args, losses.lmcl_loss(F.normalize(features(p), dim=-1), y, weights))
    outer = lambda p: losses.cross_entropy(features(p) @ p[1], y)
    sgd = dict(lr=0.02, momentum=0.9, weight_decay=5e-4)

    def final_loss():
        theta = [nn.Parameter(p.clone()) for p in start]
        optimizer = torch.optim.SGD(theta, **sgd)
        for loss in [inner] * steps + [outer]:
            for p in theta:
                p.grad = torch.zeros_like(p)                              # not None: that would spare it the decay
            loss(theta).backward()
            optimizer.step()
        return outer(theta).item()

    ours, = meta.hypergradient(inner, outer, start, [weights], inner_steps=steps, **sgd)
    for place in ((0, 0, 1, 0, 0), (0, 1, 1, 0, 3), (1, 1, 0, 1, 5), (1, 0, 0, 0, 2)):
        ends = []
        for shift in (1e-5, -2e-5, 1e-5):
            weights.data[place] += shift
            ends.append(final_loss())
        assert ours[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9)


def test_fused_optimizer_steps_as_the_plain_one():
    """PyTorch's fused SGD on the CPU takes a gradient whose strides are not the parameter's for one whose are, silently."""
    args, net, x, y = make("lmcl", arch=["resnet8", "wrn_10_1", "shufflenetv2_0.5", "hcgnet_a1"])
    twin = copy.deepcopy(net)
    for model, kind in ((net, {"fused": True}), (twin, {"foreach": False})):
        sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, **kind)
        for _ in range(2):
            sgd.zero_grad()
            train.objective(args, model, x, y)[0].backward()
            sgd.step()
    for (name, p), q in zip(net.named_parameters(), twin.parameters()):
        assert (p - q).norm() <= 1e-3 * q.norm() + 1e-6, name


# ---------------------------------------------------------------- the loop

def test_schedule_meta_steps_and_batches(run, monkeypatch):
    seen, steps, meta_at, true_step, true_objective = {}, [], [], meta.meta_step, train.objective

    def objective(args, net, images, labels):
        seen.setdefault(args.method, []).append((images.sum().item(), labels.tolist()))
        return true_objective(args, net, images, labels)

    def meta_step(*args, **settings):
        meta_at.append((len(seen["lmcl"]), settings["lr"], settings["inner_steps"]))
        true_step(*args, **settings)

    monkeypatch.setattr(train, "objective", objective)
    monkeypatch.setattr(meta, "meta_step", meta_step)
    for method in train.METHODS:
        log = run("--method", method, out=method, epochs=3)
        assert [line["lr"] for line in log[1:]] == [0.05 * (1 + math.cos(math.pi * e / 3)) for e in range(3)]
        assert [line["step"] for line in log[1:]] == [3, 6, 9]
    assert [at for at, _, _ in meta_at] == [2, 4, 6, 8]
    assert [lr for _, lr, _ in meta_at] == pytest.approx([0.1, 0.075, 0.075, 0.025]) and meta_at[0][2] == 2
    assert all(batches == seen["lmcl"] for batches in seen.values())      # every method sees the same batches


def test_outputs(run, tmp_path, capsys, images):
    log = run(epochs=2)
    printed = capsys.readouterr().out
    for word in ("student 2", "77,782 parameters", "3.1M multiply-adds", "with branches 208,546", "54 training and 18 test",
                 "cpu", "0.1 vcl", "tau 0.1", "2 epochs of 3 steps of 18 = 6"):
        assert word in printed
    assert log[0]["command"].startswith("python ") and log[0]["args"]["batch_size"] == 18
    for e, line in enumerate(log[1:], 1):
        assert line["epoch"] == e and len(line["test_top1"]) == 2 and line["images_per_second"] > 0
        assert {"step", "loss", "ce", "ce_agg", "kd", "vcl", "soft_vcl", "icl", "soft_icl", "mi_bound"} <= line.keys()
    files = {p.name for p in Path("out").iterdir()}
    assert files == {"log.jsonl", "last.pt", "previous.pt", "best.pt", "matching.png", "student_1_resnet8.pt", "student_2_resnet8.pt"}

    train.main(["--evaluate", "out/last.pt", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [f"student {a}  resnet8: top-1 {log[-1]['test_top1'][a - 1]:.2f}  top-5 {log[-1]['test_top5'][a - 1]:.2f}"
            for a in (1, 2)] == lines

    dataset = data.load("folder", images, 16)                             # an exported student needs models.py alone
    for a in (1, 2):
        student = models.Cohort(["resnet8"], 6, branches=False).students[0].backbone.eval()
        student.load_state_dict(torch.load(f"out/student_{a}_resnet8.pt", weights_only=True))
        hits = sum((student(x).argmax(1) == y).sum() for x, y in data.test_batches(dataset))
        assert round(100 * hits.item() / 18, 2) == log[-1]["test_top1"][a - 1]


def test_operations_of_a_step(images):
    """Ordinary step with its optimizer, and meta step, of resnet32 x 2, views aside: no change lets them creep up."""
    args = train.parse_arguments(["--arch", "resnet32", "--device", "cpu", "--out-dir", "unused"])
    run = train.Run(args, data.load("folder", images, 16), signals=None)
    run.begin(0.1)
    batches = [b for epoch in (0, 1) for b in data.train_batches(run.dataset, 18, 0, epoch)]
    train.ordinary_step(args, run, *batches[0])                           # the first makes the momentum buffers
    with train.CountOperations() as counter:
        train.ordinary_step(args, run, *batches[1])
    assert counter.count <= 1550
    with train.CountOperations() as counter:
        train.matching_step(args, run, *batches[1])
    assert counter.count <= 31000


def test_benchmark_leaves_a_run_in_out_dir_alone(run, images, monkeypatch, capsys):
    run(epochs=1)
    before, true_benchmark = Path("out/last.pt").read_bytes(), train.benchmark
    monkeypatch.setattr(train, "benchmark", lambda args, dataset: true_benchmark(args, dataset, runs=2, warm_up=1))
    capsys.readouterr()
    train.main(["--benchmark", "--dataset", "folder", "--data-dir", str(images), "--image-size", "16", "--arch", "resnet8",
                "--batch-size", "18", "--device", "cpu", "--epochs", "7", "--out-dir", "out"])
    rows = json.loads(capsys.readouterr().out.splitlines()[0])
    assert {"step, deep-supervision", "step, lmcl", "meta step", "evaluation"} <= rows.keys()
    assert rows["step, lmcl"]["operations"] > rows["step, deep-supervision"]["operations"] > 0
    assert Path("out/last.pt").read_bytes() == before


def test_the_log_holds_means_over_the_epoch(run, monkeypatch):
    values, true_objective = [], train.objective

    def objective(*inputs):
        result = true_objective(*inputs)
        values.append(result[1]["ce"].item())
        return result

    monkeypatch.setattr(train, "objective", objective)
    log = run("--method", "independent")
    assert [line["ce"] for line in log[1:]] == pytest.approx([sum(values[:3]) / 3, sum(values[3:]) / 3], abs=1e-5)


def test_one_student_is_plain_training(run):
    for method in train.METHODS:
        log = run("--num-nets", 1, "--method", method, out=method, epochs=1)
        assert len(log[1]["test_top1"]) == 1 and math.isfinite(log[1]["loss"])


def test_three_students_of_three_families_with_a_meta_step(run):
    log = run("--arch", "resnet8", "wrn_10_1", "shufflenetv2_0.5", epochs=1)
    assert len(log[1]["test_top1"]) == 3 and math.isfinite(log[1]["loss"])


def test_evaluation_counts_top1_and_top5():
    class Fixed(nn.Module):
        def forward(self, x):                                             # ranks class k by pixel k
            return x[:, 0, 0, :7]

    cohort = nn.Module()
    cohort.students = [nn.Module()]
    cohort.students[0].backbone = Fixed()
    pixels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    pixels[:, 0, :7, 0] = torch.tensor([10, 60, 50, 40, 30, 20, 0])       # ranking: 1, 2, 3, 4, 5, 0, 6
    dataset = data.Dataset("x", pixels, None, pixels, torch.tensor([1, 2, 5, 6]), list("abcdefg"), (0.5,) * 3, (0.5,) * 3)
    assert train.evaluate(cohort, dataset) == [[25.0], [75.0]]


# ---------------------------------------------------------------- stopping and going on

def test_same_seed_same_result_other_seed_other_result(run):
    a, b, c = (run(out=out, epochs=1, *flags) for out, flags in (("a", []), ("b", []), ("c", ["--seed", 1])))
    assert without_times(a) == without_times(b)
    assert_equal(state("a/last.pt"), state("b/last.pt"))
    assert a[1]["loss"] != c[1]["loss"]


@pytest.mark.parametrize("method", train.METHODS)
def test_resumed_equals_uninterrupted(run, method):
    """Stopped inside the first epoch, at its end, and inside the second."""
    whole = run("--method", method, out="whole")
    for steps in (1, 1, 3, 5, 2, 0):                                      # 1 again, 2 after 5: nothing left to do
        parts = run("--method", method, "--max-steps", steps, "--resume", out="parts")
    assert without_times(parts) == without_times(whole)
    assert_equal(state("parts/last.pt"), state("whole/last.pt"))
    assert_equal(torch.load("parts/student_1_resnet8.pt"), torch.load("whole/student_1_resnet8.pt"))


def test_max_steps_logs_the_unfinished_epoch(run):
    log = run("--max-steps", 4, epochs=9)
    assert [(line["epoch"], line["step"]) for line in log[1:]] == [(1, 3), (2, 4)]
    assert checkpoint.load("out/last.pt")["step"] == 1


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(run, capsys):
    run("--resume", epochs=1)
    assert "starting afresh" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lmcl", "afd"])
def test_bfloat16(run, method):
    assert math.isfinite(run("--amp", "bf16", "--method", method, epochs=1)[1]["loss"])


def storages(tree):
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tree)
            if torch.is_tensor(t) and not t._is_zerotensor()}


class CPUGraph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph and torch.cuda.graph: records operations and replays them on the same memory.

    As on CUDA recording leaves no trace (what was overwritten is put back) and replaying runs no Python; operations that
    make the host wait, or bring numbers from it, are refused.
    """

    WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::lift_fresh",
               "aten::unique_dim", "aten::_unique2", "aten::is_nonzero"}
    def __init__(self):
        super().__init__()
        self.operations, self.overwritten, self.replays = [], {}, 0
        self.made, self.foreign = set(), set()                            # storages that operations return, and others they use

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, kwargs = op._schema.name, kwargs or {}
        assert name not in self.WAITING, f"{name} makes the host wait"
        assert name != "aten::index" or all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index makes the host wait"
        written = [a for a, formal in zip(args, op._schema.arguments) if formal.alias_info and formal.alias_info.is_write]
        written += args[3:5] if name == "aten::native_batch_norm" else []              # running averages: not in the schema
        for tensor in tree_leaves(written):
            if torch.is_tensor(tensor):
                self.overwritten.setdefault(tensor.untyped_storage().data_ptr(), (tensor.untyped_storage(), tensor.untyped_storage().clone()))
        self.foreign |= storages((args, kwargs)) - self.made
        result = op(*args, **kwargs)
        self.made |= storages(result) - self.foreign
        self.operations.append((op, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, before in self.overwritten.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for op, args, kwargs, result in self.operations:
            for kept, new in zip(tree_leaves(result), tree_leaves(op(*args, **kwargs))):
                if torch.is_tensor(kept) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.mark.parametrize("method", ["lmcl", "afd"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs want a GPU"))])
def test_recorded_steps_equal_plain_ones(method, device, images, tmp_path, monkeypatch):
    """Ordinary and meta steps, batches of two sizes, three learning rates: bit for bit on the CPU, where CUDA's graphs are
    played by CPUGraph, which shows too that no operation in a step waits for the host or uses memory that may be freed."""
    if device == "cpu":
        for name, stand_in in (("CUDAGraph", CPUGraph), ("graph", lambda graph, pool, stream: graph), ("Stream", MagicMock),
                               ("stream", MagicMock()), ("current_stream", MagicMock), ("graph_pool_handle", MagicMock)):
            monkeypatch.setattr(torch.cuda, name, stand_in)
    else:                                                                 # lr is rounded to float32 in a recording
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    recorded, true_steps = [], train.steps
    monkeypatch.setattr(train, "steps", lambda *args: recorded.extend(true_steps(*args)) or recorded[-3:])
    monkeypatch.setattr(train.Recorded, "WARM_UP", 1)
    states, dataset = [], data.load("folder", images, 16).to(device)
    for flags in ([], ["--cuda-graph"]):
        out = tmp_path / f"out{len(flags)}"
        args = train.parse_arguments(["--method", method, "--arch", "resnet8", "--device", device, "--epochs", "3", "--lr", "0.01",
                                      "--batch-size", "12", "--meta-freq", "1", "--out-dir", str(out), *flags])
        out.mkdir()
        run = train.Run(args, dataset, SimpleNamespace(name=None))
        train.train(args, dataset, run)
        states.append(state(out / "last.pt"))
    plain, replayed = states
    if device == "cuda":
        for a, b in zip(plain["log"][1:], replayed["log"][1:], strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        return
    for key in ("net", "log", "matching"):
        assert_equal(replayed[key], plain[key])
    kept = storages([run.net.state_dict(), run.rate, [o.state_dict() for o in (run.optimizer, run.second_optimizer)]])
    for function in recorded[3:5 + (method == "lmcl")]:
        assert len(function.graphs) == 2                                  # 14 and 12 images
        for graph, inputs, _ in function.graphs.values():
            assert graph.replays >= 2
            constants = [c.cell_contents for c in getattr(function.function, "__closure__", None) or ()]   # of draw
            assert graph.foreign <= kept | storages([inputs, constants])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_resuming_gives_the_same(run, number, monkeypatch, capsys):
    whole, true_objective, calls, handler = run(out="whole"), train.objective, [], signal.getsignal(number)

    def objective(*inputs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return true_objective(*inputs)

    monkeypatch.setattr(train, "objective", objective)
    with pytest.raises(SystemExit) as end:
        run(out="parts")
    error = capsys.readouterr().err
    assert end.value.code == 1 and "after step 2" in error and "--resume" in error and error.count("\n") == 1
    assert checkpoint.load("parts/last.pt")["total_steps"] == 2
    assert signal.getsignal(number) is handler
    assert without_times(run("--resume", out="parts")) == without_times(whole)
    assert_equal(state("parts/last.pt"), state("whole/last.pt"))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(run, monkeypatch, capsys):
    run(epochs=2, *["--max-steps", 2])
    before, true_loss = Path("out/last.pt").read_bytes(), losses.lmcl_loss
    monkeypatch.setattr(losses, "lmcl_loss", lambda *a: {**true_loss(*a), "icl": torch.tensor(math.nan)})
    with pytest.raises(SystemExit) as end:
        run("--resume")
    error = capsys.readouterr().err
    assert end.value.code == 1 and "icl became" in error and "step 3:" in error and "--lr" in error
    assert Path("out/last.pt").read_bytes() == before


# ---------------------------------------------------------------- what users do wrong

@pytest.mark.parametrize("flags, code, words", [
    (["--arch", "resnet33"], 2, "--arch: unknown student 'resnet33'; known: resnet8"),
    (["--num-nets", "0"], 2, "--num-nets: must be at least 1"),
    (["--arch", "resnet8", "resnet20", "--num-nets", "3"], 2, "--num-nets"),
    (["--batch-size", "1"], 2, "--batch-size: must be even"),
    (["--batch-size", "19"], 2, "--batch-size: must be even"),
    (["--batch-size", "1000"], 1, "--batch-size 1000 is larger than the training set (54 images)"),
    (["--epochs", "0"], 2, "--epochs"),
    (["--epochs", "ten"], 2, "--epochs"),
    (["--max-steps", "-1"], 2, "--max-steps"),
    (["--lr", "0"], 2, "--lr"),
    (["--lr", "nan"], 2, "--lr"),
    (["--momentum", "1"], 2, "--momentum"),
    (["--momentum", "0"], 2, "Nesterov"),
    (["--weight-soft-icl", "nan"], 2, "--weight-soft-icl"),
    (["--weight-decay", "-1"], 2, "--weight-decay"),
    (["--tau", "0"], 2, "--tau"),
    (["--T", "-3"], 2, "--T"),
    (["--meta-freq", "0"], 2, "--meta-freq"),
    (["--meta-steps", "0"], 2, "--meta-steps"),
    (["--image-size", "4"], 2, "--image-size"),
    (["--seed", "-1"], 2, "--seed"),
    (["--save-every", "-1"], 2, "--save-every"),
    (["--method", "mlc"], 2, "--method"),
    (["--dataset", "cifar1000"], 2, "--dataset"),
    (["--data-dir", "nowhere"], 1, "nowhere"),
    (["--device", "tpu9"], 1, "--device tpu9"),
    (["--evaluate", "nothing.pt"], 1, "nothing.pt"),
    (["--evaluate", "junk.pt"], 1, "junk.pt"),
    (["--evaluate", "foreign.pt"], 1, "foreign.pt"),
    (["--evaluate", "future.pt"], 1, "newer"),
    (["--out-dir", "used"], 1, "--resume"),
    (["--out-dir", "used", "--resume", "--lr", "0.3"], 1, "--lr 0.1 (now 0.3)"),
    (["--out-dir", "used", "--resume", "--epochs", "7"], 1, "learning-rate schedule"),
    (["--out-dir", "damaged", "--resume"], 1, "mv damaged/previous.pt damaged/last.pt"),
    (["--out-dir", "junk.pt/x"], 1, "--out-dir"),
    (["--no-such-flag"], 2, "--no-such-flag"),
    (["--logit-kd"], 2, "--logit-kd: goes with --method mcl"),
    (["--cuda-graph"], 1, "--cuda-graph wants a CUDA device, and this is cpu"),
    pytest.param(["--device", "cuda"], 1, "--device cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")),
])
def test_user_errors_end_in_one_line(run, flags, code, words, capsys):
    if "used" in flags or "damaged" in flags:
        run(out=flags[1])
        if flags[1] == "damaged":
            Path("damaged/last.pt").write_bytes(Path("damaged/last.pt").read_bytes()[:-1000])
    Path("junk.pt").write_bytes(b"junk" * 100)
    checkpoint.save("foreign.pt", {"weights": torch.ones(2)})
    checkpoint.save("future.pt", {"format": 99, "args": {}, "net": {}})
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*flags)
    error = capsys.readouterr().err.splitlines()
    assert end.value.code == code and words in error[-1] and error[-1].startswith("train.py: error: ")
    assert code == 2 or len(error) == 1                                   # argparse prints the usage first


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "--batch-size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "--batch-size"),
    (RuntimeError("x_cuda does not have a deterministic implementation, but you set 'torch"), "--deterministic cannot be had here (x_cuda"),
])
def test_errors_of_the_device(error, words, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(train, "run_command", fail)
    with pytest.raises(SystemExit) as end:
        train.main([])
    message = capsys.readouterr().err
    assert end.value.code == 1 and words in message and message.count("\n") == 1


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(args):
        raise RuntimeError("a defect")

    monkeypatch.setattr(train, "run_command", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        train.main([])


def test_a_full_disk_keeps_what_was_there(run, monkeypatch, capsys):
    run("--max-steps", 2)
    before, true_fsync = Path("out/last.pt").read_bytes(), os.fsync

    def full(file):
        if os.fstat(file).st_size > 10_000:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        run("--resume")
    error = capsys.readouterr().err
    assert end.value.code == 1 and "No space left" in error and "MiB" in error and error.count("\n") == 1
    assert Path("out/last.pt").read_bytes() == before and not list(Path("out").glob("*.tmp"))


def test_as_a_program(tmp_path):
    """Exit status and a single line, with no traceback, from the shell."""
    done = subprocess.run([sys.executable, HERE / "train.py", "--dataset", "folder", "--data-dir", "nowhere", "--device", "cpu"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the shape of the project

def test_leaves_import_none_of_each_other():
    leaves = {"losses", "models", "meta", "data", "checkpoint"}
    for leaf in leaves:
        for node in ast.walk(ast.parse((HERE / f"{leaf}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & (leaves | {"train"}), leaf
