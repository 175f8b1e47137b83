"""train.py and its tools: the loop's schedule, what a run leaves, stopping and resuming."""

import functools
import importlib
import itertools
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import losses
import meta
import models
import options
import predict
import train
from conftest import Small, assert_same, flags, fork, read_log, results, wait
from methods import METHODS, Independent
from support import architectures, files, picture
from support import images as image_files
from support import run as runs
from support.processes import Processes
from test_meta import Layer

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------- the loop

def test_schedule_second_steps_and_batches(run, monkeypatch):
    """Every method sees the same batches;
    lmcl's meta step gets that of its step and the present rate."""
    seen, meta_at, true_step, true_meta_step = {}, [], train.train_step, meta.meta_step

    def train_step(args, method, run, images, labels, rows):
        seen.setdefault(args.method, []).append((images.sum().item(), labels.tolist()))
        return true_step(args, method, run, images, labels, rows)

    def meta_step(students, network, optimizer, images, *losses, **settings):
        assert images.sum().item() == seen["lmcl"][-1][0]
        meta_at.append((len(seen["lmcl"]), settings["lr"], settings["inner_steps"]))
        true_meta_step(students, network, optimizer, images, *losses, **settings)

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(meta, "meta_step", meta_step)
    for name in METHODS:
        log = run("--method", name, *(["--meta-freq", 2] if name == "lmcl" else []), out=name)
        assert [line["lr"] for line in log[1:]] == [
            0.05 * (1 + math.cos(math.pi * e / 2)) for e in range(2)]
        assert [line["step"] for line in log[1:]] == [3, 6]
    assert meta_at == [(2, 0.1, 2), (4, pytest.approx(0.05), 2), (6, pytest.approx(0.05), 2)]
    assert len(seen["lmcl"]) == 6 and all(batches == seen["lmcl"] for batches in seen.values())


def test_options_of_the_data_are_handed_on(run, monkeypatch):
    """--augment, --seed and --validation-fraction, --stream and --workers reach data.load
    as they are given."""
    given, true = {}, data.load

    def load(*where, **settings):
        given.update(settings)
        return true(*where, **settings)

    monkeypatch.setattr(data, "load", load)
    run("--method", "independent", "--augment", "crop", "--seed", 7,
        "--validation-fraction", 0.33, "--batch-size", 12,
        "--stream", "--workers", 1, "--max-steps", 1, epochs=1)
    assert given == dict(stream=True, augment="crop", validation_fraction=0.33, seed=7, workers=1,
                         synthetic_images=None)


def test_dropout_is_a_function_of_seed_step_and_rank(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", None)  # it would seed other devices' generators too

    def draw(*key):
        train.seed_dropout(*key, torch.device("cpu"))
        return torch.rand(1).item()

    keys = [(0, 5, 0), (0, 5, 1), (0, 6, 0), (1, 5, 0)]
    assert len({draw(*key) for key in keys}) == 4 and draw(*keys[1]) == draw(*keys[1])


def test_multistep_drops_at_milestones(run):
    log = run("--method", "independent", "--schedule", "multistep", "--milestones", 1, 3, epochs=4)
    assert [line["lr"] for line in log[1:]] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_warmup_is_linear_by_the_step_and_the_schedule_follows(run, monkeypatch):
    """The virtual steps have the rate of the ordinary one before them."""
    rates, virtual, true_step, true_meta_step = [], [], train.train_step, meta.meta_step

    def train_step(args, method, run, *batch):
        rates.append(run.optimizers[0].param_groups[0]["lr"])
        return true_step(args, method, run, *batch)

    def meta_step(*inputs, **settings):
        virtual.append((settings["lr"], settings["weight_decay"]))
        true_meta_step(*inputs, **settings)

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(meta, "meta_step", meta_step)
    log = run("--warmup", 2, "--optimizer", "adamw", "--meta-freq", 4, epochs=4)
    cosine = [0.001 / 2 * (1 + math.cos(math.pi * e / 2)) for e in range(2)]
    assert rates == pytest.approx([0.001 * step / 6 for step in range(1, 7)]
                                  + [r for r in cosine for _ in range(3)])
    assert [line["lr"] for line in log[1:]] == [rates[2], rates[5], rates[6], rates[9]]
    assert virtual == [(rate, 0.05) for rate in rates[3::4]]
    rates.clear()
    run("--warmup", 2, "--method", "independent", "--schedule", "multistep", "--milestones", 2,
        out="drops", epochs=3)
    assert rates == pytest.approx([0.1 * step / 6 for step in range(1, 7)] + [0.01] * 3)


def test_a_stop_after_the_last_step_of_a_warm_up_epoch(run, monkeypatch):
    flags, steps = ["--method", "independent", "--warmup", 1, "--num-nets", 1], itertools.count(1)
    run(*flags, out="whole")
    after_step = runs.Run.after_step

    def stopped(self):
        if next(steps) == 3:  # of three an epoch
            self.signals.name = "SIGTERM"
        after_step(self)

    monkeypatch.setattr(runs.Run, "after_step", stopped)
    with pytest.raises(SystemExit):
        run(*flags)
    run(*flags, "--resume")
    assert_same("whole", "out")


def test_the_log_holds_means_over_the_epoch(run, monkeypatch):
    values, true_terms = [], Independent.terms

    def terms(self, *inputs):
        result = true_terms(self, *inputs)
        values.extend([result["ce"][1].item()] if self.training else [])
        return result

    monkeypatch.setattr(Independent, "terms", terms)
    log = run("--method", "independent")
    means = [sum(values[:3]) / 3, sum(values[3:]) / 3]
    assert [line["ce"] for line in log[1:]] == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("students, more", [
    *((1, ["--num-nets", 1, "--method", name]) for name in METHODS),
    (3, ["--meta-freq", 1, "--arch", "resnet8", "wrn_10_1", "resnet8"]),
    (2, ["--method", "mcl", "--arch", "shufflenet_v2_x0_5"])], ids=[*METHODS, "three", "imagenet"])
def test_cohorts_of_one_of_three_and_of_imagenet_students(run, students, more):
    """A step, evaluation, and a meta step of the three.

    One student alone has no mutual contrast.
    """
    line = run(*more, "--max-steps", 1, epochs=1)[1]
    assert len(line["test_top1"]) == students and line["ce"] > 0
    names = ("ce", "ce_agg", "kd", "vcl", "icl", "soft_vcl", "soft_icl", "adversarial")
    assert line["loss"] == pytest.approx(sum(line.get(name, 0) for name in names), rel=1e-5)
    mutual = [line[name] for name in ("icl", "soft_vcl", "soft_icl") if name in line]
    assert all((value == 0) == (students == 1) for value in mutual)


def test_evaluation_counts_top1_and_top5():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):  # ranks class k by pixel k
            return x[:, 0, 0, :7]

    pixels = torch.zeros(4, 3, 8, 8)
    # ranking: 1, 2, 3, 4, 5, 0, 6
    pixels[:, 0, 0, :7] = torch.tensor([10.0, 60, 50, 40, 30, 20, 0])
    batches = [(pixels[:3], torch.tensor([1, 1, 5])), (pixels[3:], torch.tensor([6]))]
    assert train.evaluate([Fixed(), Fixed()], batches, Processes({})) == ([50.0] * 2, [75.0] * 2)
    # another process with four images, on which nothing hits
    two = SimpleNamespace(sum=lambda mine: mine + torch.tensor([0, 0, 0, 0, 4]))
    assert train.evaluate([Fixed(), Fixed()], batches, two) == ([25.0] * 2, [37.5] * 2)


