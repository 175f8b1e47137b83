"""Several processes: two gloo processes against one that evaluates both halves of each batch and averages.

    pytest test_processes.py
    python test_processes.py     # the campaign: five SIGTERMs, five SIGKILLs under torchrun, each resumed; one line
"""

import argparse
import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import data
import losses
import meta
import options
import train
from conftest import draw_images, flags, fork, free_port, read_log, results, wait
from devices import Processes
from experiment import Run, fingerprint

HERE = Path(__file__).parent
PAIR, MIXED = ["--arch", "small"], ["--arch", "small", "small_12", "small"]
BANK = ["--contrast", "bank", "--negatives", "12"]
SHORT = ["--batch-size", "12", "--save-every", "0.0001", "--meta-freq", "3"]                  # 8 steps, two meta steps
CASES = [["--method", name, *PAIR] for name in ("lmcl", "mcl", "deep-supervision", "dml", "afd", "independent")] + [
    ["--method", "lmcl", *MIXED], ["--method", "lmcl", *PAIR, *BANK],
    ["--method", "mcl", *MIXED, *BANK, "--logit-kd"]]


# ---------------------------------------------------------------- the same numbers as one process

def setting(flags, images, processes):
    """A method in float64 with its run, and its batches' parts by process."""
    args = options.parse("", [*flags, "--image-size", "16", "--batch-size", "16", "--lr", "0.05"])
    args.device, dataset = torch.device("cpu"), data.load("folder", images, 16)
    method = train.build(args, dataset).double()
    method.gather = processes.gather
    if method.bank:
        method.bank.half()
    run = Run(args, None, method, train.make_optimizers(args, method), {}, 3, 54, processes, None)
    run.start_epoch(0.05)
    return args, dataset, method, run


def batches(args, dataset, method, part):
    for step in range(5):
        epoch, place = divmod(step, 3)
        images, labels, index = next(dataset.train_batches(16, 0, epoch, place, part=part))
        rows = method.bank.draw(index, epoch, place) if method.bank else ()
        yield step, (images.double(), labels, *rows)


def by_processes(rank, flags, images, broken=None):
    """Five steps and two second steps with the real thing; broken: the name of what is left out."""
    processes = Processes()
    processes.start(torch.device("cpu"))
    args, dataset, method, run = setting(flags, images, processes)
    processes.broadcast(method)
    if broken == "gradients":
        processes.average_in_place = lambda tensors: None
    average = None if broken == "second step" else processes.average
    for step, batch in batches(args, dataset, method, processes.part):
        terms = train.train_step(args, method, run, *batch)
        if method.second_every and step in (1, 3):
            method.second_step(run.optimizers[-1], 0.05, average, *batch)
    same = processes.all_equal(fingerprint(method))
    optimizers = processes.all_equal(str([o.state_dict() for o in run.optimizers]))
    processes.stop()
    terms = {k: v.tolist() for k, v in terms.items()}
    torch.save((same and optimizers, terms, method.state_dict()), f"result{rank}.pt")


@functools.cache
def by_one(flags, images):
    """The definition: loss and running statistics are the means of the halves', bank rows the halves' own."""
    args, dataset, method, run = setting(flags, images, Processes({}))
    halves = [batches(args, dataset, method, (rank, 2)) for rank in (0, 1)]
    for (step, first), (_, second) in zip(*halves, strict=True):
        before, after, shown, embedded, maps = [b.clone() for b in method.statistics()], [], [], [], []
        method.zero_grad()
        for batch in (first, second):
            for buffer, value in zip(method.statistics(), before, strict=True):
                buffer.copy_(value)
            terms = method.terms(*batch)
            (sum(weight * value for weight, value in terms.values() if weight is not None) / 2).backward()
            after.append([b.clone() for b in method.statistics()])
            embedded.append(method.embeddings_for_bank if method.bank else None)
            maps.append(getattr(method, "maps", None))
            shown.append({name: value.item() * (weight or 1) for name, (weight, value) in terms.items()})
        for buffer, *values in zip(method.statistics(), *after, strict=True):
            buffer.copy_(sum(values) / 2)
        run.optimizers[0].step()
        for batch, z in zip((first, second), embedded, strict=True):
            if method.bank:
                method.bank.update(z, batch[2])
        if method.second_every and step in (1, 3):
            second_step = meta_step_by_one if args.method == "lmcl" else discriminator_step_by_one
            second_step(args, method, run, (first, second), maps)
    return {name: (shown[0][name] + shown[1][name]) / 2 for name in shown[0]}, method.state_dict()


