"""Compare runs: a Markdown table, seeds pooled, and learning curves.

    python compare.py out/*
    python compare.py out/* --curves curves.png             # needs matplotlib

A path is an --out-dir of train.py or a log.jsonl. Runs whose options are equal, but for the seed and for where and how
far they ran, are a group. A row pools a group's runs that did equally many steps, so a run under way has its own row.
Nobody chose the last epoch by its score; the best epoch is chosen so, and its column names the images it is chosen on.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

# What never makes a group: the seed; where, how far and how fast a run goes. num_nets is the length of arch.
POOLED = {"seed", "out_dir", "data_dir", "device", "resume", "save_every", "workers", "evaluate", "predict",
          "benchmark", "cuda_graph", "num_nets", "tensorboard", "model_file"}


class CompareError(Exception):
    """Something the user can mend, in one line."""


class Run(NamedTuple):
    """options: those that can make a group, by name. epochs: the log's lines by epoch, at least one."""
    options: dict
    seed: object
    epochs: dict

    @property
    def last(self):
        return self.epochs[max(self.epochs)]

    @property
    def finished(self):
        """Whether the last epoch is there, whole: --max-steps may end a run inside it."""
        first, epochs = self.epochs[min(self.epochs)], self.options.get("epochs")
        if self.last["epoch"] != epochs or self.last["step"] != self.options.get("max_steps"):
            return self.last["epoch"] == epochs
        return first is not self.last and self.last["step"] >= first["step"] / first["epoch"] * epochs

    @property
    def chosen_on(self):
        """What the best epoch is chosen on."""
        return "validation" if any("validation_top1" in line for line in self.epochs.values()) else "test"

    def curve(self):
        """{epoch: top-1 in %, mean over students}, on the images that the best epoch is chosen on."""
        key = f"{self.chosen_on}_top1"
        return {epoch: mean(line[key]) for epoch, line in sorted(self.epochs.items()) if key in line}


# ---------------------------------------------------------------- reading logs

def warn(text):
    print(f"compare.py: {text}", file=sys.stderr)


def parse(text):
    """The JSON object in a line, {} if there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_epoch(line):
    """Whether a log's object is an epoch with scores: non-empty lists of percentages, one a student."""
    scores = [line[key] for key in ("test_top1", "test_top5", "validation_top1") if key in line]
    percent = lambda x: isinstance(x, (int, float)) and 0 <= x <= 100
    return (isinstance(line.get("epoch"), int) and isinstance(line.get("step"), int)
            and ("test_top1" in line or "validation_top1" in line)
            and all(isinstance(s, list) and s and all(map(percent, s)) for s in scores))


def read_run(path):
    """The Run in a folder or log file; a damaged line is left out with a warning. Raises CompareError."""
    try:
        log = path / "log.jsonl" if path.is_dir() else path
        if not log.is_file():                              # a pipe, too, is none: reading it would wait
            raise CompareError(f"{path}: " + ("no log.jsonl in it" if path.is_dir() else "no such file or folder"))
        first, *rest = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise CompareError(f"{path}: cannot be read ({error.strerror})") from None
    header, epochs = parse(first), {}
    if not isinstance(header.get("args"), dict):
        raise CompareError(f"{log}: not a log of train.py (its first line has no args)")
    for number, text in enumerate(rest, start=2):
        line = parse(text)
        if is_epoch(line):
            epochs[line["epoch"]] = line
        elif text.strip():
            warn(f"{log}, line {number}: damaged or without top-1, left out")
    if not epochs:
        raise CompareError(f"{log}: no epoch in it yet")
    options = {k: v for k, v in header["args"].items() if k not in POOLED}
    if isinstance(header.get("classes"), list):
        options["classes"] = len(header["classes"])        # another data set, whatever its folder is called
    if isinstance(header.get("digest"), str):
        options["digest"] = header["digest"]               # of the training images' names
    if options.get("method") == "lmcl":
        options.setdefault("matching", "learned")          # a log from before --matching
    else:
        options.pop("matching", None)                      # logged, but nothing there is matched
    return Run(options, header["args"].get("seed"), epochs)


# ---------------------------------------------------------------- groups

