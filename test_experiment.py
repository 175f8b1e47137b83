"""experiment.py and devices.py: whole files, checkpoints, locks, signals, CUDA graphs played on the CPU."""

import hashlib
import io
import itertools
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import devices
import experiment
import options
import train
from conftest import bits
from devices import UserError

HERE = Path(__file__).parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


# ---------------------------------------------------------------- checkpoints

@pytest.fixture
def example():
    """Values of every kind that a run saves, and the floats that are easily lost."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, 0.9, nesterov=True), torch.optim.Adam(net.parameters())]
    net(torch.randn(2, 3, 5, 5)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return dict(format=experiment.CHECKPOINT_FORMAT, model=net.state_dict(),
                optimizers=[o.state_dict() for o in optimizers], mean=(0.1, 1 / 3, 1e-300),
                args={"lr": 0.1, "arch": ["resnet8", "wrn_10_1"], "out_dir": "naïve/ö", "x": None},
                best=-1.0, seed=2 ** 63 - 1, odd=torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
                sums={"names": ["loss"], "values": torch.rand(1)}, log=[{"classes": ["a", "b"]}, {"epoch": 1}])


def damages(content, truncations=50, flips=50):
    """(what, bytes): content cut short, and with one bit wrong, at both ends and at random places between."""
    draw, n = random.Random(0), len(content)
    for cut in [0, 1, n - 1, *draw.sample(range(2, n - 1), truncations - 3)]:
        yield "truncation", content[:cut]
    for bit in [0, 8 * n - 1, *draw.sample(range(1, 8 * n - 1), flips - 2)]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield "flip", bytes(damaged)


def assert_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        experiment.load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_checkpoints_come_back_bit_for_bit_or_are_refused(example, tmp_path):
    experiment.save_checkpoint(tmp_path / "x.pt", example)
    assert bits(experiment.load_checkpoint(tmp_path / "x.pt")) == bits(example)
    seen = [what for what, content in damages((tmp_path / "x.pt").read_bytes())
            if assert_refused(tmp_path / "y.pt", content) is None]
    assert seen == ["truncation"] * 50 + ["flip"] * 50


def test_too_little_memory_is_not_called_a_bad_checkpoint(tmp_path, monkeypatch):
    """Its file is good: the advice to take the one before it would lose it."""
    experiment.save_checkpoint(tmp_path / "last.pt", dict(format=experiment.CHECKPOINT_FORMAT, args={}))
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(torch.OutOfMemoryError):
        experiment.load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("content", [b"", b"\x80", b".", b"N.", b"PK\x03\x04", b"junk" * 99], ids=repr)
def test_foreign_files_are_refused_even_with_a_right_digest(content, tmp_path):
    assert_refused(tmp_path / "x.pt", content)
    assert_refused(tmp_path / "x.pt", content + hashlib.sha256(content).digest())


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    zipped = experiment.torch_bytes({"format": 1, "model": Bomb()})
    for content in (zipped, pickle.dumps(Bomb(), protocol=2)):
        assert_refused(tmp_path / "x.pt", content + hashlib.sha256(content).digest())
        assert not (tmp_path / "exploded").exists()
    torch.load(io.BytesIO(zipped), weights_only=False)
    assert (tmp_path / "exploded").exists()                               # the bomb was a live one


# ---------------------------------------------------------------- writing

def test_a_reader_at_any_moment_finds_a_whole_file(tmp_path, monkeypatch):
    last, previous, seen = tmp_path / "last", tmp_path / "previous", set()
    for content in (b"older", b"old"):
        experiment.write(last, content, keep=previous)
    for name, true in [(name, getattr(os, name)) for name in ("fsync", "replace", "link")]:
        def looking(*args, call=true):
            seen.add((last.read_bytes(), previous.read_bytes()))
            call(*args)
            seen.add((last.read_bytes(), previous.read_bytes()))

        monkeypatch.setattr(os, name, looking)
    experiment.write(last, b"new" * 99, keep=previous)
    assert seen == {(b"old", b"older"), (b"old", b"old"), (b"new" * 99, b"old")}
    assert {p.name for p in tmp_path.iterdir()} == {"last", "previous"}


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    for content in (b"one", b"two", b"three"):
        experiment.write(tmp_path / "last", content, keep=tmp_path / "previous")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"last": b"three", "previous": b"two"}


@pytest.mark.parametrize("where, fails_at", [("open", 1), ("write", 1), ("fsync", 1), ("link", 1), ("replace", 1),
                                             ("replace", 2)])
def test_a_failure_to_write_leaves_what_was_there(where, fails_at, tmp_path, monkeypatch):
    last, previous, content, calls = tmp_path / "last", tmp_path / "previous", b"new" * 99_999, itertools.count(1)
    for old in (b"older", b"old"):
        experiment.write(last, old, previous)

    def failing(true):
        def call(*args):
            if next(calls) == fails_at:
                raise OSError(28, "No space left on device")
            return true(*args)
        return call

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched, pytest.raises(UserError) as error:
        if where == "open":
            patched.setattr(experiment, "open", failing(open), raising=False)
        elif where != "write":
            patched.setattr(os, where, failing(getattr(os, where)))
        try:
            if where == "write":                                          # the system itself stops it half-way
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            experiment.write(last, content, previous)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(word in str(error.value) for word in (str(last), "make room for 0.3 MiB"))
    assert "\n" not in str(error.value)
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in ("last", "previous")}
    assert left["last"] == b"old" and left["previous"] in (b"older", b"old")


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        experiment.write(tmp_path / "file" / "x", b"1")

    def read_only(*args, **settings):                                     # also what unlink says on such a file system
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(experiment, "open", read_only, raising=False)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(UserError, match="Read-only file system.: give another --out-dir"):
        experiment.write(tmp_path / "x", b"1")


# ---------------------------------------------------------------- locks and signals

# A child without torch, which takes seconds to load: stand-ins for what experiment.py imports.
ALONE = ("import sys, time, unittest.mock as m\n"
         "stand_in = m.MagicMock(UserError=Exception)\n"
         "sys.modules.update(dict.fromkeys(('torch', 'numpy', 'PIL', 'devices', 'models'), stand_in))\n"
         "import experiment\n")


def child_process(program, *arguments):
    return subprocess.Popen([sys.executable, "-c", ALONE + program, *arguments], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_runs_never_share_a_folder(tmp_path):
    """A child process holds the lock; it is free again when the child is killed."""
    program = "out = experiment.OutDir(sys.argv[1]); out.open(); print('ready', flush=True); time.sleep(60)"
    with child_process(program, tmp_path / "run") as child:
        try:
            assert child.stdout.readline() == "ready\n"
            with pytest.raises(UserError, match=f"in use by process {child.pid}:"):
                experiment.OutDir(tmp_path / "run").open()
        finally:
            child.kill()
    experiment.OutDir(tmp_path / "run").open()
    assert (tmp_path / "run/.lock").read_text() == f"{os.getpid()}\n"


def test_signals_are_noted_and_handlers_come_back():
    first = {s: signal.signal(s, lambda *_, s=s: None) for s in SIGNALS}
    try:
        mine = [signal.getsignal(s) for s in SIGNALS]
        for number in (None, *SIGNALS):
            with pytest.raises(KeyError), experiment.Signals() as signals:
                assert signals.name is None
                if number:
                    os.kill(os.getpid(), number)
                    assert signals.name == number.name
                raise KeyError                                            # however the block ends
            assert [signal.getsignal(s) for s in SIGNALS] == mine
        signal.signal(signal.SIGHUP, signal.SIG_IGN)                      # nohup
        with experiment.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.name is None
    finally:
        for s, handler in first.items():
            signal.signal(s, handler)


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT),
                                           (signal.SIGHUP, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1)])
def test_the_second_signal_ends_the_process_at_once(first, second):
    program = ("with experiment.Signals() as signals:\n"
               "    print('ready', flush=True)\n"
               "    while not signals.name: time.sleep(0.01)\n"
               "    print(signals.name, flush=True); time.sleep(60)")
    with child_process(program) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(first)
            assert process.stdout.readline() == f"{first.name}\n" and process.poll() is None
            process.send_signal(second)
            assert process.wait(10) == -second
            assert ("stopping after this step" in process.stderr.read()) == (first == signal.SIGINT)
        finally:
            process.kill()


def test_a_broken_pipe_does_not_end_a_run(capfd):
    """Standard output is a pipe whose reader has gone, then a full device: say() goes on, and the exit is clean."""
    program = ALONE + "for i in range(3): experiment.say('x' * 100_000)\nprint('alive', file=sys.stderr)"
    reader, writer = os.pipe()
    os.close(reader)
    for stdout in (writer, os.open("/dev/full", os.O_WRONLY)):
        done = subprocess.run([sys.executable, "-c", program], cwd=HERE, stdout=stdout, stderr=subprocess.PIPE)
        os.close(stdout)
        assert done.returncode == 0 and done.stderr == b"alive\n"


# ---------------------------------------------------------------- CUDA graphs, played on the CPU

def storages(tree):
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tree)
            if torch.is_tensor(t) and not t._is_zerotensor()}


class CPUGraph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph and torch.cuda.graph: records operations and replays them on the same memory.

    As on CUDA recording leaves no trace (what was overwritten is put back) and replaying runs no Python; operations
    that make the host wait, or bring numbers from it, are refused.
    """

    WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::lift_fresh",
               "aten::unique_dim", "aten::_unique2", "aten::is_nonzero"}

    def __init__(self):
        super().__init__()
        self.operations, self.overwritten, self.replays = [], {}, 0
        self.made, self.foreign = set(), set()                            # storages that operations return; others used

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, kwargs = op._schema.name, kwargs or {}
        assert name not in self.WAITING, f"{name} makes the host wait"
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "aten::index" else []
        assert not masks, "a mask as an index makes the host wait"
        written = [a for a, formal in zip(args, op._schema.arguments, strict=False)
                   if formal.alias_info and formal.alias_info.is_write]
        written += args[3:5] if name == "aten::native_batch_norm" else []  # running averages: not in the schema
        for storage in (t.untyped_storage() for t in tree_leaves(written) if torch.is_tensor(t)):
            self.overwritten.setdefault(storage.data_ptr(), (storage, storage.clone()))
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
            for kept, new in zip(tree_leaves(result), tree_leaves(op(*args, **kwargs)), strict=True):
                if torch.is_tensor(kept) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def play_graphs_on_the_cpu(monkeypatch):
    for name, stand_in in (("CUDAGraph", CPUGraph), ("graph", lambda graph, **_: graph), ("Stream", MagicMock),
                           ("stream", MagicMock()), ("current_stream", MagicMock), ("graph_pool_handle", MagicMock)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(devices.CUDAGraphs, "WARM_UP", 1)


@pytest.mark.parametrize("flags", [["--method", "lmcl"], ["--method", "afd"],
                                   ["--method", "lmcl", "--contrast", "bank", "--negatives", "16"]])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs want a GPU"))])
def test_captured_steps_equal_plain_ones(flags, device, images, tmp_path, monkeypatch):
    """Ordinary and second steps, batches of two sizes, three learning rates: bit for bit on the CPU, where CPUGraph
    plays CUDA's graphs; it shows too that no step's operation waits for the host or uses memory that may be freed."""
    if device == "cpu":
        play_graphs_on_the_cpu(monkeypatch)
    else:                                                                 # lr is rounded to float32 in a captured step
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    captured, true_steps, states = [], train.steps, []
    monkeypatch.setattr(train, "steps", lambda *args: captured.extend(true_steps(*args)) or captured[-2:])
    for graphs in ([], ["--cuda-graph"]):
        args = options.parse("", ["--arch", "small", "--image-size", "16", "--epochs", "3", "--lr", "0.01",
                                  "--batch-size", "12", "--meta-freq", "1", "--meta-steps", "1", "--out-dir",
                                  str(tmp_path / f"out{len(graphs)}"), *flags, *graphs])
        args.device, dataset = torch.device(device), data.load("folder", images, 16).to(device)
        method, out = train.build(args, dataset), experiment.OutDir(args.out_dir)
        out.open()
        metadata = dict(classes=dataset.classes, mean=dataset.mean, std=dataset.std, image_size=16, resize=16)
        run = experiment.Run(args, out, method, train.make_optimizers(args, method), metadata, 4, 54,
                             devices.Processes({}), SimpleNamespace(name=None))
        train.train(args, dataset, method, run)
        states.append(bits({k: v for k, v in experiment.load_checkpoint(out / "last.pt").items() if k != "optimizers"}))
    if device == "cuda":
        plain, replayed = (experiment.load_checkpoint(tmp_path / f"out{n}" / "last.pt")["log"][1:] for n in (0, 1))
        assert [line["loss"] for line in replayed] == pytest.approx([line["loss"] for line in plain], rel=1e-3)
        return
    assert states[0] == states[1]
    kept = storages([method.state_dict(), list(method.buffers()), run.lr, [o.state_dict() for o in run.optimizers]])
    functions = [dataset.draw, *captured[2:]]
    assert all(isinstance(f, devices.CUDAGraphs) for f in functions)
    own = storages([getattr(method, "maps", []), dataset.__dict__])
    for function in functions:
        assert len(function.graphs) == 2                                  # 14 and 12 images
        for graph, inputs, _ in function.graphs.values():
            assert graph.replays >= 2
            if function is not captured[3] or "afd" not in flags:         # afd's second step reads the first one's maps
                assert graph.foreign <= kept | storages(inputs) | own


def test_errors_of_a_capture(monkeypatch):
    """What a capture refuses is the user's to leave out; an error of the program is raised as it is."""
    play_graphs_on_the_cpu(monkeypatch)
    for message, kind in (("operation not permitted when stream is capturing", UserError), ("a defect", RuntimeError)):
        calls = itertools.count()

        def fail(x):
            if next(calls) % 2:
                raise RuntimeError(message)
            return x

        graphs = devices.CUDAGraphs(fail)
        graphs(torch.ones(1))
        with pytest.raises(kind, match=message):
            graphs(torch.ones(1))


def test_dropout_of_any_kind_is_seen():
    x = torch.ones(2, 3)
    for function, random_ in ((torch.relu, False), (torch.nn.functional.dropout, True), (torch.nn.Dropout(0.5), True),
                              (torch.nn.Dropout(0.5).eval(), False)):
        before = torch.get_rng_state()
        assert devices.draws_random_numbers(lambda: function(x), torch.device("cpu")) == random_
        assert torch.equal(torch.get_rng_state(), before)
