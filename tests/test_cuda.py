"""On a GPU: numbers against the CPU's float64, graphs against plain steps, resuming, waiting,
memory, every student.

    pytest -q -n 6 tests/test_cuda.py       # pytest-xdist
    DRY=cpu pytest -q tests/test_cuda.py    # tries the tests' own logic without a GPU
"""

import argparse
import contextlib
import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch

import data
import losses
import meta
import models
import options
import predict
import train
from conftest import assert_same, draw_images, flags, free_port, read_log
from methods import METHODS
from support.processes import Processes, pick_device
from support.run import Run
from support.second_order import FastSecondDerivatives
from test_second_order import LAYERS

GPU = os.environ.get("DRY", "cuda")
IS_GPU = GPU != "cpu"
pytestmark = pytest.mark.skipif(IS_GPU and not torch.cuda.is_available(), reason="wants a GPU")
GRAPH = ["--cuda-graph"] if IS_GPU else []
BANK = ["--contrast", "bank", "--negatives", "16", "--contrast-start", "0"]
VARIANTS = [*(["--method", name] for name in METHODS),
            ["--method", "lmcl", *BANK], ["--method", "mcl", *BANK],
            ["--method", "lmcl", "--virtual-lambda", "moving"],
            ["--method", "afd", "--arch", "small", "small_12"]]


def distance(ours, exact):
    """|ours - exact| / |exact|, in float64 on the CPU, of lists of tensors."""
    a, b = (torch.cat([t.detach().cpu().double().flatten() for t in ts]) for ts in (ours, exact))
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


@pytest.fixture
def exact_float32():
    with meta.no_tf32():
        yield


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)


class Setting:
    """A run's parts on the device, and batches of two sizes without an end."""

    def __init__(self, images, *more, size=16, device=GPU, batch=12, dtype=torch.float32):
        arch = [] if "--arch" in more else ["--arch", "small"]
        often = ["--meta-freq", "1"] if "lmcl" in more or "--method" not in more else []
        args = options.parse("", ["--image-size", str(size), "--batch-size", str(batch),
                                  "--epochs", "3", "--lr", "0.0625", "--schedule", "multistep",
                                  "--out-dir", "out", *arch, *often, *more])
        args.device = pick_device(device, Processes({}))
        dataset = data.load("folder", images, size).to(args.device)
        self.args, self.batch, self.dtype = args, batch, dtype
        self.method = train.build(args, dataset)
        for name, part in self.method.named_children():
            if name != "bank":  # its rows stay float16
                part.to(dtype)
        self.run = Run(args, None, self.method, self.method.optimizers(), metadata={},
                       steps_per_epoch=4, images_per_epoch=54, processes=Processes({}),
                       signals=None)
        self.run.start_epoch()
        self.run.set_lr(args.lr)
        self.step, self.second_step = train.make_steps(args, dataset, self.method, self.run)
        self.batches = self.endless(dataset)

    def endless(self, dataset):
        bank = self.method.bank
        for epoch in itertools.count():
            for step, (x, y, index) in enumerate(dataset.train_batches(self.batch, 0, epoch)):
                yield x.to(self.dtype), y, bank.sample(index, epoch, step) if bank else None

    def go(self, steps):
        """Ordinary steps, each with a second one behind it
        -> the last one's terms with one number."""
        for batch in itertools.islice(self.batches, steps):
            logged, outputs = self.step(*batch)
            if self.method.second:
                self.second_step(*batch, outputs)
        return {name: float(value) for name, value in logged.items() if value.dim() == 0}


# ---------------------------------------------------------------- numbers

