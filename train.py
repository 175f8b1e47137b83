r"""Train N students together by layer-wise mutual contrastive learning (L-MCL), or by a baseline.

    python train.py --dataset synthetic --synthetic-images 400 --arch resnet8 --epochs 60 \
        --batch-size 32 --lr 0.05                             # a first try, in two minutes
    python train.py --arch resnet32 --num-nets 2              # CIFAR-100, the published recipe
    python train.py --arch resnet56 wrn_40_2                  # two different students
    python train.py --arch resnet32 --method independent      # the published baseline
    python train.py --dataset folder --data-dir my_images     # my_images/{train,test}/CLASS/*
    torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir imagenet --arch resnet50
    python train.py --arch resnet32 --resume                  # go on after an interruption

predict.py uses, evaluates and exports what was trained. The method is that of Yang et al., TPAMI
2023 (arXiv 2207.11518). SIGINT, SIGTERM, SIGHUP and SIGUSR1 end a run after the present step,
with everything saved; a second one ends it at once.
"""

import support.interrupt  # noqa: F401  first: Ctrl-C while libraries load

import functools
import itertools
import math
import shlex

import torch
from torch.utils._pytree import tree_map

import data
import meta
import models
import options
from methods import METHODS, check_second
from support import seeds
from support.console import Signals, UserError, one_line_errors, say, shorten
from support.cuda_graphs import CUDAGraphs, check_graphs, draws_random_numbers
from support.files import load_pretrained, student_file, torch_bytes, write
from support.picture import matching_picture
from support.precision import mixed_precision
from support.processes import Processes, be_deterministic, device_name, pick_device
from support.run import OutDir, Run, fill_gradients, own_code
from support.terms import as_logged, check_terms, unreached

# ---------------------------------------------------------------- the algorithm

def train(args, dataset, method, run):
    """The ordinary step on every batch, the second step on every n-th, evaluation every epoch."""
    ordinary_step, second_step = make_steps(args, dataset, method, run)
    for epoch in run.epochs():
        run.set_lr(learning_rate(args, epoch, run.step / run.steps_per_epoch))
        method.start_epoch(epoch)
        for images, labels, index in run.timed(train_batches(args, dataset, run)):
            rows = method.bank.sample(index, epoch, run.step) if method.bank else None
            if epoch < args.warmup:
                run.set_lr(learning_rate(args, epoch, (run.step + 1) / run.steps_per_epoch))
            seed_dropout(args.seed, run.total_steps, run.processes.rank, args.device)
            logged, outputs = ordinary_step(images, labels, rows)
            run.add(logged, len(labels))
            if method.second and method.second.is_due(epoch, run.total_steps):
                run.show_progress(method.second.name)
                second_step(images, labels, rows, outputs)  # L-MCL: the meta step
            run.after_step()
        run.end_epoch(*evaluate_epoch(args, dataset, method, run))


def train_step(args, method, run, images, labels, rows):
    """One SGD step on a batch: images [B, 3, H, W], labels [B], and the bank's rows or None.

    Returns the terms as logged, and the students' outputs, detached.
    """
    with mixed_precision(args):
        outputs = method(images)
        terms = method.terms(outputs, labels, rows)
        loss = sum(weight * value for weight, value in terms.values() if weight is not None)
    method.zero_grad()  # all: a captured step must not add to an old gradient
    loss.backward()

    logged = as_logged(loss, terms)
    gradients = fill_gradients(run.optimizers[0])
    run.processes.average_in_place([*gradients, *method.statistics(), *logged.values()])
    run.optimizers[0].step()
    method.after_step(outputs, rows)
    return logged, tree_map(lambda x: x.detach() if torch.is_tensor(x) else x, outputs)


