"""What several test files share:
a small data set, runs of train.py here or in forks, comparison of what runs leave."""

import gc
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import convnext, efficientnet, mnasnet, mobilenetv2, mobilenetv3, regnet
from torchvision.models import swin_transformer as swin

import train
from support.architectures import ARCHITECTURES, LAYOUTS, ExistingNetwork, he_normal
from support.run import Run

torch.set_num_threads(1)  # small tensors: a second thread would mostly be waited for
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: children would ignore it, too
    signal.signal(signal.SIGHUP, lambda *_: None)
gc.freeze()  # what is imported stays: the collector need not look at it again and again


class Small:
    """Two stages of one convolution:
    what most tests train, since they look at the program and not at the student."""

    stages = 2

    def __init__(self, width):
        self.width = width

    def layer(self, inputs, stride):
        convolution = nn.Conv2d(inputs, self.width, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(self.width), nn.ReLU())

    def stem(self):
        return self.layer(3, stride=1)

    def stage(self, s):
        return self.layer(self.width, stride=2)

    def tail(self):
        return nn.Identity()

    def initialise(self, module):
        he_normal(module)


Run.SECONDS_BETWEEN_SAVES = -1  # each epoch is saved, as where epochs are long
def little_mobilenet_v3(num_classes):
    rows = [(8, 8, True, "RE", 2),
            (8, 12, False, "RE", 2), (12, 12, False, "RE", 1),
            (12, 16, True, "HS", 2), *[(16, 16, True, "HS", 1)] * 2,
            (16, 20, True, "HS", 1), (20, 20, True, "HS", 1),
            (20, 24, True, "HS", 2), *[(24, 24, True, "HS", 1)] * 2]
    blocks = [mobilenetv3.InvertedResidualConfig(a, 3, 2 * a, b, se, act, stride, 1, 1.0)
              for a, b, se, act, stride in rows]
    return mobilenetv3.MobileNetV3(blocks, 32, num_classes)


def little_efficientnet(num_classes):
    rows = [(1, 1, 8, 8, 1), (2, 2, 8, 12, 1), (2, 2, 12, 12, 2), (2, 2, 12, 16, 1),
            (2, 1, 16, 20, 2), (2, 2, 20, 24, 2), (2, 1, 24, 28, 1)]
    blocks = [efficientnet.MBConvConfig(expand, 3, stride, a, b, n)
              for expand, stride, a, b, n in rows]
    return efficientnet.EfficientNet(blocks, 0.2, 0.2, num_classes)


def little_regnet(num_classes):
    return regnet.RegNet(
        regnet.BlockParams([1, 1, 2, 2], [8, 16, 24, 32], [8] * 4, [1.0] * 4, [2] * 4, 0.25),
        num_classes)


def little_convnext(num_classes):
    blocks = [convnext.CNBlockConfig(*row)
              for row in ((8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 2))]
    return convnext.ConvNeXt(blocks, 0.2, num_classes=num_classes)


def little_swin(num_classes, **version):
    return swin.SwinTransformer([4, 4], 8, [2, 2, 1, 1], [1, 2, 2, 4], [2, 2],
                                stochastic_depth_prob=0.2, num_classes=num_classes, **version)


def little_swin_v2(num_classes):
    return little_swin(num_classes, block=swin.SwinTransformerBlockV2,
                       downsample_layer=swin.PatchMergingV2)


# a small network of each family: torchvision's own classes, cut as the real ones
LITTLE = {
    "mobilenet_v2": lambda num_classes: mobilenetv2.MobileNetV2(num_classes, width_mult=0.1),
    "mobilenet_v3_small": little_mobilenet_v3, "efficientnet_.*": little_efficientnet,
    "mnasnet.*": lambda num_classes: mnasnet.MNASNet(0.1, num_classes), "regnet_.*": little_regnet,
    "convnext_.*": little_convnext, "swin_.*": little_swin, "swin_v2": little_swin_v2}
FAMILIES = {f"little_{re.sub(r'_?[.][*]', '', pattern)}": build
            for pattern, build in LITTLE.items()}
for (name, build), pattern in zip(FAMILIES.items(), LITTLE, strict=True):
    layout, pool = LAYOUTS.get(pattern, LAYOUTS["swin_.*"])
    ARCHITECTURES[name] = ExistingNetwork(build, layout, blocks="fewest", pool=pool)
ARCHITECTURES |= {"small": Small(8), "small_12": Small(12)}
TIMES = ("seconds", "images_per_second", "data_seconds")


