"""predict.py: pictures, evaluation and export of student files, last.pt and best.pt."""

import copy
import functools
import importlib
import os
import shutil
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models import SwinTransformer
from torchvision.transforms.functional import pil_to_tensor

import data
import methods
import models
import predict
import train
from conftest import flags, read_log
from support import files
from support.architectures import ARCHITECTURES, ExistingNetwork
from support.console import UserError

ROOT = Path(train.__file__).parent
ARCH = ["small", "small_12"]


@pytest.fixture(scope="module")
def out(images, tmp_path_factory):
    """What a run of two students leaves."""
    out = tmp_path_factory.mktemp("run") / "out"
    train.main(flags(images, out, 2, "--method", "mcl", "--arch", *ARCH))
    return out


@pytest.fixture
def use(tmp_path, monkeypatch, capsys):
    """Run predict.py in an empty folder; returns the lines it prints."""
    monkeypatch.chdir(tmp_path)

    def use(*more):
        capsys.readouterr()
        predict.main([*map(str, more), "--device", "cpu"])
        return capsys.readouterr().out.splitlines()

    return use


@pytest.fixture
def fails(use, capsys):
    """Run predict.py, which is to end by this exit status and one line with all these words."""
    def fails(more, *words, status=1):
        with pytest.raises(SystemExit) as end:
            use(*more)
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert end.value.code == status and len(lines) == 1 and printed.out == "", lines
        assert lines[0].startswith("predict.py: error: "), lines
        assert [w for w in words if w not in lines[0]] == [], lines

    return fails


def student(out, a):
    return predict.load_student(out / f"student_{a}_{ARCH[a - 1]}.pt")


@torch.no_grad()
def expected(network, images):
    """Probabilities [B, C] for uint8 [B, 3, H, W] of the right size."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (network.mean, network.std))
    return network((images / 255 - mean) / std).softmax(-1)


def probabilities(network, picture):
    return expected(network, pil_to_tensor(Image.open(picture))[None])[0]


def five(classes, p):
    """The line's words for probabilities [C]."""
    return "  ".join(f"{classes[c]} {p[c]:.2f}" for c in p.argsort(descending=True)[:5])


# ---------------------------------------------------------------- pictures

def test_pictures_and_folders_by_a_student(use, out, images):
    """Five classes of six, the likeliest first;
    a folder's images in order, those in folders of it too."""
    picture, folder, own = images / "test/class3/9.png", images / "test/class0", student(out, 1)
    (Path("deep") / "er").mkdir(parents=True)
    shutil.copy(picture, "deep/er/x.png")
    Path("deep/notes.txt").write_text("no picture")
    lines = use(picture, folder, "deep", "--student", out / "student_1_small.pt")
    paths = [picture, *sorted(folder.iterdir()), Path("deep/er/x.png")]
    assert lines == [f"{path}  {five(own.classes, probabilities(own, path))}" for path in paths]


def test_several_students_by_their_mean_probability(use, out, images):
    """Of last.pt those of the student files; of best.pt its own."""
    pictures = sorted(images.glob("test/*/9.png"))
    for checkpoint in ("last.pt", "best.pt"):
        students = [predict.load_student(file)
                    for file in predict.load_contents(out / checkpoint)[0]]
        means = [sum(probabilities(network, picture) for network in students) / 2
                 for picture in pictures]
        assert use(*pictures, "--student", out / checkpoint) == [
            f"{picture}  {five(students[0].classes, p)}"
            for picture, p in zip(pictures, means, strict=True)]
        if checkpoint == "last.pt":
            first, second = (
                torch.stack([probabilities(student(out, a), picture) for picture in pictures])
                for a in (1, 2))
            assert torch.equal(torch.stack(means), (first + second) / 2)
            assert (first - second).abs().max() > 0.01  # the mean is not one of them


# ---------------------------------------------------------------- evaluation

def scores(log):
    """predict.py's lines for the last epoch of a log."""
    names = log[0]["args"]["arch"]
    return [f"student {a}  {name}: top-1 {top1:.2f}  top-5 {top5:.2f}" for a, name, top1, top5 in
            zip((1, 2, 3), names, log[-1]["test_top1"], log[-1]["test_top5"], strict=False)]