def meta_step_by_one(args, method, run, halves, _):
    """The hypergradient of the halves' mean for the two halves' lambdas, handed on to phi."""
    names, params = zip(*method.students.named_parameters(), strict=True)
    call = lambda theta, batch: torch.func.functional_call(
        method.students, dict(zip(names, theta, strict=True)), (batch[0],))
    with meta.batch_statistics(method.students):
        with torch.no_grad():
            features = [call(params, batch)[0] for batch in halves]
        weights = [method.matching_network(f) for f in features]
        held = [w.detach().requires_grad_() for w in weights]
        inner = lambda theta: sum(w * v for batch, lam in zip(halves, held, strict=True) for w, v in
                                  method.contrast(call(theta, batch)[1], batch[1], lam, batch[2:]).values()) / 2
        outer = lambda theta: sum(losses.cross_entropy(call(theta, batch)[2], batch[1]) for batch in halves) / 2
        grads = meta.hypergradient(inner, outer, params, held, inner_steps=args.meta_steps, lr=0.05,
                                   momentum=0.9, weight_decay=args.weight_decay)
    run.optimizers[1].zero_grad()
    torch.autograd.backward(weights, grads)
    run.optimizers[1].step()


def discriminator_step_by_one(args, method, run, halves, maps):
    run.optimizers[1].zero_grad()
    for own in maps:
        losses.discriminator_loss(*(method.discriminators(m) for m in (own, own[1:] + own[:1]))).div(2).backward()
    run.optimizers[1].step()


def worst_difference(a, b):
    pairs = ((a[k].double(), b[k].double()) for k in b if "num_batches_tracked" not in k)         # one counts twice
    return torch.stack([(x - y).abs().max() / (1 + y.abs().max()) for x, y in pairs]).max().item()   # NaN stays


@pytest.mark.parametrize("flags", CASES, ids=lambda flags: "-".join(flags[1:]).replace("--", ""))
def test_two_processes_equal_one(flags, images, tmp_path):
    bank, statuses = "bank" in flags, wait(fork(2, lambda rank: by_processes(rank, flags, images), tmp_path))
    assert statuses == [0, 0], (tmp_path / "output0.txt").read_text()
    (same, terms, state), _ = (torch.load(tmp_path / f"result{rank}.pt") for rank in (0, 1))
    expected_terms, expected = by_one(tuple(flags), images)
    assert same                                                           # model, optimizers, bank: bit for bit
    assert {k: v for k, v in terms.items() if k in expected_terms} == pytest.approx(expected_terms, rel=1e-10)
    assert worst_difference(state, {k: v for k, v in expected.items() if not k.startswith("bank.")}) < 1e-11
    assert not bank or worst_difference(state, expected) < 1e-3           # float16 rows may round apart


@pytest.mark.parametrize("broken", ["gradients", "second step"])
def test_an_average_left_out_is_seen(broken, images, tmp_path):
    flags = ["--method", "lmcl", *PAIR]
    assert wait(fork(2, lambda rank: by_processes(rank, flags, images, broken), tmp_path)) == [0, 0]
    same, _, state = torch.load(tmp_path / "result0.pt")
    assert not same and worst_difference(state, by_one(tuple(flags), images)[1]) > 1e-4


# ---------------------------------------------------------------- whole runs

def program(images, out, *more):
    return lambda rank: train.main(flags(images, out, 2, *SHORT, *more))


def signalled(number, at, images, *more):
    """program() in which process 1 sends itself a signal before step `at`."""
    def stopped(rank):
        true_step, steps = train.train_step, itertools.count(1)

        def step(*inputs):
            if next(steps) == at and rank == 1:
                os.kill(os.getpid(), number)
            return true_step(*inputs)

        train.train_step = step
        program(images, "out", *more)(rank)

    return stopped


@pytest.mark.parametrize("more", [[], ["--method", "mcl", *BANK, "--stream", "--workers", "0"]],
                         ids=["lmcl", "mcl-bank-streamed"])
