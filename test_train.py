"""train.py and options.py: the loop's schedule, resuming, outputs, and what users do wrong."""

import ast
import importlib
import json
import math
import operator
import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import benchmark
import data
import devices
import experiment
import losses
import meta
import models
import options
import train
from conftest import assert_same, flags, read_log, results
from methods import METHODS, Independent

HERE = Path(__file__).parent


# ---------------------------------------------------------------- the loop

def test_schedule_meta_steps_and_batches(run, monkeypatch):
    seen, meta_at, true_step = {}, [], meta.meta_step

    def meta_step(*inputs, **settings):
        meta_at.append((len(seen["lmcl"]), settings["lr"], settings["inner_steps"]))
        true_step(*inputs, **settings)

    monkeypatch.setattr(meta, "meta_step", meta_step)
    for name, method in METHODS.items():
        def terms(self, images, labels, *rows, name=name, true=method.terms):
            if self.training:
                seen.setdefault(name, []).append((images.sum().item(), labels.tolist()))
            return true(self, images, labels, *rows)

        monkeypatch.setattr(method, "terms", terms)
        log = run("--method", name, out=name, epochs=3)
        assert [line["lr"] for line in log[1:]] == [0.05 * (1 + math.cos(math.pi * e / 3)) for e in range(3)]
        assert [line["step"] for line in log[1:]] == [3, 6, 9]
    assert [at for at, _, _ in meta_at] == [2, 4, 6, 8]
    assert [lr for _, lr, _ in meta_at] == pytest.approx([0.1, 0.075, 0.075, 0.025]) and meta_at[0][2] == 2
    assert all(batches == seen["lmcl"] for batches in seen.values())      # every method sees the same batches


def test_recipes(run):
    ours = vars(options.parse("", []))
    assert ours.items() >= dict(
        dataset="cifar100", epochs=300, batch_size=128, lr=0.1, weight_decay=5e-4, schedule="cosine", tau=0.1, T=3.0,
        weight_vcl=0.1, weight_soft_icl=1.0, meta_freq=50, contrast="batch", batches="pairs", image_size=32,
        momentum=0.9).items()
    ours = vars(options.parse("", ["--dataset", "imagenet", "--arch", "resnet18", "--weight-icl", "0.5"]))
    assert ours.items() >= dict(
        epochs=100, batch_size=256, weight_decay=1e-4, schedule="multistep", milestones=[30, 60, 90], tau=0.07,
        weight_vcl=0.01, weight_icl=0.5, meta_freq=500, contrast="bank", batches="uniform", image_size=224,
        negatives=8192, bank_momentum=0.5).items()
    log = run("--method", "independent", "--schedule", "multistep", "--milestones", 1, 3, epochs=4)
    assert [line["lr"] for line in log[1:]] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_default_out_dirs_name_what_differs():
    where = lambda *more: options.parse("", list(more)).out_dir
    assert where() == "out/cifar100-lmcl-resnet32x2-0"
    assert where("--arch", "resnet8", "--num-nets", "3", "--seed", "2", "--resume") == "out/cifar100-lmcl-resnet8x3-2"
    assert where("--arch", "resnet8", "--arch", "wrn_10_1", "--tau", "0.2", "--logit-kd", "--method", "mcl") == \
        "out/cifar100-mcl-resnet8+wrn_10_1-0-logit-kd-True-tau-0.2"
    assert where("--epochs", "300") == where() != where("--epochs", "200")
    assert where("--method", "dml") == "out/cifar100-dml-resnet32x2-0"      # though its T is another one
    assert [options.parse("", ["--method", m]).T for m in ("dml", "afd", "lmcl")] == [1, 3, 3]


