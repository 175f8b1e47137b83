"""Several processes: two gloo processes against one
that evaluates both halves of each batch and averages."""

import copy
import functools
import itertools
import os
import signal

import pytest
import torch
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

import data
import losses
import meta
import options
import train
from conftest import assert_same, flags, fork, free_port, read_log, wait
from methods import METHODS
from support import console
from support.processes import Processes
from support.run import Run, fill_gradients, fingerprint

PAIR, MIXED = ["--arch", "small"], ["--arch", "small", "small_12", "small"]
BANK = ["--contrast", "bank", "--negatives", "12"]
CASES = [*(["--method", name, *PAIR] for name in METHODS), ["--method", "lmcl", *MIXED],
         ["--method", "lmcl", *PAIR, *BANK, "--contrast-start", "0"],
         ["--method", "lmcl", *PAIR, "--virtual-lambda", "moving"],
         # contrast from the second epoch on
         ["--method", "lmcl", *PAIR, *BANK, "--soft-ramp", "3"],
         ["--method", "mcl", *MIXED, *BANK, "--logit-kd"]]
BROKEN = [(["--method", "dml", *PAIR], "gradients"), (["--method", "lmcl", *PAIR], "second step")]


# ---------------------------------------------------------------- the same numbers as one process

def setting(flags, images, processes):
    """A method in float64 with its run, and its data set."""
    args = options.parse("", [*flags, "--image-size", "16", "--batch-size", "16", "--lr", "0.05"])
    args.device, dataset = torch.device("cpu"), data.load("folder", images, 16)
    method = train.build(args, dataset).double()
    method.gather = processes.gather
    if method.bank:
        method.bank.half()
    run = Run(args, None, method, method.optimizers(), metadata={}, steps_per_epoch=3,
              images_per_epoch=54, processes=processes, signals=None)
    run.start_epoch()
    run.set_lr(0.05)
    return args, dataset, method, run


def batches(dataset, method, share):
    """Five steps: images in float64, labels, the bank's rows."""
    for step in range(5):
        epoch, place = divmod(step, 3)
        method.start_epoch(epoch)
        images, labels, index = next(dataset.train_batches(16, 0, epoch, place, share=share))
        yield (images.double(), labels,
               method.bank.sample(index, epoch, place) if method.bank else None)


SECOND = (1, 3)  # the steps after which there is a second one


def by_processes(processes, flags, images, broken=None):
    """Five steps and two second steps with the real thing; broken: the name of what is left out."""
    args, dataset, method, run = setting(flags, images, processes)
    processes.broadcast(method)
    if broken == "gradients":
        processes = run.processes = copy.copy(processes)
        processes.average_in_place = lambda tensors: None
    average = None if broken == "second step" else processes.average
    for step, batch in enumerate(batches(dataset, method, processes.share)):
        logged, outputs = train.train_step(args, method, run, *batch)
        if step == 3:  # an epoch's sums have one form
            run.sums = {}
        run.add(logged, len(batch[1]))
        if method.second and step in SECOND and step // 3 >= method.second.first:
            method.second.step(run.optimizers[1], 0.05, average, *batch, outputs)
    same = processes.all_equal(fingerprint(method))
    optimizers = processes.all_equal(str([o.state_dict() for o in run.optimizers]))
    return same and optimizers, logged, method.state_dict(), run.images_seen


@functools.cache
def by_one(flags, images):
    """The definition: loss and running statistics are the means of the halves',
    bank rows the halves' own."""
    args, dataset, method, run = setting(flags, images, Processes({}))
    halves = [batches(dataset, method, (rank, 2)) for rank in (0, 1)]
    for step, pair in enumerate(zip(*halves, strict=True)):
        before, after, shown, found = [b.clone() for b in method.statistics()], [], [], []
        method.zero_grad()
        for images, labels, rows in pair:
            for buffer, value in zip(method.statistics(), before, strict=True):
                buffer.copy_(value)
            outputs = method(images)
            terms = method.terms(outputs, labels, rows)
            (sum(weight * value for weight, value in terms.values()
                 if weight is not None) / 2).backward()
            after.append([b.clone() for b in method.statistics()])
            found.append(outputs)
            shown.append({name: value.detach() * (weight or 1)
                          for name, (weight, value) in terms.items()})
        for buffer, *values in zip(method.statistics(), *after, strict=True):
            buffer.copy_(sum(values) / 2)
        fill_gradients(run.optimizers[0])
        run.optimizers[0].step()
        for (_, _, rows), outputs in zip(pair, found, strict=True):
            if method.bank:
                method.bank.update(rows.index, outputs.embeddings)
        if method.second and step in SECOND and step // 3 >= method.second.first:
            if args.method == "lmcl":
                meta_step_by_one(args, method, run, pair)
            else:
                discriminator_step_by_one(method, run, [outputs.maps for outputs in found])
    return {name: (shown[0][name] + shown[1][name]) / 2 for name in shown[0]}, method.state_dict()