def pytest_configure(config):
    """What torchvision, pycocotools and torch.load warn of is not ours to mend.

    Tests send SIGINT, which a shell's `&` ignores.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torchvision|pycocotools")
    config.addinivalue_line("filterwarnings", "ignore:Detected pickle protocol 118")


def draw_images(root, size=16, train_images=9, test_images=3):
    """A folder data set: 6 classes of noise that differ in brightness."""
    draw = torch.Generator().manual_seed(0)
    for i, c in itertools.product(range(train_images + test_images), range(6)):
        path = root / ("train" if i < train_images else "test") / f"class{c}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 128, (size, size, 3), generator=draw, dtype=torch.uint8) + 20 * c
        Image.fromarray(pixels.numpy()).save(path)
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"))


def flags(images, out, epochs, *more):
    """3 steps an epoch, lmcl's meta step at every fourth,
    `Small` students unless `more` has --arch."""
    arch = [] if "--arch" in more else ["--arch", "small"]
    meta = [] if "--method" in more and "lmcl" not in more else ["--meta-freq", "4"]
    return ["--dataset", "folder", "--data-dir", str(images), "--image-size", "16",
            "--batch-size", "18", "--device", "cpu", "--epochs", str(epochs),
            "--out-dir", str(out), *arch, *meta, *map(str, more)]


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    """Run train.py in this process, in an empty folder; returns its log."""
    monkeypatch.chdir(tmp_path)

    def run(*more, out="out", epochs=2):
        train.main(flags(images, out, epochs, *more))
        return read_log(out)

    return run


def read_log(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def bits(x):
    """x, less the times in it, with every tensor as type, shape, strides and bytes:
    == is then bit for bit."""
    if torch.is_tensor(x):
        return (x.dtype, x.shape, x.stride(),
                x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(x, dict):
        return {k: bits(v) for k, v in x.items() if k not in (*TIMES, "command", "args")}
    if isinstance(x, (list, tuple)):
        return type(x), [bits(v) for v in x]
    return type(x), x.hex() if isinstance(x, float) else x


def results(out):
    """Every file of an --out-dir by name, such that equal runs have equal ones."""
    return {
        p.name: bits(torch.load(p, weights_only=True)) if p.suffix == ".pt"
        else bits([json.loads(line) for line in p.read_text().splitlines()]) if p.suffix == ".jsonl"
        else p.read_bytes()
        for p in Path(out).iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")}


def assert_same(a, b):
    """Two --out-dirs hold the same files, bit for bit, less the times;
    previous.pt depends on when a run was saved."""
    a, b = results(a), results(b)
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} <= {"previous.pt"}


@pytest.fixture
def fails(run, capsys):
    """Run train.py, which is to end by this exit status and one line with all these words,
    and to leave nothing."""
    def fails(flags, *words, status=1):
        before = set(Path().rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(*flags)
        lines = capsys.readouterr().err.splitlines()
        assert (end.value.code == status and len(lines) == 1
                and lines[0].startswith("train.py: error: ")), lines
        assert [w for w in words if w not in lines[0]] == [], lines
        left = {p for p in set(Path().rglob("*")) - before if p.name != ".lock"}
        assert left <= {Path("out")} and not os.path.exists("out/last.pt")

    return fails


class Convolutions(TorchDispatchMode):
    """What convolutions compute in, and their backward passes: {depthwise: dtypes}."""

    def __init__(self):
        super().__init__()
        self.seen = {True: set(), False: set()}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "convolution" in str(op):
            x, weight = args[1:3] if "backward" in str(op) else args[:2]
            self.seen[weight.shape[1] == 1].add(x.dtype)
        return op(*args, **(kwargs or {}))


# ---------------------------------------------------------------- several processes

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(size, function, folder):
    """function(rank) in `size` processes that find each other as torchrun's do.

    Returns the process numbers.
    """
    children, port = [], free_port()
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 99
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.chdir(folder)
            output = os.open(f"output{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout = sys.stderr = open(output, "w", buffering=1)
            torch.set_num_threads(1)
            function(rank)
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return children


def wait(children, limit=60):
    """Their exit statuses, a signal's as a negative number."""
    ends, began = {}, time.monotonic()
    while len(ends) < len(children):
        for child in children:
            if child not in ends:
                number, status = os.waitpid(child, os.WNOHANG)
                if number:
                    ends[child] = os.waitstatus_to_exitcode(status)
        assert time.monotonic() - began < limit, "a process does not end"
        time.sleep(0.01)
    return [ends[child] for child in children]