def test_scores_equal_those_of_the_run(use, out, images):
    """last.pt knows where its data is; a student file is told.

    best.pt has its own epoch's scores.
    """
    log = read_log(out)
    assert use("--student", out / "last.pt", "--dataset", "folder") == scores(log)
    best = files.load_checkpoint(out / "best.pt")["best_epoch"]
    assert use("--student", out / "best.pt", "--dataset", "folder") == scores(log[:best + 1])
    for a in (1, 2):
        file = out / f"student_{a}_{ARCH[a - 1]}.pt"
        found = use("--student", file, "--dataset", "folder", "--data-dir", images)
        assert found == [scores(log)[a - 1].replace("student 2", "student 1")]


def test_scores_where_test_images_were_split_off(use, run, images):
    """A folder without test images:
    the run's --seed and --validation-fraction say which were held back."""
    shutil.copytree(images / "train", "all/train")
    split = ["--validation-fraction", 0.33, "--seed", 3]
    log = run(*split, "--data-dir", "all", "--method", "independent", "--batch-size", 12, epochs=1)
    assert use("--student", "out/last.pt", "--dataset", "folder") == scores(log)
    given = ["--student", "out/student_1_small.pt", "--dataset", "folder", "--data-dir", "all"]
    assert use(*given, *split) == scores(log)[:1]
    assert len({use(*given, *split[:3], seed)[0] for seed in range(5)}) > 1


def test_scores_on_other_images_by_the_students_own_mean(use, out, images, monkeypatch):
    """Those of the other folder's training images are not its."""
    shutil.copytree(images, "other")
    for path in Path("other/train").rglob("*.png"):
        Image.new("RGB", (16, 16)).save(path)
    seen = []
    monkeypatch.setattr(predict, "evaluate", lambda students, batches, _: (
        seen.extend(batches), ([0.0], [0.0]))[1])
    use("--student", out / "student_1_small.pt", "--dataset", "folder", "--data-dir", "other")
    mean, std = torch.tensor([student(out, 1).mean, student(out, 1).std])[..., None, None]
    pixels = data.load("folder", "other", 16).test_images.permute(0, 3, 1, 2).float()
    torch.testing.assert_close(255 * (seen[0][0] * std + mean), pixels, rtol=0, atol=0.01)


def test_scores_of_a_streamed_run(use, run, images):
    """Its images are resized and cropped as it did,
    for student files too, which remember the size."""
    log = run("--stream", "--workers", 0, "--method", "independent", "--batch-size", 12,
              "--validation-fraction", 0.33, epochs=1)
    folder = ["--dataset", "folder", "--workers", 0]
    assert use("--student", "out/last.pt", *folder) == scores(log)
    second = scores(log)[1].replace("student 2", "student 1")
    assert use("--student", "out/student_2_small.pt", *folder, "--data-dir", images) == [second]
    line, = use("--student", "out/student_1_small.pt", images / "test/class3/9.png")
    assert line.count("class") == 6


class Average(methods.Method):
    """A copy of the students that stays as drawn, as an average of them would lag behind."""

    def __init__(self, *args):
        super().__init__(*args)
        self.mean_students = copy.deepcopy(self.students).requires_grad_(False)


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_copy_of_the_students_in_a_method_is_not_taken_for_them(
        run, monkeypatch, embeddings):
    monkeypatch.setitem(methods.METHODS, "average", Average)
    monkeypatch.setattr(Average, "embeddings", embeddings)
    run("--method", "average", "--num-nets", 2, epochs=1)
    contents, _ = predict.load_contents("out/last.pt")
    for a, content in enumerate(contents, start=1):
        own = torch.load(f"out/student_{a}_small.pt")["state_dict"]
        assert content["state_dict"].keys() == own.keys()
        assert all(torch.equal(content["state_dict"][key], own[key]) for key in own)


# ---------------------------------------------------------------- export

def batch(count):
    draw = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 3, 16, 16), generator=draw, dtype=torch.uint8)


ELSEWHERE = """
import json, sys, torch
if len(sys.argv) > 1:
    import onnx
    from onnx.reference import ReferenceEvaluator
input()  # until the files are there
batches, extra = torch.load("batches.pt"), {"classes.json": ""}
network = torch.export.load("new/net.pt2", extra_files=extra).module()
found = {"pt2": [network(x) for x in batches], "classes": json.loads(extra["classes.json"])}
assert "mean_std" in dict(network.named_buffers())  # so that it moves to another device
if len(sys.argv) > 1:
    model = onnx.load("net.onnx")
    onnx.checker.check_model(model, full_check=True)
    run = lambda x: ReferenceEvaluator(model).run(None, {"images": x.numpy()})[0]
    found["onnx"] = [torch.tensor(run(x)) for x in batches]
    assert json.loads({p.key: p.value for p in model.metadata_props}["classes"]) == found["classes"]
    (given,), (result,) = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("images", "probabilities")
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
torch.save(found, "found.pt")
"""