def meta_step_by_one(args, method, run, halves):
    """The hypergradient of the halves' mean for the two halves' lambdas, handed on to phi."""
    names, params = zip(*method.students.named_parameters(), strict=True)

    def call(theta, images):
        return torch.func.functional_call(
            method.students, dict(zip(names, theta, strict=True)), (images,))

    moving = args.virtual_lambda == "moving"
    phi = list(method.matching_network.parameters())

    def inner(theta):
        total = 0
        for (images, labels, rows), lam in zip(halves, held, strict=True):
            features, z, _ = call(theta, images)
            lam = method.matching_network(features) if moving else lam
            terms = method.contrastive_terms(z, labels, lam, rows)
            total += sum(weight * value for weight, value in terms.values()) / 2
        return total

    def outer(theta):
        return sum(losses.cross_entropy(call(theta, images)[2], labels)
                   for images, labels, _ in halves) / 2

    with meta.batch_statistics(method.students):
        with torch.no_grad():
            features = [call(params, images)[0] for images, _, _ in halves]
        weights = [method.matching_network(f) for f in features]
        held = [w.detach().requires_grad_() for w in weights]
        grads = meta.hypergradient(
            inner, outer, params, phi if moving else held, inner_steps=args.meta_steps,
            lr=0.05, momentum=0.9, weight_decay=args.weight_decay)
    run.optimizers[1].zero_grad()
    if moving:
        for p, grad in zip(phi, grads, strict=True):
            p.grad = grad
    else:
        torch.autograd.backward(weights, grads)
    run.optimizers[1].step()


def discriminator_step_by_one(method, run, halves):
    run.optimizers[1].zero_grad()
    for maps in halves:
        own = [m.detach() for m in maps]
        scores = (method.discriminators(m) for m in (own, own[1:] + own[:1]))
        (losses.discriminator_loss(*scores) / 2).backward()
    run.optimizers[1].step()


def worst_difference(a, b):
    # one counts twice
    pairs = ((a[k].double(), b[k].double()) for k in b if "num_batches_tracked" not in k)
    differences = [(x - y).abs().max() / (1 + y.abs().max()) for x, y in pairs]
    return torch.stack(differences).max().item()  # NaN stays


@pytest.fixture(scope="module")
def pair(images, tmp_path_factory):
    """What by_processes gives for each of CASES and BROKEN: all of them by the same two processes,
    while this one computes what is expected."""
    folder = tmp_path_factory.mktemp("pair")

    def all_in_turn(rank):
        processes = Processes()
        processes.start(torch.device("cpu"))
        found = [by_processes(processes, flags, images) for flags in CASES]
        found += [by_processes(processes, flags, images, broken) for flags, broken in BROKEN]
        processes.stop()
        torch.save(found, f"result{rank}.pt")

    children = fork(2, all_in_turn, folder)
    for case in CASES:
        by_one(tuple(case), images)
    assert wait(children) == [0, 0], (folder / "output0.txt").read_text()
    return torch.load(folder / "result0.pt")


@pytest.mark.parametrize("flags", CASES, ids=lambda flags: "-".join(flags[1:]).replace("--", ""))
def test_two_processes_equal_one(flags, images, pair):
    same, logged, state, seen = pair[CASES.index(flags)]
    expected_terms, expected = by_one(tuple(flags), images)
    assert same  # model, optimizers, bank: bit for bit
    assert seen == 5 * 16  # of both: a batch has 18, which do not divide in pairs
    torch.testing.assert_close(
        {k: logged[k] for k in expected_terms}, expected_terms, rtol=1e-10, atol=1e-12)
    assert worst_difference(
        state, {k: v for k, v in expected.items() if not k.startswith("bank.")}) < 1e-11
    # float16 rows may round apart
    assert "bank" not in flags or worst_difference(state, expected) < 1e-3


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken[1])
def test_an_average_left_out_is_seen(broken, images, pair):
    same, _, state, _ = pair[len(CASES) + BROKEN.index(broken)]
    assert not same and worst_difference(state, by_one(tuple(broken[0]), images)[1]) > 1e-4


