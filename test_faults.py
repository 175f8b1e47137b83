"""Runs that are killed and resumed, in processes of their own.

    pytest test_faults.py        # three kills
    python test_faults.py        # the whole fault campaign: 30 kills, a minute, one line with the numbers
"""

import argparse
import itertools
import os
import random
import re
import shutil
import signal
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

FLAGS = ["--dataset", "folder", "--image-size", "16", "--arch", "small", "--batch-size", "18", "--meta-freq", "3",
         "--device", "cpu", "--resume", "--save-every", "0.00001", "--out-dir", "out"]


def start(folder, flags, dies_at=None, unread=False, output="output.txt"):
    """train.py in a process of its own, in `folder`; dies_at: (name, n), to die by SIGKILL at the n-th os.name().

    unread: standard output is a pipe whose reader has gone.
    """
    folder.mkdir(exist_ok=True)
    child = os.fork()                                                     # quicker than python train.py: torch is there
    if child:
        return child
    status = 99
    try:
        os.chdir(folder)
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        reader, pipe = os.pipe()
        os.close(reader)
        os.dup2(pipe if unread else 2, 1)
        torch.set_num_threads(1)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
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
        os._exit(status)


def files(out, pattern):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in out.glob(pattern)}


def second_start(child, folder, flags):
    """Another start in the same --out-dir, while the first stands still, is refused and changes nothing.

    False if the first has not locked the folder yet, or has ended.
    """
    os.kill(child, signal.SIGSTOP)
    stopped = os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code == os.CLD_STOPPED
    lock, tried = folder / "out" / ".lock", False
    if stopped and lock.exists() and lock.read_text() == f"{child}\n":
        before, other = files(folder / "out", "*"), start(folder, flags, output="second.txt")
        status, text = os.waitpid(other, 0)[1], (folder / "second.txt").read_text()
        assert os.waitstatus_to_exitcode(status) == 1 and f"in use by process {child}: " in text, text
        assert files(folder / "out", "*") == before
        tried = True
    os.kill(child, signal.SIGCONT)
    return tried


def ended(child, folder, wait=0):
    """Waits so long for the process: True if it has finished, False if it runs, None if a signal ended it."""
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
    second: after a second start.         hangup: SIGHUP after a random time, as where a terminal and its reader go.
    call: it dies at a random fsync, link or rename.
    """
    before, began, delay = files(folder / "out", "*.tmp"), time.monotonic(), draw.uniform(0, span)
    if how == "call":
        return ended(start(folder, flags, (draw.choice(["fsync", "replace", "link"]), draw.randint(1, 12))), folder)
    child = start(folder, flags, unread=how in ("watched", "hangup"))
    while (end := ended(child, folder, os.WNOHANG)) is False:
        if time.monotonic() - began > delay:
            try:
                if {"watched": lambda: files(folder / "out", "*.tmp").items() - before.items(),
                    "second": lambda: second_start(child, folder, flags)}.get(how, lambda: True)():
                    os.kill(child, signal.SIGHUP if how == "hangup" else signal.SIGKILL)
                    return ended(child, folder)
            except FileNotFoundError:                                     # renamed while it was being looked at
                pass
        time.sleep(0.0005)
    return end


def campaign(kills, epochs, folder, seed=0):
    """Stop and resume real runs until there were so many stops; compare each run's end with an uninterrupted one's."""
    draw, began, killed, inside, refused, runs, equal = random.Random(seed), time.monotonic(), 0, 0, 0, 0, True
    draw_images(folder / "images")
    flags = [*FLAGS, "--epochs", str(epochs), "--data-dir", str(folder / "images")]
    assert ended(start(folder / "whole", flags), folder / "whole")
    span, whole = (time.monotonic() - began) / 3, results(folder / "whole" / "out")
    hows = itertools.cycle(["second", "call", "watched", "moment", "hangup"])
    while killed < kills:
        parts, end, runs = folder / f"parts{runs}", None, runs + 1
        while not end:
            before, how = files(parts / "out", "*.tmp"), next(hows)
            end = attempt(parts, flags, how, draw, span) if killed < kills else ended(start(parts, flags), parts)
            if not end:
                killed, refused = killed + 1, refused + (how == "second")
                inside += bool(files(parts / "out", "*.tmp").items() - before.items())
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
          f"equal to the uninterrupted run: {'yes' if equal else 'NO'}; {refused} second starts refused; "
          f"{tried['truncation']} truncations and {tried['flip']} bit flips, all refused; "
          f"{time.monotonic() - began:.0f} s")
    return equal


def test_killed_and_resumed_runs_end_as_uninterrupted_ones(tmp_path, capsys):
    assert campaign(3, 2, tmp_path)
    assert re.match(r"3 stops \(\d+ inside writing\).*: yes; 1 second starts refused; 50 tr", capsys.readouterr().out)


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
            for name, true in (("replace", os.replace), ("link", os.link)):
                def dying(*args, true=true, calls=calls, n=n):
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
