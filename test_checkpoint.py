"""checkpoint.py alone, runs that are killed and resumed, and the bad input that test_train.py does not have.

    pytest test_checkpoint.py        # with three kills
    python test_checkpoint.py        # the whole fault campaign: 30 kills, some minutes, one line with the numbers
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
from PIL import Image

import checkpoint
import train
from test_train import images, run  # noqa: F401 (fixtures)

HERE = Path(__file__).parent
TIMES = ("seconds", "images_per_second")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FLAGS = ["--dataset", "folder", "--image-size", "16", "--arch", "resnet8", "--batch-size", "18", "--meta-freq", "2",
         "--device", "cpu", "--resume", "--save-every", "0.00001"]


def bits(x):
    """x, less the times in it, with every tensor as type, shape, strides and bytes: == is then bit for bit."""
    if torch.is_tensor(x):
        return x.dtype, x.shape, x.stride(), x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(x, dict):
        return {k: bits(v) for k, v in x.items() if k not in TIMES}
    if isinstance(x, (list, tuple)):
        return type(x), [bits(v) for v in x]
    return type(x), x.hex() if isinstance(x, float) else x


def leftover(out):
    """Every file of an --out-dir by name, such that equal runs have equal ones."""
    return {p.name: bits(torch.load(p, weights_only=True)) if p.suffix == ".pt"
            else bits([json.loads(line) for line in p.read_text().splitlines()]) if p.suffix == ".jsonl"
            else p.read_bytes() for p in Path(out).iterdir()}


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
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- checkpoints

@pytest.fixture
def example():
    """Values of every kind that train.py saves, and the floats that are easily lost."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, 0.9, nesterov=True), torch.optim.Adam(net.parameters())]
    net(torch.randn(2, 3, 5, 5)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return dict(format=1, net=net.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                mean=(0.1, 1 / 3, 1e-300),
                args={"lr": 0.1, "arch": ["resnet8", "wrn_10_1"], "out_dir": "naïve/ö", "max_steps": None},
                best=-1.0, seed=2 ** 63 - 1, odd=torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
                sums={"names": ["loss"], "values": torch.rand(1)}, healthy=torch.tensor(3), matching=0,
                log=[{"classes": ["a", "b"]}, {"epoch": 1, "test_top1": [16.67, 33.33]}])


def test_what_is_loaded_is_what_was_saved_bit_for_bit(example, tmp_path):
    checkpoint.save(tmp_path / "x.pt", example)
    assert bits(checkpoint.load(tmp_path / "x.pt")) == bits(example)


def test_damaged_checkpoints_are_refused(example, tmp_path):
    checkpoint.save(tmp_path / "x.pt", example)
    seen = [what for what, content in damages((tmp_path / "x.pt").read_bytes())
            if assert_refused(tmp_path / "y.pt", content) is None]
    assert seen == ["truncation"] * 50 + ["flip"] * 50


@pytest.mark.parametrize("content", [b"", b"\x80", b".", b"N.", b"PK\x03\x04", b"junk" * 99], ids=repr)
def test_foreign_files_are_refused_even_with_a_right_digest(content, tmp_path):
    assert_refused(tmp_path / "x.pt", content)
    assert_refused(tmp_path / "x.pt", content + hashlib.sha256(content).digest())


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    zipped = io.BytesIO()
    torch.save({"format": 1, "net": Bomb()}, zipped)
    for content in (zipped.getvalue(), pickle.dumps(Bomb(), protocol=2)):
        assert_refused(tmp_path / "x.pt", content + hashlib.sha256(content).digest())
        assert not (tmp_path / "exploded").exists()
    torch.load(io.BytesIO(zipped.getvalue()), weights_only=False)
    assert (tmp_path / "exploded").exists()                               # the bomb was a live one


# ---------------------------------------------------------------- writing

def test_the_previous_file_is_kept(tmp_path):
    last, previous = tmp_path / "last", tmp_path / "previous"
    for content in (b"one", b"two", b"three"):
        checkpoint.write(last, content, keep=previous)
    checkpoint.write(tmp_path / "log", b"1")
    checkpoint.write(tmp_path / "log", b"2")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"last": b"three", "previous": b"two", "log": b"2"}