class Sometimes(torch.nn.Module):
    """A layer that some steps leave out, as stochastic depth does."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.used = torch.nn.Conv2d(width, width, 1, bias=False), False

    def forward(self, x):
        return self.layer(x) if self.used else x


def with_and_without(rank, images):
    """Step 1: process 0 alone uses the layer. Step 2: none does.
    Step 3: a frozen one is unfrozen, late."""
    processes = Processes()
    processes.start(torch.device("cpu"))
    args, dataset, method, run = setting(["--method", "independent", *PAIR], images, processes)
    backbones = [student.backbone for student in method.cohort.students]
    for backbone in backbones:
        backbone.tail = Sometimes(8).double()
    late = backbones[1].stages[1][0].weight.requires_grad_(False)
    run.optimizers = method.optimizers()
    processes.broadcast(method)
    layers, seen = [backbone.tail for backbone in backbones], []
    weight = layers[0].layer.weight
    for step, batch in enumerate(itertools.islice(batches(dataset, method, processes.share), 3)):
        layers[0].used = step == 0 and rank == 0
        late.requires_grad_(step == 2)
        before, unfrozen = weight.detach().clone(), late.detach().clone()
        terms = method.terms(method(batch[0]), batch[1], None)
        own = torch.autograd.grad(terms["ce"][1], weight, allow_unused=True)[0]
        train.train_step(args, method, run, *batch)
        seen.append((own, weight.grad.clone(), before - weight.detach(),
                     (unfrozen - late.detach()).norm()))
    same = processes.all_equal(fingerprint(method))
    processes.stop()
    torch.save((same, seen, args.weight_decay), f"result{rank}.pt")


def test_a_parameter_without_a_gradient_in_some_step(images, tmp_path):
    """It is 0 there, in every process; momentum and weight decay go on."""
    assert wait(fork(2, lambda rank: with_and_without(rank, images), tmp_path)) == [0, 0], (
        tmp_path / "output0.txt").read_text()
    (same, seen, _), (_, other, _) = (torch.load(tmp_path / f"result{rank}.pt") for rank in (0, 1))
    (own, first, _, frozen), (none, second, moved, _), (*_, unfrozen) = seen
    assert same and other[0][0] is None and none is None
    torch.testing.assert_close(first, own / 2)
    assert not second.any() and moved.any() and frozen == 0 and unfrozen > 0


# ---------------------------------------------------------------- whole runs

def program(images, out, *more):
    """A run of 8 steps."""
    return lambda rank: train.main(flags(images, out, 2, "--batch-size", "12", *more))


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


def test_stopped_by_a_signal_to_one_process_and_resumed(images, tmp_path, capsys):
    """Both end after the same step, save once, and go on to the end of the uninterrupted run."""
    more = ["--meta-freq", "5", *BANK, "--stream", "--workers", "0"]
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    assert wait(fork(2, program(images, "out", *more), tmp_path / "whole")) == [0, 0]

    parts = tmp_path / "parts"
    stopped = fork(2, signalled(signal.SIGTERM, 5, images, *more), parts)
    assert wait(stopped) == [1, 1]  # process 0 hears of it from 1
    assert ("after step 5; the same command with --resume goes on"
            in (parts / "output0.txt").read_text())
    assert "error" not in (parts / "output1.txt").read_text()
    with pytest.raises(SystemExit):
        program(images, parts / "out", *more, "--resume")(0)
    assert ("last.pt was made by 2 processes, and this is 1: start as many"
            in capsys.readouterr().err)
    assert wait(fork(2, program(images, "out", *more, "--resume"), parts)) == [0, 0]
    assert_same(parts / "out", tmp_path / "whole" / "out")
    assert read_log(parts / "out")[0]["processes"] == 2


def test_a_process_that_dies_takes_the_other_down(images, tmp_path):
    more = ["--method", "dml", "--save-every", "0.00001"]
    killed = fork(2, signalled(signal.SIGKILL, 3, images, *more), tmp_path)
    assert wait(killed, limit=30) == [1, -signal.SIGKILL]
    error = [line for line in (tmp_path / "output0.txt").read_text().splitlines()
             if "error" in line]
    assert (len(error) == 1 and "another process of this run has ended" in error[0]
            and "--resume" in error[0])
    assert wait(fork(2, program(images, "out", *more, "--resume"), tmp_path)) == [0, 0]
    assert "out/last.pt, 2 steps done" in (tmp_path / "output0.txt").read_text()


def test_batches_that_do_not_divide_are_refused_in_one_line(images, tmp_path):
    def at_once(rank):
        console.time.sleep = lambda seconds: None  # others wait for torchrun, which ends them
        program(images, "out")(rank)

    assert wait(fork(4, at_once, tmp_path)) == [1] * 4
    assert "--batch-size 12 must be a multiple of 8" in (tmp_path / "output0.txt").read_text()


def test_torchrun_on_two_nodes(images, tmp_path):
    """Two of torchrun's agents on this machine, one process each: the same run as on one node."""
    more = ["--method", "dml"]
    (tmp_path / "one").mkdir()
    assert wait(fork(2, program(images, "out", *more), tmp_path / "one")) == [0, 0]
    port = free_port()

    def agent(rank):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        args = torchrun.parse_args(["--nnodes", "2", "--nproc-per-node", "1",
                                    "--master-addr", "127.0.0.1", "--master-port", str(port),
                                    "--node-rank", str(rank), "train.py"])
        config, _, _ = torchrun.config_from_args(args)
        config.start_method = "fork"  # quicker than python train.py: torch is there
        elastic_launch(config, program(images, "out", *more))(rank)

    assert wait(fork(2, agent, tmp_path)) == [0, 0], (tmp_path / "output0.txt").read_text()
    assert_same(tmp_path / "out", tmp_path / "one" / "out")
    assert read_log(tmp_path / "out")[0]["processes"] == 2
