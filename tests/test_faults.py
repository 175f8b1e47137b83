"""Runs that are killed and resumed, in processes of their own:
the short version of tools/faults.py."""

import importlib
import itertools
import os
import re
import shutil
from pathlib import Path

import pytest

from conftest import results

ROOT = Path(__file__).parents[1]


@pytest.fixture
def faults(monkeypatch):
    """tools/faults.py, imported."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("faults")


def test_killed_and_resumed_runs_end_as_uninterrupted_ones(faults, tmp_path, capsys):
    assert faults.kill(3, 2, tmp_path)
    assert re.match(r"3 stops \(\d+ inside writing\).*: yes; "
                    r"[1-9]\d* second starts refused; 100 of 100 damaged",
                    capsys.readouterr().out)


class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches SIGKILL."""


def test_killed_before_each_rename_and_link(run, monkeypatch, capsys):
    """Of log, best, last, in a second epoch also of previous:
    resumed, all files are those of a whole run."""
    flags = ["--method", "independent", "--num-nets", 1, "--resume"]
    run(*flags)
    whole, left = results("out"), []
    for n in range(1, 10):
        shutil.rmtree("out")
        calls = itertools.count(1)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            for name, true in (("replace", os.replace), ("link", os.link)):
                def dying(*args, true=true, calls=calls, n=n):
                    if next(calls) == n:
                        raise Killed
                    true(*args)

                patched.setattr(os, name, dying)
            run(*flags)
        left.append({p.name for p in Path("out").glob("[lp]*.pt")})
        capsys.readouterr()
        run(*flags)
        assert ("starting afresh" in capsys.readouterr().out) == (not left[-1])
        assert results("out") == whole, f"rename {n}"
    assert left[3] == {"last.pt"} and left[-1] == {"last.pt", "previous.pt"}


def test_a_best_of_an_epoch_that_the_last_does_not_know_is_removed(run):
    """A run killed between the first best.pt and its last.pt, which --save-every has written."""
    flags = ["--method", "independent", "--max-steps", 2, "--resume"]
    run(*flags)
    Path("out/best.pt").write_bytes(b"of a whole epoch")
    run(*flags)
    assert not Path("out/best.pt").exists()
