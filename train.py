"""Train N students together by layer-wise mutual contrastive learning (L-MCL), or by one of its baselines.

    python train.py --dataset synthetic --arch resnet8 --epochs 3      # two minutes on two cores, no download
    python train.py --arch resnet32 --num-nets 2                       # CIFAR-100, the published recipe
    python train.py --arch resnet56 wrn_40_2                           # two different students
    python train.py --arch resnet32 --method independent               # the published baseline
    python train.py --dataset folder --data-dir my_images              # my_images/{train,test}/CLASS/*
    torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir imagenet --arch resnet50    # eight GPUs
    python train.py --arch resnet32 --resume                           # go on after an interruption
    python train.py --evaluate out/RUN/last.pt                         # top-1 and top-5 of every student
    python train.py --predict cat.jpg --checkpoint out/RUN/student_1_resnet32.pt

The method is that of Yang et al., TPAMI 2023 (arXiv 2207.11518). SIGINT, SIGTERM, SIGHUP and SIGUSR1 end a run after the
present step, with everything saved; a second one ends it at once.
"""

import os
import signal

# Ctrl-C while libraries load, which may swallow exceptions; a shell's `&` ignores it
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"train.py: interrupted\n"), os._exit(130)))

import argparse
import dataclasses
import functools
import hashlib
import itertools
import math

import torch

import data
import devices
import experiment
import meta
import models
import options
from devices import CUDAGraphs, UserError
from experiment import say, shorten, write
from methods import METHODS


# ---------------------------------------------------------------- the algorithm

def train(args, dataset, method, run):
    """The ordinary step on every batch, the method's second step on every n-th, evaluation after every epoch."""
    ordinary_step, second_step = steps(args, dataset, method, run)
    for epoch in range(run.epoch, args.epochs):
        if 0 < args.max_steps <= run.total_steps and not run.step:
            return
        run.start_epoch(learning_rate(args, epoch))
        for images, labels, index in run.timed(train_batches(args, dataset, run, epoch)):
            rows = method.bank.draw(index, epoch, run.step) if method.bank else ()
            seed_dropout(args.seed, run.total_steps, run.processes.rank)
            logged = ordinary_step(images, labels, *rows)
            run.add(logged, len(labels))
            if method.second_every and run.total_steps % method.second_every == 0:
                run.show_progress(method.second_name)
                second_step(images, labels, *rows)          # L-MCL: the meta step
            run.after_step()
        line, score = evaluate_epoch(args, dataset, method, run)
        if run.step < run.steps_per_epoch:                  # --max-steps
            return run.end_early(line, score)
        method.end_epoch()
        run.end_epoch(line, score)


def train_step(args, method, run, images, labels, *rows):
    """One SGD step on a batch: images [B, 3, H, W], labels [B], and the bank's rows. Returns the terms as logged."""
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        terms = method.terms(images, labels, *rows)
        loss = sum(weight * value for weight, value in terms.values() if weight is not None)
    method.zero_grad()                                     # all: a captured step must not add to an old gradient
    loss.backward()

    logged = as_logged(loss, terms)
    trained = (p for group in run.optimizers[0].param_groups for p in group["params"])
    gradients = [p.grad for p in trained if p.grad is not None]
    run.processes.average_in_place([*gradients, *method.statistics(), *logged.values()])
    run.optimizers[0].step()
    method.after_step(*rows)
    return logged


def as_logged(loss, terms):
    """{"loss", each term by name and times its weight, "unweighted_" + name where that is not 1}.

    The terms sum to the loss, but for those of weight None, which are logged as they are.
    """
    parts = {name: value if weight is None else weight * value for name, (weight, value) in terms.items()}
    plain = {f"unweighted_{name}": value for name, (weight, value) in terms.items() if weight not in (1, None)}
    return {name: value.detach() for name, value in {"loss": loss, **parts, **plain}.items()}


