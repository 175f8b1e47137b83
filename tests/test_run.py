"""support/run.py, files.py, console.py, cuda_graphs.py:
whole files, locks, signals, a run's log and end."""

import hashlib
import io
import itertools
import os
import pickle
import random
import resource
import shutil
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
import options
import train
from conftest import Small, assert_same, bits, read_log, results
from support import files
from support.arguments import WHERE
from support.console import (
    ImageError,
    Interrupted,
    Signals,
    UserError,
    one_line_errors,
    say,
    shorten,
    show_line,
)
from support.cuda_graphs import CUDAGraphs, draws_random_numbers
from support.processes import Processes
from support.run import OutDir, Run, compare_arguments

HERE = Path(train.__file__).parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ALONE = SimpleNamespace(rank=0, size=1)


# ---------------------------------------------------------------- checkpoints

@pytest.fixture
def example():
    """Values of every kind that a run saves, and the floats that are easily lost."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    net = net.to(memory_format=torch.channels_last)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, 0.9, nesterov=True),
                  torch.optim.Adam(net.parameters())]
    net(torch.randn(2, 3, 5, 5)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return dict(format=files.CHECKPOINT_FORMAT, model=net.state_dict(),
                optimizers=[o.state_dict() for o in optimizers], mean=(0.1, 1 / 3, 1e-300),
                args={"lr": 0.1, "arch": ["resnet8", "wrn_10_1"], "out_dir": "naïve/ö", "x": None},
                best=-1.0, seed=2 ** 63 - 1,
                odd=torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
                sums={"shapes": {"loss": []}, "values": torch.rand(1)},
                log=[{"classes": ["a", "b"]}, {"epoch": 1}])


def damages(content, truncations=50, flips=50):
    """(what, bytes): content cut short, and with one bit wrong,
    at both ends and at random places between."""
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
        files.load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_checkpoints_come_back_bit_for_bit_or_are_refused(example, tmp_path):
    files.save_checkpoint(tmp_path / "x.pt", example)
    assert bits(files.load_checkpoint(tmp_path / "x.pt")) == bits(example)
    seen = [what for what, content in damages((tmp_path / "x.pt").read_bytes())
            if assert_refused(tmp_path / "y.pt", content) is None]
    assert seen == ["truncation"] * 50 + ["flip"] * 50


def test_too_little_memory_is_not_called_a_bad_checkpoint(tmp_path, monkeypatch):
    """Its file is good: the advice to take the one before it would lose it."""
    files.save_checkpoint(tmp_path / "last.pt", dict(format=files.CHECKPOINT_FORMAT, args={}))

    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(torch.OutOfMemoryError):
        files.load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("content", [b"", b"\x80", b"N.", b"PK\x03\x04", files.torch_bytes([1])],
                         ids=range(5))
def test_foreign_files_are_refused_even_with_a_right_digest(content, tmp_path):
    assert_refused(tmp_path / "x.pt", content)
    assert_refused(tmp_path / "x.pt", content + hashlib.sha256(content).digest())


@pytest.mark.parametrize("more, age", [(-1, "older"), (1, "newer")])
def test_checkpoints_of_another_version_are_refused(more, age, tmp_path):
    files.save_checkpoint(tmp_path / "x.pt", dict(format=files.CHECKPOINT_FORMAT + more, args={}))
    words = f"{age} than this program's {files.CHECKPOINT_FORMAT}: use the version"
    with pytest.raises(UserError, match=words):
        files.load_checkpoint(tmp_path / "x.pt")


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    zipped = files.torch_bytes({"format": files.CHECKPOINT_FORMAT, "args": {}, "model": Bomb()})
    for content in (zipped, pickle.dumps(Bomb(), protocol=2)):
        assert_refused(tmp_path / "x.pt", content + hashlib.sha256(content).digest())
        assert not (tmp_path / "exploded").exists()
    torch.load(io.BytesIO(zipped), weights_only=False)
    assert (tmp_path / "exploded").exists()  # the bomb was a live one


# ---------------------------------------------------------------- writing

def test_a_reader_at_any_moment_finds_a_whole_file(tmp_path, monkeypatch):
    last, previous, seen = tmp_path / "last", tmp_path / "previous", set()
    for content in (b"older", b"old"):
        files.write(last, content, keep=previous)
    for name, true in [(name, getattr(os, name)) for name in ("fsync", "replace", "link")]:
        def looking(*args, call=true):
            seen.add((last.read_bytes(), previous.read_bytes()))
            call(*args)
            seen.add((last.read_bytes(), previous.read_bytes()))

        monkeypatch.setattr(os, name, looking)
    files.write(last, b"new" * 99, keep=previous)
    assert seen == {(b"old", b"older"), (b"old", b"old"), (b"new" * 99, b"old")}
    assert {p.name for p in tmp_path.iterdir()} == {"last", "previous"}


@pytest.mark.parametrize("number", [1, 5, 22, 95])  # EPERM, EIO, EINVAL, ENOTSUP
def test_a_file_system_without_hard_links(number, tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_links)
    for content in (b"one", b"two", b"three"):
        files.write(tmp_path / "last", content, keep=tmp_path / "previous")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "last": b"three", "previous": b"two"}


@pytest.mark.parametrize("where, fails_at", [("open", 1), ("write", 1), ("fsync", 1), ("link", 1),
                                             ("replace", 1), ("replace", 2)])
def test_a_failure_to_write_leaves_what_was_there(where, fails_at, tmp_path, monkeypatch):
    last, previous = tmp_path / "last", tmp_path / "previous"
    content, calls = b"new" * 99_999, itertools.count(1)
    for old in (b"older", b"old"):
        files.write(last, old, previous)

    def failing(true):
        def call(*args):
            if next(calls) == fails_at:
                raise OSError(28, "No space left on device")
            return true(*args)
        return call

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched, pytest.raises(UserError) as error:
        if where == "open":
            patched.setattr(files, "open", failing(open), raising=False)
        elif where != "write":
            patched.setattr(os, where, failing(getattr(os, where)))
            if where == "link":  # then it is copied, which needs room
                patched.setattr(shutil, "copyfile", lambda *args: failing(None)(*args))
                calls = itertools.cycle([fails_at])
        try:
            if where == "write":  # the system itself stops it half-way
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            files.write(last, content, previous)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(word in str(error.value) for word in (str(last), "make room for 0.3 MiB"))
    assert "\n" not in str(error.value)
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in ("last", "previous")}
    assert left["last"] == b"old" and left["previous"] in (b"older", b"old")


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        files.write(tmp_path / "file" / "x", b"1")
    with pytest.raises(UserError,
                       match="cannot make --here .*/file/x .Not a directory.: give another"):
        files.make_folder(tmp_path / "file" / "x", "--here")
    with pytest.raises(UserError,
                       match="cannot make --out-dir .*/file/x .Not a directory.: give another"):
        OutDir(tmp_path / "file" / "x").open()

    def read_only(*args, **settings):  # also what unlink says on such a file system
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "open", read_only, raising=False)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(UserError, match="Read-only file system.: give another folder"):
        files.write(tmp_path / "x", b"1")


# ---------------------------------------------------------------- locks

# A child without torch, which takes seconds to load: stand-ins for what support/run.py imports.
LOCKING = """
import sys, time, unittest.mock
for name in ("torch", "torch.utils", "torch.utils._pytree", "numpy", "PIL",
             "support.files", "support.processes"):
    sys.modules[name] = unittest.mock.MagicMock()
