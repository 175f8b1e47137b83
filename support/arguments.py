"""What the command lines of train.py, detect.py and predict.py share."""

import argparse
import math
import os
import re
import sys

# Where and how far a run goes, not what it computes: --resume lets these differ, the default
# --out-dir leaves them out, compare.py pools over them.
WHERE = {"device", "data_dir", "out_dir", "max_steps", "save_every", "resume", "cuda_graph",
         "workers", "tensorboard", "model_file", "num_nets"}
# What train.py did before it had the option, for logs and checkpoints that lack it.
BEFORE = {"augment": "crop-flip", "validation_fraction": 0.0, "weights": None, "schedule": "cosine",
          "batches": "pairs", "contrast": "batch", "contrast_start": 0, "soft_ramp": 0.0,
          "matching": "learned", "virtual_lambda": "held", "synthetic_images": None,
          "optimizer": "sgd", "warmup": 0, "no_decay_1d": False}
WORKERS = min(4, os.cpu_count() or 1)


class Parser(argparse.ArgumentParser):
    """One line instead of the whole usage."""

    def __init__(self, prog, description):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=layout)
        # argparse's own takes -1e-4 for an option; the option's rule has better words
        number = r"-((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf(inity)?|nan)$"
        self._negative_number_matcher = re.compile(number, re.IGNORECASE)

    def error(self, message):
        print(f"{self.prog}: error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


def limited(kind, is_good, rule):
    """A type for add_argument: a number (kind: int, float) that keeps a rule, said in words."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            float(text)  # 1e-4 for an int breaks the rule, ten is no number
            raise argparse.ArgumentTypeError(f"must be whole, {rule}") from None
        if not is_good(value):
            raise argparse.ArgumentTypeError(f"must be {rule}")
        return value

    convert.__name__ = kind.__name__  # argparse: "invalid float value"
    return convert


at_least = lambda least: limited(int, lambda x: x >= least, f"at least {least}")
at_least_0 = limited(int, lambda x: x >= 0, "0 or more")
at_least_1 = at_least(1)
milestone = limited(int, lambda x: x >= 1, "epochs from 1 on")
positive = limited(float, lambda x: 0 < x < math.inf, "above 0")
not_negative = limited(float, lambda x: 0 <= x < math.inf, "0 or more")
fraction = limited(float, lambda x: 0 <= x < 1, "0 or more, below 1")
seed = limited(int, lambda x: 0 <= x < 2 ** 63, "between 0 and 2^63 - 1")


def name(what):
    """A type for add_argument: a text that is not empty. what: "a file's name"."""
    def convert(text):
        if not text:
            raise argparse.ArgumentTypeError(f"must be {what}")
        return text

    return convert


def add_running(parser):
    """Adds the options on where and how far a run goes; returns their group."""
    g = parser.add_argument_group("running")
    g.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: CUDA if there (auto)")
    g.add_argument("--out-dir", type=name("a folder's name"), metavar="DIR",
                   help="log, checkpoints, students (out/ and what differs from the defaults)")
    g.add_argument("--resume", action="store_true", help="go on from last.pt in --out-dir")
    g.add_argument("--max-steps", type=at_least_0, default=0, metavar="STEPS",
                   help="end after so many steps; 0: never (0)")
    g.add_argument("--save-every", type=not_negative, default=0, metavar="MINUTES",
                   help="save inside epochs too; 0: after each, short ones every ten seconds (0)")
    g.add_argument("--amp", choices=["no", "bf16"], default="no",
                   help="bf16: autocast; losses, weights and the meta step stay in float32 (no)")
    g.add_argument("--deterministic", action="store_true",
                   help="bit-equal runs on CUDA too, slower (always so on the CPU)")
    return g


def default_name(args, usual, first):
    """out/FIRST-... and every other option that differs from `usual`. first: {option: text}."""
    left_out = WHERE | first.keys()
    other = ""
    for option, value in sorted(vars(args).items()):
        if option not in left_out and value != vars(usual).get(option):
            other += f"-{option.replace('_', '-')}-{value}"
    text = "-".join(map(str, first.values())) + other
    return "out/" + re.sub(r"[^\w.+-]+", "_", text)[:200]
