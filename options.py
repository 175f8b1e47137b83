"""The command line of train.py: every option, its default, its rule. `python train.py --help` prints them."""

import argparse
import math
import os
import re
import sys

import data
import models
from methods import METHODS

RECIPES = {                                                # as published; "others" is CIFAR-100's
    "others": dict(epochs=300, batch_size=128, weight_decay=5e-4, schedule="cosine", contrast="batch",
                   tau=0.1, weight_vcl=0.1, weight_icl=0.1, meta_freq=50, image_size=32),
    "imagenet": dict(epochs=100, batch_size=256, weight_decay=1e-4, schedule="multistep", contrast="bank",
                     tau=0.07, weight_vcl=0.01, weight_icl=0.01, meta_freq=500, image_size=224),
}
# Options that do not change the result: --resume lets them differ, the default --out-dir leaves them out.
WHERE = {"device", "data_dir", "out_dir", "max_steps", "save_every", "resume", "evaluate", "predict", "checkpoint",
         "cuda_graph", "workers", "tensorboard", "model_file", "num_nets"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line instead of the whole usage."""
        print(f"{self.prog}: error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)

    def check(self, args, rules):
        """rules: (flag, whether its value is good, what it must be)."""
        for flag, good, rule in rules:
            if not good:
                self.error(f"argument {flag}: must be {rule}")


def running(p):
    """The options that train.py and detect.py share."""
    g = p.add_argument_group("running")
    g.add_argument("--device", default="auto", help="cpu, cuda or cuda:1; auto takes CUDA if it is there (auto)")
    g.add_argument("--out-dir", metavar="DIR", help="log, checkpoints, exported files (out/ and what differs from "
                   "the defaults)")
    g.add_argument("--resume", action="store_true", help="go on from last.pt in --out-dir")
    g.add_argument("--max-steps", type=int, default=0, metavar="STEPS", help="end after so many steps; 0: never (0)")
    g.add_argument("--save-every", type=float, default=0, metavar="MINUTES", help="save inside epochs too; 0: after "
                   "each (0)")
    g.add_argument("--amp", choices=["no", "bf16"], default="no", help="bf16: convolutions and linear maps in "
                   "bfloat16; losses and the meta step stay in float32 (no)")
    g.add_argument("--deterministic", action="store_true", help="bit-equal runs on CUDA too, slower (always so on "
                   "the CPU)")
    return g


def running_rules(args):
    return [("--epochs", args.epochs >= 1, "at least 1"), ("--max-steps", args.max_steps >= 0, "0 (no end) or more"),
            ("--lr", 0 < args.lr < math.inf, "above 0"),
            ("--weight-decay", 0 <= args.weight_decay < math.inf, "0 or more"),
            ("--workers", args.workers >= 0, "0 (the program itself reads) or more"),
            ("--save-every", 0 <= args.save_every < math.inf, "0 (only after epochs) or more"),
            ("--seed", 0 <= args.seed < 2 ** 63, "between 0 and 2^63 - 1"),
            ("--out-dir", args.out_dir != "", "a folder's name"), ("--evaluate", args.evaluate != "", "a file's name")]


def build_parser(description, program):
    p = Parser(prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what is trained")
    g.add_argument("--arch", nargs="+", action="extend", metavar="NAME",
                   help="students (resnet32): " + ", ".join(models.ARCHITECTURES))
    g.add_argument("--num-nets", type=int, metavar="N", help="how many students, if one NAME is given (2)")
    g.add_argument("--method", choices=METHODS, default="lmcl",
                   help="; ".join(f"{k}: {' '.join((v.__doc__ or k).split())}" for k, v in METHODS.items()) + " (lmcl)")
    g.add_argument("--matching", choices=["learned", "uniform"], default="learned",
                   help="lmcl: lambda from the matching network, or 0.5 for all, without a meta step (learned)")
    g.add_argument("--weights", nargs="+", metavar="FILE", help="start the students from these files: exported "
                   "students, or torchvision's weights for its architectures")
    g.add_argument("--model-file", metavar="FILE", help="a Python file that adds architectures of your own (README)")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=data.DATASETS, help="cifar100 (default) and cifar10 are downloaded at first "
                   "use; folder: DATA_DIR/{train,test}/CLASS/*; imagenet: DATA_DIR/{train,val}/CLASS/*, streamed; "
                   "synthetic: drawn at start")
    g.add_argument("--data-dir", metavar="DIR", help="where the data set is or is downloaded to (data)")
    g.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (32; imagenet 224)")
    g.add_argument("--stream", action="store_true", help="folder: read images from disk at every use, with random "
                   "resized crops, instead of holding them in memory")
    g.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1),
                   help="processes that read streamed images; 0: the program itself reads (4, or the number of CPUs)")
    g.add_argument("--augment", choices=["crop-flip", "crop", "none"], default="crop-flip", help="of training images "
                   "(crop-flip)")
    g.add_argument("--validation-fraction", type=float, default=0.0, metavar="F", help="hold back this share of each "
                   "class's training images: best.pt is chosen on it, the test set is looked at once, at the end (0)")
    g.add_argument("--batches", choices=["pairs", "uniform"], help="pairs: two images each of B/2 classes, as in-batch "
                   "contrast needs; uniform: any images; each once an epoch both ways (pairs; uniform with a bank)")
    g = p.add_argument_group("recipe")
    g.add_argument("--epochs", type=int, help="length of the schedule (300; imagenet 100)")
    g.add_argument("--batch-size", type=int, help="images a step, of all processes together, an even number; a few "
                   "more where the set does not divide, so that every image comes once an epoch (128; imagenet 256)")
    g.add_argument("--lr", type=float, default=0.1, help="initial learning rate of SGD with Nesterov momentum (0.1)")
    g.add_argument("--schedule", choices=["cosine", "multistep"], help="multistep: times 0.1 at each of --milestones "
                   "(cosine; imagenet multistep)")
    g.add_argument("--milestones", type=int, nargs="+", default=[30, 60, 90], metavar="EPOCH", help="(30 60 90)")
    g.add_argument("--momentum", type=float, default=0.9, help="(0.9)")
    g.add_argument("--weight-decay", type=float, help="(5e-4; imagenet 1e-4)")
    g.add_argument("--seed", type=int, default=0, help="of initial weights, batches and augmentation (0)")
    g = p.add_argument_group("losses")
    g.add_argument("--contrast", choices=["batch", "bank"], help="with the other images of the batch, or with a "
                   "memory bank of all training images' embeddings (batch; imagenet bank)")
    g.add_argument("--negatives", type=int, default=8192, metavar="K", help="bank: rows drawn for each batch (8192)")
    g.add_argument("--bank-momentum", type=float, default=0.5, metavar="M", help="bank: share of the old row (0.5)")
    g.add_argument("--weight-vcl", type=float, metavar="ALPHA", help="alpha, of VCL (0.1; imagenet 0.01)")
    g.add_argument("--weight-icl", type=float, metavar="BETA", help="beta, of ICL (0.1; imagenet 0.01)")
    g.add_argument("--weight-soft-vcl", type=float, default=1.0, metavar="GAMMA", help="gamma, of Soft VCL (1)")
    g.add_argument("--weight-soft-icl", type=float, default=1.0, metavar="LAM", help="lam, of Soft ICL (1)")
    g.add_argument("--tau", type=float, help="temperature of the contrastive distributions (0.1; imagenet 0.07)")
    g.add_argument("--T", type=float, help="temperature of the KL terms (3; dml's is always 1)")
    g.add_argument("--logit-kd", action="store_true", help="mcl: each student also distils the mean of all logits")
    g.add_argument("--weight-adversarial", type=float, default=0.05, metavar="W", help="afd: of the adversarial "
                   "term; at 1 it drowns the others at this learning rate (0.05)")
    g.add_argument("--meta-freq", type=int, metavar="STEPS", help="a meta step every so many steps (50; imagenet 500)")
    g.add_argument("--meta-steps", type=int, default=2, metavar="STEPS",
                   help="virtual steps on the contrastive loss (2)")
    g = running(p)
    g.add_argument("--cuda-graph", action="store_true", help="capture the steps as CUDA graphs and replay them; not "
                   "yet seen on a GPU")
    g.add_argument("--tensorboard", action="store_true", help="write scalars and matching.png for TensorBoard, too")
    g.add_argument("--evaluate", metavar="FILE", help="print top-1 and top-5 of every student of last.pt, best.pt or "
                   "a student file, and end")
    g.add_argument("--predict", nargs="+", metavar="IMAGE", help="print the five likeliest classes of pictures (or "
                   "of all in a folder) by the students of --checkpoint, and end")
    g.add_argument("--checkpoint", metavar="FILE", help="of --predict: a student file, last.pt or best.pt (its "
                   "students' mean)")
    return p


def parse(description, argv=None, program="train.py"):
    """The options of a command line, complete and checked; a wrong one ends the program with one line and status 2."""
    p = build_parser(description, program)
    args = p.parse_args(argv)
    if args.T is not None and args.method == "dml":
        p.error("argument --T: dml's temperature is always 1")
    if args.model_file:
        try:
            models.load_model_file(args.model_file)
        except ValueError as error:
            p.error(f"argument --model-file: {error}")
    fill(args)
    p.check(args, [
        ("--num-nets", 1 <= args.num_nets == len(args.arch), "at least 1, and the number of names if --arch has more"),
        ("--batch-size", args.batch_size >= 2 and args.batch_size % 2 == 0, "even and at least 2: pairs of images"),
        *((f"--weight-{k}", 0 <= vars(args)[f"weight_{k.replace('-', '_')}"] < math.inf, "0 or more")
          for k in ("vcl", "icl", "soft-vcl", "soft-icl", "adversarial")),
        ("--momentum", 0 < args.momentum < 1, "between 0 and 1: Nesterov needs it"),
        ("--tau", 0 < args.tau < math.inf, "above 0"), ("--T", 0 < args.T < math.inf, "above 0"),
        ("--meta-freq", args.meta_freq >= 1, "at least 1"), ("--meta-steps", args.meta_steps >= 1, "at least 1"),
        ("--negatives", args.negatives >= 1, "at least 1"),
        ("--bank-momentum", 0 <= args.bank_momentum < 1, "0 or more, below 1"),
        ("--image-size", args.image_size >= 8, "at least 8"),
        ("--validation-fraction", 0 <= args.validation_fraction < 1, "0 or more, below 1"),
        ("--milestones", all(m >= 1 for m in args.milestones), "epochs from 1 on"),
        ("--weights", not args.weights or len(args.weights) == len(args.arch), f"{len(args.arch)} files, one each"),
        ("--evaluate", not (args.evaluate and args.predict), "left out with --predict"),
        ("--checkpoint", bool(args.checkpoint) == bool(args.predict), "given with --predict, and only there"),
        *running_rules(args)])
    if args.logit_kd and args.method != "mcl":
        p.error("argument --logit-kd: goes with --method mcl")
    if args.matching == "uniform" and args.method != "lmcl":
        p.error("argument --matching: goes with --method lmcl")
    try:
        stages = {name: models.architecture(name).stages for name in args.arch}
    except ValueError as error:
        p.error(f"argument --arch: {error}")
    if len(set(stages.values())) > 1:
        p.error("argument --arch: " + ", ".join(f"{name} has {n} stages" for name, n in stages.items())
                + ", which cannot be matched")
    if args.out_dir is None:
        students = "+".join(args.arch) if len(set(args.arch)) > 1 else f"{args.arch[0]}x{len(args.arch)}"
        usual = fill(p.parse_args(["--method", args.method] + (["--dataset", args.dataset] if args.dataset else [])))
        first = dict(dataset=args.dataset, method=args.method, arch=students, seed=args.seed)
        args.out_dir = default_name(args, usual, first)
    return args


def fill(args):
    """The recipe's defaults, and --arch NAME --num-nets N as N names."""
    args.arch = args.arch or ["resnet32"]
    if args.num_nets is None:
        args.num_nets = 2 if len(args.arch) == 1 else len(args.arch)
    if len(args.arch) == 1:
        args.arch = args.arch * args.num_nets
    fill_recipe(args, RECIPES["imagenet" if args.dataset == "imagenet" else "others"])
    fill_recipe(args, {"T": METHODS[args.method].T})
    fill_recipe(args, {"batches": "pairs" if args.contrast == "batch" else "uniform"})
    if not (args.evaluate or args.predict):                # these take a checkpoint's own data set
        args.dataset, args.data_dir = args.dataset or "cifar100", args.data_dir or "data"
    return args


def fill_recipe(args, recipe):
    """Options that the command line leaves open (None) take the recipe's values."""
    for name, value in recipe.items():
        if vars(args)[name] is None:
            vars(args)[name] = value


def default_name(args, usual, first):
    """out/FIRST-... and every other option that differs from `usual`. first: {option: how it is shown}."""
    other = [f"-{k.replace('_', '-')}-{v}" for k, v in sorted(vars(args).items())
             if v != vars(usual)[k] and k not in WHERE | {"deterministic"} | first.keys()]
    return "out/" + re.sub(r"[^\w.+-]+", "_", "-".join(map(str, first.values())) + "".join(other))[:200]