from support.run import OutDir
out = OutDir(sys.argv[1])
out.open()
print("ready", flush=True)
time.sleep(60)
"""


def child_process(program, *arguments):
    return subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_runs_never_share_a_folder(tmp_path):
    """A child process holds the lock; it is free again when the child is killed."""
    with child_process(LOCKING, tmp_path / "run") as child:
        try:
            assert child.stdout.readline() == "ready\n"
            with pytest.raises(UserError, match=f"in use by process {child.pid}:"):
                OutDir(tmp_path / "run").open()
        finally:
            child.kill()
    OutDir(tmp_path / "run").open()
    assert (tmp_path / "run/.lock").read_text() == f"{os.getpid()}\n"


def test_a_run_that_ended_before_the_lock_was_had_is_not_overwritten(tmp_path):
    out, args = OutDir(tmp_path / "run"), SimpleNamespace(resume=True)
    assert out.find_checkpoint(args, ALONE) is None
    first = OutDir(tmp_path / "run")
    first.open()
    (tmp_path / "run/last.pt").write_bytes(b"")
    first.lock.close()
    with pytest.raises(UserError, match="has just written .*last.pt: start again with --resume"):
        out.open()


def test_only_where_and_how_far_may_differ_when_a_run_goes_on():
    assert {"device", "data_dir", "out_dir", "max_steps", "save_every", "resume", "cuda_graph",
            "workers", "tensorboard", "model_file", "num_nets"} == WHERE
    saved = dict(**dict.fromkeys(WHERE, 1), lr=0.1, epochs=3, arch=["a", "b"], of_old=1)
    now = SimpleNamespace(**dict.fromkeys(WHERE, 2), lr=0.1, epochs=3, arch=["a", "b"], of_new=1)
    compare_arguments(now, saved, "last.pt")
    now.arch = ["a", "c"]
    with pytest.raises(UserError,
                       match="^last.pt was made with .* --arch a b .now a c.; give the same"):
        compare_arguments(now, saved, "last.pt")


def test_a_checkpoint_from_before_an_option_goes_on_as_it_began():
    saved = dict(lr=0.1, epochs=3)
    now = SimpleNamespace(lr=0.1, epochs=3, virtual_lambda="held", soft_ramp=0.0)
    compare_arguments(now, saved, "last.pt")
    now.virtual_lambda = "moving"
    with pytest.raises(UserError, match=r"made with .*: --virtual-lambda held .now moving.; give"):
        compare_arguments(now, saved, "last.pt")


# ---------------------------------------------------------------- signals, printing, errors

def test_signals_are_noted_and_handlers_come_back():
    first = {s: signal.signal(s, lambda *_, s=s: None) for s in SIGNALS}
    try:
        mine = [signal.getsignal(s) for s in SIGNALS]
        for number in (None, *SIGNALS):
            with pytest.raises(KeyError), Signals("train.py", ALONE) as signals:
                assert signals.name is None
                if number:
                    os.kill(os.getpid(), number)
                    assert signals.name == number.name
                raise KeyError  # however the block ends
            assert [signal.getsignal(s) for s in SIGNALS] == mine
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with Signals("train.py", ALONE) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.name is None
    finally:
        for s, handler in first.items():
            signal.signal(s, handler)


def test_under_torchrun_a_second_signal_ends_nothing(capfd):
    """torchrun and a scheduler may both send one. One process of them speaks."""
    for rank in (0, 1):
        with Signals("train.py", SimpleNamespace(rank=rank, size=2)) as signals:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
                assert signals.name == number.name
                assert signal.SIG_DFL not in map(signal.getsignal, SIGNALS)
        assert capfd.readouterr().err == "\ntrain.py: stopping after this step\n" * (rank == 0)


@pytest.mark.parametrize("first, second", [
    (signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGTERM)])
def test_the_second_signal_ends_the_process_at_once(first, second):
    program = ("import time, types\n"
               "from support.console import Signals\n"
               "with Signals('train.py', types.SimpleNamespace(rank=0, size=1)) as signals:\n"
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
            words = "\ntrain.py: stopping after this step (Ctrl-C again: at once)\n"
            assert process.stderr.read() == words * (first == signal.SIGINT)
        finally:
            process.kill()


def test_a_broken_pipe_does_not_end_a_run():
    """Standard output is a pipe whose reader has gone, or a full device:
    say() goes on, the exit is clean."""
    program = ("import sys\n"
               "from support.console import say\n"
               "for i in range(3): say('x' * 100_000)\n"
               "print('of a library, unflushed')\n"
               "print('alive', file=sys.stderr)")
    reader, writer = os.pipe()
    os.close(reader)
    for stdout in (writer, os.open("/dev/full", os.O_WRONLY)):
        done = subprocess.run([sys.executable, "-c", program], cwd=HERE, stdout=stdout,
                              stderr=subprocess.PIPE)
        os.close(stdout)
        assert done.returncode == 0 and done.stderr == b"alive\n"


def test_standard_error_that_is_closed(capsys, monkeypatch):
    """After 2>&- Python has no sys.stderr."""
    monkeypatch.setattr(sys, "stderr", None)
    say("said")
    assert capsys.readouterr().out == "said\n"


def test_words_that_fit(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "9")
    show_line("0123456789")
    assert capsys.readouterr().err == "\r\033[K01234567"
    assert shorten("abcdefg") == "a, b, c, d, e, f, ... 7 in all" and shorten(["a", 2]) == "a, 2"
    assert str(UserError("two\n  lines")) == "two lines" and isinstance(ImageError(""), UserError)


@pytest.mark.parametrize("error, status, words", [
    (UserError("wrong"), 1, "x.py: error: wrong\n"),
    (Interrupted("SIGTERM: saved"), 1, "x.py: SIGTERM: saved\n"),
    (Interrupted(""), 1, ""), (KeyboardInterrupt(), 130, "x.py: interrupted\n"),
    (OSError(5, "Input/output error", "a"), 1, "x.py: error: [Errno 5] Input/output error: 'a'\n"),
    (torch.OutOfMemoryError("CUDA"), 1,
     "x.py: error: out of memory on cuda:1: try a smaller --batch-size or smaller images\n"),
    (RuntimeError("f does not have a deterministic implementation, but"), 1,
     "x.py: error: --deterministic cannot be had here "
     "(f does not have a deterministic implementation): leave it out\n")])
def test_what_ends_a_program_is_one_line(error, status, words, capsys):
    with (pytest.raises(SystemExit) as end,
          one_line_errors("x.py", SimpleNamespace(device="cuda:1"))):
        raise error
    assert (end.value.code, *capsys.readouterr()) == (status, "", words)


def test_an_error_of_the_program_is_raised_as_it_is():
    for error in (RuntimeError("shapes differ"), ValueError("a defect"), SystemExit(2)):
        with pytest.raises(type(error)) as caught, one_line_errors("x.py"):
            raise error
        assert caught.value is error


# ---------------------------------------------------------------- the log

def make_run(out, **more):
    """A Run of one weight, 3 steps an epoch, 2 epochs."""
    args = SimpleNamespace(**{**dict(epochs=2, lr=0.1, max_steps=0, save_every=0, resume=False,
                                     device=torch.device("cpu")), **more})
    model, out = torch.nn.Linear(1, 1, bias=False), OutDir(out)
    out.open()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1),
                  torch.optim.Adam(model.parameters(), 0.3)]
    return Run(args, out, model, optimizers, metadata=dict(classes=["a"], digest=""),
               steps_per_epoch=3, images_per_epoch=6, processes=Processes({}),
               signals=SimpleNamespace(name=None))


def test_best_pt_is_of_the_epoch_with_the_largest_score(tmp_path):
    """The first of two equal ones; last.pt is of the last."""
    run, weights = make_run(tmp_path, epochs=5), []
    for epoch, score in zip(run.epochs(), [2.0, 5.0, 5.0, 3.0, 4.0], strict=True):
        for _ in range(3):
            run.add({"loss": torch.tensor(1.0)}, images=2)
        run.model.weight.data.fill_(epoch)
        with run.evaluating():
            pass
        run.end_epoch(run.epoch_line(), score)
        weights.append(files.load_checkpoint(tmp_path / "best.pt")["model"]["weight"].item())
    assert weights == [0, 1, 1, 1, 1] and (run.best, run.best_epoch) == (5.0, 2)
    assert files.load_checkpoint(tmp_path / "last.pt")["model"]["weight"].item() == 4


def test_a_term_of_any_shape_is_logged_as_nested_lists(tmp_path):
    run = make_run(tmp_path)
    run.start_epoch()
    pairs = torch.rand(3, 2, 3, 2, 3)  # of 3 steps [N, L, N, L], N = 2, L = 3
    for k, matching in enumerate(pairs):
        run.add({"loss": torch.tensor(k + 0.1234567), "matching": matching}, images=2)
    with run.evaluating():
        pass
    run.end_epoch(run.epoch_line(test_top1=[50.0]), 50.0)
    line = read_log(tmp_path)[1]
    assert (line["loss"] == 1.123457
            and (line["epoch"], line["step"], line["test_top1"]) == (1, 3, [50.0]))
    mean = pairs.double().mean(0)
    assert torch.tensor(line["matching"]).shape == (2, 3, 2, 3)
    # 4 digits
    torch.testing.assert_close(torch.tensor(line["matching"]).double(), mean, rtol=0, atol=6e-5)
    assert all(x == round(x, 4) for x in tree_leaves(line["matching"]))


@pytest.mark.parametrize("spoiled, words", [
    (["matching"], "matching"), (["ce"], "ce"), (["loss", "matching", "ce"], "matching, ce"),
    (["loss"], "loss")])
@pytest.mark.parametrize("value, after", [("nan", 1.0), ("inf", float("nan"))])
def test_a_term_that_is_not_finite_is_named_with_its_step(tmp_path, spoiled, words, value, after):
    """It is the 2nd of the 2nd epoch; what comes after neither hides it nor is named;
    nothing is saved."""
    run = make_run(tmp_path)
    for step in range(1, 7):
        usual = after if step == 6 else 1.0
        terms = dict(loss=torch.tensor(usual), matching=torch.full((2, 2, 2, 2), usual),
                     ce=torch.tensor(usual))
        for name in spoiled if step == 5 else ():
            terms[name].view(-1)[-1] = float(value)
        run.add(terms, images=2)
        if step == 3:
            run.end_epoch({}, 1.0)
    before = results(tmp_path)
    for call in (run.means, run.save, run.stop_clock):
        with pytest.raises(UserError) as error:
            call()
        assert f"{words} became infinite or NaN at step 5: try a smaller --lr; " in str(error.value)
        assert str(error.value).endswith(f"{tmp_path / 'last.pt'} is from before that")
    assert results(tmp_path) == before


def test_save_every_counts_minutes(tmp_path, monkeypatch):
    now, saved = [100.0], []
    monkeypatch.setattr("support.run.time", SimpleNamespace(perf_counter=lambda: now[0]))
    run = make_run(tmp_path, save_every=2)
    monkeypatch.setattr(Run, "save", lambda self: saved.append(now[0]))
    for now[0] in (101.0, 219.0, 221.0):
        run.after_step()
    assert saved == [221.0]


def test_the_time_that_batches_are_waited_for(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("support.run.time", SimpleNamespace(perf_counter=lambda: now[0]))
    run = make_run(tmp_path)

    def batches():
        for batch in range(3):
            now[0] += 2
            yield batch

    for _ in run.timed(batches()):
        now[0] += 5
    assert run.data_seconds == 6


def test_copies_of_the_model_that_differ_are_not_saved(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    run.processes.size = 2
    monkeypatch.setattr(Processes, "gather_objects", lambda self, value: [value, "another"])
    with pytest.raises(UserError, match="the processes' copies of the model differ: nothing was"):
        run.save()
    assert not (tmp_path / "last.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The terms are from before the update that spoiled them."""
    run = make_run(tmp_path)
    run.add({"loss": torch.tensor(1.0)}, images=2)
    run.save()
    before = results(tmp_path)
    run.add({"loss": torch.tensor(1.0)}, images=2)
    for value in ("nan", "inf"):
        run.model.weight.data.fill_(float(value))
        with pytest.raises(UserError, match="a weight became infinite or NaN by step 2: try a "
                                            "smaller --lr; .*last.pt is from before that"):
            run.save()
        assert results(tmp_path) == before


