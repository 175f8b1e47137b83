"""The command line of train.py: options, defaults, rules. methods.py has those of one method."""

import argparse
import re

import data
from methods import METHODS
from support import arguments
from support.architectures import ARCHITECTURES, architecture, load_model_file
from support.console import UserError

# As published; "others" is CIFAR-100's. Options of other methods are passed over.
RECIPES = {
    "others": dict(
        epochs=300, batch_size=128, weight_decay=5e-4, schedule="cosine", image_size=32,
        contrast="batch", batches="pairs", tau=0.1, weight_vcl=0.1, weight_icl=0.1, meta_freq=50),
    "imagenet": dict(
        epochs=100, batch_size=256, weight_decay=1e-4, schedule="multistep", image_size=224,
        contrast="bank", batches="uniform", tau=0.07, weight_vcl=0.01, weight_icl=0.01,
        meta_freq=500),
    "imagenet, mcl": dict(epochs=90, weight_vcl=0.1, weight_icl=0.1),  # the conference paper's
}

# torchvision's for Swin and ConvNeXt; they come before the data set's
OPTIMIZERS = {"sgd": dict(lr=0.1), "adamw": dict(lr=1e-3, weight_decay=0.05)}


def build_parser(description, program, method):
    """The parser of train.py with the options of one method, a class of METHODS."""
    p = arguments.Parser(program, description)
    g = p.add_argument_group("what is trained")
    g.add_argument("--arch", nargs="+", action="extend", metavar="NAME",
                   help="students (resnet32): " + ", ".join(ARCHITECTURES))
    g.add_argument("--num-nets", type=arguments.at_least_1, metavar="N",
                   help="students, all of the one NAME (2)")
    about = {known: " ".join((found.__doc__ or known).split()) for known, found in METHODS.items()}
    words = "; ".join(f"{known}: {text}" for known, text in about.items()).replace("%", "%%")
    g.add_argument("--method", choices=METHODS, default="lmcl", help=f"{words} (lmcl)")
    g.add_argument("--weights", nargs="+", metavar="FILE",
                   help="start the students from student files, or from torchvision's weights")
    g.add_argument("--model-file", metavar="FILE", help="Python, adds architectures (README)")

    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=data.DATASETS, default="cifar100",
                   help="cifar100 (default), cifar10: downloaded at first use; folder: DATA_DIR/"
                   "{train,test}/CLASS/*; imagenet: DATA_DIR/{train,val}/CLASS/*, streamed; "
                   "synthetic: drawn at start")
    g.add_argument("--synthetic-images", type=arguments.at_least_1, metavar="N",
                   help="synthetic: training images, up to 10000 (10000)")
    g.add_argument("--data-dir", default="data", metavar="DIR", help="where the data set is (data)")
    g.add_argument("--image-size", type=arguments.at_least(8), metavar="PIXELS",
                   help="side of the images (32; imagenet 224)")
    g.add_argument("--stream", action="store_true",
                   help="folder: read images at every use, with random resized crops")
    g.add_argument("--workers", type=arguments.at_least_0, default=arguments.WORKERS,
                   help="processes that read streamed images; 0: none (4, or the number of CPUs)")
    g.add_argument("--augment", choices=data.AUGMENTATIONS, default="crop-flip", help="(crop-flip)")
    g.add_argument("--validation-fraction", type=arguments.fraction, default=0.0, metavar="F",
                   help="hold back this share of each class's training images: best.pt is chosen "
                   "on it, the test set is looked at once, at the end (0)")
    g.add_argument("--batches", choices=["pairs", "uniform"],
                   help="pairs: two images each of B/2 classes, as in-batch contrast needs; "
                   "uniform: any; each image once an epoch both ways "
                   "(pairs; with a bank, and on imagenet without contrast: uniform)")

    g = p.add_argument_group("recipe")
    g.add_argument("--epochs", type=arguments.at_least_1, help="(300; imagenet 100, mcl 90)")
    is_even = lambda x: x >= 2 and x % 2 == 0
    even = arguments.limited(int, is_even, "even and at least 2: pairs of images")
    g.add_argument("--batch-size", type=even,
                   help="images a step, of all processes together; some more where the set does "
                   "not divide, so that every image comes once an epoch (128; imagenet 256)")
    g.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd",
                   help="of all that the loss trains; virtual steps and the matching network's are "
                   "SGD (sgd, with Nesterov momentum)")
    g.add_argument("--lr", type=arguments.positive, help="initial learning rate (0.1; adamw 0.001)")
    g.add_argument("--warmup", type=arguments.at_least_0, default=0, metavar="EPOCHS",
                   help="the rate grows to --lr linearly, step by step; the schedule follows (0)")
    g.add_argument("--schedule", choices=["cosine", "multistep"],
                   help="multistep: times 0.1 at each of --milestones (cosine; imagenet multistep)")
    g.add_argument("--milestones", type=arguments.milestone, nargs="+", default=[30, 60, 90],
                   metavar="EPOCH", help="(30 60 90)")
    momentum = arguments.limited(float, lambda x: 0 < x < 1, "between 0 and 1: Nesterov needs it")
    g.add_argument("--momentum", type=momentum, default=0.9, help="(0.9)")
    g.add_argument("--weight-decay", type=arguments.not_negative,
                   help="(5e-4; imagenet 1e-4; adamw 0.05)")
    g.add_argument("--no-decay-1d", action="store_true",
                   help="no weight decay of vectors: biases, and weights of normalisation")
    g.add_argument("--seed", type=arguments.seed, default=0,
                   help="of initial weights, batches and augmentation (0)")

    name = next(known for known, found in METHODS.items() if found is method)
    own = p.add_argument_group(f"method {name} (--method NAME --help shows another's)")
    method.add_options(own)
    g = arguments.add_running(p)
    g.add_argument("--cuda-graph", action="store_true",
                   help="capture the steps as CUDA graphs and replay them; not yet seen on a GPU")
    g.add_argument("--tensorboard", action="store_true", help="write its files, too")
    return p


