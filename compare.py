"""Compare runs: a Markdown table, seeds pooled, and learning curves.

    python compare.py out/*
    python compare.py out/* --curves curves.png             # needs matplotlib

A path is an --out-dir of train.py or a log.jsonl. A group is runs of equal options, but for the
seed and for where and how far they ran; equal code of a user's own method and students, too. A row
pools a group's runs that did equally many steps; rows of the same seeds are compared seed by seed.
Nobody chose the last epoch by its score; the best epoch is, on the images that its column names.
"""

import json
import os
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from support.arguments import BEFORE, WHERE, Parser
from support.console import UserError, one_line_errors, say, warn

UNMATCHED = {"independent", "deep-supervision", "dml", "mcl", "afd"}  # older logs hold `matching`
LESS = "mean less row 1's, by seed"
GAINS = {"vcl_gain": "VCL gain, nats", "icl_gain": "ICL gain, nats"}


class Run(NamedTuple):
    """options: all that can make a group, and max_steps. epochs: the log's lines, at least one."""

    options: dict
    seed: object
    epochs: dict

    @property
    def last(self):
        return self.epochs[max(self.epochs)]

    @property
    def finished(self):
        """Whether the last epoch is there, whole: --max-steps may end a run inside it."""
        if self.last["epoch"] != self.options.get("epochs"):
            return False
        first, last = self.epochs[min(self.epochs)], self.last
        if first is last:  # nothing tells how long an epoch is
            return last["step"] != self.options.get("max_steps")
        return last["step"] >= first["step"] / first["epoch"] * last["epoch"]

    @property
    def chosen_on(self):
        """What the best epoch is chosen on."""
        validated = any("validation_top1" in line for line in self.epochs.values())
        return "validation" if validated else "test"

    def curve(self):
        """{epoch: mean top-1 of the students in %}, on the images that it is chosen on."""
        key, lines = f"{self.chosen_on}_top1", sorted(self.epochs.items())
        return {epoch: mean(line[key]) for epoch, line in lines if key in line}


def parse(text):
    """The JSON object in a line, {} if there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_epoch(line):
    """Whether a log's object is an epoch with scores: lists of percentages, one of each student."""
    is_count = lambda x: isinstance(x, int) and x >= 1
    counted = is_count(line.get("epoch")) and is_count(line.get("step"))
    scored = "test_top1" in line or "validation_top1" in line
    is_percent = lambda x: isinstance(x, (int, float)) and 0 <= x <= 100
    are_percent = lambda s: isinstance(s, list) and s and all(map(is_percent, s))
    scores = [line[key] for key in ("test_top1", "test_top5", "validation_top1") if key in line]
    return counted and scored and all(map(are_percent, scores))


def read_run(path):
    """The Run in a folder or log file, less damaged lines, with a warning. Raises UserError."""
    try:
        log = path / "log.jsonl" if path.is_dir() else path
        if not log.is_file():  # a pipe, too, is none: reading it would wait
            reason = "no log.jsonl in it" if path.is_dir() else "no such file or folder"
            raise UserError(f"{path}: {reason}")
        first, *rest = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    header, epochs = parse(first), {}
    if not isinstance(header.get("args"), dict):
        raise UserError(f"{log}: not a log of train.py (its first line has no args)")
    for number, text in enumerate(rest, start=2):
        line = parse(text)
        if is_epoch(line):
            epochs[line["epoch"]] = line
        elif text.strip():
            warn(f"compare.py: {log}, line {number}: damaged or without top-1, left out")
    if not epochs:
        raise UserError(f"{log}: no epoch in it yet")
    left_out = WHERE - {"max_steps"} | {"seed"}
    options = {name: value for name, value in header["args"].items() if name not in left_out}
    if isinstance(header.get("classes"), list):
        options["classes"] = len(header["classes"])  # another data set, whatever its folder's name
    if isinstance(header.get("digest"), str):
        options["digest"] = header["digest"]  # of the training images' names
    if "code" in header:
        options["code"] = header["code"] or "none"  # of a user's own files
    if isinstance(header.get("processes"), int):
        options["processes"] = header["processes"]  # each contrasts and normalises its own share
    if options.get("method") in UNMATCHED:
        options.pop("matching", None)
    return Run(options, header["args"].get("seed"), epochs)