def test_a_reader_at_any_moment_finds_a_whole_file(tmp_path, monkeypatch):
    last, previous, seen = tmp_path / "last", tmp_path / "previous", []
    checkpoint.write(last, b"old")
    for name in ("fsync", "replace"):
        def looking(*args, call=getattr(os, name), name=name):
            look = lambda: seen.append((name, *(p.read_bytes() if p.exists() else None for p in (last, previous))))
            look()
            call(*args)
            look()

        monkeypatch.setattr(os, name, looking)
    checkpoint.write(last, b"new" * 99, keep=previous)
    assert seen == [("fsync", b"old", None)] * 2 + [("replace", b"old", None), ("replace", None, b"old")] \
        + [("replace", None, b"old"), ("replace", b"new" * 99, b"old")]


@pytest.mark.parametrize("where, fails_at, keep", [
    *((where, 1, keep) for where in ("open", "write", "fsync", "replace") for keep in (None, "previous")),
    ("replace", 2, "previous")])                                          # without keep= there is one rename only
def test_a_failure_to_write_leaves_what_was_there(where, fails_at, keep, tmp_path, monkeypatch):
    last, content, calls = tmp_path / "last", b"new" * 99_999, itertools.count(1)
    keep = keep and tmp_path / keep
    for old in (b"older", b"old"):
        checkpoint.write(last, old, keep)

    def failing(true):
        def call(*args):
            if next(calls) == fails_at:
                raise OSError(28, "No space left on device")
            return true(*args)
        return call

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched, pytest.raises(checkpoint.CheckpointError) as error:
        if where == "open":
            patched.setattr(checkpoint, "open", failing(open), raising=False)
        elif where != "write":
            patched.setattr(os, where, failing(getattr(os, where)))
        try:
            if where == "write":                                          # the system itself stops it half-way
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            checkpoint.write(last, content, keep)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(last) in str(error.value) and "0.3 MiB" in str(error.value) and "\n" not in str(error.value)
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    if fails_at == 2:
        assert b"old" in left.values() and set(left) <= {"last", "previous"}   # under keep: --resume takes either
    else:
        assert left.pop("last") == b"old" and left in ({}, {"previous": b"older"})


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.CheckpointError, match="Not a directory"):
        checkpoint.write(tmp_path / "file" / "x", b"1")

    def read_only(*args, **settings):                                     # also what unlink says on such a file system
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint, "open", read_only, raising=False)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(checkpoint.CheckpointError, match="Read-only file system.*--out-dir"):
        checkpoint.write(tmp_path / "x", b"1")


# ---------------------------------------------------------------- signals

def test_signals_are_noted_and_handlers_come_back():
    first = {s: signal.signal(s, lambda *_, s=s: None) for s in SIGNALS}
    try:
        mine = [signal.getsignal(s) for s in SIGNALS]
        for number in (None, *SIGNALS):
            with pytest.raises(KeyError), checkpoint.Signals() as signals:
                assert signals.name is None
                if number:
                    os.kill(os.getpid(), number)
                    assert signals.name == number.name
                raise KeyError                                            # however the block ends
            assert [signal.getsignal(s) for s in SIGNALS] == mine
    finally:
        for s, handler in first.items():
            signal.signal(s, handler)


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT),
                                           (signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1)])
def test_the_second_signal_ends_the_process_at_once(first, second):
    program = ("import sys, time, types; sys.modules['torch'] = types.ModuleType('torch'); import checkpoint\n"
               "with checkpoint.Signals() as signals:\n"
               "    print('ready', flush=True)\n"
               "    while not signals.name: time.sleep(0.01)\n"
               "    print(signals.name, flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(first)
            assert process.stdout.readline() == f"{first.name}\n" and process.poll() is None
            process.send_signal(second)
            assert process.wait(10) == -second
        finally:
            process.kill()


# ---------------------------------------------------------------- the fault campaign

def draw_images(root):
    """6 classes, 9 training and 3 test images each, 16x16."""
    draw = torch.Generator().manual_seed(0)
    for i, c in itertools.product(range(12), range(6)):
        path = root / ("train" if i < 9 else "test") / f"class{c}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 128, (16, 16, 3), generator=draw, dtype=torch.uint8) + 20 * c
        Image.fromarray(pixels.numpy()).save(path)


def start(folder, flags, dies_at=None):
    """train.py in a process of its own, in `folder`; dies_at: (name, n), to die by SIGKILL at the n-th os.name()."""
    folder.mkdir(exist_ok=True)
    child = os.fork()                                                     # quicker than python train.py: torch is there
    if child:
        return child
    status = 99
    try:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout = sys.stderr = open(output, "w")
        if dies_at:
            name, n = dies_at
            true, calls = getattr(os, name), itertools.count(1)
            setattr(os, name, lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == n else true(*a))
        train.main(flags)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def unfinished_files(out):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in out.glob("*.tmp")}