@pytest.mark.parametrize("score, best", [(2.0, (2.0, 2)), (9.0, (9.0, 2))])
def test_a_best_pt_of_an_epoch_that_is_done_again(tmp_path, score, best):
    """Killed between best.pt and last.pt; on another machine the epoch may end otherwise.

    The best that the run names is the one in best.pt.
    """
    run = make_run(tmp_path, epochs=3, resume=True)

    def epoch(score):
        for _ in range(3):
            run.add({"loss": torch.tensor(1.0)}, images=2)
        with run.evaluating():
            pass
        run.end_epoch(run.epoch_line(), score)

    epoch(5.0)
    run.begin(files.load_checkpoint(tmp_path / "last.pt"))
    assert (tmp_path / "best.pt").exists() and (run.best, run.best_epoch) == (5.0, 1)
    whole = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "best.pt").write_bytes(b"not to be read")  # which tells nothing: it stays
    run.begin(files.load_checkpoint(tmp_path / "last.pt"))
    assert (tmp_path / "best.pt").read_bytes() == b"not to be read" and run.best_epoch == 1
    (tmp_path / "best.pt").write_bytes(whole)
    epoch(7.0)
    os.replace(tmp_path / "previous.pt", tmp_path / "last.pt")
    run.begin(files.load_checkpoint(tmp_path / "last.pt"))
    epoch(score)
    kept = files.load_checkpoint(tmp_path / "best.pt")
    assert (run.best, run.best_epoch) == (kept["best"], kept["best_epoch"]) == best