@pytest.mark.parametrize("dtype,most", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_losses_and_their_gradients(dtype, most):
    torch.manual_seed(0)
    y, same = torch.arange(32).repeat_interleave(2), torch.rand(64, 100) < 0.1
    unit = lambda *s: torch.nn.functional.normalize(torch.randn(*s, dtype=torch.float64), dim=-1)
    w = torch.rand(2, 3, 2, 3, 64, dtype=torch.float64)
    rows = unit(2, 3, 64, 128), unit(2, 3, 64, 128), unit(2, 3, 100, 128)
    for call in (lambda z, w, y, s, *r: losses.lmcl_loss(z, y, w),
                 lambda z, w, y, s, *r: losses.mcl_loss(z[:, -1], y),
                 lambda z, w, y, s, *r: losses.lmcl_bank_loss(z, *r, s, w)):
        z, results = unit(2, 3, 64, 128), []
        for to in (lambda t: t.clone(),
                   lambda t: t.to(GPU, dtype if t.is_floating_point() else None)):
            inputs = [to(z).requires_grad_(), to(w).requires_grad_(), to(y), to(same),
                      *map(to, rows)]
            values = call(*inputs)
            grads = torch.autograd.grad(sum(values.values()), inputs[:2], materialize_grads=True)
            results.append([*values.values(), *grads])
        assert distance(results[1][:4], results[0][:4]) < most
        assert distance(results[1][4:], results[0][4:]) < 10 * most


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype,most", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_second_derivatives(dtype, most, memory_format, exact_float32):
    """second_order.py against PyTorch's own, on the CPU in float64."""
    for name, (layer, shape) in LAYERS.items():
        if memory_format == torch.channels_last and len(shape) != 4:
            continue
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        results = []
        for there, kind, mode in (("cpu", torch.float64, contextlib.nullcontext()),
                                  (GPU, dtype, FastSecondDerivatives())):
            net = copy.deepcopy(layer).to(there, kind)
            t = x.to(there, kind).contiguous(memory_format=memory_format).requires_grad_()
            inputs = [t, *net.parameters()]
            with mode:
                g = torch.autograd.grad(net(t).sin().sum(), inputs, create_graph=True)
            results.append(torch.autograd.grad(sum((v.square() * 0.5).sum() for v in g), inputs))
        assert distance(results[1], results[0]) < most, name


@pytest.mark.parametrize("lam", ["held", "moving"])
def test_hypergradient_in_float64(lam, images):
    """The whole meta step of two ResNet-8 with branches: the same code on both devices."""
    grads = []
    for device in ("cpu", GPU):
        s = Setting(images, "--arch", "resnet8", "--virtual-lambda", lam,
                    device=device, dtype=torch.float64)
        s.second_step(*next(s.batches), None)
        grads.append([p.grad for p in s.method.matching_network.parameters()])
    assert distance(grads[1], grads[0]) < 1e-6


@pytest.mark.parametrize("more", VARIANTS, ids=" ".join)
def test_a_step_equals_the_cpus(more, images, exact_float32):
    """What one ordinary step changes: parameters, statistics, bank."""
    changes = []
    for device, dtype in (("cpu", torch.float64), (GPU, torch.float32)):
        s = Setting(images, *more, device=device, dtype=dtype)
        before = [t.detach().cpu().double().clone() for t in s.method.state_dict().values()]
        s.step(*next(s.batches))
        after = s.method.state_dict().values()
        changes.append([t.cpu().double() - b for t, b in zip(after, before, strict=True)])
    assert distance(changes[1], changes[0]) < 1e-3


def test_bfloat16_is_near_and_the_meta_step_stays_float32(images):
    terms = [Setting(images, "--amp", amp).go(1) for amp in ("no", "bf16")]
    assert terms[1] == pytest.approx(terms[0], rel=0.05, abs=0.05)
    seen = set()
    s = Setting(images, "--amp", "bf16")
    s.method.cohort.students[0].register_forward_hook(lambda m, i, o: seen.add(o[1].dtype))
    s.second_step(*next(s.batches), None)
    assert seen == {torch.float32}


# ---------------------------------------------------------------- graphs, resuming, waiting

@pytest.mark.parametrize("more", [*VARIANTS, ["--method", "lmcl", "--amp", "bf16"]], ids=" ".join)
def test_graphs_equal_plain_steps(more, images, deterministic):
    """Two batch sizes, 12 steps with 12 second ones, bit for bit:
    the learning rate is a power of two."""
    states = []
    for graphs in ([], GRAPH):
        s = Setting(images, *more, *graphs)
        s.go(12)
        states.append({k: v.clone() for k, v in s.method.state_dict().items()})
        if graphs:
            assert not s.step.is_eager and s.step.graphs
    assert [k for k in states[0] if not torch.equal(states[0][k], states[1][k])] == []


@pytest.mark.parametrize("graphs", [[], GRAPH], ids=["plain", "graph"])
@pytest.mark.parametrize("more", [
    ["--method", "lmcl"], ["--method", "afd"],
    ["--method", "lmcl", "--contrast", "bank", "--negatives", "16", "--amp", "bf16"]],
    ids=["lmcl", "afd", "bank"])
def test_resuming_is_bit_equal(more, graphs, images, run, deterministic):
    more = [*more, "--device", GPU, "--deterministic", *graphs]
    run(*more, out="whole", epochs=5)
    for steps in (2, 7, 0):
        run(*more, "--max-steps", steps, "--resume", out="parts", epochs=5)
    assert_same("parts", "whole")


@pytest.mark.parametrize("more", VARIANTS, ids=" ".join)
def test_no_step_waits(more, images):
    s = Setting(images, *more)
    s.go(4)
    batches = list(itertools.islice(s.batches, 4))
    if IS_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            train.seed_dropout(0, s.run.total_steps, 0, s.args.device)
            logged, outputs = s.step(*batch)
            s.run.add(logged, len(batch[1]))
            if s.method.second:
                s.second_step(*batch, outputs)
    finally:
        if IS_GPU:
            torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- data

def test_images_in_memory_and_streamed(images):
    for stream in (False, True):
        batches = [list(data.load("folder", images, 16, stream=stream, workers=2).to(d)
                        .train_batches(12, 0, 1)) for d in ("cpu", GPU)]
        for (x, y, i), (x_, y_, i_) in zip(*batches, strict=True):
            assert distance([x_], [x]) < 1e-6 and y.equal(y_.cpu()) and i.equal(i_.cpu())


def test_the_banks_draws_do_not_overtake_each_other():
    """300 draws and updates queued without a wait:
    a pinned buffer used again too early would show."""
    labels, banks = torch.arange(500) % 50, []
    for device in ("cpu", GPU):
        bank, seen = models.MemoryBank(labels, 2, 3, dim=16, negatives=64).to(device), []
        for step in range(300):
            draw = torch.Generator().manual_seed(step)
            index = torch.randperm(500, generator=draw)[:32].to(device)
            rows = bank.sample(index, step // 16, step)
            z = torch.nn.functional.normalize(torch.randn(2, 3, 32, 16, generator=draw), dim=-1)
            bank.update(index, z.to(device))
            seen.append(rows.same_class)
        banks.append((bank.stored, bank.written, seen))
    (rows, written, masks), (rows_, written_, masks_) = banks
    assert (all(a.equal(b.cpu()) for a, b in zip(masks, masks_, strict=True))
            and written.equal(written_.cpu()))
    assert distance([rows_], [rows]) < 1e-3


def test_evaluation_is_the_cpus(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*flags(images, "out", 1, "--method", "independent"), "--device", GPU])
    found = []
    for device in ("cpu", GPU):
        capsys.readouterr()
        predict.main(["--student", "out/last.pt", "--dataset", "folder",
                      "--data-dir", str(images), "--device", device])
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] and "top-1" in found[0]


