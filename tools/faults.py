"""Stop real runs at random moments, resume each to its end,
and compare it with an uninterrupted run.

    python tools/faults.py kill         # one process: SIGKILL, SIGHUP, second starts
    python tools/faults.py torchrun     # two processes: SIGTERM to torchrun, SIGKILL to one of them

Prints what was done and whether all files were equal, bit for bit; status 1 if not.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import train
from conftest import draw_images, results
from support.arguments import Parser, at_least_1
from support.console import UserError
from support.files import load_checkpoint

ROOT = Path(__file__).parents[1]
FLAGS = ["--dataset", "folder", "--image-size", "16", "--batch-size", "18", "--meta-freq", "3",
         "--device", "cpu", "--resume", "--save-every", "0.00001", "--out-dir", "out"]


# ---------------------------------------------------------------- one process

def start(folder, flags, dies_at=None, unread=False, output="output.txt"):
    """train.py in a process of its own, in `folder`. Returns its number.

    dies_at: (name, n), to die by SIGKILL at the n-th os.name().
    unread: standard output is a pipe whose reader has gone.
    """
    folder.mkdir(exist_ok=True)
    child = os.fork()  # quicker than python train.py: torch is there
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
            true, calls, die = getattr(os, name), itertools.count(1), signal.SIGKILL
            setattr(
                os, name, lambda *a: os.kill(os.getpid(), die) if next(calls) == n else true(*a))
        train.main(flags)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def stats(out, pattern):
    """What tells whether a file was touched, by name."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size)
            for p in out.glob(pattern)}


def second_start(child, folder, flags):
    """Another start in the same --out-dir, while the first stands still,
    is refused and changes nothing.

    False if the first has not locked the folder yet, or has ended.
    """
    os.kill(child, signal.SIGSTOP)
    try:
        state = os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code
        lock = folder / "out" / ".lock"
        if state != os.CLD_STOPPED or not lock.exists() or lock.read_text() != f"{child}\n":
            return False
        before, other = stats(folder / "out", "*"), start(folder, flags, output="second.txt")
        status, text = os.waitpid(other, 0)[1], (folder / "second.txt").read_text()
        assert (os.waitstatus_to_exitcode(status) == 1
                and f"in use by process {child}: " in text), text
        assert stats(folder / "out", "*") == before
        return True
    finally:
        os.kill(child, signal.SIGCONT)


def ended(child, folder, wait=0):
    """Waits so long for the process: True if it has finished, False if it runs,
    None if a signal ended it."""
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

    moment   SIGKILL after a random time
    watched  after a random time, when a file is next seen being written
    second   after a second start
    hangup   SIGHUP after a random time, as where a terminal and its reader go
    call     it dies at a random fsync, link or rename
    """
    before, began, delay = stats(folder / "out", "*.tmp"), time.monotonic(), draw.uniform(0, span)
    if how == "call":
        place = draw.choice(["fsync", "replace", "link"]), draw.randint(1, 12)
        return ended(start(folder, flags, place), folder)
    child = start(folder, flags, unread=how in ("watched", "hangup"))
    while (end := ended(child, folder, os.WNOHANG)) is False:
        if time.monotonic() - began > delay:
            try:
                if {"watched": lambda: stats(folder / "out", "*.tmp").items() - before.items(),
                    "second": lambda: second_start(child, folder, flags)}.get(how, lambda: True)():
                    os.kill(child, signal.SIGHUP if how == "hangup" else signal.SIGKILL)
                    return ended(child, folder)
            except FileNotFoundError:  # renamed while it was being looked at
                pass
        time.sleep(0.0005)
    return end


def refused(path, damages=100, seed=0):
    """How many damaged copies of a checkpoint are refused:
    half are cut short, half have one bit wrong."""
    content, draw, count, copy = (
        path.read_bytes(), random.Random(seed), 0, path.with_name("damaged.pt"))
    for number in range(damages):
        damaged, place = bytearray(content), draw.randrange(len(content))
        if number % 2:
            damaged[place] ^= 1 << draw.randrange(8)
        else:
            del damaged[place:]
        copy.write_bytes(damaged)
        try:
            load_checkpoint(copy)
        except UserError:
            count += 1
    copy.unlink()
    return count


def kill(stops, epochs, folder, seed=0):
    """Stop and resume runs until there were so many stops."""
    draw, began = random.Random(seed), time.monotonic()
    stopped, inside, second, runs, equal = 0, 0, 0, 0, True
    draw_images(folder / "images")
    flags = [*FLAGS, "--arch", "small", "--epochs", str(epochs),
             "--data-dir", str(folder / "images")]
    assert ended(start(folder / "whole", flags), folder / "whole")
    span, whole = (time.monotonic() - began) / 3, results(folder / "whole" / "out")
    hows = itertools.cycle(["second", "call", "watched", "moment", "hangup"])
    while stopped < stops:
        parts, end, runs = folder / f"parts{runs}", None, runs + 1
        while not end:
            before, how = stats(parts / "out", "*.tmp"), next(hows)
            if stopped < stops:
                end = attempt(parts, flags, how, draw, span)
            else:
                end = ended(start(parts, flags), parts)
            if not end:
                stopped, second = stopped + 1, second + (how == "second")
                inside += bool(stats(parts / "out", "*.tmp").items() - before.items())
        equal &= same(results(parts / "out"), whole, f"run {runs}")
        shutil.rmtree(parts)
    damaged = refused(folder / "whole" / "out" / "last.pt")
    print(f"{stopped} stops ({inside} inside writing) in {runs} runs of {3 * epochs} steps, "
          "each resumed to its end: equal to the uninterrupted run: "
          f"{'yes' if equal else 'NO'}; {second} second starts refused; "
          f"{damaged} of 100 damaged checkpoints refused; {time.monotonic() - began:.0f} s")
    return equal and damaged == 100


def same(found, whole, name):
    """Whether two runs' files are equal; names those that are not."""
    for file in sorted(whole.keys() | found.keys()):
        if whole.get(file) != found.get(file):
            print(f"{name}: {file} "
                  + ("differs" if file in whole and file in found else "is in one only"))
    return found == whole