def test_evaluation_of_fewer_classes_than_five():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    batches = [(torch.zeros(4, 3, 1, 1), torch.tensor([0, 1, 1, 1]))]
    (top1,), (top5,) = train.evaluate([network], batches, Processes({}))
    assert top1 in (25.0, 75.0) and top5 == 100.0


def test_validation_chooses_the_best_and_the_test_set_is_looked_at_once(run, monkeypatch):
    splits, true = [], data.InMemory.test_batches
    monkeypatch.setattr(
        data.InMemory, "test_batches",
        lambda self, split="test", *share: splits.append(split) or true(self, split, *share))
    log = run("--validation-fraction", 0.33, "--method", "independent", "--batch-size", 12)
    assert (splits == ["validation", "validation", "test"]
            and log[0]["args"]["validation_fraction"] == 0.33)
    names = "validation_top1", "test_top1"
    assert [[name in line for name in names] for line in log[1:]] == [[True, False], [True, True]]


def test_the_test_set_says_nothing_before_the_end_and_chooses_nothing(run, monkeypatch):
    held = ["--validation-fraction", 0.33, "--method", "independent", "--batch-size", 12]
    assert "test_top1" not in run(*held, "--max-steps", 4, out="ended")[-1]  # inside the last epoch
    scores = iter([60.0, 50.0, 99.0])  # validation, validation, test
    monkeypatch.setattr(train, "evaluate", lambda *_: ([next(scores)] * 2, [100.0] * 2))
    run(*held, out="chosen")
    state = files.load_checkpoint("chosen/last.pt")
    assert (state["best_epoch"], state["best"]) == (1, 60.0)


def test_one_student_is_told_that_it_has_no_peers(run, capsys):
    for method, said in (("dml", True), ("independent", False)):
        run("--method", method, "--num-nets", 1, "--max-steps", 1, out=method)
        assert ("one student has no peers" in capsys.readouterr().out) is said


def test_starting_from_weights(run, monkeypatch, capsys):
    run("--method", "independent", epochs=1)
    exported, seen = [f"out/student_{a}_small.pt" for a in (1, 2)], []
    alone = ["--method", "independent", "--weights", *exported]
    run(*alone, "--max-steps", 1, out="third")
    assert "\n           weights out/student_2_small.pt: " in capsys.readouterr().out
    for file in map(Path, exported):
        file.rename(f"{file}.away")
    run(*alone, "--resume", out="third")  # a checkpoint holds all weights
    for file in exported:
        Path(f"{file}.away").rename(file)
    monkeypatch.setattr(
        train, "train", lambda args, data, method, run: seen.extend(method.cohort.students))
    run("--weights", *exported, out="second")
    for student, file in zip(seen, exported, strict=True):
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.equal(v, saved[k]) for k, v in student.backbone.state_dict().items())