def make_steps(args, dataset, method, run):
    """The ordinary and the second step as functions of a batch; --cuda-graph captures them."""
    def second_step(*batch):
        method.second.step(run.optimizers[1], run.lr, run.processes.average, *batch)

    ordinary_step = functools.partial(train_step, args, method, run)
    if not args.cuda_graph:
        return ordinary_step, second_step
    example = torch.zeros(2, 3, args.image_size, args.image_size, device=args.device)
    with torch.no_grad(), meta.batch_statistics(method.train()):
        dropout = draws_random_numbers(lambda: method.students(example), args.device)
    phase = lambda: method.phase
    captured_second = CUDAGraphs(second_step, phase)
    if dropout and method.second and method.second.step == getattr(method, "meta_step", None):
        say("warning    --cuda-graph cannot draw a student's dropout masks again in the meta step: "
            "it stays as it is")
        captured_second = second_step
    if hasattr(dataset, "take"):  # the augmentation of images in memory
        dataset.take = CUDAGraphs(dataset.take)
    return CUDAGraphs(ordinary_step, phase), captured_second


def learning_rate(args, epoch, share=0.0):
    """By the epoch, counted from 0; linear in the first --warmup epochs.

    share: of the epoch that is done, for the warm-up.
    """
    warm = min(1, (epoch + share) / args.warmup) if args.warmup else 1
    if args.schedule == "cosine":
        done = max(0, epoch - args.warmup)
        return args.lr * warm / 2 * (1 + math.cos(math.pi * done / (args.epochs - args.warmup)))
    drops = sum(epoch >= milestone for milestone in args.milestones)
    return args.lr * warm * 0.1 ** drops


def train_batches(args, dataset, run):
    """What is left of the epoch, or until --max-steps: images, labels and index of each batch."""
    batches = dataset.train_batches(args.batch_size, args.seed, run.epoch, run.step,
                                    pairs=args.batches == "pairs", share=run.processes.share)
    return itertools.islice(batches, run.steps_left)


def seed_dropout(seed, step, rank, device):
    """Dropout is all that is random in a step: a resumed run draws the same masks."""
    seeds.seed_own(seeds.seed(f"{seed},{step},{rank}"), device)


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(networks, batches, processes):
    """Two lists with one number a network: top-1 and top-5 accuracy in percent.

    networks: images [B, 3, H, W] -> logits [B, C]. batches: of images and labels [B].
    """
    device = next(networks[0].parameters()).device
    hits = torch.zeros(2, len(networks), dtype=torch.int64, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    for images, labels in batches:
        logits = torch.stack([network.eval()(images) for network in networks])  # [N, B, C]
        is_hit = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]  # [N, B, 5]
        hits += torch.stack([is_hit[..., 0].sum(1), is_hit.any(-1).sum(1)])  # [2, N]
        count += len(labels)
    *hits, count = processes.sum(torch.cat([hits.flatten(), count])).tolist()  # the host waits here
    percent = [round(100 * n / count, 2) for n in hits]
    return percent[:len(networks)], percent[len(networks):]


def evaluate_epoch(args, dataset, method, run):
    """The epoch's line, printed and drawn, and the score that best.pt is chosen by: mean top-1."""
    chosen_on = "validation" if len(dataset.validation_labels) else "test"
    is_last = run.epoch + 1 == args.epochs and run.step == run.steps_per_epoch
    splits = [chosen_on, "test"] if is_last else [chosen_on]  # the test set once, at the end
    backbones, scores = [student.backbone for student in method.cohort.students], {}
    with run.evaluating():
        for split in dict.fromkeys(splits):
            batches = dataset.test_batches(split, run.processes.share)
            top1, top5 = evaluate(backbones, batches, run.processes)
            scores |= {f"{split}_top1": top1, f"{split}_top5": top5}
    line = run.epoch_line(**scores)
    if run.is_main:
        say_epoch(line, scores)
        if warning := method.warning(line):
            say(f"warning    {warning}")
        picture = None
        if "matching" in line:
            picture = matching_picture(line["matching"], args.arch, line["step"])
            write(run.out / "matching.png", picture)
        run.to_tensorboard(line, picture)
    return line, sum(scores[f"{chosen_on}_top1"]) / len(backbones)