def test_processes_that_found_other_checkpoints(tmp_path, monkeypatch):
    """--out-dir is a folder that only one of two machines sees."""
    run = make_run(tmp_path)
    monkeypatch.setattr(Processes, "gather_objects", lambda self, value: [value, 3])
    with pytest.raises(UserError, match="not all processes found the same .*last.pt: --out-dir"):
        run.begin(None)
    assert not (tmp_path / "log.jsonl").exists()


def test_the_log_of_a_run_that_has_ended_is_not_written_over(run, capsys):
    """Its large files were removed; its students and log are what it was run for."""
    run("--method", "independent", "--num-nets", 1, epochs=1)
    for path in Path("out").glob("*t.pt"):  # last, best
        path.unlink()
    before = results("out")
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            run("--method", "independent", "--num-nets", 1, *more, epochs=1)
        assert "of a run that has ended, without its last.pt: give" in capsys.readouterr().err
    assert results("out") == before


def test_the_rate_goes_to_sgd_and_to_whoever_reads_it(tmp_path):
    run = make_run(tmp_path)
    run.set_lr(0.02)
    assert (run.lr, run.logged_lr) == (0.02, 0.02)
    assert [o.param_groups[0]["lr"] for o in run.optimizers] == [0.02, 0.3]  # Adam keeps its own
    graphs = make_run(tmp_path / "graphs", cuda_graph=True)
    tensor = graphs.lr
    graphs.set_lr(0.02)
    assert (graphs.lr is tensor is graphs.optimizers[0].param_groups[0]["lr"]
            and tensor == torch.tensor(0.02))
    assert graphs.logged_lr == 0.02