def shown(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def group_runs(runs):
    """Returns (names of the options that differ, method first; {their values as text: runs}).

    An option differs if two runs log two values of it. A run that does not log it, an older one, does not differ by it;
    where others do, its value is "-".
    """
    names = dict.fromkeys(name for run in runs for name in run.options if name != "max_steps")
    differing = ["method"] + [name for name in names if name != "method" and len(
        {shown(run.options[name]) for run in runs if name in run.options}) > 1]
    groups = {}
    for run in runs:
        groups.setdefault(tuple(shown(run.options.get(name, "-")) for name in differing), []).append(run)
    return differing, groups


# ---------------------------------------------------------------- table

def spread(values):
    """Mean +- sample standard deviation (n - 1); the mean alone for one value."""
    return f"{mean(values):.2f}" + (f" +- {stdev(values):.2f}" if len(values) > 1 else "")


def row_key(run):
    """What is equal in runs that are averaged: steps done, images scored on, number of students."""
    on = "test" if "test_top1" in run.last else "validation"
    return run.last["step"], on, len(run.last[f"{on}_top1"]), run.chosen_on


def row(runs):
    """Cells by column for runs of one group and row_key; a student's column is its number, from 1."""
    _, on, students, chosen_on = row_key(runs[0])
    last = [run.last[f"{on}_top1"] for run in runs]        # [n, students]
    cells = {a + 1: spread([scores[a] for scores in last]) for a in range(students)}
    cells["mean"] = spread([mean(scores) for scores in last])
    if all("test_top5" in run.last for run in runs):
        cells["top-5 mean"] = spread([mean(run.last["test_top5"]) for run in runs])
    cells["best epoch (chosen on)"] = f"{spread([max(run.curve().values()) for run in runs])} ({chosen_on})"
    cells["n (seeds)"] = f"{len(runs)} ({' '.join(str(run.seed) for run in runs)})"
    cells["epochs done"] = (f"{runs[0].last['epoch']} of {runs[0].options.get('epochs', '-')}"
                            + ("" if any(run.finished for run in runs) else ", unfinished")
                            + (", on validation images" if on == "validation" else ""))
    return cells


def table(differing, groups):
    """The Markdown table as text, groups in the order of their first runs."""
    rows = []
    for values, runs in groups.items():
        alike = {}
        for run in runs:
            alike.setdefault(row_key(run), []).append(run)
        rows += [{**dict(zip(differing, values, strict=True)), **row(same)} for same in alike.values()]
    numbers = sorted({column for cells in rows for column in cells if isinstance(column, int)})
    arch = next(iter(groups.values()))[0].options.get("arch")
    named = "arch" not in differing and isinstance(arch, list) and len(arch) == len(numbers)
    titles = {**{name: name for name in differing},
              **{a: f"student {a}" + (f" {arch[a - 1]}" if named else "") for a in numbers},
              **{c: c for c in ("mean", "top-5 mean", "best epoch (chosen on)", "n (seeds)", "epochs done")}}
    lines = [titles.values(), ["---"] * len(titles), *([cells.get(c, "") for c in titles] for cells in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---------------------------------------------------------------- curves

def draw_curves(differing, groups, path):
    """Learning curves as a picture: a colour a group, a thin line a run; thick their mean over the epochs all have."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise CompareError("--curves needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="top-1 in %, mean over students")
    for i, (values, runs) in enumerate(groups.items()):
        colour = f"C{i}" if len(groups) <= 10 else matplotlib.colormaps["turbo"](i / (len(groups) - 1))
        curves = [run.curve() for run in runs]             # a curve: {epoch: top-1}
        for curve in curves:
            axes.plot(curve.keys(), curve.values(), color=colour, linewidth=0.7, alpha=0.6)
        shared = sorted(set.intersection(*map(set, curves)))
        options = [f"{name} {value}" for name, value in zip(differing, values, strict=True) if value != "-"]
        sets = " and ".join(sorted({run.chosen_on for run in runs}))
        axes.plot(shared, [mean(curve[e] for curve in curves) for e in shared], color=colour, linewidth=2.5, marker=".",
                  label=f"{', '.join(options)} ({sets}, n = {len(runs)})".replace("$", r"\$"))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise CompareError(f"--curves {path}: {getattr(error, 'strerror', None) or error}") from None


# ---------------------------------------------------------------- program

def compare(paths, curves):
    """Print the table of the runs at `paths`; draw them to `curves` if it is given."""
    runs = {}
    for path in paths:
        try:
            log = path / "log.jsonl" if os.path.isdir(path) else path
            runs[os.path.realpath(log)] = read_run(path)   # a run named twice counts once
        except CompareError as error:
            warn(f"left out: {error}")
    if not runs:
        raise CompareError("no run to compare")
    differing, groups = group_runs(list(runs.values()))
    print(table(differing, groups), "", "Top-1 in % after the last epoch, on test images unless a row says otherwise: "
          "mean +- sample standard deviation over n runs.", "The best epoch's top-1 is the students' mean on the "
          "images that it is chosen on, so it flatters.", sep="\n", flush=True)
    if curves:
        draw_curves(differing, groups, curves)


def main(argv=None):
    p = argparse.ArgumentParser(prog="compare.py", description=__doc__, usage=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a run's folder or its log.jsonl")
    p.add_argument("--curves", metavar="FILE", help="draw learning curves, too: a .png, .pdf or .svg")
    args = p.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")      # a name that the terminal cannot show
    try:
        compare(args.paths, args.curves)
    except CompareError as error:
        warn(f"error: {error}")
        sys.exit(1)
    except OSError as error:                               # of standard output: its reader has gone, its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)       # what is still in the buffer goes there
        warn(f"error: cannot print the table ({error.strerror})")
        sys.exit(1)


if __name__ == "__main__":
    main()