def test_outputs(run, capsys, images):
    log = run("--arch", "resnet8", epochs=2)
    printed = capsys.readouterr().out
    for word in ("student 2", "77,782 parameters", "3.1M multiply-adds", "with branches 208,546", "cpu", "0.1 vcl",
                 "54 training and 18 test", "tau 0.1", "2 epochs of 3 steps of 18 = 6", "best epoch",
                 "--evaluate out/last.pt"):
        assert word in printed, word
    assert "\r" not in printed and "warning" not in printed
    assert log[0]["command"].startswith("python ") and log[0]["args"]["batch_size"] == 18
    for e, line in enumerate(log[1:], 1):
        assert line["epoch"] == e and len(line["test_top1"]) == 2 and line["images_per_second"] > 0
        assert {"step", "ce_agg", "mi_bound", "unweighted_vcl", "unweighted_icl", "data_seconds"} <= line.keys()
        parts = [line[k] for k in ("ce", "ce_agg", "kd", "vcl", "icl", "soft_vcl", "soft_icl")]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-4)
        assert line["vcl"] == pytest.approx(0.1 * line["unweighted_vcl"], abs=1e-5)
    assert {p.name for p in Path("out").iterdir()} == {
        ".lock", "log.jsonl", "last.pt", "previous.pt", "best.pt", "matching.png", "student_1_resnet8.pt",
        "student_2_resnet8.pt"}

    scores = [f"student {a}  resnet8: top-1 {top1:.2f}  top-5 {top5:.2f}" for a, top1, top5 in
              zip((1, 2), log[-1]["test_top1"], log[-1]["test_top5"], strict=True)]
    train.main(["--evaluate", "out/last.pt", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines() == scores
    where = ["--device", "cpu", "--dataset", "folder", "--data-dir", str(images)]
    train.main(["--evaluate", "out/student_2_resnet8.pt", *where])
    assert capsys.readouterr().out == scores[1].replace("student 2", "student 1") + "\n"

    student, dataset = models.load_student("out/student_1_resnet8.pt"), data.load("folder", images, 16)
    hits = sum((student(x).argmax(1) == y).sum() for x, y in dataset.test_batches("test"))
    assert round(100 * hits.item() / 18, 2) == log[-1]["test_top1"][0]
    picture = next(images.glob("test/class3/*"))
    Path("empty").mkdir()
    with pytest.raises(SystemExit):
        train.main(["--predict", "empty", "--checkpoint", "out/best.pt", "--device", "cpu"])
    assert "no image in empty" in capsys.readouterr().err
    for checkpoint in ("out/student_1_resnet8.pt", "out/best.pt"):
        train.main(["--predict", str(picture), str(images / "test/class0"), "--checkpoint", checkpoint,
                    "--device", "cpu"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and lines[0].startswith(f"{picture}  class") and lines[0].count("class") == 6
    with torch.no_grad():
        p = student(student.transform(Image.open(picture))[None]).softmax(-1)[0]
    train.main(["--predict", str(picture), "--checkpoint", "out/student_1_resnet8.pt", "--device", "cpu"])
    assert f"{picture}  {student.classes[p.argmax()]} {p.max():.2f}  " in capsys.readouterr().out


def test_gradients_of_a_checkpoint(run, capsys):
    """docs/gradients.py: the sum's row by a backward pass, the embeddings' cosines by a loop; the file stays as it is."""
    run("--device", "cpu", epochs=1)
    before, state = Path("out/last.pt").read_bytes(), experiment.load_checkpoint("out/last.pt")
    program = runpy.run_path(str(HERE / "docs/gradients.py"))["main"]
    capsys.readouterr()
    program(["out/last.pt", "--batches", "1"])
    printed = capsys.readouterr().out
    args = options.parse("", flags(*[state["args"][k] for k in ("data_dir", "out_dir", "epochs")]))
    args.device = torch.device("cpu")
    dataset = train.load_data(args)
    method = train.build(args, dataset).train()
    method.load_state_dict(state["model"])
    images, labels, _ = next(iter(dataset.train_batches(18, 0, 0)))
    _, z, logits = method.students(images)
    backbones = [p for student in method.cohort.students for p in student.backbone.parameters()]
    norms = []
    for loss in (sum(weight * value for weight, value in method.terms(images, labels).values() if weight is not None),
                 sum(F.cross_entropy(student, labels) for student in logits[:, -1])):
        method.zero_grad()
        loss.backward(retain_graph=True)
        norms.append(torch.cat([p.grad.flatten() for p in backbones if p.grad is not None]).norm().item())
    row = next(line for line in printed.splitlines() if line.startswith("| the sum |"))
    assert [float(x) for x in row.split("|")[2:4]] == pytest.approx([norms[0], norms[0] / norms[1]], rel=0.01)
    for a in range(2):
        cosine = [sum(F.cosine_similarity(rows[i], rows[j], 0) for i in range(18) for j in range(18) if i != j)
                  / (18 * 17) for rows in z[a]]
        row = next(line for line in printed.splitlines() if line.startswith(f"student {a + 1}: mean cosine"))
        assert row.endswith(f"stage by stage: {cosine[0]:.3f} {cosine[1]:.3f}")
    sets = [(u, v) for a in range(2) for u in z[a] for v in z[1 - a]]
    nats = [sum(x.item() for x in values) / len(sets) for values in (
        [losses.vcl(u, labels) for u, _ in sets], [losses.icl(u, v, labels) for u, v in sets])]
    assert f"VCL {nats[0]:.3f}, ICL {nats[1]:.3f}, chance {math.log(17):.3f}" in printed
    assert Path("out/last.pt").read_bytes() == before
    run("--method", "mcl", out="mcl", epochs=1)
    with pytest.raises(SystemExit):
        program(["mcl/last.pt"])
    assert "no checkpoint of lmcl" in capsys.readouterr().err
    program(["out/last.pt"])                               # ten batches, of which there are three
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| ce, own heads |"))
    assert row.endswith("| 1.00 | 1.00 |")


def test_the_log_holds_means_over_the_epoch(run, monkeypatch):
    values, true_terms = [], Independent.terms

    def terms(self, *inputs):
        result = true_terms(self, *inputs)
        values.extend([result["ce"][1].item()] if self.training else [])
        return result

    monkeypatch.setattr(Independent, "terms", terms)
    log = run("--method", "independent")
    assert [line["ce"] for line in log[1:]] == pytest.approx([sum(values[:3]) / 3, sum(values[3:]) / 3], abs=1e-5)


def test_cohorts_of_one_three_and_of_imagenet_students(run):
    """Two steps, evaluation, and a second step but for the last."""
    alone = [["--num-nets", 1, "--method", name] for name in METHODS]
    for n, more in [*((1, more) for more in alone), (3, ["--arch", "resnet8", "wrn_10_1", "shufflenetv2_0.5"]),
                    (2, ["--meta-freq", 3, "--arch", "shufflenet_v2_x0_5"])]:
        log = run(*more, "--max-steps", 2, out=more[-1], epochs=1)
        assert len(log[1]["test_top1"]) == n and math.isfinite(log[1]["loss"])


def test_evaluation_counts_top1_and_top5():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):                                             # ranks class k by pixel k
            return x[:, 0, 0, :7]

    pixels = torch.zeros(4, 3, 8, 8)
    pixels[:, 0, 0, :7] = torch.tensor([10.0, 60, 50, 40, 30, 20, 0])     # ranking: 1, 2, 3, 4, 5, 0, 6
    batches = [(pixels[:3], torch.tensor([1, 2, 5])), (pixels[3:], torch.tensor([6]))]
    assert train.evaluate([Fixed(), Fixed()], batches, devices.Processes({})) == ([25.0] * 2, [75.0] * 2)


def test_validation_chooses_the_best_and_the_test_set_is_looked_at_once(run, monkeypatch):
    splits, true = [], data.InMemory.test_batches
    monkeypatch.setattr(data.InMemory, "test_batches",
                        lambda self, split="test", *part: splits.append(split) or true(self, split, *part))
    log = run("--validation-fraction", 0.33, "--method", "independent", "--batch-size", 12)
    assert splits == ["validation", "validation", "test"] and log[0]["args"]["validation_fraction"] == 0.33
    assert [name in line for line in log[1:] for name in ("validation_top1", "test_top1")] == [True, False, True, True]


def test_starting_from_weights(run, monkeypatch):
    run("--method", "independent", epochs=1)
    files, seen = [f"out/student_{a}_small.pt" for a in (1, 2)], []
    run("--weights", *files, "--max-steps", 1, out="third")
    for file in map(Path, files):
        file.rename(f"{file}.away")
    run("--weights", *files, "--resume", out="third", epochs=2)            # a checkpoint holds all weights
    for file in files:
        Path(f"{file}.away").rename(file)
    monkeypatch.setattr(train, "train", lambda args, dataset, method, run: seen.extend(method.cohort.students))
    run("--weights", *files, out="second")
    for student, file in zip(seen, files, strict=True):
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.equal(v, saved[k]) for k, v in student.backbone.state_dict().items())


def test_too_few_steps_for_a_meta_step_are_warned_of(run, capsys):
    run("--meta-freq", 7)
    assert "less than --meta-freq 7" in capsys.readouterr().out


def test_tensorboard(run, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    run("--tensorboard", epochs=1)
    assert list(Path("out").glob("events*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit):
        run("--tensorboard", out="second", epochs=1)
    assert "pip install tensorboard" in capsys.readouterr().err and not Path("second/log.jsonl").exists()


def test_a_model_file(run, capsys, images):
    """An architecture of a user's own trains, evaluates and predicts; its mistakes are one line."""
    source = """
import torch.nn as nn, models
class Tiny:
    stages, width = 3, {width}
    def stem(self): return nn.Conv2d(3, 16, 3, padding=1)
    def stage(self, l): return nn.Sequential(
        nn.Conv2d(16 if l == 0 else 24, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.Dropout(0.1))
    def tail(self): return nn.Identity()
    def initialise(self, module): models.he_normal(module)
models.ARCHITECTURES["tiny"] = Tiny()
"""
    Path("mine.py").write_text(source.format(width=24))
    for out, parts in (("whole", [[]]), ("parts", [["--max-steps", "2"], ["--resume"]])):
        for part in parts:                                                # dropout's masks too are drawn again
            run("--model-file", "mine.py", "--arch", "tiny", *part, out=out)
    assert_same("whole", "parts")
    capsys.readouterr()
    del models.ARCHITECTURES["tiny"]
    train.main(["--evaluate", "whole/last.pt", "--device", "cpu"])
    assert capsys.readouterr().out.count("tiny: top-1") == 2
    Path("mine.py").write_text(source.replace("24", "32").format(width=32))
    own = ["--model-file", "mine.py", "--arch", "tiny"]
    for again in (["--evaluate", "whole/last.pt", "--device", "cpu", *own], flags(images, "whole", 2, "--resume", *own)):
        with pytest.raises(SystemExit):
            train.main(again)
        error = capsys.readouterr().err
        assert "whole/last.pt holds other networks" in error and "--model-file" in error and error.count("\n") == 1
    Path("mine.py").write_text(source.format(width=25))
    for method in ("lmcl", "afd"):                                        # afd runs the students as it is made
        with pytest.raises(SystemExit) as end:
            run("--model-file", "mine.py", "--arch", "tiny", "--method", method, out="third")
        error = capsys.readouterr().err
        assert end.value.code in (1, 2) and "24" in error and "width" in error and error.count("\n") == 1


# ---------------------------------------------------------------- stopping and going on

def test_same_seed_same_result_other_seed_other_result(run):
    a, _, c = (run(*more, out=out, epochs=1) for out, more in (("a", []), ("b", []), ("c", ["--seed", 1])))
    assert_same("a", "b")
    assert a[1]["loss"] != c[1]["loss"]


STREAMED = ["--contrast", "bank", "--negatives", "16", "--stream", "--augment", "crop", "--batches", "uniform",
            "--workers", "0", "--arch", "small", "small_12", "small", "--amp", "bf16", "--validation-fraction", "0.33",
            "--batch-size", "12"]


@pytest.mark.parametrize("more", [*(["--method", name] for name in METHODS), STREAMED], ids=lambda more: more[1])
def test_resumed_equals_uninterrupted(run, more):
    """Stopped inside the first epoch, at its end, and inside the second."""
    run(*more, out="whole")
    for steps in (1, 1, 3, 5, 2, 0):                                      # 1 again, 2 after 5: nothing left to do
        workers = ["--workers", steps % 3] if "--stream" in more and steps in (0, 5) else []
        run(*more, *workers, "--max-steps", steps, "--resume", out="parts")
    assert_same("parts", "whole")


def test_evaluating_a_streamed_run(run, images, capsys):
    log = run(*STREAMED, epochs=1)
    capsys.readouterr()
    train.main(["--evaluate", "out/last.pt", "--device", "cpu", "--workers", "0"])
    found = re.findall(r"top-1 (\S+)", capsys.readouterr().out)
    assert list(map(float, found)) == log[-1]["test_top1"] and len(found) == 3
    train.main(["--predict", str(images / "test/class3/9.png"), "--checkpoint", "out/last.pt", "--device", "cpu"])
    assert capsys.readouterr().out.count("class") == 6


def test_killed_while_max_steps_end_the_run(run, monkeypatch):
    """At each file that is written after the last step, and resumed."""
    run(out="whole")
    write, step = experiment.write, train.train_step
    for number, name in enumerate(["matching.png", "last.pt", "best.pt", "log.jsonl"], start=1):
        written = []                                       # since step 4 began

        def until(path, *content, number=number, written=written, **keep):
            written.append(path.name)
            if len(written) == number:
                raise KeyboardInterrupt
            write(path, *content, **keep)

        def train_step(args, method, run, *batch, until=until):
            if run.total_steps == 3:
                for module in (experiment, train):
                    m.setattr(module, "write", until)
            return step(args, method, run, *batch)

        with monkeypatch.context() as m, pytest.raises(SystemExit) as end:
            m.setattr(train, "train_step", train_step)
            run("--max-steps", 4, out=name)
        assert end.value.code == 130 and written[-1] == name
        run("--resume", out=name)
        assert_same("whole", name)


def test_max_steps_logs_the_unfinished_epoch(run):
    log = run("--max-steps", 4, epochs=9)
    assert [(line["epoch"], line["step"]) for line in log[1:]] == [(1, 3), (2, 4)]
    assert experiment.load_checkpoint("out/last.pt")["step"] == 1
    best = experiment.load_checkpoint("out/best.pt")
    assert best["best"] == max(sum(line["test_top1"]) / 2 for line in log[1:])
    before = results("out")                                               # the same command again changes nothing
    run("--max-steps", 4, "--resume", epochs=9)
    after = results("out")
    assert before.keys() == after.keys() and {k for k in after if after[k] != before[k]} <= {"previous.pt"}


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.rename(path.with_name("7b.png"))])
@pytest.mark.parametrize("more", [[], ["--contrast", "bank", "--negatives", "16"]])
def test_resuming_on_other_images_is_refused(run, images, capsys, more, spoil):
    shutil.copytree(images, "mine")
    run(*more, "--data-dir", "mine", epochs=2)
    before = Path("out/last.pt").read_bytes()
    for path in Path("mine/train").glob("*/8.png"):
        spoil(path)
    with pytest.raises(SystemExit):
        run(*more, "--data-dir", "mine", "--resume", epochs=2)
    error = capsys.readouterr().err
    assert "was made on training images of other names or another number" in error and error.count("\n") == 1
    assert Path("out/last.pt").read_bytes() == before


def test_a_checkpoint_of_another_program_is_refused(fails):
    experiment.save_checkpoint(Path("other.pt"), dict(format=experiment.CHECKPOINT_FORMAT, args=dict(arch="resnet18")))
    fails(["--evaluate", "other.pt"], "other.pt is no checkpoint of train.py")


def test_the_log_says_where_a_run_went_on(run, monkeypatch):
    run("--max-steps", 1)
    monkeypatch.setattr(experiment, "device_name", lambda device: "another")
    run("--max-steps", 2, "--resume")
    header, *_ = run("--resume")
    assert header["resumed"] == [dict(after_step=1, torch=header["torch"], device="another")]


def test_what_resuming_says(run, capsys):
    run("--resume", epochs=1)
    assert "starting afresh" in capsys.readouterr().out
    run("--resume", epochs=1)
    assert "no step is left to do" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--method", "afd"], ["--contrast", "bank"]])
def test_bfloat16(run, more):
    assert math.isfinite(run("--amp", "bf16", *more, epochs=1)[1]["loss"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_resuming_gives_the_same(run, number, monkeypatch, capsys):
    run(out="whole")
    true_step, calls, handler = train.train_step, [], signal.getsignal(number)

    def step(*inputs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return true_step(*inputs)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(SystemExit) as end:
        run(out="parts")
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1 and "after step 2" in error and "--resume" in error
    assert experiment.load_checkpoint("parts/last.pt")["total_steps"] == 2
    assert signal.getsignal(number) is handler
    run("--resume", out="parts")
    assert_same("parts", "whole")


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(run, monkeypatch, capsys):
    run("--max-steps", 2)
    before, true_loss = Path("out/last.pt").read_bytes(), losses.lmcl_loss
    monkeypatch.setattr(losses, "lmcl_loss", lambda *a: {**true_loss(*a), "icl": torch.tensor(math.nan)})
    with pytest.raises(SystemExit) as end:
        run("--resume")
    error = capsys.readouterr().err
    assert end.value.code == 1 and "icl" in error and "step 3:" in error and "--lr" in error
    assert Path("out/last.pt").read_bytes() == before


@pytest.mark.parametrize("file, workers", [("train/class3/5.png", 0), ("train/class3/5.png", 2), ("test/class3/9.png", 0)])
def test_an_image_that_breaks_while_training_is_named_and_nothing_is_lost(run, images, capsys, file, workers):
    """A streamed file is damaged after the first epoch has read it, then mended: the run goes on as if nothing was."""
    streamed = ["--stream", "--workers", workers, "--method", "independent"]
    shutil.copytree(images, "mine")
    run(*streamed, "--data-dir", "mine", out="whole")
    run(*streamed, "--data-dir", "mine", "--max-steps", 3, out="parts")
    whole = Path("mine", file).read_bytes()
    Path("mine", file).write_bytes(whole[:100])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*streamed, "--data-dir", "mine", "--resume", out="parts")
    error = capsys.readouterr().err
    assert end.value.code == 1 and f"mine/{file}" in error and error.count("\n") == 1
    if "test" in file:                                                    # all of the epoch's steps are kept
        assert experiment.load_checkpoint("parts/last.pt")["total_steps"] == 6
    Path("mine", file).write_bytes(whole)
    run(*streamed, "--data-dir", "mine", "--resume", out="parts")
    assert_same("parts", "whole")


# ---------------------------------------------------------------- what users do wrong

@pytest.mark.parametrize("more, status, words", [
    (["--arch", "resnet33"], 2, "--arch: unknown student 'resnet33'"),
    (["--arch", "resnet18", "resnet32"], 2, "stages"),
    (["--num-nets", "0"], 2, "--num-nets: must be at least 1"),
    (["--arch", "resnet8", "resnet20", "--num-nets", "3"], 2, "--num-nets"),
    (["--batch-size", "1"], 2, "--batch-size: must be even"),
    (["--batch-size", "19"], 2, "--batch-size: must be even"),
    (["--batch-size", "1000"], 1, "54"),
    (["--epochs", "0"], 2, "--epochs"),
    (["--epochs", "ten"], 2, "--epochs"),
    (["--max-steps", "-1"], 2, "--max-steps"),
    (["--lr", "0"], 2, "--lr"),
    (["--lr", "nan"], 2, "--lr"),
    (["--momentum", "1"], 2, "--momentum"),
    (["--momentum", "0"], 2, "Nesterov"),
    (["--weight-soft-icl", "nan"], 2, "--weight-soft-icl"),
    (["--weight-adversarial", "-1"], 2, "--weight-adversarial"),
    (["--weight-decay", "-1"], 2, "--weight-decay"),
    (["--tau", "0"], 2, "--tau"),
    (["--T", "-3"], 2, "--T"),
    (["--T", "4", "--method", "dml"], 2, "--T: dml"),
    (["--meta-freq", "0"], 2, "--meta-freq"),
    (["--meta-steps", "0"], 2, "--meta-steps"),
    (["--negatives", "0"], 2, "--negatives"),
    (["--bank-momentum", "1"], 2, "--bank-momentum"),
    (["--milestones", "0"], 2, "--milestones"),
    (["--validation-fraction", "1"], 2, "--validation-fraction"),
    (["--image-size", "4"], 2, "--image-size"),
    (["--seed", "-1"], 2, "--seed"),
    (["--seed", str(2 ** 63)], 2, "--seed: must be between 0 and 2^63 - 1"),
    (["--save-every", "-1"], 2, "--save-every"),
    (["--workers", "-1"], 2, "--workers"),
    (["--method", "mlc"], 2, "--method"),
    (["--dataset", "cifar1000"], 2, "--dataset"),
    (["--evaluate", ""], 2, "--evaluate: must be a file's name"),
    (["--out-dir", ""], 2, "--out-dir: must be a folder's name"),
    (["--logit-kd"], 2, "--logit-kd: goes with --method mcl"),
    (["--matching", "uniform", "--method", "mcl"], 2, "--matching: goes with --method lmcl"),
    (["--weights", "a.pt"], 2, "--weights: must be 2 files"),
    (["--model-file", "nowhere.py"], 2, "nowhere.py"),
    (["--no-such-flag"], 2, "--no-such-flag"),
    (["--data-dir", "nowhere"], 1, "nowhere"),
    (["--dataset", "imagenet", "--data-dir", "nowhere", "--arch", "resnet18"], 1, "nowhere"),
    (["--weights", "a.pt", "b.pt"], 1, "a.pt"),
    (["--device", "tpu9"], 1, "--device tpu9"),
    (["--device", "meta"], 1, "--device meta"),
    (["--device", "cuda:x"], 1, "--device cuda:x"),
    (["--device", ""], 1, "--device "),
    (["--evaluate", "nothing.pt"], 1, "nothing.pt"),
    (["--evaluate", "junk.pt"], 1, "junk.pt"),
    (["--evaluate", "foreign.pt"], 1, "foreign.pt"),
    (["--evaluate", "future.pt"], 1, "newer"),
    (["--evaluate", "past.pt"], 1, "older"),
    (["--predict", "cat.png"], 2, "--checkpoint"),
    (["--predict", "cat.png", "--checkpoint", "junk.pt"], 1, "junk.pt"),
    (["--image-size", "10000000"], 1, "out of memory"),
    (["--out-dir", "junk.pt/x"], 1, "--out-dir junk.pt/x"),
    (["--out-dir", "x" * 300], 1, "--out-dir xxx"),
    (["--out-dir", "/proc/nowhere"], 1, "--out-dir /proc/nowhere"),
    (["--cuda-graph"], 1, "--cuda-graph wants a CUDA device, and this is cpu"),
    pytest.param(["--device", "cuda"], 1, "--device cuda",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")),
])
def test_user_errors_end_in_one_line(fails, more, status, words):
    Path("junk.pt").write_bytes(b"junk" * 100)
    experiment.save_checkpoint("foreign.pt", {"weights": torch.ones(2)})
    experiment.save_checkpoint("future.pt", {"format": 99, "args": {}, "model": {}})
    experiment.save_checkpoint("past.pt", {"format": 1, "args": {}, "net": {}})
    fails(more, words, status=status)


def test_out_dirs_that_cannot_be_used(run, fails, capsys):
    run(out="used")
    before = results("used")
    for more, words in ((["--out-dir", "used"], "--resume"),
                        (["--out-dir", "used", "--resume", "--lr", "0.3"], "--lr 0.1 (now 0.3)"),
                        (["--out-dir", "used", "--resume", "--epochs", "7"], "learning-rate schedule"),
                        (["--out-dir", "used", "--arch", "resnet8", "resnet20", "--resume"],
                         "--arch small small (now resnet8 resnet20)")):
        fails(more, words)
    assert results("used") == before
    Path("used/last.pt").write_bytes(Path("used/last.pt").read_bytes()[:-1000])
    fails(["--out-dir", "used", "--resume"], "used/last.pt is damaged", "mv used/previous.pt used/last.pt")
    Path("used/previous.pt").unlink()
    fails(["--out-dir", "used", "--resume"], "used/last.pt is damaged", "another --out-dir")
    Path("used/last.pt").unlink()
    Path("used/last.pt").mkdir()
    fails(["--out-dir", "used", "--resume"], "Is a directory", "another --out-dir")
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
    monkeypatch.setattr(experiment.OutDir, "open", full)
    fails([], "No space left on device")


def test_benchmark(images, tmp_path, capsys):
    benchmark.main(flags(images, tmp_path, 1))
    first, *rows = capsys.readouterr().out.splitlines()
    names = ["step, deep-supervision", "step, lmcl", "meta step", "evaluation"]
    assert [row[:24].strip() for row in rows] == names
    timed = json.loads(first)
    assert all(timed[name]["operations"] > 100 for name in names[:3]) and timed[names[1]]["images_per_second"] > 0
    with pytest.raises(SystemExit):
        benchmark.main(flags(images, tmp_path, 1, "--cuda-graph"))
    assert "--cuda-graph wants a CUDA device" in capsys.readouterr().err


def test_data_sets_and_files_that_do_not_go_with_evaluation(run, fails, images, capsys, monkeypatch):
    run(out="finished")
    shutil.copytree(images, "other")
    shutil.copytree(images / "train", "no_test/train")
    train.main(["--evaluate", "finished/student_1_small.pt", "--device", "cpu", "--dataset", "folder", "--data-dir",
                "no_test", "--validation-fraction", "0.4"])
    assert "student 1  small: top-1" in capsys.readouterr().out
    for split in ("train", "test"):
        Path("other", split, "class0").rename(Path("other", split, "cat"))
    for where, *words in (("other", "finished/last.pt was trained on other classes", "class0, class1", "cat, class1"),
                          ("gone", "--data-dir gone", "expected")):
        with pytest.raises(SystemExit) as end:
            train.main(["--evaluate", "finished/last.pt", "--device", "cpu", "--data-dir", where])
        error = capsys.readouterr().err
        assert end.value.code == 1 and error.count("\n") == 1 and all(w in error for w in words)
    for environment, path, words in (({}, "finished/student_1_small.pt", "give --dataset and --data-dir"),
                                     (dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"), "finished/last.pt", "torchrun")):
        with monkeypatch.context() as m, pytest.raises(SystemExit) as end:
            for item in environment.items():
                m.setenv(*item)
            train.main(["--evaluate", path, "--device", "cpu"])
        error = capsys.readouterr().err
        assert end.value.code == 1 and error.count("\n") == 1 and words in error
    fails(["--evaluate", "finished"], "finished", "Is a directory")
    fails(["--evaluate", "finished/log.jsonl"], "finished/log.jsonl is no file of weights")


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "--batch-size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "--batch-size"),
    (RuntimeError("x_cuda does not have a deterministic implementation, but you set 'torch"),
     "--deterministic cannot be had here (x_cuda"),
    (KeyboardInterrupt(), "interrupted"),
    (RuntimeError("a defect"), None),
])
def test_errors_of_the_device_are_told_and_others_are_not_hidden(error, words, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "load_data", fail)
    with pytest.raises(SystemExit if words else RuntimeError) as end:
        train.main(["--device", "cpu", "--out-dir", "nowhere"])
    message = capsys.readouterr().err
    assert not words or words in message and message.count("\n") == 1 and end.value.code in (1, 130)


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
    assert end.value.code == 1 and "No space left" in error and "MiB" in error and error.count("\n") == 1
    assert Path("out/last.pt").read_bytes() == before and not list(Path("out").glob("*.tmp"))


def test_as_a_program(tmp_path, images):
    """From the shell, with a reader that goes away (| head -1): the run does not stop, the exit is clean."""
    command = [sys.executable, str(HERE / "train.py"),
               *flags(images, tmp_path / "out", 1, "--method", "independent", "--arch", "resnet8")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0
    assert len(read_log(tmp_path / "out")) == 2


def test_control_c_while_images_load_ends_at_once(tmp_path):
    """Also while libraries are imported; always one line."""
    first = tmp_path / "train/0"
    first.mkdir(parents=True)
    Image.effect_noise((1500, 1500), 50).convert("RGB").save(first / "0.png", compress_level=1)
    for k in range(1, 1000):
        os.link(first / "0.png", first / f"{k}.png")
    (tmp_path / "train/1").symlink_to(first)
    (tmp_path / "test").symlink_to(tmp_path / "train")
    command = [sys.executable, str(HERE / "train.py"), "--dataset", "folder", "--data-dir", tmp_path, "--device", "cpu"]
    start = lambda: subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for loading, started in ((False, start()), (True, start())):          # both start now
        with started as process:
            maps = Path(f"/proc/{process.pid}/maps")
            while not loading and maps.exists() and "libtorch" not in maps.read_text():
                time.sleep(0.01)
            assert not loading or process.stdout.readline().startswith("loading")
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=20)[1]                    # all the images take longer
            assert process.returncode in (1, 130) and error.count("\n") == 1 and "interrupted" in error, error


# ---------------------------------------------------------------- the shape of the project

def test_no_file_imports_upward():
    """Leaves import nothing of ours, and the files stand in one order."""
    leaves = {"losses", "models", "data", "second_order"}
    order = ["devices", "meta", "experiment", "methods", "options", "train", "benchmark", "detect", "compare"]
    for place, name in enumerate([*leaves, *order]):
        if not (HERE / f"{name}.py").exists():
            continue
        imported = {n.split(".")[0] for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text()))
                    for n in ([a.name for a in node.names] if isinstance(node, ast.Import) else
                              [node.module] if isinstance(node, ast.ImportFrom) else [])}
        below = set() if name in leaves or name == "compare" else leaves | set(order[:place - len(leaves)])
        assert imported & (leaves | set(order)) <= below, name
    assert set(METHODS) == {"lmcl", "mcl", "deep-supervision", "dml", "afd", "independent"}


def test_every_function_that_the_docs_name_exists():
    """README and docs point to `file.name`: the auditor's way from an equation to its line."""
    for page in (HERE / "README.md", *(HERE / "docs").glob("*.md")):
        for name, path in re.findall(r"\b([a-z_]+)\.([A-Za-z_]\w*(?:\.\w+)?)", page.read_text()):
            if (HERE / f"{name}.py").exists() and path.split(".")[0] not in ("py", "md"):
                operator.attrgetter(path)(importlib.import_module(name))              # or AttributeError