def say_epoch(line, scores):
    words = [f"epoch {line['epoch']:3d}  step {line['step']}  lr {line['lr']:.4f}"]
    words += [f"{name} {line[name]:.3f}" for name in ("loss", "ce") if name in line]
    words += [f"{name} {line[name]:.3f}" for name in ("vcl_gain", "icl_gain") if name in line]
    for name, top in scores.items():
        if name.endswith("top1"):
            words.append(f"{name.removesuffix('_top1')} top-1 {' '.join(f'{x:.2f}' for x in top)}")
    say("  ".join([*words, f"{line['images_per_second']:.0f} images/s"]))


# ---------------------------------------------------------------- setting up

def load_data(args):
    """The data set of the options, on the CPU. Raises UserError."""
    return data.load(args.dataset, args.data_dir, args.image_size, stream=args.stream,
                     augment=args.augment, validation_fraction=args.validation_fraction,
                     seed=args.seed, workers=args.workers, synthetic_images=args.synthetic_images)


def build(args, dataset, resumed=False):
    """The method's networks on the device, drawn from the seed: all methods get the same backbones.

    resumed: the weights will come from a checkpoint, so the files of --weights are not wanted.
    """
    torch.manual_seed(args.seed)
    method = METHODS[args.method](args, len(dataset.classes), dataset.train_labels)
    for a, path in enumerate(() if resumed else args.weights or ()):
        _, taken = load_pretrained(method.cohort.students[a].backbone, args.arch[a], path)
        dataset.notes.append(f"weights {path}: {taken}")
    models.count_no_batches(method)
    for module in method.to(args.device).modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return method