def steps(args, dataset, method, run):
    """The ordinary and the second step as functions of a batch's tensors; with --cuda-graph captured and replayed."""
    def second_step(*batch):
        method.second_step(run.optimizers[-1], run.lr, run.processes.average, *batch)

    ordinary_step = functools.partial(train_step, args, method, run)
    if not args.cuda_graph:
        return ordinary_step, second_step
    example = torch.zeros(2, 3, args.image_size, args.image_size, device=args.device)
    with torch.no_grad(), meta.batch_statistics(method.train()):
        dropout = devices.draws_random_numbers(lambda: method.students(example), args.device)
    if dropout and method.second_every and method.second_name == "meta step":
        raise UserError("--cuda-graph cannot draw a student's dropout masks again in the meta step: leave it out")
    if hasattr(dataset, "draw"):                           # the augmentation of images in memory
        dataset.draw = CUDAGraphs(dataset.draw)
    return CUDAGraphs(ordinary_step), CUDAGraphs(second_step)


def learning_rate(args, epoch):
    if args.schedule == "cosine":
        return args.lr / 2 * (1 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)


def train_batches(args, dataset, run, epoch):
    batches = dataset.train_batches(args.batch_size, args.seed, epoch, run.step, pairs=args.batches == "pairs",
                                    part=run.processes.part)
    return itertools.islice(batches, run.steps_left)


def seed_dropout(seed, step, rank):
    """Dropout is all that is random in a step: its masks are a function of this, so a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed},{step},{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(networks, batches, processes):
    """Top-1 and top-5 accuracy in percent of each network, images -> logits [B, C], on all batches: two lists."""
    hits = torch.zeros(2, len(networks), dtype=torch.int64, device=next(networks[0].parameters()).device)
    count = torch.zeros_like(hits[0, :1])
    for images, labels in batches:
        logits = torch.stack([network.eval()(images) for network in networks])              # [N, B, C]
        best = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]             # [N, B, 5]
        hits += torch.stack([best[..., 0].sum(1), best.any(-1).sum(1)])                     # [2, N]
        count += len(labels)
    *hits, count = processes.sum(torch.cat([hits.flatten(), count])).tolist()               # the host waits here
    percent = [round(100 * n / count, 2) for n in hits]
    return percent[:len(networks)], percent[len(networks):]


def evaluate_epoch(args, dataset, method, run):
    """The epoch's line, printed and drawn, and the score that best.pt is chosen by: mean top-1 of the students."""
    run.stop_clock()
    run.show_progress("evaluation", every=0)
    split = "validation" if len(dataset.validation_labels) else "test"
    last = run.epoch + 1 == args.epochs and run.step == run.steps_per_epoch
    backbones, scores = [student.backbone for student in method.cohort.students], {}
    for name in dict.fromkeys([split, "test"] if last else [split]):   # with a validation split the test set once, last
        top1, top5 = evaluate(backbones, dataset.test_batches(name, run.processes.part), run.processes)
        scores |= {f"{name}_top1": top1, f"{name}_top5": top5}
    line = run.line(lr=learning_rate(args, run.epoch), **scores)
    if run.is_main:
        tops = "  ".join(f"{name[:-5]} top-1 {' '.join(f'{x:.2f}' for x in top)}"
                         for name, top in scores.items() if name.endswith("top1"))
        say(f"epoch {line['epoch']:3d}  step {line['step']}  lr {line['lr']:.4f}  loss {line['loss']:.3f}  "
            f"ce {line['ce']:.3f}  {tops}  {line['images_per_second']:.0f} images/s")
        if picture := method.picture(run.step, run.total_steps):
            write(run.out / "matching.png", picture)
        run.to_tensorboard(line, picture)
    return line, sum(scores[f"{split}_top1"]) / len(backbones)


def evaluate_file(args):
    """--evaluate: top-1 and top-5 of every student of last.pt, best.pt or a student file."""
    students, saved = trained_students(args.evaluate, args)
    saved.dataset, saved.data_dir = args.dataset or saved.dataset, args.data_dir or saved.data_dir or "data"
    streamed = args.stream or saved.stream or students[0].resize != students[0].image_size
    saved.stream, saved.workers = streamed and saved.dataset == "folder", args.workers
    dataset = load_data(saved, image_size=students[0].image_size)
    check_classes(args.evaluate, students[0].classes, dataset, saved.data_dir)
    dataset = dataclasses.replace(dataset, mean=students[0].mean, std=students[0].std).to(args.device)
    scores = evaluate(students, dataset.test_batches("test"), devices.Processes({}))
    for a, (student, top1, top5) in enumerate(zip(students, *scores, strict=True), start=1):
        say(f"student {a}  {student.architecture}: top-1 {top1:.2f}  top-5 {top5:.2f}")