def test_a_model_file(run, capsys, images):
    """An architecture of a user's own trains, resumes and is evaluated;
    its mistakes are one line."""
    source = """
import torch.nn as nn
from support.architectures import ARCHITECTURES, he_normal
class Tiny:
    stages, width = 2, {width}
    def stem(self): return nn.Conv2d(3, 16, 3, padding=1)
    def stage(self, l): return nn.Sequential(
        nn.Conv2d(16 if l == 0 else 24, 24, 3, stride=2, padding=1),
        nn.BatchNorm2d(24), nn.Dropout(0.1))
    def tail(self): return nn.Identity()
    def initialise(self, module): he_normal(module)
ARCHITECTURES["tiny"] = Tiny()
"""
    own = ["--model-file", "mine.py", "--arch", "tiny", "--method", "deep-supervision"]
    Path("mine.py").write_text(source.format(width=24))
    for out, parts in (("whole", [[]]), ("parts", [["--max-steps", "2"], ["--resume"]])):
        for part in parts:  # dropout's masks too are drawn again
            run(*own, *part, out=out)
    assert_same("whole", "parts")
    capsys.readouterr()
    del architectures.ARCHITECTURES["tiny"]
    evaluation = ["--student", "whole/last.pt", "--dataset", "folder", "--device", "cpu"]
    with pytest.raises(SystemExit):  # a checkpoint's own is named, not run
        predict.main(evaluation)
    assert "was trained with --model-file mine.py: give it here" in capsys.readouterr().err
    Path("mine.py").rename("moved.py")
    predict.main([*evaluation, "--model-file", "moved.py"])
    assert capsys.readouterr().out.count("tiny: top-1") == 2
    Path("mine.py").write_text(source.replace("24", "32").format(width=32))
    for program, arguments, words in (
            (predict, ["--student", "whole/last.pt", "--dataset", "folder", "--device", "cpu",
                       "--model-file", "mine.py"],
             ("whole/last.pt holds other networks", "--model-file")),
            (train, flags(images, "whole", 2, "--resume", *own),
             ("has changed since whole/last.pt was made",))):
        with pytest.raises(SystemExit):
            program.main(arguments)
        error = capsys.readouterr().err
        assert all(w in error for w in words)
        assert error.count("\n") == 1
    Path("mine.py").write_text(source.format(width=25))
    for method in ("lmcl", "afd"):  # afd runs the students as it is made
        with pytest.raises(SystemExit) as end:
            run(*own, "--method", method, out="third")
        error = capsys.readouterr().err
        assert (end.value.code in (1, 2) and "24" in error and "width" in error
                and error.count("\n") == 1)


@pytest.mark.parametrize("more", [
    [],
    ["--method", "afd"],
    ["--contrast", "bank", "--negatives", "16"],
])
def test_bfloat16(run, more):
    """The first step is float32's up to rounding, and rounded."""
    exact, rounded = (run(*flag, *more, "--max-steps", 1, out=out, epochs=1)[1]
                      for flag, out in (([], "exact"), (["--amp", "bf16"], "rounded")))
    for name in ("loss", "ce"):
        assert (rounded[name] == pytest.approx(exact[name], rel=0.02)
                and rounded[name] != exact[name])


def test_a_bank_teaches_once_it_is_filled(run, capsys):
    """With the schedule contrast leaves chance in its first epoch;
    with the published weights at once it does not,
    and the second epoch's line is followed by the warning."""
    settings = ["--dataset", "synthetic", "--image-size", "8", "--batch-size", "32",
                "--validation-fraction", "0.7",
                "--method", "mcl", "--contrast", "bank", "--negatives", "128",
                "--weight-vcl", "0.05", "--weight-icl", "0.05"]
    taught = run(*settings, "--soft-ramp", "4", out="taught")
    printed = capsys.readouterr().out
    assert "vcl_gain" not in taught[1] and taught[2]["vcl_gain"] > 0.05
    assert "contrast from epoch 2 on, its soft losses grow to full weight in 4 epochs" in printed
    assert (f"vcl_gain {taught[2]['vcl_gain']:.3f}  icl_gain" in printed
            and "teaches nothing" not in printed)
    published = run(*settings, "--contrast-start", "0", "--soft-ramp", "0", out="published")
    printed = capsys.readouterr().out
    assert (published[2]["vcl_gain"] < 0
            and printed.count("warning    contrast teaches nothing yet") == 1)


def test_deterministic_is_switched_on_before_anything_is_computed(run, monkeypatch):
    """On CUDA cuBLAS reads the environment when it starts.

    The run's result is the same on the CPU.
    """
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before, seen = torch.utils.deterministic.fill_uninitialized_memory, []
    true_build, true_step = train.build, train.train_step

    def look(true):
        def call(*inputs, **settings):
            workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
            seen.append((torch.are_deterministic_algorithms_enabled(), workspace))
            return true(*inputs, **settings)
        return call

    monkeypatch.setattr(train, "build", look(true_build))
    monkeypatch.setattr(train, "train_step", look(true_step))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    plain = run(out="plain", epochs=1)
    assert seen == [(False, None)] * 4 and torch.backends.cudnn.benchmark is True
    try:
        log = run("--deterministic", epochs=1)
        assert torch.backends.cudnn.benchmark is False
        assert (seen[4:] == [(True, ":4096:8")] * 4
                and not torch.utils.deterministic.fill_uninitialized_memory)
        assert log[0]["args"]["deterministic"] and log[1]["loss"] == plain[1]["loss"]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


# ---------------------------------------------------------------- what a run prints and leaves

