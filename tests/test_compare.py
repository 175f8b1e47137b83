"""compare.py on small logs written here, and on old ones of docs/logs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

import compare
import options
from support.arguments import WHERE

LOGS = Path(compare.__file__).parent / "docs" / "logs"


def epoch(number, *top1, on="test", **more):
    return {"epoch": number, "step": 10 * number, f"{on}_top1": list(top1), **more}


def write_log(folder, *epochs, classes=("a", "b"), header=(), **args):
    """A run's folder: args over the defaults in the log's first line, then the epochs."""
    args = {"method": "lmcl", "arch": ["resnet8", "resnet20"], "epochs": 2, "seed": 0,
            "max_steps": 0, "out_dir": str(folder), **args}
    folder.mkdir()
    lines = [{"command": "", "args": args, "classes": classes, **dict(header)}, *epochs]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(capsys, *argv):
    """Returns (exit status, the table's rows as dicts, lines of standard error)."""
    try:
        compare.main([str(a) for a in argv])
        status = 0
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    return status, [dict(zip(lines[0], line, strict=True)) for line in lines[2:]], err.splitlines()


def test_seeds_are_pooled_and_options_that_differ_make_groups(tmp_path, capsys):
    last = epoch(2, 40, 50, test_top5=[90, 80], vcl_gain=1.25, icl_gain=0.5)
    a = write_log(tmp_path / "a", epoch(1, 60, 62), last, seed=1)
    last = epoch(2, 43, 54, test_top5=[91, 83], vcl_gain=1.75, icl_gain=0.5)
    b = write_log(tmp_path / "b", epoch(1, 10, 20), last, seed=2, data_dir="y")
    c = write_log(tmp_path / "c", epoch(1, 1, 1), epoch(2, 30, 31), method="mcl", tau=0.2)
    d = write_log(tmp_path / "d", epoch(1, 1, 1), epoch(2, 32, 33), method="mcl", tau=0.1)
    # b twice
    status, rows, errors = run(capsys, a, b / "log.jsonl", c, d, tmp_path / "a" / ".." / "b")
    assert (status, errors) == (0, [])
    assert rows[0] == {"method": "lmcl", "tau": "-",
                       "student 1 resnet8": "41.50 +- 2.12",  # 3/sqrt(2)
                       "student 2 resnet20": "52.00 +- 2.83", "mean": "46.75 +- 2.47",
                       "top-5 mean": "86.00 +- 1.41", "VCL gain, nats": "1.50 +- 0.35",
                       "ICL gain, nats": "0.50 +- 0.00",
                       "best epoch (chosen on)": "54.75 +- 8.84 (test)", "n (seeds)": "2 (1 2)",
                       "epochs done": "2 of 2"}
    assert [(row["tau"], row["mean"], row["top-5 mean"], row["n (seeds)"]) for row in rows[1:]] == [
        ("0.2", "30.50", "", "1 (0)"), ("0.1", "32.50", "", "1 (0)")]


def test_runs_of_an_earlier_version_join_those_of_their_method(tmp_path, capsys):
    """Earlier logs hold tau for methods that do not read it."""
    old = write_log(tmp_path / "old", epoch(2, 1, 2), method="dml", tau=0.1, seed=1)
    new = write_log(tmp_path / "new", epoch(2, 3, 4), method="dml", seed=2)
    others = [write_log(tmp_path / f"tau{tau}", epoch(2, 5, 6), tau=tau) for tau in (0.1, 0.2)]
    _, rows, _ = run(capsys, old, new, *others)
    assert [(row["method"], row["tau"], row["n (seeds)"]) for row in rows] == [
        ("dml", "0.1", "2 (1 2)"), ("lmcl", "0.1", "1 (0)"), ("lmcl", "0.2", "1 (0)")]


def test_where_and_how_far_a_run_went_and_its_seed_make_no_group(tmp_path, capsys):
    """Every option of WHERE differs at once;
    the log has the first command's, --resume went on to the end."""
    paths = [write_log(tmp_path / str(i), epoch(1, 4, 4), epoch(2, 5 + i, 5), seed=i,
                       **{name: 5 * i for name in WHERE}) for i in (0, 1)]
    assert {"max_steps", "device", "out_dir", "data_dir", "resume"} <= WHERE
    _, (row,), _ = run(capsys, *paths)
    assert row["n (seeds)"] == "2 (0 1)" and row["epochs done"] == "2 of 2"
    assert not (WHERE | {"seed"}) & row.keys()


def test_old_logs_are_pooled_with_a_run_of_the_same_command_today(tmp_path, capsys):
    """lmcl-0 is from before --batches, --contrast, --matching and the digest,
    lmcl-1 from before methods had options of their own."""
    logs = [LOGS / f"quarter-lmcl-{i}.jsonl" for i in (0, 1)]
    header, *epochs = map(json.loads, logs[1].read_text().splitlines())
    args = vars(options.parse("", [*shlex.split(header["command"])[2:], "--seed", "7"]))
    oldest = json.loads(logs[0].read_text().splitlines()[0])["args"]
    assert header["args"].keys() - args.keys() and args.keys() - oldest.keys()
    today = write_log(tmp_path / "today", *epochs, classes=header["classes"], **args)
    status, (row,), errors = run(capsys, *logs, today)
    assert (status, errors, row["n (seeds)"], row["epochs done"]) == (
        0, [], "3 (0 1 7)", "24 of 24")
    last = [mean(json.loads(log.read_text().splitlines()[-1])["test_top1"])
            for log in [*logs, logs[1]]]
    assert row["mean"] == f"{mean(last):.2f} +- {stdev(last):.2f}"


def test_an_option_that_came_later_differs_from_what_was_done_before(tmp_path, capsys):
    """An older log joins a newer one that says what it did; an unknown option does not differ."""
    old = write_log(tmp_path / "old", epoch(2, 5, 5))
    later = [("augment", "crop-flip", "crop"), ("virtual_lambda", "held", "moving"),
             ("contrast_start", 0, 1), ("soft_ramp", 0.0, 8.0), ("warmup", 0, 5)]
    for name, before, other in later:
        new = [write_log(tmp_path / f"{name}{i}", epoch(2, 5, 5), seed=i, **{name: value})
               for i, value in enumerate((before, other), start=1)]
        _, rows, _ = run(capsys, old, *new)
        assert [(row[name], row["n (seeds)"]) for row in rows] == [
            (str(before), "2 (0 1)"), (str(other), "1 (2)")]
    new = write_log(tmp_path / "new", epoch(2, 5, 5), seed=1, negatives=7)
    _, (row,), _ = run(capsys, old, new)
    assert row["n (seeds)"] == "2 (0 1)" and "negatives" not in row


def test_matching_is_lmcls_alone_and_learned_in_a_log_from_before_the_option(tmp_path, capsys):
    paths = [write_log(tmp_path / str(i), epoch(2, 5, 5), seed=i, **options)
             for i, options in enumerate([
                 {}, {"matching": "learned"}, {"matching": "uniform"}, {"method": "mcl"},
                 {"method": "mcl", "matching": "learned"}])]
    _, rows, _ = run(capsys, *paths)
    assert [(row["method"], row["matching"], row["n (seeds)"]) for row in rows] == [
        ("lmcl", "learned", "2 (0 1)"), ("lmcl", "uniform", "1 (2)"), ("mcl", "-", "2 (3 4)")]


def test_an_own_method_derived_from_lmcl_keeps_its_matching(tmp_path, capsys):
    paths = [write_log(tmp_path / matching, epoch(2, 5, 5), seed=i, method="mine",
                       matching=matching) for i, matching in enumerate(("learned", "uniform"))]
    _, rows, _ = run(capsys, *paths)
    assert [(row["matching"], row["n (seeds)"]) for row in rows] == [
        ("learned", "1 (0)"), ("uniform", "1 (1)")]


def test_no_code_of_a_users_own_is_a_value_too(tmp_path, capsys):
    """null where the program knew of own code and there was none; a log without the key joins."""
    codes = [{"code": None}, {"code": "abc"}, {}]
    stock, own, older = [write_log(tmp_path / str(i), epoch(2, 5, 5), seed=i, header=header)
                         for i, header in enumerate(codes)]
    _, rows, _ = run(capsys, stock, own)
    assert [(row["code"], row["n (seeds)"]) for row in rows] == [
        ("none", "1 (0)"), ("abc", "1 (1)")]
    _, rows, _ = run(capsys, stock, older)
    assert [row["n (seeds)"] for row in rows] == ["2 (0 2)"]
    mine = write_log(tmp_path / "mine", epoch(2, 5, 5), method="mine", header={"code": "xyz"})
    _, rows, _ = run(capsys, stock, mine)
    assert [row["method"] for row in rows] == ["lmcl", "mine"] and "code" not in rows[0]


def test_max_steps_of_the_first_command_that_a_later_one_changed(tmp_path, capsys):
    """The second command had --max-steps 15, inside the last epoch: the log's header is older."""
    _, (row,), _ = run(capsys, write_log(
        tmp_path / "a", epoch(1, 4, 4), epoch(2, 5, 5) | {"step": 15}))
    assert row["epochs done"] == "2 of 2, unfinished"


def test_max_steps_at_the_end_is_an_end(tmp_path, capsys):
    _, (row,), _ = run(
        capsys, write_log(tmp_path / "a", epoch(1, 4, 4), epoch(2, 5, 5), max_steps=20))
    assert row["epochs done"] == "2 of 2"


def test_runs_on_other_images_are_another_group(tmp_path, capsys):
    paths = [write_log(tmp_path / c, epoch(2, 5, 5)) for c in "ab"]
    for path in paths:
        log = path / "log.jsonl"
        log.write_text(log.read_text().replace(
            '"command"', f'"digest": "{path.name}", "command"', 1))
    _, rows, _ = run(capsys, *paths)
    assert [row["digest"] for row in rows] == ["a", "b"] and compare.LESS not in rows[1]


@pytest.mark.parametrize(("name", "values"), [("code", ["a", "b"]), ("processes", [1, 2])])
def test_runs_of_other_code_or_more_processes_are_another_group(tmp_path, capsys, name, values):
    """Seed 0 of each: two rows, not one of two seeds.

    A log without it joins where there is one value.
    """
    paths = [write_log(tmp_path / str(value), epoch(2, 5, 5), header={name: value})
             for value in values]
    _, rows, _ = run(capsys, *paths)
    assert [(row[name], row["n (seeds)"]) for row in rows] == [
        (str(value), "1 (0)") for value in values]
    older = write_log(tmp_path / "older", epoch(2, 5, 5), seed=1)
    _, rows, _ = run(capsys, paths[0], older)
    assert [row["n (seeds)"] for row in rows] == ["2 (0 1)"]


def test_rows_of_the_same_seeds_are_compared_seed_by_seed(tmp_path, capsys):
    """The spread of differences, not the difference of spreads; other seeds: none.

    A seed that is twice in a row.
    """
    scores = dict(mcl=[10, 20, 60], lmcl=[12, 23, 61], dml=[1, 2])
    paths = [write_log(tmp_path / f"{method}{seed}", epoch(2, score - 1, score + 1),
                       method=method, seed=seed)
             for method, values in scores.items() for seed, score in enumerate(values)]
    _, rows, errors = run(capsys, *paths)
    column = "mean less row 1's, by seed"
    assert [row[column] for row in rows] == ["", "2.00 +- 1.00", ""] and not errors
    elsewhere = [write_log(tmp_path / f"c{seed}", epoch(2, 5, 5),
                           classes=("a", "b", "c"), seed=seed)
                 for seed in range(3)]
    _, rows, _ = run(capsys, *paths[:3], *elsewhere)
    assert len(rows) == 2 and column not in rows[0]
    again = write_log(tmp_path / "again", epoch(2, 0, 0), method="dml", seed=1)
    _, rows, errors = run(capsys, *paths[-2:], again)
    assert errors == ["compare.py: row 1: seed 1 occurs more than once"] and column not in rows[0]


@pytest.mark.parametrize("other", [
    dict(last=epoch(2, 5, 5) | {"step": 21}), dict(last=epoch(2, 5, 5), dataset="imagenet"),
    dict(last=epoch(2, 5, 5, 5)), dict(last=epoch(2, 5, 5, on="validation"))])
def test_rows_that_did_other_work_are_not_compared_seed_by_seed(tmp_path, capsys, other):
    a = write_log(tmp_path / "a", epoch(2, 5, 5), dataset="folder")
    b = write_log(tmp_path / "b", epoch(2, 6, 6), dataset="folder", method="mcl")
    _, rows, _ = run(capsys, a, b)
    assert rows[1][compare.LESS] == "1.00"
    c = write_log(tmp_path / "c", other["last"], method="mcl",
                  dataset=other.get("dataset", "folder"))
    _, rows, _ = run(capsys, a, c)
    assert len(rows) == 2 and compare.LESS not in rows[1]


def test_runs_on_other_classes_are_another_group(tmp_path, capsys):
    paths = [write_log(tmp_path / c, epoch(2, 5, 5), classes=list(c)) for c in ("ab", "abc")]
    _, rows, _ = run(capsys, *paths)
    assert [row["classes"] for row in rows] == ["2", "3"]


def test_runs_of_unequal_length_and_numbers_of_students(tmp_path, capsys):
    """Each is a row:
    under way, ended by --max-steps, on validation images until its end; one student."""
    paths = [write_log(tmp_path / "whole", epoch(1, 1, 3), epoch(2, 5, 7)),
             write_log(tmp_path / "under way", epoch(1, 2, 4), seed=1),
             write_log(tmp_path / "ended", {**epoch(2, 9, 9), "step": 15}, seed=2, max_steps=15),
             write_log(tmp_path / "held", epoch(1, 60, 70, on="validation"), seed=3),
             write_log(tmp_path / "held to the end", epoch(1, 80, 80, on="validation"),
                       epoch(2, 20, 22, validation_top1=[70, 70]), seed=4),
             write_log(tmp_path / "alone", epoch(2, 8), arch=["resnet8"])]
    status, rows, errors = run(capsys, *paths)
    assert (status, errors) == (0, []) and compare.LESS not in rows[0]
    cells = ["arch", "student 2", "mean", "best epoch (chosen on)", "epochs done"]
    assert [[row[c] for c in cells] for row in rows] == [
        ["resnet8 resnet20", "7.00", "6.00", "6.00 (test)", "2 of 2"],
        ["resnet8 resnet20", "4.00", "3.00", "3.00 (test)", "1 of 2, unfinished"],
        ["resnet8 resnet20", "9.00", "9.00", "9.00 (test)", "2 of 2, unfinished"],
        ["resnet8 resnet20", "70.00", "65.00", "65.00 (validation)",
         "1 of 2, unfinished, on validation images"],
        ["resnet8 resnet20", "22.00", "21.00", "80.00 (validation)", "2 of 2"],
        ["resnet8", "", "8.00", "8.00 (test)", "2 of 2"]]


DAMAGE = ['{"epoch": 2, "st', "[" * 99999, "[]", "{}", '{"epoch": 2, "step": 3, "test_top1": []}',
          '{"epoch": 2, "step": 3, "test_top1": [NaN]}',
          '{"epoch": 2, "step": 3, "test_top1": [1], "test_top5": 7}']


@pytest.mark.parametrize("line", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_line_is_left_out_with_a_word(tmp_path, capsys, line):
    log = write_log(tmp_path / "a", epoch(1, 5, 7)) / "log.jsonl"
    log.write_text(log.read_text() + line)
    status, (row,), (error,) = run(capsys, log)
    assert (status, row["epochs done"]) == (0, "1 of 2, unfinished")
    assert error.startswith(f"compare.py: {log}, line 3: damaged")


def test_what_is_no_run_is_left_out_with_a_word(tmp_path, capsys):
    good = write_log(tmp_path / "good", epoch(2, 5, 7))
    empty, binary = tmp_path / "empty", tmp_path / "picture.png"
    empty.mkdir()
    binary.write_bytes(b"\x89PNG\xff\n\0\n")
    os.mkfifo(tmp_path / "pipe")
    bad = [tmp_path / "missing", empty, binary, tmp_path / "pipe", write_log(tmp_path / "young")]
    status, rows, errors = run(capsys, *bad, good)
    assert status == 0 and len(rows) == 1 and len(errors) == len(bad)
    for error, path in zip(errors, bad, strict=True):
        assert error.startswith(f"compare.py: left out: {path}")
    status, rows, errors = run(capsys, *bad)
    assert (status == 1 and not rows
            and errors[len(bad):] == ["compare.py: error: no run to compare"])


def test_curves(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = [write_log(tmp_path / f"{i}", *(epoch(e, e, 2 * i) for e in range(1, 3 + i)), epochs=4,
                       seed=i % 2, method=["lmcl", "mcl"][i // 2]) for i in range(3)]
    assert run(capsys, *paths, "--curves", tmp_path / "curves.png")[0] == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for wrong in (tmp_path / "curves.nothing", tmp_path / "no folder" / "curves.png"):
        status, rows, (error,) = run(capsys, *paths, "--curves", wrong)
        assert (status == 1 and len(rows) == 3
                and error.startswith(f"compare.py: error: --curves {wrong}: "))


def test_curves_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it raises ImportError
    path = write_log(tmp_path / "a", epoch(2, 5, 7))
    status, rows, errors = run(capsys, path, "--curves", tmp_path / "c.png")
    assert (status, len(rows)) == (1, 1)
    assert errors == ["compare.py: error: --curves needs matplotlib: pip install matplotlib"]


def test_a_reader_that_has_gone_and_no_path(tmp_path):
    """The first ends a run in peace, the second is one line; neither waits for PyTorch."""
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was loaded')")
    settings = dict(stderr=subprocess.PIPE, text=True,
                    env={**os.environ, "PYTHONPATH": str(tmp_path)})
    program = [sys.executable, compare.__file__]
    reader, writer = os.pipe()
    os.close(reader)
    run_folder = write_log(tmp_path / "a", epoch(2, 5, 7))
    gone = subprocess.run([*program, run_folder], stdout=writer, **settings)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (0, "")
    none = subprocess.run(program, **settings)
    assert none.returncode == 2 and len(none.stderr.splitlines()) == 1
    assert none.stderr.startswith("compare.py: error: ")