@pytest.mark.parametrize("graphs", [False, True])
def test_groups_and_an_own_adamw_follow_in_proportion(tmp_path, graphs):
    """In a resumed run, too, whose checkpoint has the rates of its step."""
    def make(out):
        run = make_run(tmp_path / out, cuda_graph=graphs, resume=True)
        weight = lambda: torch.nn.Parameter(torch.ones(1))
        groups = [dict(params=[weight()]), dict(params=[weight()], lr=0.01)]
        run = Run(run.args, run.out, run.model,
                  [torch.optim.SGD(groups, 0.1), torch.optim.AdamW([weight()], 0.2)],
                  metadata=run.metadata, steps_per_epoch=3, images_per_epoch=6,
                  processes=run.processes, signals=run.signals)
        rates = lambda: [float(group["lr"]) for o in run.optimizers for group in o.param_groups]
        return run, rates

    run, rates = make("first")
    run.set_lr(0.05)
    assert rates() == pytest.approx([0.05, 0.005, 0.1])
    run.save()
    again, rates = make("second")
    again.begin(files.load_checkpoint(tmp_path / "first/last.pt"))
    assert rates() == pytest.approx([0.05, 0.005, 0.1])
    again.set_lr(0.02)
    assert rates() == pytest.approx([0.02, 0.002, 0.04])
    kept = [group["lr"] for o in again.optimizers for group in o.param_groups]
    again.set_lr(0.01)
    if graphs:  # a captured step reads the same tensors
        assert [float(lr) for lr in kept] == rates() == pytest.approx([0.01, 0.001, 0.02])