# ---------------------------------------------------------------- detection, two processes

def test_a_step_of_detection_equals_the_cpus(exact_float32):
    """With every region taken, where training draws some."""
    detect = pytest.importorskip("detect")
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, 64, 64), generator=draw, dtype=torch.uint8) for _ in range(2)]
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 10:40, 8:50] = 1
    targets = [dict(boxes=torch.tensor([[8., 10, 50, 40]]), labels=torch.tensor([1]),
                    masks=masks)] * 2
    found = []
    for device in ("cpu", GPU):
        args = argparse.Namespace(arch="resnet18", seed=0, freeze=0, batch_norm="frozen",
                                  proposals=16, min_size=64, max_size=64,
                                  device=torch.device(device), amp=None)
        model = detect.build(args, ["thing"], *data.IMAGENET).train()
        for part in (model.rpn, model.roi_heads):
            part.fg_bg_sampler.batch_size_per_image = 10_000
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        logged = detect.train_step(
            args, model, argparse.Namespace(optimizers=[optimizer], processes=Processes({})),
            images, targets)
        found.append(({name: float(value) for name, value in logged.items()},
                      list(model.parameters())))
    (terms, weights), (terms_, weights_) = found
    assert terms_ == pytest.approx(terms, rel=0.01, abs=1e-4) and distance(weights_, weights) < 1e-4