def check_classes(path, classes, dataset, data_dir):
    if list(classes) != list(dataset.classes):
        raise UserError(f"{path} was trained on other classes ({shorten(classes)}) than those of --dataset "
                        f"{dataset.name} --data-dir {data_dir} ({shorten(dataset.classes)}): give its own data set")


@torch.no_grad()
def predict(args):
    """--predict: the five likeliest classes of each picture, one line each; by the students' mean probability."""
    students, _ = trained_students(args.checkpoint, args)
    for path, pixels in data.pictures(args.predict):
        image = students[0].transform(pixels)[None].to(args.device)                                  # [1, 3, H, W]
        probability = torch.stack([student(image).softmax(-1)[0] for student in students]).mean(0)   # [C]
        best = probability.topk(min(5, len(probability)))
        say(f"{path}  " + "  ".join(f"{students[0].classes[c]} {p:.2f}" for p, c in
                                    zip(best.values.tolist(), best.indices.tolist(), strict=True)))


def trained_students(path, args):
    """The networks of a student file, last.pt or best.pt, in eval mode (models.load_student), and the run's options.

    A student file has no options: those of this command line, seed and validation fraction too.
    """
    content = as_user_error(models.read_weights, path)
    if models.is_student_file(content):
        if args.evaluate and not args.dataset:
            raise UserError(f"{path} does not say on what it was trained: give --dataset and --data-dir")
        return [as_user_error(models.load_student, content).to(args.device)], argparse.Namespace(**vars(args))
    state = experiment.load_checkpoint(path)
    if "method" not in state["args"]:
        raise UserError(f"{path} is no checkpoint of train.py")
    saved = argparse.Namespace(**state["args"])
    if saved.model_file and not args.model_file:
        as_user_error(models.load_model_file, saved.model_file)
    cohort, students = models.Cohort(saved.arch, len(state["classes"]), branches=False), []
    for a, (name, student) in enumerate(zip(saved.arch, cohort.students, strict=True)):
        prefix = f"students.{a}.backbone."
        own = {key.split(prefix)[1]: tensor for key, tensor in state["model"].items() if prefix in key}
        experiment.load_into(student.backbone, own, path)
        students.append(models.load_student(student_content(student.backbone, name, state)).to(args.device))
    return students, saved


def student_content(backbone, name, metadata):
    keys = "classes", "mean", "std", "image_size", "resize"
    return models.student_file(backbone, name, *(metadata[k] for k in keys))


# ---------------------------------------------------------------- setting up

def load_data(args, image_size=None):
    return data.load(args.dataset, args.data_dir, image_size or args.image_size, stream=args.stream, seed=args.seed,
                     validation_fraction=args.validation_fraction, augment=args.augment, workers=args.workers)


def build(args, dataset, resumed=False):
    """The method's networks on the device, drawn from the seed: the same initial backbones for every method.

    resumed: the weights will come from a checkpoint, so the files of --weights are not wanted.
    """
    torch.manual_seed(args.seed)
    method = as_user_error(METHODS[args.method], args, len(dataset.classes), dataset.train_labels)
    if args.weights and not resumed:
        for student, name, path in zip(method.cohort.students, args.arch, args.weights, strict=True):
            dataset.notes.append(f"weights {path}: " + as_user_error(models.load_weights, student.backbone, name, path))
    return method.to(args.device, memory_format=torch.channels_last)


def make_optimizers(args, method):
    """SGD of the recipe for what the loss trains, and the optimizer of the second step, if there is one."""
    return method.optimizers(lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True,
                             fused=True)


def as_user_error(call, *inputs):
    """call(*inputs), whose ValueError is one line for the user."""
    try:
        return call(*inputs)
    except ValueError as error:
        raise UserError(str(error)) from None


@torch.no_grad()
def formula(args, method):
    """The loss in words, from the terms of two black images; they leave no trace."""
    images = torch.zeros(2, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.zeros(2, dtype=torch.int64, device=args.device)
    index = torch.zeros_like(labels)
    terms = method.eval().terms(images, labels, *(method.bank.draw(index, 0, 0) if method.bank else ()))
    method.end_epoch()
    weights = {name: weight for name, (weight, _) in terms.items() if weight is not None}
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items()) \
        + (f"; tau {args.tau:g}, T {args.T:g}, contrast {args.contrast}" if method.embeddings else "")