def test_what_a_run_prints(run, capsys):
    """Students and what they cost, data, device, loss, steps, an epoch's line, what to do next."""
    log = run("--arch", "resnet8", "--matching", "uniform", epochs=1)
    printed = capsys.readouterr().out
    top1 = " ".join(f"{score:.2f}" for score in log[1]["test_top1"])
    for words in (
            "student 2  resnet8: 77,782 parameters, 3.1M multiply-adds; with branches 208,546",
            "data       folder: 54 training and 18 test images, 6 classes, 16x16",
            "device     cpu", f"torch {torch.__version__}",
            ("loss       lmcl: ce + ce_agg + kd + 0.1 vcl + soft_vcl + 0.1 icl + soft_icl; "
             "tau 0.1, T 3.0"),
            "steps      1 epochs of 3 steps of 18 = 3; cosine schedule", "output     out",
            "epoch   1  step 3  lr 0.1000  loss", f"test top-1 {top1}",
            "ended      3 steps, best epoch 1 (",
            "next: python predict.py --student out/student_1_resnet8.pt IMAGE"):
        assert words in printed, words
    assert "\r" not in printed and "warning" not in printed


def test_the_log(run):
    """A header, then a line an epoch:
    terms that sum to the loss, also unweighted, scores, times."""
    header, *lines = run("--meta-freq", 4, epochs=2)
    assert header["command"].startswith("python ") and header["args"]["batch_size"] == 18
    assert header["processes"] == 1 and header["classes"] == [f"class{c}" for c in range(6)]
    for e, line in enumerate(lines, 1):
        assert line["epoch"] == e and len(line["test_top1"]) == len(line["test_top5"]) == 2
        assert (line["images_per_second"] > 0
                and {"seconds", "data_seconds", "mi_bound"} <= line.keys())
        parts = [line[k] for k in ("ce", "ce_agg", "kd", "vcl", "icl", "soft_vcl", "soft_icl")]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-4)
        for term in ("vcl", "icl"):
            assert line[term] == pytest.approx(0.1 * line[f"unweighted_{term}"], abs=1e-5)
        assert not {"unweighted_ce", "unweighted_soft_vcl", "unweighted_matching"} & line.keys()


def test_the_files_of_a_run(run):
    run("--arch", "small", "small_12", "--matching", "uniform", epochs=2)
    assert {p.name for p in Path("out").iterdir()} == {
        ".lock", "log.jsonl", "last.pt", "previous.pt", "best.pt", "matching.png",
        "student_1_small.pt", "student_2_small_12.pt"}
    model = files.load_checkpoint("out/last.pt")["model"]
    for a, name in enumerate(("small", "small_12")):
        content = files.read(f"out/student_{a + 1}_{name}.pt")
        assert files.is_student_file(content) and content["architecture"] == name
        prefix = (next(k for k in model if f"students.{a}.backbone." in k).split("backbone.")[0]
                  + "backbone.")
        assert all(torch.equal(value, model[prefix + key])
                   for key, value in content["state_dict"].items())


def test_the_learned_matching_is_logged_and_drawn(run, monkeypatch):
    """Mean lambda of the epoch [N][L][N][L]: of (a, l) and (b, m) as of (b, m) and (a, l)."""
    drawn, values, true_matching = [], [], METHODS["lmcl"].matching

    def matching(self, features):
        values.extend([true_matching(self, features).mean(-1)] if self.training else [])
        return true_matching(self, features)

    monkeypatch.setattr(METHODS["lmcl"], "matching", matching)
    monkeypatch.setattr(train, "matching_picture",
                        lambda *inputs: drawn.append(inputs) or picture.matching_picture(*inputs))
    arch = ["small", "small_12", "small_12"]
    line = run("--arch", *arch, epochs=1)[1]
    found = torch.tensor(line["matching"])
    assert found.shape == (3, 2, 3, 2) and torch.equal(found, found.permute(2, 3, 0, 1))
    assert torch.allclose(found, torch.stack(values).mean(0), atol=6e-5) and len(values) == 3
    between = [found[a, :, b] for a in range(3) for b in range(3) if a != b]
    assert all((0.26 < pair).all() and (pair < 0.74).all() and pair.std() > 0 for pair in between)
    (nested, names, step), = drawn
    assert nested == line["matching"] and names == arch and step == 3
    assert Path("out/matching.png").read_bytes() == picture.matching_picture(
        line["matching"], names, 3)


def test_matching_is_a_half_if_uniform_and_none_for_one_student(run):
    line = run("--matching", "uniform", "--meta-freq", 1, epochs=1)[1]
    assert line["matching"] == [[[[0.5] * 2] * 2] * 2] * 2 and Path("out/matching.png").exists()
    line = run("--num-nets", 1, out="alone", epochs=1)[1]
    assert "matching" not in line and not Path("alone/matching.png").exists()


class Unusual(Small):
    """A student with a layer of test_meta.py behind its second stage."""

    def __init__(self, kind):
        super().__init__(4)
        self.kind = kind

    def stage(self, s):
        return nn.Sequential(super().stage(s), *[Layer(self.kind)] * (s == 1))


def test_a_student_that_the_meta_step_cannot_differentiate_is_refused_at_the_start(
        run, capsys, monkeypatch):
    """One without forward mode alone goes on by two backward passes; uniform matching takes any."""
    for kind in ("raises", "checkpoint", "no jvp"):
        monkeypatch.setitem(architectures.ARCHITECTURES, kind, Unusual(kind))
    for kind, words in (("raises", "cannot be differentiated twice"),
                        ("checkpoint", "computes in the backward pass")):
        with pytest.raises(SystemExit) as end:
            run("--arch", kind, out=kind)
        error = capsys.readouterr().err
        assert end.value.code == 1 and error.count("\n") == 1 and not Path(kind).exists()
        assert f"student '{kind}': stage 2" in error and words in error
        run("--arch", kind, "--matching", "uniform", "--max-steps", 1, out=kind)
    made, mixed = [], meta._mixed_product
    monkeypatch.setattr(meta, "_mixed_product", lambda *inputs: made.append(1) or mixed(*inputs))
    run("--arch", "no jvp", "small", "--meta-freq", 2, out="jvp", epochs=1)
    assert not made
    run("--meta-freq", 2, out="small", epochs=1)
    assert made == [1]