def test_exported_networks_need_nothing_of_ours(use, out):
    """In a process that starts in another folder:
    uint8 of any batch size in, probabilities out, classes beside."""
    onnx = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s",
               "-c", ELSEWHERE, *onnx[1:]]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:  # it loads PyTorch
        line, = use("--student", out / "student_2_small_12.pt", "--export", "new/net.pt2")
        assert line == ("student 1  small_12: new/net.pt2, "
                        "uint8 [B, 3, 16, 16] -> probabilities, 6 classes")
        if len(onnx) == 2:
            use("--student", out / "student_2_small_12.pt", "--export", "net.onnx")
        batches, own = [batch(1), batch(5)], student(out, 2)
        torch.save(batches, "batches.pt")
        _, errors = process.communicate("\n")
    assert process.returncode == 0, errors
    found = torch.load("found.pt")
    assert found.pop("classes") == own.classes == [f"class{c}" for c in range(6)]
    assert found.keys() == ({"pt2", "onnx"} if len(onnx) == 2 else {"pt2"})
    for probabilities in found.values():
        for x, p in zip(batches, probabilities, strict=True):
            torch.testing.assert_close(p, expected(own, x), rtol=0, atol=1e-5)


TEACHING = """
import losses, methods, predict, train

class Offline(methods.Method):
    \"\"\"backbones alone, cross-entropy and KL towards a trained student that stays as it is\"\"\"
    @staticmethod
    def add_options(group): group.add_argument("--teacher", required=True, help="a student file")
    def __init__(self, *setting):
        super().__init__(*setting)
        self.teacher = predict.load_student(self.args.teacher).requires_grad_(False)
    def forward(self, images):
        return super().forward(images)._replace(extra=self.teacher(images))
    def terms(self, outputs, labels, rows):
        kd = losses.distillation(outputs.logits[:, -1], outputs.extra, T=4.0).sum()
        return {"ce": (1, losses.cross_entropy(outputs.logits, labels)), "kd": (1, kd)}

methods.METHODS["offline"] = Offline
"""


def test_a_trained_student_teaches_and_stays_as_it_is(out, run, monkeypatch):
    """RUNNING.md's offline distillation:
    not a bit of the teacher moves, in any mode of what holds it."""
    page = (ROOT / "docs/RUNNING.md").read_text()
    shown = page[page.index("class Offline"):page.index('methods.METHODS["offline"]')]
    assert shown.strip() in textwrap.dedent(TEACHING)
    monkeypatch.setattr(methods, "METHODS", methods.METHODS.copy())
    monkeypatch.setitem(methods.METHODS, "offline", None)
    exec(TEACHING, {})
    teacher = student(out, 1)
    monkeypatch.setitem(sys.modules["options"].METHODS, "offline", methods.METHODS["offline"])
    monkeypatch.setitem(train.METHODS, "offline", methods.METHODS["offline"])
    _, line = run("--method", "offline", "--teacher", out / "student_1_small.pt",
                  out="taught", epochs=1)
    assert line["kd"] > 0
    state = files.load_checkpoint("taught/last.pt")["model"]
    for name, value in teacher.state_dict().items():
        assert torch.equal(state[f"teacher.{name}"], value)
    teacher.train()
    assert not any(module.training for module in teacher.modules())