# ---------------------------------------------------------------- several processes

def start_torchrun(folder, images, epochs):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               str(ROOT / "train.py"), *FLAGS, "--arch", "resnet8", "--batch-size", "12",
               "--epochs", str(epochs), "--data-dir", str(images)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def torchrun(stops, epochs, folder, seed=0):
    """Stop and resume runs, by each signal in turn, until there were so many stops."""
    draw, began, equal = random.Random(seed), time.monotonic(), True
    images = draw_images(folder / "images")
    (folder / "whole").mkdir()
    start_torchrun(folder / "whole", images, epochs).communicate()
    span, whole = time.monotonic() - began, results(folder / "whole" / "out")
    names = list(itertools.islice(itertools.cycle(["SIGTERM", "SIGKILL"]), stops))
    for name in names:
        parts = folder / "parts"
        parts.mkdir()
        process = start_torchrun(parts, images, epochs)
        while not (parts / "out" / "last.pt").exists():
            time.sleep(0.05)
        time.sleep(draw.uniform(0, span / 3))
        if name == "SIGTERM":
            process.terminate()
        else:
            found = subprocess.run(["pgrep", "-P", str(process.pid)],
                                   capture_output=True, text=True)
            os.kill(int(draw.choice(found.stdout.split())), signal.SIGKILL)
        down = time.monotonic()
        process.communicate(timeout=60)
        print(f"{name}: down after {time.monotonic() - down:.1f} s, "
              f"exit status {process.returncode}", flush=True)
        start_torchrun(parts, images, epochs).communicate()
        equal &= same(results(parts / "out"), whole, name)
        shutil.rmtree(parts)
    print(f"{names.count('SIGTERM')} SIGTERMs, {names.count('SIGKILL')} SIGKILLs, "
          "each resumed to its end: equal to the uninterrupted run: "
          f"{'yes' if equal else 'NO'}; {time.monotonic() - began:.0f} s")
    return equal


def main(argv=None):
    parser = Parser("faults.py", __doc__)
    campaigns = parser.add_subparsers(required=True, parser_class=argparse.ArgumentParser)
    for campaign, stops, epochs in ((kill, 30, 8), (torchrun, 10, 20)):
        p = campaigns.add_parser(campaign.__name__, description=campaign.__doc__,
                                 help=campaign.__doc__)
        p.add_argument("--stops", type=at_least_1, default=stops, help=f"({stops})")
        p.add_argument("--epochs", type=at_least_1, default=epochs, help=f"of each run ({epochs})")
        p.set_defaults(campaign=campaign)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(0 if args.campaign(args.stops, args.epochs, Path(temporary)) else 1)


if __name__ == "__main__":
    main()