def test_images_that_are_too_small_for_a_student_are_warned_of(run, capsys):
    run("--arch", "small", "small_12", "--image-size", 8, "--method", "independent",
        "--max-steps", 1)
    printed = capsys.readouterr().out
    for name in ("small", "small_12"):
        assert (f"warning    {name}: of 8x8 pixels its stem leaves 8x8 "
                "and its last stage 2x2; a larger") in printed
    run("--arch", "small", "--method", "independent", "--max-steps", 1, out="large")
    assert "warning" not in capsys.readouterr().out


def test_too_few_steps_for_a_meta_step_are_warned_of(run, capsys):
    run("--meta-freq", 7)
    assert "warning    too few steps: no meta step will be made" in capsys.readouterr().out
    run("--meta-freq", 3, "--contrast-start", 2, out="late")
    assert "no meta step will be made" in capsys.readouterr().out
    run("--meta-freq", 5, "--contrast-start", 2, epochs=3, out="between")  # due after 5 and 10
    assert "no meta step will be made" in capsys.readouterr().out
    run("--meta-freq", 3, "--contrast-start", 1, out="made")
    assert "no meta step will be made" not in capsys.readouterr().out


def test_tensorboard(run, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = run("--tensorboard", "--max-steps", 4)
    log = run("--tensorboard", "--resume")
    events = EventAccumulator("out").Reload()
    for tag, of_line in (("loss", lambda line: line["loss"]),
                         ("test_top1/2", lambda line: line["test_top1"][1])):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(line["epoch"], pytest.approx(of_line(line))) for line in log[1:]]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit):
        run("--tensorboard", out="second", epochs=1)
    assert ("pip install tensorboard" in capsys.readouterr().err
            and not Path("second/log.jsonl").exists())


def test_batches_are_those_of_the_seed_the_epoch_the_step_and_the_process():
    asked = {}
    take = lambda *at, **more: asked.update(at=at, **more) or iter(range(9))
    here = SimpleNamespace(epoch=3, step=2, steps_left=4, processes=SimpleNamespace(share=(1, 2)))
    for batches, pairs in (("uniform", False), ("pairs", True)):
        args = SimpleNamespace(batch_size=18, seed=7, batches=batches)
        found = train.train_batches(args, SimpleNamespace(train_batches=take), here)
        assert list(found) == [0, 1, 2, 3]
        assert asked == dict(at=(18, 7, 3, 2), pairs=pairs, share=(1, 2))


def test_each_step_draws_its_own_masks_and_rows_of_the_bank(run, monkeypatch):
    masks, rows, sample = [], [], models.MemoryBank.sample
    monkeypatch.setattr(train, "seed_dropout", lambda *key: masks.append(key[:3]))
    monkeypatch.setattr(models.MemoryBank, "sample", lambda self, index, *at: (
        rows.append(at), sample(self, index, *at))[1])
    run("--method", "mcl", "--contrast", "bank", "--negatives", 16, "--seed", 7)
    assert masks == [(7, step, 0) for step in range(6)]
    assert rows[1:] == [(e, step) for e in (0, 1) for step in range(3)]  # the first: the report's


# ---------------------------------------------------------------- stopping and going on

def test_same_seed_same_result_other_seed_other_result(run):
    cases = ("a", []), ("b", []), ("c", ["--seed", 1])
    a, _, c = (run("--meta-freq", 3, *more, out=out, epochs=1) for out, more in cases)
    assert_same("a", "b")
    assert a[1]["loss"] != c[1]["loss"]


STREAMED = ["--stream", "--workers", "0", "--augment", "crop", "--batches", "uniform",
            "--amp", "bf16", "--method", "independent",
            "--validation-fraction", "0.33", "--batch-size", "12"]


@pytest.mark.parametrize("stops, more", [
    ([[3]], ["--meta-freq", "3"]),
    ([[1], [1], [5], [2]], ["--method", "afd"]),  # 1 again, 2 after 5: nothing left to do
    ([[2]], ["--meta-freq", "2"]),
    ([[1], [4]], ["--method", "mcl", "--contrast", "bank", "--negatives", "16"]),
    ([[1], [4, "--workers", 1]], STREAMED),
    ([[2], [5]], ["--optimizer", "adamw", "--warmup", "1", "--no-decay-1d", "--meta-freq", "3"]),
], ids=["between epochs", "inside epochs", "after a second step", "bank", "streamed", "adamw"])
def test_resumed_equals_uninterrupted(run, monkeypatch, stops, more):
    """And no step is made twice: one that began afresh would end equal, too."""
    step, made = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *inputs: made.append(1) or step(*inputs))
    run(*more, out="whole")
    whole = len(made)
    for steps, *other in [*stops, [0]]:
        run(*more, *other, "--max-steps", steps, "--resume", out="parts")
    assert_same("parts", "whole")
    assert len(made) == 2 * whole