def ended(child, folder, wait=0):
    """Waits so long for the process: True if it has finished, False if it runs, None if it was killed by SIGKILL."""
    status = os.waitpid(child, wait)
    if status[0] == 0:
        return False
    if os.WIFSIGNALED(status[1]) and os.WTERMSIG(status[1]) == signal.SIGKILL:
        return None
    if status[1]:
        sys.exit(f"train.py failed:\n{(folder / 'output.txt').read_text()}")
    return True


def attempt(folder, flags, how, draw, span):
    """Start or resume the run and kill -9 it. True if it finished before that, None if it was killed.

    moment: after a random time.  watched: after a random time, when a file is next seen being written.
    call: it dies at a random fsync or rename, the one between last.pt's two renames included.
    """
    before, began, delay = unfinished_files(folder / "out"), time.monotonic(), draw.uniform(0, span)
    if how == "call":
        return ended(start(folder, flags, (draw.choice(["fsync", "replace", "replace"]), draw.randint(1, 12))), folder)
    child = start(folder, flags)
    while (end := ended(child, folder, os.WNOHANG)) is False:
        if time.monotonic() - began > delay:
            try:
                if how == "moment" or unfinished_files(folder / "out").items() - before.items():
                    os.kill(child, signal.SIGKILL)
                    return ended(child, folder)
            except FileNotFoundError:                                     # renamed while it was being looked at
                pass
        time.sleep(0.0005)
    return end


def campaign(kills, epochs, folder, seed=0):
    """Kill and resume real runs until there were so many kills; compare each run's end with an uninterrupted one's."""
    torch.set_num_threads(1)
    draw, began, killed, inside, runs, equal = random.Random(seed), time.monotonic(), 0, 0, 0, True
    draw_images(folder / "images")
    flags = [*FLAGS, "--epochs", str(epochs), "--data-dir", str(folder / "images"), "--out-dir", "out"]
    assert ended(start(folder / "whole", flags), folder / "whole")
    span, whole = (time.monotonic() - began) / 3, leftover(folder / "whole" / "out")
    hows = itertools.cycle(["call", "watched", "moment"])
    while killed < kills:
        parts, end, runs = folder / f"parts{runs}", None, runs + 1
        while not end:
            before = unfinished_files(parts / "out")
            end = attempt(parts, flags, next(hows), draw, span) if killed < kills else ended(start(parts, flags), parts)
            if not end:
                killed += 1
                inside += bool(unfinished_files(parts / "out").items() - before.items())
        found = leftover(parts / "out")
        for name in sorted(whole.keys() | found.keys()):
            if whole.get(name) != found.get(name):
                equal = False
                print(f"run {runs}: {name} " + ("differs" if name in whole and name in found else "is in one only"))
        shutil.rmtree(parts)

    tried = {"truncation": 0, "flip": 0}
    for what, content in damages((folder / "whole" / "out" / "last.pt").read_bytes()):
        assert_refused(folder / "damaged.pt", content)
        tried[what] += 1
    steps = 3 * epochs
    print(f"{killed} kills ({inside} inside writing) in {runs} runs of {steps} steps, each resumed to its end: "
          f"equal to the uninterrupted run: {'yes' if equal else 'NO'}; "
          f"{tried['truncation']} truncations and {tried['flip']} bit flips, all refused; "
          f"{time.monotonic() - began:.0f} s")
    return equal


