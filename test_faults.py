"""Runs that are killed and resumed, in processes of their own.

    pytest test_faults.py        # three kills
    python test_faults.py        # the whole fault campaign: 30 kills, some minutes, one line with the numbers
"""

import argparse
import itertools
import os
import random
import re
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

import train
from conftest import draw_images, results
from test_experiment import assert_refused, damages

FLAGS = ["--dataset", "folder", "--image-size", "16", "--arch", "resnet8", "--batch-size", "18", "--meta-freq", "2",
         "--device", "cpu", "--resume", "--save-every", "0.00001", "--out-dir", "out"]


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
    """Waits so long for the process: True if it has finished, False if it runs, None if it was killed by SIGKILL or SIGHUP."""
    status = os.waitpid(child, wait)
    if status[0] == 0:
        return False
    if os.WIFSIGNALED(status[1]) and os.WTERMSIG(status[1]) in (signal.SIGKILL, signal.SIGHUP):
        return None
    text = (folder / "output.txt").read_text()
    if status[1] and "SIGHUP: saved" in text:
        return None
    if status[1]:
        sys.exit(f"train.py failed:\n{text}")
    return True


def attempt(folder, flags, how, draw, span):
    """Start or resume the run and stop it. True if it finished before that, None if it was stopped.

    moment: SIGKILL after a random time.  watched: after a random time, when a file is next seen being written.
    hangup: SIGHUP after a random time.   call: it dies at a random fsync, link or rename.
    """
    before, began, delay = unfinished_files(folder / "out"), time.monotonic(), draw.uniform(0, span)
    if how == "call":
        return ended(start(folder, flags, (draw.choice(["fsync", "replace", "link"]), draw.randint(1, 12))), folder)
    child = start(folder, flags)
    while (end := ended(child, folder, os.WNOHANG)) is False:
        if time.monotonic() - began > delay:
            try:
                if how != "watched" or unfinished_files(folder / "out").items() - before.items():
                    os.kill(child, signal.SIGHUP if how == "hangup" else signal.SIGKILL)
                    return ended(child, folder)
            except FileNotFoundError:                                     # renamed while it was being looked at
                pass
        time.sleep(0.0005)
    return end


def campaign(kills, epochs, folder, seed=0):
    """Stop and resume real runs until there were so many stops; compare each run's end with an uninterrupted one's."""
    torch.set_num_threads(1)
    draw, began, killed, inside, runs, equal = random.Random(seed), time.monotonic(), 0, 0, 0, True
    draw_images(folder / "images")
    flags = [*FLAGS, "--epochs", str(epochs), "--data-dir", str(folder / "images")]
    assert ended(start(folder / "whole", flags), folder / "whole")
    span, whole = (time.monotonic() - began) / 3, results(folder / "whole" / "out")
    hows = itertools.cycle(["call", "watched", "moment", "hangup"])
    while killed < kills:
        parts, end, runs = folder / f"parts{runs}", None, runs + 1
        while not end:
            before = unfinished_files(parts / "out")
            end = attempt(parts, flags, next(hows), draw, span) if killed < kills else ended(start(parts, flags), parts)
            if not end:
                killed += 1
                inside += bool(unfinished_files(parts / "out").items() - before.items())
        found = results(parts / "out")
        for name in sorted(whole.keys() | found.keys()):
            if whole.get(name) != found.get(name):
                equal = False
                print(f"run {runs}: {name} " + ("differs" if name in whole and name in found else "is in one only"))
        shutil.rmtree(parts)

    tried = {"truncation": 0, "flip": 0}
    for what, content in damages((folder / "whole" / "out" / "last.pt").read_bytes()):
        assert_refused(folder / "damaged.pt", content)
        tried[what] += 1
    print(f"{killed} stops ({inside} inside writing) in {runs} runs of {3 * epochs} steps, each resumed to its end: "
          f"equal to the uninterrupted run: {'yes' if equal else 'NO'}; "
          f"{tried['truncation']} truncations and {tried['flip']} bit flips, all refused; "
          f"{time.monotonic() - began:.0f} s")
    return equal


def test_killed_and_resumed_runs_end_as_uninterrupted_ones():
    done = subprocess.run([sys.executable, __file__, "--kills", "3", "--epochs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"3 stops \(\d+ inside writing\).*: yes; 50 tr", done.stdout)


class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches SIGKILL."""


def test_killed_before_each_rename_and_link(run, monkeypatch, capsys):
    """Of log, best, last, in a second epoch also of previous: resumed, all files are those of a whole run."""
    flags = ["--method", "independent", "--num-nets", 1, "--resume"]
    run(*flags)
    whole, left = results("out"), []
    for n in range(1, 10):
        shutil.rmtree("out")
        calls = itertools.count(1)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            for name in ("replace", "link"):
                def dying(*args, true=getattr(os, name), calls=calls, n=n):
                    if next(calls) == n:
                        raise Killed
                    true(*args)

                patched.setattr(os, name, dying)
            run(*flags)
        left.append({p.name for p in Path("out").glob("[lp]*.pt")})
        capsys.readouterr()
        run(*flags)
        assert ("starting afresh" in capsys.readouterr().out) == (not left[-1])
        assert results("out") == whole, f"rename {n}"
    assert left[3] == {"last.pt"} and left[-1] == {"last.pt", "previous.pt"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=campaign.__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(0 if campaign(options.kills, options.epochs, Path(temporary)) else 1)