def test_adam_is_told_of_cuda_graphs_in_a_resumed_run_too(tmp_path):
    capturable = lambda run: run.optimizers[1].param_groups[0]["capturable"]
    run, graphs = make_run(tmp_path), make_run(tmp_path / "graphs", cuda_graph=True)
    assert (capturable(run), capturable(graphs)) == (False, True)
    run.save()
    graphs.load(files.load_checkpoint(tmp_path / "last.pt"))
    assert capturable(graphs)


def test_short_epochs_are_not_each_saved(run, monkeypatch):
    """Ten seconds lie between saves, the last epoch is saved;
    best.pt is still that of the best epoch."""
    whole, now, scores = (
        run("--method", "independent", out="whole", epochs=5), [100.0], iter((1, 2, 9, 4, 3)))
    monkeypatch.setattr(Run, "SECONDS_BETWEEN_SAVES", 10)
    monkeypatch.setattr("support.run.time", SimpleNamespace(perf_counter=lambda: now[0]))
    written, end_epoch, saving, add = [], Run.end_epoch, Run.save, Run.add

    def add_in_time(self, *step):
        now[0] += 1  # three an epoch
        add(self, *step)

    def end(self, line, score):
        now[0] += 1  # 4, 8, 12: due, 16, 20: the last
        written.append(line["epoch"])
        end_epoch(self, line, next(scores))

    def save(self):
        written.append("saved")
        saving(self)

    monkeypatch.setattr(Run, "add", add_in_time)
    monkeypatch.setattr(Run, "end_epoch", end)
    monkeypatch.setattr(Run, "save", save)
    log = run("--method", "independent", epochs=5)
    assert written == [1, 2, 3, "saved", 4, 5, "saved"] and len(log) == 6
    for name, epoch in (("previous.pt", 3), ("last.pt", 5), ("best.pt", 3)):
        state = files.load_checkpoint(f"out/{name}")
        assert (state["epoch"] == epoch and state["best_epoch"] == 3
                and len(state["log"]) == epoch + 1)
    assert log[5]["loss"] == whole[5]["loss"]

    written.clear()
    scores = iter((1, 9, 4, 3, 2))
    run("--method", "independent", out="early", epochs=5)  # the best one is not due
    assert files.load_checkpoint("early/best.pt")["epoch"] == 2
    scores = iter((1, 2))
    two = run("--method", "independent", "--max-steps", 6, out="two", epochs=5)
    early, same = (files.load_checkpoint(f"{out}/{name}.pt")["model"]
                   for out, name in (("early", "best"), ("two", "last")))
    assert len(two) == 3 and bits(early) == bits(same)