def test_killed_while_max_steps_end_the_run(run, monkeypatch):
    """At each file that is written after the last step, and resumed."""
    uniform = ["--matching", "uniform"]  # quicker
    run(*uniform, out="whole")
    write, step = files.write, train.train_step
    for number, name in enumerate(["matching.png", "last.pt", "log.jsonl"], start=1):
        written = []  # since step 4 began

        def until(path, *content, number=number, written=written, **keep):
            written.append(path.name)
            if len(written) == number:
                raise KeyboardInterrupt
            write(path, *content, **keep)

        def train_step(args, method, run, *batch, until=until):
            if run.total_steps == 3:
                for module in (files, runs, train):
                    m.setattr(module, "write", until)
            return step(args, method, run, *batch)

        with monkeypatch.context() as m, pytest.raises(SystemExit) as end:
            m.setattr(train, "train_step", train_step)
            run(*uniform, "--max-steps", 4, out=name)
        assert end.value.code == 130 and written[-1] == name
        run(*uniform, "--resume", out=name)
        assert_same("whole", name)


def test_what_is_said_where_no_epoch_is_whole(run, capsys):
    run("--method", "independent", "--max-steps", 2)
    printed = capsys.readouterr().out
    assert "epoch   1  step 2  " in printed and "= 6, ending at 2; cosine" in printed
    assert ("ended      2 steps; "
            "next: python predict.py --student out/student_1_small.pt IMAGE") in printed


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.rename(path.with_name("7b.png"))],
                         ids=["fewer", "another name"])
def test_resuming_on_other_images_is_refused(run, images, capsys, spoil):
    shutil.copytree(images, "mine")
    run("--data-dir", "mine", epochs=1)
    before = Path("out/last.pt").read_bytes()
    for path in Path("mine/train").glob("*/8.png"):
        spoil(path)
    with pytest.raises(SystemExit):
        run("--data-dir", "mine", "--resume", epochs=1)
    error = capsys.readouterr().err
    assert ("was made on training images of other names or another number" in error
            and error.count("\n") == 1)
    assert Path("out/last.pt").read_bytes() == before


def test_the_log_says_where_a_run_went_on(run, monkeypatch):
    alone = ["--method", "independent", "--resume"]
    run(*alone, "--max-steps", 1)
    monkeypatch.setattr(runs, "device_name", lambda device: "another")
    run(*alone, "--max-steps", 2)
    header, *_ = run(*alone)
    assert header["resumed"] == [dict(after_step=1, torch=header["torch"], device="another")]


def test_what_resuming_says(run, capsys):
    run("--resume", epochs=1)
    assert "starting afresh" in capsys.readouterr().out
    run("--resume", epochs=1)
    assert "no step is left to do" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_after_the_step(run, number, monkeypatch, capsys):
    true_step, calls, handler = train.train_step, [], signal.getsignal(number)

    def step(*inputs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return true_step(*inputs)

    with monkeypatch.context() as m, pytest.raises(SystemExit) as end:
        m.setattr(train, "train_step", step)
        run("--matching", "uniform", out="parts")
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1 and "after step 2" in error and "--resume" in error
    assert files.load_checkpoint("parts/last.pt")["total_steps"] == len(calls) == 2
    assert signal.getsignal(number) is handler
    if number == signal.SIGTERM:
        for out in ("parts", "whole"):
            run("--matching", "uniform", "--resume", out=out)
        assert_same("parts", "whole")


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(run, monkeypatch, capsys):
    run("--max-steps", 2)
    before, true_loss = Path("out/last.pt").read_bytes(), losses.lmcl_loss
    monkeypatch.setattr(
        losses, "lmcl_loss", lambda *a: {**true_loss(*a), "icl": torch.tensor(math.nan)})
    with pytest.raises(SystemExit) as end:
        run("--resume")
    error = capsys.readouterr().err
    assert end.value.code == 1 and "icl became" in error and "step 3:" in error and "--lr" in error
    assert Path("out/last.pt").read_bytes() == before


@pytest.mark.parametrize("file, workers", [
    ("train/class3/5.png", 0), ("train/class3/5.png", 1), ("test/class3/9.png", 0)])
def test_an_image_that_breaks_while_training_is_named_and_nothing_is_lost(
        run, images, capsys, file, workers):
    """A streamed file is damaged after the first epoch, then mended:
    the run goes on as if nothing was."""
    streamed = ["--stream", "--workers", workers, "--method", "independent"]
    shutil.copytree(images, "mine")
    run(*streamed, "--data-dir", "mine", "--max-steps", 3, out="parts")
    whole = Path("mine", file).read_bytes()
    Path("mine", file).write_bytes(whole[:100])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*streamed, "--data-dir", "mine", "--resume", out="parts")
    error = capsys.readouterr().err
    assert end.value.code == 1 and f"mine/{file}" in error and error.count("\n") == 1
    if "test" in file:  # all of the epoch's steps are kept
        assert files.load_checkpoint("parts/last.pt")["total_steps"] == 6
    if not workers:
        Path("mine", file).write_bytes(whole)
        run(*streamed, "--data-dir", "mine", "--resume", out="parts")
        run(*streamed, "--data-dir", "mine", out="whole")
        assert_same("parts", "whole")