def parse(description, argv=None, program="train.py"):
    """The options of a command line, complete and checked; a wrong one: one line and status 2."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    first.add_argument("--method", default="lmcl")
    try:
        method = METHODS.get(first.parse_known_args(argv)[0].method)
    except argparse.ArgumentError:  # the parser below says what is wrong
        method = None
    p = build_parser(description, program, method or METHODS["lmcl"])
    args, unknown = p.parse_known_args(argv)
    if unknown:
        p.error(explain(unknown[0], args.method))
    if args.model_file:
        try:
            load_model_file(args.model_file)
        except UserError as error:
            p.error(f"argument --model-file: {error}")
    complete(args)
    try:
        stages = {known: architecture(known).stages for known in args.arch}
    except UserError as error:
        p.error(f"argument --arch: {error}")
    for known in args.arch:
        if "/" in known or "\\" in known:
            p.error(f"argument --arch: {known} becomes part of a file's name: register it under "
                    "a name without / and \\")
    if args.warmup >= args.epochs:
        p.error(f"argument --warmup: must be below --epochs, which is {args.epochs}")
    if args.num_nets != len(args.arch):
        p.error("argument --num-nets: must be the number of names if --arch has more than one")
    if args.weights and len(args.weights) != len(args.arch):
        p.error(f"argument --weights: must be {len(args.arch)} files, one each")
    if len(set(stages.values())) > 1:
        counts = ", ".join(f"{known} has {n} stages" for known, n in stages.items())
        p.error(f"argument --arch: {counts}, which cannot be matched")
    if args.out_dir is None:
        alike = len(set(args.arch)) == 1
        names = f"{args.arch[0]}x{len(args.arch)}" if alike else "+".join(args.arch)
        usual = argparse.Namespace(**{option: p.get_default(option) for option in vars(args)})
        usual.method, usual.dataset = args.method, args.dataset
        usual.optimizer = args.optimizer
        complete(usual)
        usual.optimizer = p.get_default("optimizer")
        vars(usual).update(beginning(args))
        shown = dict(dataset=args.dataset, method=args.method, arch=names, seed=args.seed)
        args.out_dir = arguments.default_name(args, usual, shown)
    for option, value in vars(args).items():
        for v in value if isinstance(value, list) else [value]:
            if not isinstance(v, (int, float, str, type(None))):
                p.error(f"argument --{option.replace('_', '-')}: a checkpoint cannot hold a "
                        f"{type(v).__name__}, its type must be int, float or str")
    return args


def explain(unknown, method):
    """Why an option is not known: it belongs to other methods, or to none."""
    flag = unknown.split("=")[0]
    owners = " or ".join(known for known, found in METHODS.items() if flag in flags_of(found))
    if flag in ("--evaluate", "--predict", "--checkpoint"):
        return f"argument {flag}: predict.py does that, see python predict.py --help"
    if not owners:
        return f"unrecognized argument {unknown}"
    return f"argument {flag}: {method} has no such option, it goes with --method {owners}"


def flags_of(method):
    """The flags that a method adds."""
    p = argparse.ArgumentParser(add_help=False)
    method.add_options(p.add_argument_group())
    return re.findall(r"--[\w-]+", p.format_help())


def complete(args):
    """--arch NAME --num-nets N as N names; options left open (None) take the recipe's values."""
    args.arch = args.arch or ["resnet32"]
    if args.num_nets is None:
        args.num_nets = 2 if len(args.arch) == 1 else len(args.arch)
    if len(args.arch) == 1:
        args.arch = args.arch * args.num_nets
    contrast = getattr(args, "contrast", None)
    if contrast and args.batches is None:
        args.batches = "pairs" if contrast == "batch" else "uniform"
    recipe = (RECIPES.get(args.dataset, RECIPES["others"])
              | RECIPES.get(f"{args.dataset}, {args.method}", {}))
    recipe = recipe | OPTIMIZERS[args.optimizer]
    for option, value in recipe.items():
        if vars(args).get(option, value) is None:
            vars(args)[option] = value
    for option, value in beginning(args).items():
        if vars(args)[option] is None:
            vars(args)[option] = value
    return args


def beginning(args):
    """When contrast begins and how fast its soft losses grow: a bank has to be filled first."""
    if "contrast" not in args:
        return {}
    if args.contrast == "batch":
        return dict(contrast_start=0, soft_ramp=0.0)
    return dict(contrast_start=1, soft_ramp=max(8, args.epochs / 10))