def test_progress_is_one_line_on_a_terminal(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("support.run.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setenv("COLUMNS", "99")
    run, shown = make_run(tmp_path, max_steps=4), lambda: capsys.readouterr().err
    run.start_epoch()
    run.show_progress("loading", every=0)
    assert shown() == ""  # a pipe
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run.show_progress("loading", every=0)
    assert shown() == "\r\033[Kepoch 1/2  loading"
    for loss in (1.0, 2.0):
        run.add({"loss": torch.tensor(loss)}, images=2)
    now[0] += 2
    with run.evaluating():  # 4 images in 2 s; 4 are left of 2 steps
        assert shown() == ("\r\033[Kepoch 1/2  0:00:02 left  step 2/3  loss 1.500  "
                           "2 images/s  evaluation")
        now[0] += 0.9
        run.after_step()
        assert shown() == ""  # at most one a second
        now[0] += 50
    assert run.epoch_line()["seconds"] == 2.0  # less the evaluation


# ---------------------------------------------------------------- --max-steps

def test_max_steps_inside_an_epoch(run):
    """The epoch's line is in the log until --resume goes on; best.pt is of whole epochs;
    the end is that of a whole run."""
    run(out="whole")
    steps = lambda: [(line["epoch"], line["step"]) for line in read_log("out")[1:]]
    run("--max-steps", 2)
    assert steps() == [(1, 2)] and read_log("out")[1].keys() >= {
        "loss", "matching", "test_top1", "test_top5"}
    assert not Path("out/best.pt").exists() and files.load_checkpoint("out/last.pt")["step"] == 2
    assert Path("out/student_1_small.pt").exists() and Path("out/matching.png").exists()
    before = results("out")
    run("--max-steps", 2, "--resume")  # the same command again
    after = results("out")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"previous.pt"}

    run("--max-steps", 5, "--resume")
    assert steps() == [(1, 3), (2, 5)]
    best, last = (files.load_checkpoint(f"out/{name}.pt") for name in ("best", "last"))
    assert best["best_epoch"] == last["best_epoch"] == best["epoch"] == 1
    assert best["best"] == last["best"] == sum(read_log("out")[1]["test_top1"]) / 2
    run("--resume")
    assert_same("whole", "out")


def test_max_steps_at_the_end_of_an_epoch(run):
    log = run("--method", "independent", "--max-steps", 3)
    assert [(line["epoch"], line["step"]) for line in log[1:]] == [(1, 3)]
    assert files.load_checkpoint("out/best.pt")["epoch"] == 1


# ---------------------------------------------------------------- CUDA graphs, played on the CPU

def storages(tree):
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tree)
            if torch.is_tensor(t) and not t._is_zerotensor()}