def test_out_dirs_that_cannot_be_used(run, fails):
    used = ["--method", "independent", "--out-dir", "used"]
    run(*used, out="used")
    before = results("used")
    for more, words in (
            ([], "--resume"),
            (["--resume", "--lr", "0.3"], "--lr 0.1 (now 0.3)"),
            (["--resume", "--epochs", "7"], "learning-rate schedule"),
            (["--resume", "--validation-fraction", "0.33"], "--validation-fraction 0.0 (now 0.33)"),
            (["--resume", "--arch", "resnet8", "resnet20"],
             "--arch small small (now resnet8 resnet20)")):
        fails([*used, *more], words)
    assert results("used") == before
    Path("used/last.pt").write_bytes(Path("used/last.pt").read_bytes()[:-1000])
    fails([*used, "--resume"], "used/last.pt is damaged", "mv used/previous.pt used/last.pt")
    Path("used/previous.pt").unlink()
    fails([*used, "--resume"], "used/last.pt is damaged", "another --out-dir")
    Path("used/last.pt").unlink()
    Path("used/last.pt").mkdir()
    fails([*used, "--resume"], "Is a directory", "another --out-dir")
    if os.geteuid():
        Path("locked").mkdir(mode=0o500)
        fails(["--out-dir", "locked"], "--out-dir locked", "give another")


