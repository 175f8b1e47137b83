"""The command line of train.py:
recipes, default folders, methods' own options, what users do wrong."""

from pathlib import Path

import pytest
import torch

import detect
import options
import predict
from methods import METHODS
from support.architectures import ARCHITECTURES
from support.arguments import WHERE


def parse(*more):
    return options.parse("", list(more))


# ---------------------------------------------------------------- what is not given

def test_recipes():
    assert vars(parse()).items() >= dict(
        dataset="cifar100", arch=["resnet32"] * 2, method="lmcl",
        epochs=300, batch_size=128, lr=0.1, weight_decay=5e-4, schedule="cosine", momentum=0.9,
        tau=0.1, T=3.0, weight_vcl=0.1, weight_icl=0.1, weight_soft_vcl=1.0, weight_soft_icl=1.0,
        matching="learned", meta_freq=50, meta_steps=2, contrast="batch", batches="pairs",
        image_size=32, contrast_start=0, soft_ramp=0).items()
    ours = vars(parse("--dataset", "imagenet", "--arch", "resnet18", "--weight-icl", "0.5"))
    assert ours.items() >= dict(
        epochs=100, batch_size=256, weight_decay=1e-4,
        schedule="multistep", milestones=[30, 60, 90],
        tau=0.07, weight_vcl=0.01, weight_icl=0.5, meta_freq=500,
        contrast="bank", batches="uniform", image_size=224,
        negatives=8192, bank_momentum=0.5, contrast_start=1, soft_ramp=10).items()
    assert vars(parse("--contrast", "bank", "--epochs", "20"))["soft_ramp"] == 8
    adamw = vars(parse("--dataset", "imagenet", "--arch", "swin_t", "--optimizer", "adamw"))
    assert (adamw["lr"], adamw["weight_decay"], adamw["epochs"]) == (1e-3, 0.05, 100)
    given = vars(parse("--optimizer", "adamw", "--lr", "0.01", "--weight-decay", "0"))
    assert (given["lr"], given["weight_decay"], given["warmup"]) == (0.01, 0, 0)


    mcl = vars(parse("--dataset", "imagenet", "--arch", "resnet18", "--method", "mcl"))  # AAAI 2022
    assert mcl.items() >= dict(
        epochs=90, weight_vcl=0.1, weight_icl=0.1, tau=0.07,
        contrast="bank", soft_ramp=9).items()


def test_batches_go_with_the_contrast():
    imagenet = ["--dataset", "imagenet", "--arch", "resnet18"]
    assert parse("--contrast", "bank").batches == "uniform"
    assert parse("--contrast", "bank", "--batches", "pairs").batches == "pairs"
    assert parse(*imagenet, "--contrast", "batch").batches == "pairs"
    assert parse(*imagenet, "--method", "dml").batches == "uniform"


def test_default_out_dirs_name_what_differs():
    where = lambda *more: parse(*more).out_dir
    assert where() == "out/cifar100-lmcl-resnet32x2-0"
    three = ["--arch", "resnet8", "--num-nets", "3", "--seed", "2", "--resume"]
    assert where(*three) == "out/cifar100-lmcl-resnet8x3-2"
    mixed = ["--arch", "resnet8", "--arch", "wrn_10_1", "--tau", "0.2", "--logit-kd",
             "--method", "mcl"]
    assert where(*mixed) == "out/cifar100-mcl-resnet8+wrn_10_1-0-logit-kd-True-tau-0.2"
    assert where("--epochs", "300") == where() != where("--epochs", "200")
    assert where("--method", "dml") == "out/cifar100-dml-resnet32x2-0"
    assert where(
        *"--device cpu --data-dir x --max-steps 3 --save-every 1 --workers 7".split()) == where()
    assert where("--tensorboard") == where() != where("--deterministic")
    bank = where("--contrast", "bank", "--epochs", "20")  # what follows from these two is not named
    assert bank == "out/cifar100-lmcl-resnet32x2-0-batches-uniform-contrast-bank-epochs-20"
    assert where("--optimizer", "adamw") == where() + "-optimizer-adamw"
    assert where("--soft-ramp", "2") == where() + "-soft-ramp-2.0"


# ---------------------------------------------------------------- methods' own options

CONTRAST = {"weight_vcl", "weight_icl", "weight_soft_vcl", "weight_soft_icl", "tau", "T",
            "contrast", "negatives", "bank_momentum", "contrast_start", "soft_ramp"}
OWN = {"lmcl": CONTRAST | {"matching", "meta_freq", "meta_steps", "virtual_lambda"},
       "mcl": CONTRAST | {"logit_kd"},
       "afd": {"T", "weight_adversarial"},
       "dml": set(), "deep-supervision": set(), "independent": set()}


def test_a_method_has_the_options_that_it_reads_and_no_others():
    assert OWN.keys() == METHODS.keys()
    shared = vars(parse("--method", "independent")).keys()
    assert shared >= WHERE and not shared & set.union(*OWN.values())
    for name, own in OWN.items():
        assert vars(parse("--method", name)).keys() - shared == own, name


@pytest.mark.parametrize("more, flag, method, owners", [
    (["--method", "dml", "--tau", "0.1"], "--tau", "dml", "lmcl or mcl"),
    (["--T=4", "--method=dml"], "--T", "dml", "lmcl or mcl or afd"),
    (["--logit-kd"], "--logit-kd", "lmcl", "mcl"),
])
def test_an_option_of_another_method_names_those_that_it_goes_with(
        more, flag, method, owners, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*more)
    words = f"argument {flag}: {method} has no such option, it goes with --method {owners}"
    assert end.value.code == 2
    assert capsys.readouterr().err == f"train.py: error: {words} (--help lists the options)\n"