class CPUGraph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph and torch.cuda.graph:
    records operations, replays them in place.

    As on CUDA recording leaves no trace (what was overwritten is put back) and replaying runs
    no Python; operations that make the host wait, or bring numbers from it, are refused.
    """

    WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
               "aten::lift_fresh", "aten::unique_dim", "aten::_unique2", "aten::is_nonzero"}

    def __init__(self):
        super().__init__()
        self.operations, self.overwritten, self.replays = [], {}, 0
        self.made, self.foreign = set(), set()  # storages that operations return; others used

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, kwargs = op._schema.name, kwargs or {}
        assert name not in self.WAITING, f"{name} makes the host wait"
        indices = args[1] if name == "aten::index" else ()
        assert not any(i is not None and i.dtype == torch.bool for i in indices), (
            "a mask makes the host wait")
        written = [a for a, formal in zip(args, op._schema.arguments, strict=False)
                   if formal.alias_info and formal.alias_info.is_write]
        written += args[3:5] if name == "aten::native_batch_norm" else []  # its schema lacks them
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
            for kept, new in zip(
                    tree_leaves(result), tree_leaves(op(*args, **kwargs)), strict=True):
                if torch.is_tensor(kept) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def play_graphs_on_the_cpu(monkeypatch):
    for name in ("Stream", "stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CPUGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(CUDAGraphs, "WARM_UP", 1)


LMCL = ["--meta-freq", "1", "--meta-steps", "1"]
BANK = ["--contrast", "bank", "--negatives", "16", "--batches", "pairs", "--epochs", "6",
        "--contrast-start", "3", "--soft-ramp", "3"]


@pytest.mark.parametrize("flags", [LMCL, ["--method", "afd"], [*LMCL, *BANK]],
                         ids=["lmcl", "afd", "bank"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs want a GPU"))])
def test_captured_steps_equal_plain_ones(flags, device, images, tmp_path, monkeypatch):
    """Ordinary and second steps, batches of two sizes, three learning rates: bit for bit
    on the CPU, where CPUGraph plays CUDA's graphs;
    it shows too that no operation waits for the host or uses memory that may be freed."""
    if device == "cpu":
        play_graphs_on_the_cpu(monkeypatch)
    else:  # lr is rounded to float32 in a captured step
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    captured, make_steps, states = [], train.make_steps, []
    monkeypatch.setattr(train, "make_steps",
                        lambda *args: captured.extend(make_steps(*args)) or captured[-2:])
    for graphs in ([], ["--cuda-graph"]):
        args = options.parse("", ["--arch", "small", "--image-size", "16", "--epochs", "3",
                                  "--lr", "0.01", "--batch-size", "26",
                                  "--out-dir", str(tmp_path / f"out{len(graphs)}"),
                                  *flags, *graphs])
        args.device, dataset = torch.device(device), data.load("folder", images, 16).to(device)
        method, out = train.build(args, dataset), OutDir(args.out_dir)
        out.open()
        run = Run(args, out, method, method.optimizers(), metadata=dataset.facts(),
                  steps_per_epoch=2, images_per_epoch=54, processes=Processes({}),
                  signals=SimpleNamespace(name=None))
        train.train(args, dataset, method, run)
        states.append(files.load_checkpoint(out / "last.pt"))
        del states[-1]["optimizers"]
    if device == "cuda":
        plain, replayed = ([line["loss"] for line in state["log"][1:]] for state in states)
        assert replayed == pytest.approx(plain, rel=1e-3)
        return
    assert bits(states[0]) == bits(states[1])
    kept = storages([method.state_dict(), list(method.buffers()), run.lr,
                     [o.state_dict() for o in run.optimizers]])
    functions, own = [dataset.take, *captured[2:]], storages(dataset.__dict__)
    assert all(isinstance(f, CUDAGraphs) for f in functions)
    for function in functions:
        # before contrast, with it
        phases = 2 if function is captured[-2] and "bank" in flags else 1
        assert len(function.graphs) == 2 * phases  # 28 and 26 images
        for inputs, graph, _ in function.graphs.values():
            assert graph.replays >= 2
            assert graph.foreign <= kept | storages(inputs) | own


def test_dropout_keeps_the_meta_step_eager(tmp_path, monkeypatch, capsys):
    """Its masks are drawn again in each pass, which a graph cannot;
    the ordinary step is captured."""
    play_graphs_on_the_cpu(monkeypatch)
    monkeypatch.setattr(Small, "tail", lambda self: torch.nn.Dropout2d(0.5))
    for name, eager in (("lmcl", True), ("afd", False)):
        args = options.parse("", ["--arch", "small", "--image-size", "16", "--cuda-graph",
                                  "--method", name])
        args.device = torch.device("cpu")
        method = train.build(args, SimpleNamespace(classes=range(6), train_labels=None, notes=[]))
        steps = train.make_steps(args, None, method, make_run(tmp_path / name))
        assert isinstance(steps[0], CUDAGraphs) and isinstance(steps[1], CUDAGraphs) != eager
        assert ("dropout masks again in the meta step: it stays as it is"
                in capsys.readouterr().out) == eager


def test_errors_of_a_capture(monkeypatch, capsys):
    """What cannot be captured stays eager, with one warning;
    an error of the program is raised as it is."""
    play_graphs_on_the_cpu(monkeypatch)
    message, capturing = "operation not permitted when stream is capturing", []

    def augment(x):
        if capturing:
            capturing.pop()
            raise RuntimeError(message)
        return 2 * x

    graphs = CUDAGraphs(augment)
    graphs(torch.ones(1))
    capturing.append(1)
    for x in (torch.ones(1), torch.ones(1), torch.ones(2)):
        assert torch.equal(graphs(x), 2 * x)
    error = capsys.readouterr().err
    assert error == (f"warning    --cuda-graph cannot capture augment ({message}): "
                     "it stays as it is\n")
    message = "a defect"
    graphs = CUDAGraphs(augment)
    graphs(torch.ones(1))
    capturing.append(1)
    with pytest.raises(RuntimeError, match="a defect"):
        graphs(torch.ones(1))


def test_dropout_of_any_kind_is_seen():
    x = torch.ones(2, 3)
    for function, random_ in ((torch.relu, False), (torch.nn.functional.dropout, True),
                              (torch.nn.Dropout(0.5), True), (torch.nn.Dropout(0.5).eval(), False)):
        before = torch.get_rng_state()
        assert draws_random_numbers(lambda: function(x), torch.device("cpu")) == random_
        assert torch.equal(torch.get_rng_state(), before)