def as_text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def completed(runs):
    """The same, each with what programs did BEFORE an option that other runs of its method log."""
    known, filled = {}, []  # known: names of the options by method
    for run in runs:
        known.setdefault(run.options.get("method"), set()).update(run.options)
    for run in runs:
        names = known[run.options.get("method")]
        earlier = {name: value for name, value in BEFORE.items() if name in names}
        filled.append(run._replace(options=earlier | run.options))
    return filled


def group_runs(runs):
    """Returns (names of the options that differ, method first; {their values as text: runs}).

    An option differs if two runs have two values of it. A run without it, of an earlier or later
    version, joins the one value of its method's other runs; else its value is "-".
    """
    def shared(run, name):
        same = [run] if name in run.options else runs
        method = run.options.get("method")
        values = {as_text(other.options[name]) for other in same
                  if name in other.options and other.options.get("method") == method}
        return values.pop() if len(values) == 1 else "-"

    runs = completed(runs)
    logged, groups = {}, {}
    for run in runs:
        for name, value in run.options.items():
            logged.setdefault(name, set()).add(as_text(value))
    several = [name for name, values in logged.items() if len(values) > 1]
    codes = {(run.options.get("method"), run.options["code"]) for run in runs
             if "code" in run.options}
    if len(codes) == len(dict(codes)):  # one a method, which the method's name tells
        several = [name for name in several if name != "code"]
    differing = ["method"] + [name for name in several if name not in ("method", "max_steps")]
    for run in runs:
        values = tuple(shared(run, name) for name in differing)
        groups.setdefault(values, []).append(run)
    return differing, groups


def spread(values):
    """Mean +- sample standard deviation (n - 1); the mean alone for one value."""
    return f"{mean(values):.2f}" + (f" +- {stdev(values):.2f}" if len(values) > 1 else "")


def row_key(run):
    """What is equal in runs that are averaged: steps done, images scored on, number of students."""
    on = "test" if "test_top1" in run.last else "validation"
    return run.last["step"], on, len(run.last[f"{on}_top1"]), run.chosen_on


def by_seed(runs):
    """{seed: mean top-1 of the students after the last epoch}."""
    _, on, *_ = row_key(runs[0])
    return {run.seed: mean(run.last[f"{on}_top1"]) for run in runs}


def are_paired(first, runs):
    """Whether two rows have the same seeds, and as many steps on the same images."""
    alike = lambda name: len({as_text(row[0].options[name]) for row in (first, runs)
                              if name in row[0].options}) < 2
    on_the_same = (row_key(first[0]) == row_key(runs[0])
                   and all(map(alike, ("dataset", "classes", "digest"))))
    return on_the_same and by_seed(first).keys() == by_seed(runs).keys()


def row(runs):
    """Cells by column of runs of one group and row_key; a student's column is its number from 1."""
    _, on, students, chosen_on = row_key(runs[0])
    last = [run.last[f"{on}_top1"] for run in runs]  # [n, students]
    cells = {a + 1: spread([scores[a] for scores in last]) for a in range(students)}
    cells["mean"] = spread([mean(scores) for scores in last])
    if all("test_top5" in run.last for run in runs):
        cells["top-5 mean"] = spread([mean(run.last["test_top5"]) for run in runs])
    for name, title in GAINS.items():
        if all(name in run.last for run in runs):
            cells[title] = spread([run.last[name] for run in runs])
    best = spread([max(run.curve().values()) for run in runs])
    cells["best epoch (chosen on)"] = f"{best} ({chosen_on})"
    cells["n (seeds)"] = f"{len(runs)} ({' '.join(str(run.seed) for run in runs)})"
    unfinished = "" if any(run.finished for run in runs) else ", unfinished"
    validated = ", on validation images" if on == "validation" else ""
    done = f"{runs[0].last['epoch']} of {runs[0].options.get('epochs', '-')}"
    cells["epochs done"] = done + unfinished + validated
    return cells