PROCESS = """
import sys, torch.distributed as dist
start = dist.init_process_group
# nccl wants a GPU for each process
dist.init_process_group = lambda timeout, **_: start("gloo", timeout=timeout)
import conftest, train
train.main(sys.argv[1:])
"""


def test_two_processes_on_one_device(images, tmp_path):
    """Runs of two processes that share the device log what two processes on the CPU do."""
    children = []
    for device in {GPU, "cpu"}:
        port = str(free_port())
        for rank in ("0", "1"):
            where = dict(RANK=rank, WORLD_SIZE="2", LOCAL_RANK="0",
                         MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                         OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
            command = [*flags(images, device, 2, *BANK), "--batch-size", "16", "--device", device]
            children.append(subprocess.Popen(
                [sys.executable, "-c", PROCESS, *command], env=os.environ | where,
                cwd=tmp_path, stderr=subprocess.PIPE, text=True))
    for child in children:
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
    on_device, on_cpu = (read_log(tmp_path / device)[1:] for device in (GPU, "cpu"))
    assert [line["ce"] for line in on_device] == pytest.approx(
        [line["ce"] for line in on_cpu], rel=1e-2)
    assert [line["step"] for line in on_device] == [3, 6]


# ---------------------------------------------------------------- students, memory

@pytest.mark.parametrize("name,size", [
    ("resnet8", 32), ("resnet110", 32), ("wrn_16_2", 32), ("shufflenetv2_0.5", 32),
    ("hcgnet_a1", 32), ("resnet18", 64), ("resnet50", 64), ("resnext50_32x4d", 64),
    ("shufflenet_v2_x0_5", 64)])
def test_students(name, size, images, tmp_path, exact_float32):
    """Evaluation equals the CPU's float64;
    a plain and a captured step and meta step are finite and alike."""
    if not IS_GPU and name != "resnet8":
        pytest.skip("long on a CPU")
    folder = draw_images(tmp_path / "images", size=size, train_images=2, test_images=1)
    plain, graph = (Setting(folder, "--arch", name, "--meta-steps", "1", *more, size=size)
                    for more in ([], GRAPH))
    (x, *_), _ = (next(s.batches) for s in (plain, graph))
    net = copy.deepcopy(plain.method.cohort).eval()
    assert distance([net(x)[1]], [net.cpu().double()(x.cpu().double())[1]]) < 1e-3
    terms = [s.go(5) for s in (plain, graph)]
    assert all(map(torch.isfinite, map(torch.tensor, terms[0].values())))
    assert terms[1]["ce"] == pytest.approx(terms[0]["ce"], rel=0.05)


@pytest.mark.skipif(not IS_GPU, reason="the allocator's peak")
def test_memory():
    peaks = {}
    for name in ("deep-supervision", "lmcl"):
        args = options.parse("", ["--method", name, "--out-dir", "out"])
        args.device = torch.device("cuda", 0)
        method = train.build(
            args, argparse.Namespace(classes=range(100), train_labels=None, notes=[]))
        run = Run(args, None, method, method.optimizers(), metadata={}, steps_per_epoch=390,
                  images_per_epoch=50000, processes=Processes({}), signals=None)
        run.start_epoch()
        x = torch.randn(128, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
        y = torch.arange(64, device="cuda").repeat_interleave(2)
        for part in ("step", "meta"):
            if part == "meta" and name != "lmcl":
                continue
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats()
                if part == "step":
                    _, outputs = train.train_step(args, method, run, x, y, None)
                else:
                    method.second.step(run.optimizers[1], 0.1, None, x, y, None, outputs)
                peaks[name, part] = torch.cuda.max_memory_allocated() / 2 ** 20
        del method, run
    print(peaks)
    assert peaks["lmcl", "step"] < 1.1 * peaks["deep-supervision", "step"]
    assert peaks["lmcl", "meta"] < 3 * peaks["lmcl", "step"]