@pytest.mark.parametrize("name", METHODS)
def test_help_lists_the_options_of_the_method(name, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help", "--method", name)
    text, flag = capsys.readouterr().out, lambda option: f"\n  --{option.replace('_', '-')} "
    assert (end.value.code == 0 and flag("lr") in text
            and (f"method {name} (" in text) == bool(OWN[name]))
    assert {option for option in set.union(*OWN.values()) if flag(option) in text} == OWN[name]


# ---------------------------------------------------------------- what users do wrong

@pytest.mark.parametrize("more", [
    "--num-nets 0", "--batch-size 0", "--batch-size 19", "--epochs 0", "--epochs ten",
    "--max-steps -1", "--lr 0", "--lr nan", "--momentum 1", "--momentum 0", "--weight-decay -1",
    "--milestones 0", "--validation-fraction 1", "--image-size 4", "--workers -1",
    "--save-every -1", "--seed -1", "--seed 9223372036854775808",
    "--weight-vcl -1", "--weight-icl inf", "--weight-soft-vcl -1", "--weight-soft-icl nan",
    "--tau 0", "--T -3", "--negatives 0", "--bank-momentum 1",
    "--meta-freq 0", "--meta-steps 0", "--method afd --weight-adversarial -1",
    "--weight-decay -1e-4", "--lr -.5E3", "--T -2.e+1", "--tau -nan",
    "--method afd --weight-adversarial -inf", "--milestones 3 -1e4", "--seed 1e3"])
def test_every_option_keeps_its_rule(more, capsys):
    """One line that names the option and its rule."""
    with pytest.raises(SystemExit) as end:
        parse(*more.split())
    error, flag = (capsys.readouterr().err,
                   [word for word in more.split() if word.startswith("--")][-1])
    words = "invalid int value: 'ten'" if "ten" in more else "must be "
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"train.py: error: argument {flag}: {words}")


def test_a_student_whose_name_is_no_files(monkeypatch, capsys):
    """Its file would be written at the very end."""
    monkeypatch.setitem(ARCHITECTURES, "my/small", ARCHITECTURES["resnet8"])
    with pytest.raises(SystemExit) as end:
        parse("--arch", "resnet8", "my/small")
    assert end.value.code == 2 and "--arch: my/small becomes part of" in capsys.readouterr().err


@pytest.mark.parametrize("parse, more", [
    (detect.parse, "--dataset own --backbone random --weight-decay -1e-4"),
    (detect.parse, "--dataset own --backbone random --milestones -1e4"),
    (predict.main, "x.png --student net.pt --validation-fraction -2.5e-3")])
def test_negative_numbers_meet_the_rule_in_the_other_programs(parse, more, capsys):
    with pytest.raises(SystemExit) as end:
        parse(more.split())
    assert (end.value.code == 2
            and f"argument {more.split()[-2]}: must be " in capsys.readouterr().err)


@pytest.mark.parametrize("more, status, words", [
    (["--no-such-flag"], 2, "unrecognized argument --no-such-flag"),
    (["--method", "mlc"], 2, "--method: invalid choice: 'mlc'"),
    (["--method"], 2, "--method: expected one argument"),
    (["--out-dir", ""], 2, "--out-dir: must be a folder's name"),
    (["--arch", "resnet33"], 2, "--arch: unknown student 'resnet33'"),
    (["--arch", "resnet18", "resnet32"], 2, "--arch: resnet18 has 4 stages, resnet32 has 3 stages"),
    (["--arch", "resnet8", "resnet20", "--num-nets", "3"], 2,
     "--num-nets: must be the number of names"),
    (["--weights", "a.pt"], 2, "--weights: must be 2 files"),
    (["--warmup", "2"], 2, "--warmup: must be below --epochs, which is 2"),
    (["--model-file", "nowhere.py"], 2, "--model-file: "),
    (["--batch-size", "1000"], 1, "at most the 54 training images"),
    (["--data-dir", "nowhere"], 1, "--data-dir nowhere: no folder nowhere"),
    (["--weights", "junk.pt", "junk.pt"], 1, "junk.pt"),
    (["--device", "tpu9"], 1, "--device tpu9 cannot be used here"),
    # it exists, but computes nothing
    (["--device", "meta"], 1, "--device meta cannot be used here"),
    (["--cuda-graph"], 1, "--cuda-graph wants a CUDA device, and this is cpu"),
    (["--image-size", "10000000"], 1, "out of memory on cpu: try a smaller --batch-size"),
    (["--out-dir", "junk.pt/x"], 1,
     "cannot make --out-dir junk.pt/x (Not a directory): give another one"),
    pytest.param(["--device", "cuda"], 1, "--device cuda",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")),
])
def test_user_errors_end_in_one_line(fails, more, status, words):
    """One row for each kind of cause."""
    Path("junk.pt").write_bytes(b"junk" * 100)
    fails(more, words, status=status)


def test_train_itself_no_longer_predicts(fails):
    """predict.py does; a command of an earlier version is told so, not misread."""
    fails(["--evaluate", "out/last.pt"], "--evaluate: predict.py does that", status=2)