def table(differing, groups):
    """The Markdown table as text, groups in the order of their first runs."""
    rows, first = [], None
    for values, runs in groups.items():
        alike = {}
        for run in runs:
            alike.setdefault(row_key(run), []).append(run)
        options = dict(zip(differing, values, strict=True))
        for same in alike.values():
            cells, scores = options | row(same), by_seed(same)
            if len(scores) < len(same):
                seeds = sorted(run.seed for run in same)
                twice = {str(seed) for seed, after in pairwise(seeds) if seed == after}
                warn(f"compare.py: row {len(rows) + 1}: "
                     f"seed {', '.join(sorted(twice))} occurs more than once")
            first = first or same
            if first is not same and are_paired(first, same):
                before = by_seed(first)
                cells[LESS] = spread([scores[seed] - before[seed] for seed in scores])
            rows.append(cells)
    numbers = sorted({column for cells in rows for column in cells if isinstance(column, int)})
    arch = next(iter(groups.values()))[0].options.get("arch")
    named = "arch" not in differing and isinstance(arch, list) and len(arch) == len(numbers)
    gains = [title for title in GAINS.values() if any(title in cells for cells in rows)]
    paired = [LESS] if any(LESS in cells for cells in rows) else []
    last = ["mean", *paired, "top-5 mean", *gains,
            "best epoch (chosen on)", "n (seeds)", "epochs done"]
    titles = {column: column for column in [*differing, *numbers, *last]}
    for a in numbers:
        titles[a] = f"student {a} {arch[a - 1]}" if named else f"student {a}"
    lines = [titles.values(), ["---"] * len(titles)]
    lines += [[cells.get(column, "") for column in titles] for cells in rows]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_curves(differing, groups, path):
    """A colour a group, a thin line a run, a thick one their mean over the epochs that all have."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--curves needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="top-1 in %, mean over students")
    turbo = matplotlib.colormaps["turbo"]
    for i, (values, runs) in enumerate(groups.items()):
        colour = f"C{i}" if len(groups) <= 10 else turbo(i / (len(groups) - 1))
        curves = [run.curve() for run in runs]  # a curve: {epoch: top-1}
        for curve in curves:
            axes.plot(curve.keys(), curve.values(), color=colour, linewidth=0.7, alpha=0.6)
        shared = sorted(set.intersection(*map(set, curves)))
        means = [mean(curve[epoch] for curve in curves) for epoch in shared]
        pairs = zip(differing, values, strict=True)
        options = ", ".join(f"{name} {value}" for name, value in pairs if value != "-")
        sets = " and ".join(sorted({run.chosen_on for run in runs}))
        label = f"{options} ({sets}, n = {len(runs)})".replace("$", r"\$")
        axes.plot(shared, means, color=colour, linewidth=2.5, marker=".", label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--curves {path}: {getattr(error, 'strerror', None) or error}") from None


def compare(paths, curves):
    """Print the table of the runs at `paths`; draw them to `curves` if it is given."""
    runs = {}
    for path in paths:
        try:
            log = path / "log.jsonl" if os.path.isdir(path) else path
            runs[os.path.realpath(log)] = read_run(path)  # a run named twice counts once
        except UserError as error:
            warn(f"compare.py: left out: {error}")
    if not runs:
        raise UserError("no run to compare")
    differing, groups = group_runs(list(runs.values()))
    say(f"{table(differing, groups)}\n\nTop-1 in % after the last epoch, on test images unless a "
        "row says otherwise: mean +- sample standard deviation over n runs.\nThe best epoch's "
        "top-1 is the students' mean on the images that it is chosen on, so it flatters.")
    if curves:
        draw_curves(differing, groups, curves)


def main(argv=None):
    p = Parser("compare.py", __doc__)
    p.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a run's folder or its log")
    p.add_argument("--curves", metavar="FILE", help="draw learning curves: a .png, .pdf or .svg")
    args = p.parse_args(argv)
    with one_line_errors("compare.py"):
        compare(args.paths, args.curves)


if __name__ == "__main__":
    main()