def test_export_of_a_transformer(use, monkeypatch):
    """Its windows are shifted and rolled whatever the batch size."""
    torch.manual_seed(0)
    build = functools.partial(SwinTransformer, [4, 4], 8, [2, 1], [1, 2], [2, 2])
    layout = ("features.0 permute | features.0.1 features.1 permute | "
              "features.0.1 features.2-3 permute | features.0.1 norm permute | head")
    monkeypatch.setitem(ARCHITECTURES, "two_stages", ExistingNetwork(build, layout, pool="avgpool"))
    backbone = models.Backbone("two_stages", 3)
    for p in backbone.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)  # or all probabilities are alike
    facts = dict(classes="abc", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), image_size=16, resize=16)
    torch.save(files.student_file(backbone, "two_stages", facts), "net.pt")
    use("--student", "net.pt", "--export", "net.pt2")
    network, own = torch.export.load("net.pt2").module(), predict.load_student("net.pt")
    for count in (1, 5):
        torch.testing.assert_close(network(batch(count)), expected(own, batch(count)))
    assert network(batch(5)).std(0).min() > 0.01
    Image.new("RGB", (16, 16)).save("x.png")
    line, = use("x.png", "--student", "net.pt")  # three classes, not five
    assert len(line.split("  ")) == 1 + 3


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_export_for_onnx_without_its_packages(fails, out, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    fails(["--student", out / "student_1_small.pt", "--export", "net.onnx"],
          "pip install onnx onnxscript")
    assert not Path("net.onnx").exists()


def test_export_of_several_students(use, out, images):
    """Each by itself, as numbered files; student files of best.pt are read again.

    Other uses go beside it.
    """
    picture = images / "test/class3/9.png"
    *evaluated, named, first, second = use(
        picture, "--student", out / "best.pt", "--export", "net.pt", "--dataset", "folder")
    assert len(evaluated) == 2 and named.startswith(f"{picture}  class")
    assert first == "student 1  small: net_1.pt, student file, 6 classes" and "net_2.pt" in second
    assert sorted(p.name for p in Path().iterdir()) == ["net_1.pt", "net_2.pt"]
    state = files.load_checkpoint(out / "best.pt")["model"]
    for a, name in enumerate(ARCH):
        network = predict.load_student(f"net_{a + 1}.pt")
        assert network.architecture == name and network.mean == student(out, 1).mean
        for key, value in network.state_dict().items():
            assert torch.equal(value, state[f"students.cohort.students.{a}.backbone.{key}"])
    use("--student", out / "best.pt", "--export", "net.pt2")
    assert [torch.export.load(f"net_{a}.pt2").module()(batch(2)).shape
            for a in (1, 2)] == [(2, 6)] * 2


# ---------------------------------------------------------------- weights as people save them

SHUFFLE = torchvision.models.shufflenet_v2_x0_5(num_classes=3).state_dict()


def named(before, state=None):
    return {before + key: tensor for key, tensor in (state or SHUFFLE).items()}


@pytest.mark.parametrize("content, words", [
    (named("module."), ", less 'module.'"),
    (named("module._orig_mod."), ", less 'module._orig_mod.'"),
    ({"model": SHUFFLE}, ", of the file's ['model']"),
    ({"epoch": 3, "state_dict": named("module."),
      "optimizer": {"state": {0: {"momentum": torch.ones(1)}}}},
     ", of the file's ['state_dict'], less 'module.'"),
    ({"checkpoint": {"net": SHUFFLE}}, ", of the file's ['checkpoint']['net']")])
def test_weights_inside_of_what_a_file_holds(use, content, words):
    """As train.py --weights and detect.py --backbone read them."""
    torch.save(content, "net.pt")
    backbone = models.Backbone("shufflenet_v2_x0_5", 3)
    found, taken = files.load_pretrained(backbone, "shufflenet_v2_x0_5", "net.pt")
    assert taken == f"{len(SHUFFLE)} of {len(SHUFFLE)} tensors taken{words}"
    names = files.names_in_files(backbone, "shufflenet_v2_x0_5")
    assert all(tensor.equal(SHUFFLE[names[key]]) for key, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("content, words", [
    ({"model": SHUFFLE, "model_ema": SHUFFLE},
     ["several dictionaries of tensors (['model'], ['model_ema'])"]),
    ({"model": SHUFFLE, "args": Namespace(lr=0.1)},
     ["holds objects of argparse.Namespace", "torch.save(x['model'], NEW)"]),
    (torch.nn.Linear(2, 2),
     ["holds objects of torch.nn.modules.linear.Linear", "torch.save(x.state_dict(), NEW)"]),
    ([1, 2], ["no dictionary of tensors, but a list"]),
    ({"epoch": 3}, ["no dictionary of tensors, but a dict of epoch"]),
    (named("encoder.", dict(list(SHUFFLE.items())[9:])), ["Missing keys conv1.0.weight"]),
    (named("", {"a.b": torch.ones(1)}), ["unknown keys b"])])
def test_what_else_a_file_of_weights_holds_is_said(fails, content, words):
    """The names are those of the file; predict.py says the same of what it cannot take."""
    torch.save(content, "net.pt")
    backbone = models.Backbone("shufflenet_v2_x0_5", 3)
    with pytest.raises(UserError) as error:
        files.load_pretrained(backbone, "shufflenet_v2_x0_5", "net.pt")
    assert [word for word in words if word not in str(error.value)] == [], error.value
    alone = "keys" in words[0]  # tensors, but no student file
    fails(["--student", "net.pt", "x.png"], *(["tensors alone"] if alone else words))


def test_student_files_inside_of_others(use, out, images):
    picture, student = images / "test/class3/9.png", files.read(out / "student_1_small.pt")
    want = use(picture, "--student", out / "student_1_small.pt")
    for content in ({"model": student},
                    student | dict(state_dict=named("module.", student["state_dict"]))):
        torch.save(content, "net.pt")
        assert use(picture, "--student", "net.pt") == want


# ---------------------------------------------------------------- what users do wrong

@pytest.mark.parametrize("more, status, words", [
    (["--student", "net.pt"], 2, "nothing to do: give pictures, --dataset or --export"),
    (["x.png"], 2, "--student"),
    (["--student", ""], 2, "--student: must be a file's name"),
    (["--student", "net.pt", "--export", "net.tflite"], 2,
     "--export: must end in .pt2, .onnx, .pt"),
    (["--student", "net.pt", "--export", "net"], 2, "--export: must end in"),
    (["--student", "net.pt", "--dataset", "mnist"], 2, "--dataset: invalid choice"),
    (["--student", "nothing.pt", "x.png"], 1, "cannot read nothing.pt (No such file"),
    (["--student", "folder", "x.png"], 1, "cannot read folder (Is a directory)"),
    (["--student", "junk.pt", "x.png"], 1, "junk.pt is no file of weights"),
    (["--student", "weights.pt", "x.png"], 1, "weights.pt"),
    (["--student", "foreign.pt", "x.png"], 1, "foreign.pt is no checkpoint of this program"),
    (["--student", "future.pt", "x.png"], 1, "newer than this program's"),
    (["--student", "past.pt", "x.png"], 1, "older than this program's"),
    (["--student", "detect.pt", "x.png"], 1, "detect.pt is no checkpoint of train.py"),
    (["--student", "net.pt", "nothing.png"], 1, "cannot read image nothing.png"),
    (["--student", "net.pt", "junk.pt"], 1, "cannot read image junk.pt"),
    (["--student", "net.pt", "folder"], 1, "no image in folder"),
    (["--student", "net.pt", "--dataset", "folder", "--data-dir", "gone"], 1,
     "--data-dir gone: no folder"),
    (["--student", "net.pt", "--dataset", "folder", "--data-dir", "other"], 1,
     "net.pt was trained on other classes (class0, class1, class2, class3, class4, class5) "
     "than those of"),
    (["--student", "net.pt", "--export", "junk.pt/x.pt"], 1, "the folder of --export"),
    (["--student", "net.pt", "--model-file", "nowhere.py", "x.png"], 1, "nowhere.py"),
])
def test_user_errors_end_in_one_line(fails, out, images, more, status, words):
    Path("folder").mkdir()
    Path("junk.pt").write_bytes(b"junk" * 100)
    shutil.copy(out / "student_1_small.pt", "net.pt")
    torch.save({"weights": torch.ones(2)}, "weights.pt")
    files.save_checkpoint("foreign.pt", {"weights": torch.ones(2)})
    for name, number in (("future.pt", 99), ("past.pt", 1), ("detect.pt", files.CHECKPOINT_FORMAT)):
        state = dict(format=number, args=dict(arch="resnet18", backbone="random"), model={})
        files.save_checkpoint(name, state)
    if "other" in more:
        shutil.copytree(images, "other")
        for split in ("train", "test"):
            Path("other", split, "class0").rename(Path("other", split, "cat"))
    fails(more, words, status=status)


def test_torchrun_is_refused(fails, out, monkeypatch):
    for item in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0").items():
        monkeypatch.setenv(*item)
    fails(["--student", out / "last.pt", "x.png"],
          "predict.py wants one process: leave torchrun out")


def test_last_pt_with_other_classes_is_refused(fails, out, images):
    shutil.copytree(images / "train", "other/train")
    shutil.rmtree("other/train/class5")
    shutil.copytree("other/train", "other/test")
    fails(["--student", out / "last.pt", "--dataset", "folder", "--data-dir", "other"],
          f"{out}/last.pt was trained on other classes", "class5) than",
          "--data-dir other (class0, class1, class2, class3, class4)")


def test_a_dictionary_that_is_no_student_file_is_named():
    with pytest.raises(UserError, match="^the content is no checkpoint .* and no student file"):
        predict.load_student({"weight": torch.zeros(2)})