def test_killed_and_resumed_runs_end_as_uninterrupted_ones():
    done = subprocess.run([sys.executable, __file__, "--kills", "3", "--epochs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, inside = map(int, re.match(r"(\d+) kills \((\d+) inside writing\).*: yes; 50 tr", done.stdout).groups())
    assert kills == 3 and inside >= 1


class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches SIGKILL."""


def test_killed_before_each_rename(run, monkeypatch, capsys):  # noqa: F811
    """Of log, best, last, in a second epoch also of last to previous: resumed, all files are those of a whole run."""
    flags = ["--method", "independent", "--num-nets", 1, "--resume"]
    run(*flags)
    whole, replace, left = leftover("out"), os.replace, []
    for n in range(1, 9):
        shutil.rmtree("out")
        calls = itertools.count(1)

        def dying(*args):
            if next(calls) == n:
                raise Killed
            replace(*args)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(os, "replace", dying)
            run(*flags)
        left.append({p.name for p in Path("out").glob("[lp]*.pt")})
        capsys.readouterr()
        run(*flags)
        assert ("starting afresh" in capsys.readouterr().out) == (not left[-1])
        assert leftover("out") == whole, f"rename {n}"
    assert left[3] == {"last.pt"} and left[-1] == {"last.pt", "previous.pt"}
    assert {"previous.pt"} in left                                        # between the two renames


# ---------------------------------------------------------------- what users do wrong

@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):  # noqa: F811
    """A run's --out-dir: 2 epochs."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train.main([*FLAGS, "--data-dir", str(images), "--epochs", "2", "--out-dir", str(out)])
    return out


@pytest.fixture
def fails(run, capsys):  # noqa: F811
    """Run train.py, which is to end within 10 s by exit status 1 and one line with all these words."""
    def fails(flags, *words):
        before, began = set(Path().rglob("*")), time.monotonic()
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(*flags)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 1 and len(lines) == 1 and lines[0].startswith("train.py: error: "), lines
        assert [w for w in words if w not in lines[0]] == [], lines
        assert time.monotonic() - began < 10 and set(Path().rglob("*")) - before <= {Path("out")}

    return fails


def spread(folder, pattern, change):
    for path in sorted(folder.glob(pattern)):
        change(path)


@pytest.mark.parametrize("spoil, words", [
    (lambda d: shutil.rmtree(d), ["--data-dir spoilt", "expected spoilt/train/CLASS/*"]),
    (lambda d: spread(d, "*", shutil.rmtree), ["--data-dir spoilt", "expected spoilt/train/CLASS/*"]),
    (lambda d: shutil.rmtree(d / "test"), ["--data-dir spoilt", "spoilt/test or val", "expected"]),
    (lambda d: shutil.rmtree(d) or d.write_text("a file"), ["--data-dir spoilt", "expected"]),
    (lambda d: spread(d, "train/*", shutil.rmtree), ["spoilt/train has no class folders", "expected spoilt/train"]),
    (lambda d: spread(d, "*/*", shutil.rmtree), ["spoilt/train has no class folders", "expected"]),
    (lambda d: spread(d, "*/class[1-5]", shutil.rmtree), ["spoilt/train has one class only", "at least two"]),
    (lambda d: spread(d, "train/class1/*", Path.unlink), ["spoilt/train: no image", "class1", ".png"]),
    (lambda d: spread(d, "*/*/*", Path.unlink), ["spoilt/train: no image", "class0", ".png"]),
    (lambda d: spread(d, "*/*/*", lambda p: p.rename(p.with_suffix(".txt"))),
     ["spoilt/train: no image", "looked for .jpg"]),
    (lambda d: shutil.rmtree(d / "test/class4"), ["--data-dir spoilt", "only in spoilt/train: class4"]),
    (lambda d: shutil.rmtree(d / "train/class4"), ["--data-dir spoilt", "only in spoilt/test: class4"]),
    (lambda d: (d / "train/class3/5.png").write_text("no image"), ["spoilt/train/class3/5.png", "mend or remove"]),
    (lambda d: (d / "test/class3/2.png").write_bytes(b""), ["spoilt/test/class3/2.png", "mend or remove"]),
    (lambda d: os.truncate(d / "train/class0/0.png", 300), ["spoilt/train/class0/0.png", "mend or remove"]),
    (lambda d: (d / "train/class0/0.png").unlink() or (d / "train/class0/0.png").symlink_to("gone"),
     ["spoilt/train/class0/0.png", "mend or remove"]),
], ids=lambda x: x[0].replace("/", "_") if isinstance(x, list) else "")
def test_bad_data_sets(spoil, words, fails, images):  # noqa: F811
    shutil.copytree(images, "spoilt")
    spoil(Path("spoilt"))
    fails(["--data-dir", "spoilt"], *words)


def test_out_dirs_that_cannot_be_written(fails, tmp_path):
    Path("file").write_text("")
    fails(["--out-dir", "file"], "--out-dir file", "give another")
    fails(["--out-dir", "file/x"], "--out-dir file/x", "give another")
    fails(["--out-dir", "x" * 300], "--out-dir xxx", "give another")
    fails(["--out-dir", "/proc/nowhere"], "--out-dir /proc/nowhere", "give another")
    if os.geteuid():
        Path("locked").mkdir(mode=0o500)
        fails(["--out-dir", "locked"], "locked/log.jsonl", "give another --out-dir")
        fails(["--out-dir", "locked/x"], "--out-dir locked/x", "give another")
        Path("closed").mkdir(mode=0o000)
        fails(["--out-dir", "closed/x"], "--out-dir closed/x", "give another")
    else:                                                                 # root may write where it is forbidden
        fails(["--out-dir", "/proc"], "/proc/log.jsonl", "give another --out-dir")


def test_out_dirs_of_another_run(fails, finished):
    shutil.copytree(finished, "used")
    before = leftover("used")
    fails(["--out-dir", "used", "--arch", "resnet20"], "--out-dir used", "--resume", "another --out-dir")
    fails(["--out-dir", "used", "--arch", "resnet8", "resnet20", "--resume"], "used/last.pt",
          "--arch resnet8 resnet8 (now resnet8 resnet20)", "another --out-dir")
    fails(["--out-dir", "used", "--num-nets", "3", "--method", "mcl", "--resume"],
          "--num-nets 2 (now 3)", "--method lmcl (now mcl)")
    assert leftover("used") == before


def test_a_damaged_checkpoint_with_none_before_it(fails, finished):
    Path("out").mkdir()
    Path("out/last.pt").write_bytes((finished / "last.pt").read_bytes()[:-1])
    fails(["--resume"], "out/last.pt is damaged", "another --out-dir")
    Path("out/last.pt").unlink()
    Path("out/last.pt").mkdir()
    fails(["--resume"], "out/last.pt", "Is a directory", "another --out-dir")


@pytest.mark.parametrize("device", ["meta", "cuda:7", "cuda:x", "cpu,cuda", ""])
def test_devices_that_are_not_there(device, fails):
    if device == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("it is there")
    fails(["--device", device], f"--device {device}", "--device cpu")


def test_more_pixels_than_memory(fails):
    fails(["--image-size", "10000000"], "out of memory", "smaller", "--image-size")


def test_control_c_before_training_begins(run, monkeypatch, capsys):  # noqa: F811
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.data, "load", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:           # the latter would end pytest too
        run()
    assert end.type is SystemExit and end.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_data_sets_and_files_that_do_not_go_with_evaluation(fails, finished, images):  # noqa: F811
    shutil.copytree(images, "other")
    for split in ("train", "test"):
        Path("other", split, "class0").rename(Path("other", split, "cat"))
    last = str(finished / "last.pt")
    fails(["--evaluate", last, "--data-dir", "other"], f"{last} was trained on other classes", "--data-dir other")
    fails(["--evaluate", last, "--data-dir", "gone"], "--data-dir gone", "expected")
    fails(["--evaluate", last, "--dataset", "cifar10", "--data-dir", "gone"], "--dataset cifar10", "--dataset folder")
    for name in ("student_1_resnet8.pt", "log.jsonl"):
        fails(["--evaluate", str(finished / name)], str(finished / name), "no checkpoint of this program")
    fails(["--evaluate", str(finished)], str(finished), "Is a directory")


def test_images_of_every_kind_train(run, images):  # noqa: F811
    shutil.copytree(images, "mixed")
    kinds = ("L", "jpg"), ("P", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("1", "png"), ("I", "tiff")
    for c, (mode, ending) in enumerate(kinds):
        for path in sorted(Path("mixed").glob(f"*/class{c}/*")):
            with Image.open(path) as image:
                other = image.convert("L").convert(mode) if mode == "I" else image.convert(mode)
            path.unlink()
            several = dict(save_all=True, append_images=[other] * 2) if mode == "RGBA" else {}     # animated
            other.save(path.with_suffix(f".{ending}"), **several)
    assert Image.open("mixed/train/class3/0.png").n_frames == 3
    log = run("--data-dir", "mixed", epochs=1)
    assert log[1]["step"] == 3 and log[1]["loss"] < 100 and len(log[1]["test_top1"]) == 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=campaign.__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(0 if campaign(options.kills, options.epochs, Path(temporary)) else 1)