def test_stopped_by_a_signal_to_one_process_and_resumed(more, images, tmp_path, capsys):
    """Both end after the same step, save once, and go on to the end of the uninterrupted run."""
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    assert wait(fork(2, program(images, "out", *more), tmp_path / "whole")) == [0, 0]

    parts = tmp_path / "parts"
    assert wait(fork(2, signalled(signal.SIGTERM, 4, images, *more), parts)) == [1, 1]    # process 0 hears of it from 1
    assert "after step 4; the same command with --resume goes on" in (parts / "output0.txt").read_text()
    assert "error" not in (parts / "output1.txt").read_text()
    with pytest.raises(SystemExit):
        train.main(flags(images, parts / "out", 2, *SHORT, *more, "--resume"))
    assert "last.pt was made by 2 processes, and this is 1: start as many" in capsys.readouterr().err
    assert wait(fork(2, program(images, "out", *more, "--resume"), parts)) == [0, 0]
    assert results(parts / "out") == results(tmp_path / "whole" / "out")
    assert read_log(parts / "out")[0]["processes"] == 2


def test_a_process_that_dies_takes_the_other_down(images, tmp_path):
    assert wait(fork(2, signalled(signal.SIGKILL, 3, images), tmp_path), limit=30) == [1, -signal.SIGKILL]
    error = [line for line in (tmp_path / "output0.txt").read_text().splitlines() if "error" in line]
    assert len(error) == 1 and "another process of this run has ended" in error[0] and "--resume" in error[0]
    assert wait(fork(2, program(images, "out", "--resume"), tmp_path)) == [0, 0]


def test_batches_that_do_not_divide_are_refused_in_one_line(images, tmp_path):
    statuses = wait(fork(4, program(images, "out"), tmp_path))
    assert statuses[0] == 1 and "--batch-size 12 must divide by 8" in (tmp_path / "output0.txt").read_text()


def torchrun(folder, *more, images, nodes=()):
    """torchrun itself; nodes: its options for several machines."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1" if nodes else "2", *nodes,
               str(HERE / "train.py"),
               *flags(images, folder / "out", 2, *SHORT, "--arch", "resnet8", "--resume", *more)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def test_torchrun_on_two_nodes(images, tmp_path):
    """Two agents on this machine, one process each: the same run as torchrun's two on one node."""
    (tmp_path / "one").mkdir()
    more = ["--arch", "resnet8", "--method", "dml", "--resume"]
    assert wait(fork(2, program(images, "out", *more), tmp_path / "one")) == [0, 0]
    node = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank"]
    agents = [torchrun(tmp_path, *more, images=images, nodes=[*node, str(rank)]) for rank in (0, 1)]
    errors = [agent.communicate(timeout=100)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert results(tmp_path / "out") == results(tmp_path / "one" / "out")


def campaign(stops, folder, seed=0):
    """torchrun's two processes, stopped at random moments by SIGTERM to it or SIGKILL of one of them, resumed."""
    draw, began, equal = random.Random(seed), time.monotonic(), True
    images = draw_images(folder / "images")
    (folder / "whole").mkdir()
    process = torchrun(folder / "whole", "--epochs", "20", images=images)
    process.communicate()
    span, whole = time.monotonic() - began, results(folder / "whole" / "out")
    for number in ["SIGTERM"] * stops + ["SIGKILL"] * stops:
        parts = folder / "parts"
        parts.mkdir()
        process = torchrun(parts, "--epochs", "20", images=images)
        while not (parts / "out" / "last.pt").exists():
            time.sleep(0.05)
        time.sleep(draw.uniform(0, span / 3))
        if number == "SIGTERM":
            process.terminate()
        else:
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(draw.choice(workers)), signal.SIGKILL)
        killed = time.monotonic()
        process.communicate(timeout=60)
        print(f"{number}: down after {time.monotonic() - killed:.1f} s, exit status {process.returncode}", flush=True)
        torchrun(parts, "--epochs", "20", images=images).communicate()
        equal &= results(parts / "out") == whole
        shutil.rmtree(parts)
    print(f"{stops} SIGTERMs, {stops} SIGKILLs, each resumed to its end: equal to the uninterrupted run: "
          f"{'yes' if equal else 'NO'}; {time.monotonic() - began:.0f} s")
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=campaign.__doc__)
    parser.add_argument("--stops", type=int, default=5)
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(0 if campaign(parser.parse_args().stops, Path(temporary)) else 1)