def test_file_systems_with_limits(run, fails, monkeypatch):
    """One that syncs no folders will do; what fails elsewhere is one line."""
    sync = os.fsync

    def files_alone(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(22, "Invalid argument")
        sync(number)

    def full(out):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", files_alone)
    run(out="~nobody here/out", epochs=1)
    monkeypatch.setattr(runs.OutDir, "open", full)
    fails([], "No space left on device")


def test_a_full_disk_keeps_what_was_there(run, monkeypatch, capsys):
    run("--max-steps", 2)
    before = Path("out/last.pt").read_bytes()

    def full(file):
        if os.fstat(file).st_size > 10_000:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        run("--resume")
    error = capsys.readouterr().err
    assert (end.value.code == 1 and "No space left" in error and "MiB" in error
            and error.count("\n") == 1)
    assert Path("out/last.pt").read_bytes() == before and not list(Path("out").glob("*.tmp"))


# ---------------------------------------------------------------- as a program

def test_as_a_program(tmp_path, images):
    """From the shell, with a reader that goes away (| head -1):
    the run does not stop, the exit is clean."""
    more = ["--method", "independent", "--arch", "resnet8", "--num-nets", 1, "--max-steps", 1]
    command = [sys.executable, str(ROOT / "train.py"), *flags(images, tmp_path / "out", 1, *more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0
    assert len(read_log(tmp_path / "out")) == 2


@pytest.mark.parametrize("program", ["train.py", "detect.py", "predict.py"])
def test_control_c_while_libraries_load_ends_at_once(program, tmp_path):
    """A stand-in for PyTorch takes its time and swallows what is raised meanwhile,
    as some libraries do."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('loading', flush=True)\n"
        "while True:\n try: time.sleep(60)\n except BaseException: pass\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, str(ROOT / program)], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == "loading\n"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20)[1] == f"{program}: interrupted\n"
            assert process.returncode == 130
        finally:
            process.kill()


def test_control_c_while_images_load_ends_at_once(images, tmp_path):
    """Of 54 images those in hand are finished, no others."""
    def slowly(rank):
        true, pool = image_files.fit, image_files.ThreadPoolExecutor

        def fit(*inputs):
            os.write(1, b"an image\n")
            time.sleep(0.1)
            return true(*inputs)

        image_files.fit, image_files.ThreadPoolExecutor = fit, lambda: pool(2)
        train.main(flags(images, "out", 1))

    child, = fork(1, slowly, tmp_path)
    output, began = tmp_path / "output0.txt", time.monotonic()
    while not (output.exists() and output.read_text().count("an image") > 4):
        assert time.monotonic() - began < 20
        time.sleep(0.005)
    os.kill(child, signal.SIGINT)
    assert wait([child]) == [130]
    printed = output.read_text()
    assert (printed.count("an image") < 54 and printed.count("interrupted") == 1
            and "Traceback" not in printed)


# ---------------------------------------------------------------- tools

@pytest.fixture
def tool(monkeypatch):
    """A program of tools/, imported."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module


def test_quarter_takes_125_images_a_class_and_gives_each_row_its_options(tmp_path):
    images, work, programs = (tmp_path / name for name in ("cifar", "work", "bin"))
    for part in ("train", "test"):
        for name in ("apple", "bear"):
            folder = images / part / name
            folder.mkdir(parents=True)
            for i in range(126):
                (folder / f"{i:03}.png").touch()
    programs.mkdir()
    python, log = programs / "python", tmp_path / "log"
    python.write_text('#!/bin/sh\necho "$@" >> "$LOG"\n')
    python.chmod(0o755)
    more = dict(PATH=f"{programs}:{os.environ['PATH']}", LOG=str(log), EPOCHS="3",
                METHODS="independent lmcl lmcl-uniform lmcl-moving lmcl-nocontrast",
                FLAGS="--amp bf16")
    command = ["bash", ROOT / "tools/quarter.sh", images, work, "5"]
    subprocess.run(command, env=os.environ | more, check=True)
    kept = sorted(path.name for path in (work / "quarter/train/bear").iterdir())
    assert kept == [f"{i:03}.png" for i in range(125)]
    assert len(list((work / "quarter/test/bear").iterdir())) == 126
    *runs, compared = log.read_text().splitlines()
    own = {"independent": "independent", "lmcl": "lmcl", "lmcl-uniform": "lmcl --matching uniform",
           "lmcl-moving": "lmcl --virtual-lambda moving",
           "lmcl-nocontrast": "lmcl --contrast-start 3"}
    for (row, method), given in zip(own.items(), runs, strict=True):
        assert given.endswith(f"--epochs 3 --seed 5 --method {method} --save-every 10 --resume "
                              f"--amp bf16 --out-dir {work}/epochs-3/{row}-5")
    assert compared.startswith("compare.py")


def test_benchmark(tool, images, tmp_path, capsys, monkeypatch):
    benchmark = tool("benchmark")
    monkeypatch.setattr(
        benchmark, "benchmark", functools.partial(benchmark.benchmark, runs=2, warm_up=1))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    checked, check = [], METHODS["lmcl"].check
    monkeypatch.setattr(METHODS["lmcl"], "check", lambda self: checked.append(1) or check(self))
    benchmark.main(flags(images, tmp_path, 1))
    assert checked  # or the meta step takes forward mode where a student has none
    assert torch.backends.cudnn.benchmark is True  # as train.py
    first, *rows = capsys.readouterr().out.splitlines()
    names = ["step, deep-supervision", "step, lmcl", "meta step", "evaluation"]
    assert [row[:24].strip() for row in rows] == names
    timed = json.loads(first)
    assert all(timed[name]["operations"] > 100 for name in names[:3])
    assert timed[names[1]]["images_per_second"] > 0 and timed[names[1]]["runs"] == 2
    with pytest.raises(SystemExit):
        benchmark.main(flags(images, tmp_path, 1, "--cuda-graph"))
    assert "--cuda-graph wants a CUDA device" in capsys.readouterr().err


def test_gradients_of_a_checkpoint(tool, run, capsys, monkeypatch):
    """The sum's row by a backward pass, the embeddings' cosines by a loop;
    the file stays as it is."""
    run(epochs=1)
    before, state = Path("out/last.pt").read_bytes(), files.load_checkpoint("out/last.pt")
    program = tool("gradients").main
    checked, check = [], METHODS["lmcl"].check
    monkeypatch.setattr(METHODS["lmcl"], "check", lambda self: checked.append(1) or check(self))
    capsys.readouterr()
    program(["out/last.pt", "--batches", "1"])
    assert checked
    printed = capsys.readouterr().out
    args = options.parse("", flags(*[state["args"][k] for k in ("data_dir", "out_dir", "epochs")]))
    args.device = torch.device("cpu")
    dataset = train.load_data(args)
    method = train.build(args, dataset).train()
    method.load_state_dict(state["model"])
    images, labels, _ = next(iter(dataset.train_batches(18, 0, 0)))
    outputs = method(images)
    z, logits = outputs.embeddings, outputs.logits
    backbones = [p for student in method.cohort.students for p in student.backbone.parameters()]
    norms, terms = [], method.terms(outputs, labels, None).values()
    for loss in (sum(weight * value for weight, value in terms if weight is not None),
                 sum(F.cross_entropy(student, labels) for student in logits[:, -1])):
        method.zero_grad()
        loss.backward(retain_graph=True)
        norms.append(torch.cat(
            [p.grad.flatten() for p in backbones if p.grad is not None]).norm().item())
    row = next(line for line in printed.splitlines() if line.startswith("| the sum |"))
    assert [float(x) for x in row.split("|")[2:4]] == pytest.approx(
        [norms[0], norms[0] / norms[1]], rel=0.01)
    for a in range(2):
        pairs = [(i, j) for i in range(18) for j in range(18) if i != j]
        cosine = [sum(F.cosine_similarity(u[i], u[j], 0) for i, j in pairs) / len(pairs)
                  for u in z[a]]
        row = next(line for line in printed.splitlines()
                   if line.startswith(f"student {a + 1}: mean cosine"))
        assert row.endswith(f"stage by stage: {cosine[0]:.3f} {cosine[1]:.3f}")
    sets = [(u, v) for a in range(2) for u in z[a] for v in z[1 - a]]
    gains = [math.log(17) - sum(x.item() for x in values) / len(sets) for values in (
        [losses.vcl(u, labels) for u, _ in sets], [losses.icl(u, v, labels) for u, v in sets])]
    assert ("below chance, nats an anchor, lambda left out: "
            f"VCL {gains[0]:.3f}, ICL {gains[1]:.3f}") in printed
    assert Path("out/last.pt").read_bytes() == before
    run("--method", "mcl", out="mcl", epochs=1)
    with pytest.raises(SystemExit):
        program(["mcl/last.pt"])
    assert "no checkpoint of lmcl" in capsys.readouterr().err
    program(["out/last.pt", "--batches", "1", "--meta"])
    *_, printed = capsys.readouterr().out.splitlines()
    found = []
    for kind in ("held", "moving"):
        args.virtual_lambda, method = kind, train.build(args, dataset).train()
        method.load_state_dict(state["model"])
        optimizer = torch.optim.SGD(method.matching_network.parameters(), lr=0.0)
        method.meta_step(optimizer, state["logged_lr"], None, images, labels, None, None)
        found.append(torch.cat([p.grad.flatten() for p in method.matching_network.parameters()]))
    held, moving = found
    assert printed == (f"gradient of phi: norm {held.norm():.3g} with lambda held, "
                       f"{moving.norm():.3g} with lambda moving; "
                       f"cosine {F.cosine_similarity(held, moving, 0):.3g}")
    program(["out/last.pt"])  # ten batches, of which there are three
    row = next(line for line in capsys.readouterr().out.splitlines()
               if line.startswith("| ce, own heads |"))
    assert row.endswith("| 1.00 | 1.00 |")