def report(args, dataset, method, run):
    """What will be trained, on what, for how long."""
    for a, (name, student) in enumerate(zip(args.arch, method.cohort.students, strict=True), start=1):
        own, whole = (models.multiply_adds(m, args.image_size) / 1e6 for m in (student.backbone, student))
        say(f"student {a}  {name}: {models.parameters(student.backbone):,} parameters, {own:.1f}M multiply-adds"
            + (f"; with branches {models.parameters(student):,}, {whole:.1f}M" if len(student.branches) else ""))
    held = f", {len(dataset.validation_labels):,} validation" if len(dataset.validation_labels) else ""
    say(f"data       {dataset.name}: {len(dataset.train_labels):,} training{held} and {len(dataset.test_labels):,} "
        f"test images, {len(dataset.classes)} classes, {args.image_size}x{args.image_size}")
    for note in dataset.notes:
        say(f"           {note}")
    say(f"device     {devices.device_name(args.device)}, torch {torch.__version__}"
        + (f", {run.processes.size} processes" if run.processes.size > 1 else ""))
    say(f"loss       {args.method}: {formula(args, method)}")
    total = args.epochs * run.steps_per_epoch
    say(f"steps      {args.epochs} epochs of {run.steps_per_epoch} steps of {args.batch_size} = {total:,}"
        + (f", ending at {args.max_steps:,}" if args.max_steps else "")
        + (f"; {args.schedule} schedule" + (f", drops at {args.milestones}" if args.schedule == "multistep" else "")))
    if method.second_every > min(total, args.max_steps or total):
        say(f"warning    this is less than --meta-freq {args.meta_freq}: no meta step will be made, "
            "and the matching network stays as drawn")
    say(f"output     {run.out}")


def main(argv=None):
    """Run the command line; whatever the user can mend ends in one line and status 1 (2 for a wrong flag)."""
    args = options.parse(__doc__, argv)
    with experiment.one_line_errors("train.py", (UserError, data.DataError), args):
        processes = devices.Processes()
        args.device = devices.pick_device(args.device, processes)
        if args.deterministic:
            devices.be_deterministic()
        if args.evaluate or args.predict:
            processes.be_alone("--evaluate" if args.evaluate else "--predict")
            return evaluate_file(args) if args.evaluate else predict(args)
        devices.check_graphs(args, processes)
        if args.batch_size % (2 * processes.size):
            raise UserError(f"--batch-size {args.batch_size} must divide by {2 * processes.size}: pairs of images "
                            f"for {processes.size} processes")
        out = experiment.OutDir(args.out_dir)
        found = out.find_checkpoint(args, options.WHERE, processes)
        if processes.rank == 0:
            say("loading    the data set")
        dataset = load_data(args).to(args.device)
        steps_per_epoch = dataset.steps_per_epoch(args.batch_size)
        if found:
            check_classes(out / "last.pt", found["classes"], dataset, args.data_dir)
        method = build(args, dataset, resumed=bool(found))
        with experiment.Signals("train.py", processes) as signals:
            if processes.rank == 0:
                out.open()
            processes.start(args.device)
            processes.broadcast(method)
            method.gather = processes.gather
            metadata = {name: getattr(dataset, name) for name in ("classes", "mean", "std", "image_size", "resize", "digest")}
            run = experiment.Run(args, out, method, make_optimizers(args, method), metadata, steps_per_epoch,
                                 len(dataset.train_labels), processes, signals)
            if run.is_main:
                report(args, dataset, method, run)
            if found:
                run.load(found)
                found.clear()                              # its tensors are not needed twice
            if run.is_main and args.resume:
                over = run.epoch >= args.epochs or 0 < args.max_steps <= run.total_steps
                say(f"resuming   {out / 'last.pt'}, {run.total_steps:,} steps done" + "; no step is left to do" * over
                    if run.total_steps else f"resuming   no {out / 'last.pt'}: starting afresh")
            run.write_log()
            with run.saving_on(data.DataError):
                train(args, dataset, method, run)
            if run.is_main:
                for a, (name, student) in enumerate(zip(args.arch, method.cohort.students, strict=True), start=1):
                    content = experiment.torch_bytes(student_content(student.backbone, name, metadata))
                    write(out / f"student_{a}_{name}.pt", content)
                say(run.closing_words())
            processes.stop()


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