def formula(args, method):
    """The loss in words, and the names of parameters that it does not reach, of two black images.

    Raises UserError for wrong terms, or a wrong `second`.
    """
    images = torch.zeros(2, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.zeros(2, dtype=torch.int64, device=args.device)
    rows = method.bank.sample(labels, 0, 0) if method.bank else None
    check_second(method)
    terms = method.eval().terms(method(images), labels, rows)
    check_terms(method, terms)
    weights = {name: weight for name, (weight, _) in terms.items() if weight is not None}
    number = lambda weight: float(torch.as_tensor(weight).detach())
    words = [name if weight == 1 else f"{number(weight):g} {name}"
             for name, weight in weights.items()]
    options = dict(T=method.T) if method.T else {}
    options |= {name: vars(args)[name] for name in ("tau", "T", "contrast") if name in vars(args)}
    own = [f"{name} {value}" for name, value in options.items()]
    words = " + ".join(words) + ("; " + ", ".join(own) if own else "")
    return words, unreached(method, terms)


def report(args, dataset, method, run, loss):
    """What will be trained, on what, by which loss, for how long. loss: `formula`'s."""
    size, students = args.image_size, method.cohort.students
    for a, (name, student) in enumerate(zip(args.arch, students, strict=True), start=1):
        own, adds = models.cost(student.backbone, size)
        words = f"{own:,} parameters, {adds / 1e6:.1f}M multiply-adds"
        if len(student.branches):
            whole, adds = models.cost(student, size)
            words += f"; with branches {whole:,}, {adds / 1e6:.1f}M"
        say(f"student {a}  {name}: {words}")
    held = len(dataset.validation_labels)
    split = f"{len(dataset.train_labels):,} training" + (f", {held:,} validation" if held else "")
    say(f"data       {dataset.name}: {split} and {len(dataset.test_labels):,} test images, "
        f"{len(dataset.classes)} classes, {size}x{size}")
    for note in dataset.notes:
        say(f"           {note}")
    several = f"{run.processes.size} x " if run.processes.size > 1 else ""
    say(f"device     {several}{device_name(args.device)}, torch {torch.__version__}")
    loss_in_words, lost = loss
    say(f"loss       {args.method}: {loss_in_words}")
    if schedule := method.schedule():
        say(f"           {schedule}")
    total = args.epochs * run.steps_per_epoch
    end = f", ending at {args.max_steps:,}" if args.max_steps else ""
    drops = f", drops at {args.milestones}" if args.schedule == "multistep" else ""
    drops += f", {args.optimizer}" if args.optimizer != "sgd" else ""
    drops += f", {args.warmup} epochs of warm-up" if args.warmup else ""
    say(f"steps      {args.epochs} epochs of {run.steps_per_epoch} steps of {args.batch_size} = "
        f"{total:,}{end}; {args.schedule} schedule{drops}")
    for name, student in dict(zip(args.arch, students, strict=True)).items():
        stem, last = models.map_sizes(student.backbone, size)
        if last <= 2:
            say(f"warning    {name}: of {size}x{size} pixels its stem leaves {stem}x{stem} and its "
                f"last stage {last}x{last}; a larger --image-size, or a student for small images, "
                "may serve better")
    if len(students) == 1 and method.mutual:
        say(f"warning    one student has no peers: what {args.method} adds to cross-entropy is 0, "
            "or its own")
    elif lost:
        say(f"warning    no term of the loss, as it begins, reaches {shorten(lost, 3)}: weight "
            "decay alone moves them; requires_grad_(False) keeps them as they are")
    second, end = method.second, min(total, args.max_steps or total)
    last_due = end // second.every * second.every if second else 0
    if second and last_due <= second.first * run.steps_per_epoch:
        say(f"warning    too few steps: no {second.name} will be made")
    say(f"output     {run.out}")


def main(argv=None):
    """Run the command line; what the user can mend ends in one line and status 1.

    A wrong flag: status 2.
    """
    args = options.parse(__doc__, argv)
    with one_line_errors("train.py", args):
        processes = Processes()
        args.device = pick_device(args.device, processes)
        if args.deterministic:
            be_deterministic()
        torch.backends.cudnn.benchmark = not args.deterministic  # images have one size
        check_graphs(args, processes)
        if args.batch_size % (2 * processes.size):
            raise UserError(f"--batch-size {args.batch_size} must be a multiple of "
                            f"{2 * processes.size}: pairs of images for {processes.size} processes")
        out = OutDir(args.out_dir)
        found = out.find_checkpoint(args, processes)
        if processes.rank == 0:
            say("loading    the data set")
        dataset = load_data(args).to(args.device)
        dataset.steps_per_epoch(args.batch_size)  # raises for one that does not fit
        if found:
            dataset.check_classes(found["classes"], out / "last.pt", args.data_dir)
        method = build(args, dataset, resumed=bool(found))
        method.check()
        loss = formula(args, method)
        with Signals("train.py", processes) as signals:
            start(args, out, found, dataset, method, loss, processes, signals)


def start(args, out, found, dataset, method, loss, processes, signals):
    """Connect the processes, go on from what was found, train, and leave each student as a file."""
    if processes.rank == 0:
        out.open()
    processes.start(args.device)
    processes.broadcast(method)
    method.gather = processes.gather
    metadata = dict(dataset.facts(), code=own_code(args.model_file, method))
    run = Run(args, out, method, method.optimizers(), metadata=metadata,
              steps_per_epoch=dataset.steps_per_epoch(args.batch_size),
              images_per_epoch=len(dataset.train_labels), processes=processes, signals=signals)
    if run.is_main:
        report(args, dataset, method, run, loss)
    run.begin(found)
    with run.saving():
        train(args, dataset, method, run)
    if run.is_main:
        students = zip(args.arch, method.cohort.students, strict=True)
        for a, (name, student) in enumerate(students, start=1):
            content = student_file(student.backbone, name, run.metadata)
            write(out / f"student_{a}_{name}.pt", torch_bytes(content))
    first = shlex.quote(f"{out}/student_1_{args.arch[0]}.pt")
    run.say_end("mean top-1", f"python predict.py --student {first} IMAGE")
    processes.stop()


if __name__ == "__main__":
    main()
