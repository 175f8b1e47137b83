"""detect.py: annotations, AP, the detector, runs that resume bit for bit, and errors in one line."""

import itertools
import json
import os
import shlex
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import detect
from conftest import assert_same, fork, read_log, wait
from devices import Processes

tools = pytest.importorskip("pycocotools.mask")
COCO = pytest.importorskip("pycocotools.coco").COCO
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval

SMALL = ["--min-size", 48, "--max-size", 64, "--proposals", 8, "--device", "cpu", "--workers", 0, "--warmup", 1,
         "--epochs", 2]


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def save_image(path, size, boxes=(), seed=0):
    """Noise with bright rectangles."""
    pixels = np.random.default_rng(seed).integers(0, 100, (size[1], size[0], 3), dtype=np.uint8)
    for x, y, w, h in boxes:
        pixels[y:y + h, x:x + w] = 230
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_set(root, train=5, test=3):
    """A set of its own in COCO's form: rectangles of two categories, every other image portrait."""
    for part, n in (("train", train), ("val", test)):
        content = dict(images=[], annotations=[], categories=[dict(id=7, name="wide"), dict(id=3, name="tall")])
        for i in range(n):
            size, boxes = (64, 48) if i % 2 else (48, 64), [(4 + i, 6, 24, 14), (30, 20, 10, 22)]
            save_image(root / part / f"{i}.png", size, boxes, seed=i)
            content["images"].append(dict(id=i, file_name=f"{i}.png", width=size[0], height=size[1]))
            content["annotations"] += [dict(id=2 * i + k, image_id=i, category_id=(7, 3)[k], bbox=b, area=b[2] * b[3],
                                            iscrowd=0, segmentation=rectangle(*b)) for k, b in enumerate(boxes)]
        save_json(root, part, content)
    return root


def save_json(root, part, content):
    path = root / "annotations" / f"instances_{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(detect, "WIDTH", 8)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("own"))


@pytest.fixture
def run(own, tmp_path, monkeypatch):
    """Run detect.py in this process and an empty folder; returns its log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(*more, out="out"):
        trains = "--evaluate" not in more and "--predict" not in more
        detect.main(training(own, out, *more) if trains else list(map(str, more)))
        return read_log(out)

    return run


def training(own, out, *more):
    return list(map(str, ["--dataset", "own", "--data-dir", own, "--arch", "shufflenet_v2_x0_5", "--backbone", "random",
                          "--batch-size", 2, "--lr", 0.01, *SMALL, "--out-dir", out, *more]))


@pytest.fixture
def fails(run, capsys):
    """Run detect.py, which is to end by this exit status and one line with all these words, and save nothing."""
    def fails(*flags, words=(), status=1):
        with pytest.raises(SystemExit) as end:
            run(*flags)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == status and len(lines) == 1 and lines[0].startswith("detect.py: error: "), lines
        assert [w for w in words if w not in lines[0]] == [], lines
        assert not os.path.exists("out/last.pt")

    return fails


# ---------------------------------------------------------------- data

def test_odd_annotations(tmp_path):
    """What COCO's files hold: crowds, no objects, several polygons, RLE of both kinds; and what other people's do."""
    blob = np.zeros((40, 30), np.uint8, order="F")
    blob[5:15, 10:18] = 1
    packed = tools.encode(blob)
    packed["counts"] = packed["counts"].decode()
    counts = [len(list(g)) for _, g in itertools.groupby(blob.flatten("F"))]                 # starts with zeros
    listed, usual = dict(size=[40, 30], counts=counts), dict(iscrowd=0, area=50)
    categories = [dict(id=9, name=1), dict(id=2, name="")]
    images = [dict(id=i, file_name=f"{i}.png", width=30, height=40) for i in (5, 0, 3, 8)]
    objects = [                                            # image, category, box, mask, the rest
        (0, 9, [0, 0, 15, 15], rectangle(0, 0, 4, 6) + rectangle(10, 10, 5, 5), usual),
        (0, 2, [10, 5, 8, 10], listed, dict(usual, iscrowd=1)),
        (0, 2, [10, 5, 8, 10], listed, usual),
        (0, 2, [10, 5, 8, 10], packed, dict(area=None, iscrowd=None)),
        (0, 2, [25, 30, 20, 20], rectangle(25, 30, 20, 20), {}),                             # beyond the image
        (0, 2, [3, 3, 0, 9], rectangle(3, 3, 0, 9), usual),
        (0, 2, [1, 2, 3, 4], [[1, 2, 3, 4]], usual),
        (0, 2, [1, 2, 3, 4], [], usual),                   # a box alone
        (3, 2, [3, 3, .5, 9], rectangle(3, 3, 1, 9), {}),
        (8, 2, [0, 0, 9, 9], rectangle(0, 0, 9, 9), dict(usual, iscrowd=1)),
    ]
    annotations = [dict(id=k, image_id=i, category_id=c, bbox=box, segmentation=mask, **rest)
                   for k, (i, c, box, mask, rest) in enumerate(objects)]
    for part in ("train", "val"):
        save_json(tmp_path, part, dict(images=images, annotations=annotations, categories=categories))
    for i in (0, 3, 5, 8):
        save_image(tmp_path / "train" / f"{i}.png", (30, 40))
    train, test = detect.load_data("own", tmp_path)
    assert train.classes == ["", "1"] and test.ids == [0, 3, 5, 8]
    assert train.ids == [0, 8]                             # 5 has no object, 3 one below a pixel; 8's crowd counts
    image, target = train.load((0, False))
    assert image.shape == (3, 40, 30) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[0, 0, 15, 15], [10, 5, 18, 15], [10, 5, 18, 15], [25, 30, 30, 40]]
    assert target["labels"].tolist() == [2, 1, 1, 1]
    assert all(torch.equal(target["masks"][k], torch.from_numpy(blob)) for k in (1, 2))
    assert target["masks"].sum((1, 2)).tolist() == [49, 80, 80, 50]
    flipped_image, flipped = train.load((0, True))
    assert torch.equal(flipped_image, image.flip(-1)) and torch.equal(flipped["masks"], target["masks"].flip(-1))
    assert flipped["boxes"].tolist() == [[15, 0, 30, 15], [12, 5, 20, 15], [12, 5, 20, 15], [0, 30, 5, 40]]
    _, empty = train.load((8, False))
    assert {k: v.shape for k, v in empty.items()} == dict(boxes=(0, 4), labels=(0,), masks=(0, 40, 30))


@pytest.mark.parametrize("images,masks", [("images", "masks/{}.png"), ("PNGImages", "PedMasks/{}_mask.png")])
def test_pennfudan(tmp_path, images, masks):
    for i in range(6):
        numbers = np.zeros((20, 24), np.uint8)
        numbers[2:9, 3:7], numbers[10:15, 12:20] = 1, 2
        save_image(tmp_path / images / f"{i}.png", (24, 20))
        path = tmp_path / masks.format(i)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(numbers).save(path)
    train, test = detect.load_data("pennfudan", tmp_path)
    assert (train.ids, test.ids, test.classes) == ([0, 1, 2, 3, 5], [4], ["person"])
    target = test.load((4, False))[1]
    assert target["boxes"].tolist() == [[3, 2, 7, 9], [12, 10, 20, 15]] and target["labels"].tolist() == [1, 1]
    assert target["masks"].sum((1, 2)).tolist() == [28, 40]


def test_plan():
    """An image comes once an epoch, with its like; parts make up the whole; a resumed plan is the rest of it."""
    images = {10 * i: dict(width=2 + i % 3, height=3) for i in range(23)}
    pictures = detect.Pictures(Path(), Namespace(imgs=images), list(images), [])

    def plan(epoch=0, step=0, left=5, part=(0, 1)):
        run = Namespace(step=step, steps_per_epoch=5, steps_left=left, processes=Namespace(part=part))
        items = detect.train_plan(Namespace(seed=1, batch_size=4), pictures, run, epoch)
        return list(zip(*[iter(items)] * (4 // part[1]), strict=True))

    ids = [[i for i, _ in batch] for batch in plan()]
    assert len(ids) == 5 and len({i for b in ids for i in b}) == 20
    assert sum(len({images[i]["width"] > 3 for i in b}) > 1 for b in ids) <= 1
    assert plan(step=2) == plan()[2:] and plan(step=1, left=3) == plan()[1:4] and plan(epoch=1) != plan()
    assert {flip for batch in plan() for _, flip in batch} == {True, False}
    halves = zip(plan(part=(0, 2)), plan(part=(1, 2)), strict=True)
    assert [sorted(a + b) for a, b in halves] == [sorted(batch) for batch in plan()]


def test_broken_image(own):
    """An error of a worker process is one line."""
    train, _ = detect.load_data("own", own)
    train.index.imgs[1]["file_name"] = "none.png"
    with pytest.raises(detect.DataError, match="cannot read image .*none.png"):
        list(detect.data.read_items(train.load, [(0, False), (1, False)], 1))


# ---------------------------------------------------------------- AP

def test_average_precision(own, tmp_path):
    """Perfect detections have 100, none 0, others what pycocotools gives for files of the same."""
    _, test = detect.load_data("own", own)

    def results(shift, score):
        found = []
        for i in test.ids:
            target = test.load((i, False))[1]
            target["masks"], target["boxes"] = target["masks"].roll(shift, -1).bool(), target["boxes"] + shift
            target["scores"] = torch.full((len(target["boxes"]),), score)
            found += detect.as_results(target, i, sorted(test.index.cats))
        return found

    assert detect.average_precision(test.index, results(0, 0.9)) == dict.fromkeys(detect.SCORES, 100.0)
    assert detect.average_precision(test.index, []) == dict.fromkeys(detect.SCORES, 0.0)
    mixed = results(2, 0.5) + results(1, 0.4)[::2]
    truth = json.loads((own / "annotations/instances_val.json").read_text())
    for number, a in enumerate(truth["annotations"]):      # pycocotools on files loses the object numbered 0
        a["id"] = number + 1
    (tmp_path / "truth").write_text(json.dumps(truth))
    (tmp_path / "found").write_text(json.dumps(mixed, default=bytes.decode))
    coco, expected = COCO(str(tmp_path / "truth")), []
    for kind, key in (("bbox", "segmentation"), ("segm", "bbox")):
        part = [{k: v for k, v in r.items() if k != key} for r in json.loads((tmp_path / "found").read_text())]
        (tmp_path / "part").write_text(json.dumps(part))
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "part")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        expected += [round(100 * x, 2) for x in evaluation.stats[:3].tolist()]
    assert list(detect.average_precision(test.index, mixed).values()) == expected
    assert 0 < expected[0] < 100 and expected[0] != expected[3]


# ---------------------------------------------------------------- the detector

def options(*more):
    args = detect.parse(["--dataset", "own", "--backbone", "x", "--arch", "resnet18", *map(str, [*SMALL, *more])])
    return Namespace(**{**vars(args), "device": torch.device("cpu")})


def one_step(args, model, own):
    """A training step on two images. Returns the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    run = Namespace(optimizers=[optimizer], processes=Processes({}), epoch=0, total_steps=9)
    train, _ = detect.load_data("own", own)
    torch.manual_seed(0)
    images = zip(train.load((0, False)), train.load((2, False)), strict=True)
    return detect.train_step(args, model.train(), run, *images)


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v2_x0_5"])
def test_backbones(arch, tmp_path):
    """A student file and torchvision's state_dict give the same detector, with the file's mean; others are refused."""
    net = torchvision.models.get_model(arch, num_classes=4).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(1, 2)
    file = dict(state_dict=net.state_dict(), architecture=arch, classes=[*"abcd"], mean=(.4, .5, .6), std=(.1, .2, .3),
                image_size=64, resize=64)
    torch.save(file, tmp_path / "student.pt")
    older = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / "plain.pth")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        known = (net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(image))))) if arch == "resnet18" else
                 net.maxpool(net.conv1(image)))
    for name, mean in (("student.pt", [.4, .5, .6]), ("plain.pth", [.485, .456, .406])):
        taken, *mean_std, words = detect.load_backbone(str(tmp_path / name), arch)
        left = set(net.state_dict()) - taken.keys()
        assert f"{len(taken)} tensors taken, {len(left)} after" in words
        assert {k.split(".")[0] for k in left} <= {"fc", "conv5"}
        model = detect.build(options("--arch", arch), ["a"], *mean_std, taken).train()       # train mode: BN is frozen
        assert model.transform.image_mean == mean
        torch.testing.assert_close(model.backbone.body(image)["0"], known)
        other = "shufflenet_v2_x1_0" if arch.startswith("shuffle") else "resnet34"
        with pytest.raises(detect.UserError, match=f"not a {other}|does not fit {other}"):
            detect.load_backbone(str(tmp_path / name), other)


@pytest.mark.parametrize("flags,trained,moving", [
    ((), "layer2 layer3 layer4", ""),
    (("--freeze", 0), "conv1 layer1 layer2 layer3 layer4", ""),
    (("--freeze", 2, "--batch-norm", "train"), "layer3 layer4", "layer3 layer4"),
    (("--backbone", "random"), "conv1 bn1 layer1 layer2 layer3 layer4", "bn1 layer1 layer2 layer3 layer4"),
    (("--freeze", 1, "--arch", "shufflenet_v2_x0_5"), "stage2 stage3 stage4", ""),
])
def test_frozen_layers(flags, trained, moving, own):
    """One SGD step changes the layers that are trained, and batch statistics only where batch norm is."""
    args = options(*flags)
    model = detect.build(args, ["a", "b"], *detect.data.IMAGENET)
    body = model.backbone.body
    before = {k: v.clone() for k, v in body.state_dict().items()}
    one_step(args, model, own)
    changed = [k for k, v in body.state_dict().items() if not torch.equal(v, before[k])]
    assert {k.split(".")[0] for k in changed if k.endswith("weight")} == set(trained.split())
    assert {k.split(".")[0] for k in changed if "running" in k} == set(moving.split())


def test_proposals():
    """512 are torchvision's own defaults."""
    model = detect.build(options("--proposals", 512), ["a"], *detect.data.IMAGENET)
    usual = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    for a, b in ((model.rpn, usual.rpn), (model.roi_heads.fg_bg_sampler, usual.roi_heads.fg_bg_sampler)):
        for name in ("_pre_nms_top_n", "_post_nms_top_n", "batch_size_per_image"):
            assert getattr(a, name, None) == getattr(b, name, None)


def test_bfloat16(own):
    """Losses are float32 and near those in float32; evaluation is float32 throughout."""
    losses, scores, image = [], [], torch.randint(255, (3, 48, 64), dtype=torch.uint8)
    for amp in ("no", "bf16"):
        args = options("--amp", amp, "--batch-norm", "train")
        model = detect.build(args, ["a", "b"], *detect.data.IMAGENET)
        scores.append(detect.detect(model, image, "cpu")["scores"])
        losses.append(one_step(args, model, own))
    with torch.autocast("cpu", torch.bfloat16):            # what boxes are made of
        maps = list(model.backbone(torch.rand(1, 3, 64, 64)).values())
        assert {x.dtype for x in [*maps, *sum(model.rpn.head(maps), [])]} == {torch.float32}
    (plain, half), dtypes = losses, {v.dtype for v in losses[1].values()}
    assert torch.equal(*scores) and dtypes == {torch.float32} and plain["loss"] != half["loss"]
    torch.testing.assert_close(half, plain, rtol=0.1, atol=0.02)


# ---------------------------------------------------------------- runs

def test_resume_evaluate_predict(run, own, capsys, monkeypatch):
    """Stopped inside an epoch by --max-steps, then after its last step by a signal, and resumed, all while the rate
    warms up: bit for bit as if not stopped."""
    log = run("--warmup", 9, out="whole")
    assert [line["step"] for line in log[1:]] == [2, 4] and {"loss", "loss_mask", *detect.SCORES} <= log[-1].keys()
    run("--warmup", 9, "--max-steps", 1, out="parts")
    run("--warmup", 9, "--max-steps", 1, "--resume", out="parts")         # again: nothing is lost
    assert read_log("parts")[-1]["step"] == 1 and Path("parts/best.pt").exists()
    step = detect.train_step
    monkeypatch.setattr(detect, "train_step", lambda args, model, run, *batch: (
        signal.raise_signal(signal.SIGTERM) if run.total_steps == 1 else None, step(args, model, run, *batch))[1])
    with pytest.raises(SystemExit) as end:
        run("--warmup", 9, "--resume", out="parts")
    assert end.value.code == 1 and "SIGTERM: saved parts/last.pt after step 2" in capsys.readouterr().err
    monkeypatch.setattr(detect, "train_step", step)
    run("--warmup", 9, "--resume", out="parts")
    (Path("whole") / "previous.pt").unlink()               # of another moment
    (Path("parts") / "previous.pt").unlink()
    assert_same("whole", "parts")

    for name in ("val", "annotations"):
        shutil.copytree(own / name, Path("other", name))
    Path("other/annotations/instances_train.json").unlink()               # evaluation does without a training set
    capsys.readouterr()
    run("--evaluate", "whole/last.pt", "--device", "cpu", "--workers", "0", "--data-dir", "~/other", out="whole")
    assert capsys.readouterr().out == detect.words({k: log[-1][k] for k in detect.SCORES}) + "\n"
    monkeypatch.setattr(detect, "SHOWN", 0.0)
    picture = own / "val" / "0.png"
    run("--predict", str(picture), "--checkpoint", "whole/best.pt", "--device", "cpu", out="whole")
    assert f"{picture}  " in capsys.readouterr().out
    drawn = np.asarray(Image.open("whole/0_detections.png"))[:64, :48]
    assert drawn.shape == (64, 48, 3) and (drawn != np.asarray(Image.open(picture))).any()
    run("--predict", str(picture), str(own / "train" / "0.png"), "--checkpoint", "whole/best.pt", "--device", "cpu",
        "--out-dir", "new/folder", out="whole")
    assert {p.name for p in Path("new/folder").iterdir()} == {"0_detections.png", "0_2_detections.png"}
    assert Image.open("whole/detections.png").size == (2 * 64, 64 + 48 + 64 + 3 * 4)

    changed = json.loads((own / "annotations" / "instances_train.json").read_text())
    changed["images"][0]["file_name"] = "other.png"
    save_json(Path("other"), "train", changed)
    with pytest.raises(SystemExit):
        run("--warmup", 9, "--resume", "--data-dir", "other", out="whole")
    assert "was made on training images of other names" in capsys.readouterr().err


def test_two_processes(run, own, tmp_path, capsys):
    """The parts' gradients are averaged, their detections gathered: AP is what one process finds."""
    children = fork(2, lambda rank: detect.main(training(own, "two", "--max-steps", 1)), tmp_path)
    assert wait(children) == [0, 0], (tmp_path / "output0.txt").read_text()
    line = read_log("two")[-1]
    run("--evaluate", "two/last.pt", "--device", "cpu", "--workers", 0, out="two")
    assert line["step"] == 1 and detect.words({k: line[k] for k in detect.SCORES}) in capsys.readouterr().out


def test_overlapping_masks_have_the_colour_of_the_best():
    found = dict(boxes=torch.tensor([[1., 1, 9, 9]] * 2), labels=torch.tensor([1, 1]), scores=torch.tensor([0.9, 0.8]),
                 masks=torch.ones(2, 10, 10))
    r, g, b = detect.draw(torch.full((3, 10, 10), 200, dtype=torch.uint8), found, ["a"])[:, 9, 0].tolist()
    assert r > g > b > 0                                   # red over lime over gray


def test_not_finite(fails):
    fails("--lr", 1e30, words=["became infinite or NaN at step", "smaller --lr"])


def test_without_pycocotools(fails, monkeypatch):
    monkeypatch.setattr(detect, "coco", None)
    fails(words=["pip install pycocotools"])


@pytest.mark.parametrize("flags", [
    "--arch resnet32", "--dataset voc", "--dataset ''", "--backbone ''", "--freeze 5", "--freeze -1",
    "--batch-norm sync", "--proposals 0", "--batch-size 0", "--epochs 0", "--lr 0", "--lr nan", "--weight-decay -1",
    "--warmup -1", "--milestones 0", "--min-size 8", "--max-size 40", "--workers -1", "--seed -1", "--surprise",
    "--checkpoint x.pt", "--predict x.png", "--predict x.png --checkpoint x.pt --evaluate x.pt"])
def test_wrong_flags(flags, fails):
    fails(*shlex.split(flags), words=[flags.split()[0]], status=2)


@pytest.mark.parametrize("flags,words", [
    ("--device tpu", "--device tpu"),
    ("--batch-size 6", "at most the 5 training images"),
    ("--backbone .", "--backbone: "),
    ("--backbone none.pt", "--backbone: cannot read none.pt"),
    ("--backbone text.pt", "text.pt is no file of weights"),
    ("--backbone odd.pt", "odd.pt does not fit shufflenet_v2_x0_5"),
    ("--data-dir none", "FileNotFoundError"),
    ("--data-dir empty", "instances_train.json"),
    ("--data-dir text", "not in COCO's form"),
    ("--data-dir list", "not in COCO's form"),
    ("--data-dir stray", "KeyError: 1"),
    ("--data-dir boxes", "no training image"),
    ("--data-dir five", "too many values"),
    ("--data-dir flat", "image 1 lacks a name or a size"),
    ("--data-dir others", "has other classes (cat) than the test set"),
    ("--data-dir wrong", "it is 9x9, its annotation says 8x8"),
    ("--data-dir rle", "cannot read image rle/train/a.png"),
    ("--dataset coco", "instances_train2017.json"),
    ("--dataset pennfudan --data-dir empty", "neither images/ and masks/"),
    ("--dataset pennfudan --data-dir maskless", "masks/a.png"),
    ("--evaluate none.pt", "cannot read none.pt"),
    ("--evaluate text.pt", "no checkpoint"),
    ("--predict x.png --checkpoint text.pt", "no checkpoint"),
])
def test_errors_in_one_line(flags, words, fails, tmp_path):
    Path("text.pt").write_text("no weights")
    torch.save(dict(a=torch.zeros(2)), "odd.pt")
    Path("empty").mkdir()
    images = [dict(id=i, file_name="a.png", width=8, height=8) for i in (1, 2)]
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=[1, 1, 4, 4]) for i in (1, 2)]
    right = dict(images=images, annotations=[{**b, "segmentation": rectangle(1, 1, 4, 4)} for b in boxes],
                 categories=[dict(id=1, name="cat")])
    rle = dict(images=[{**i, "width": 9, "height": 9} for i in images],
               annotations=[{**b, "segmentation": dict(size=[3, 4], counts="P")} for b in boxes])
    for name, train, test in (("wrong", {}, {}), ("stray", dict(categories=[]), {}), ("rle", rle, {}),
                              ("boxes", dict(annotations=boxes), {}),
                              ("five", {}, dict(annotations=[{**right["annotations"][0], "bbox": [1, 1, 4, 4, 4]}])),
                              ("flat", dict(images=[{**i, "height": 0} for i in images]), {}),
                              ("others", {}, dict(categories=[dict(id=1, name="dog")]))):
        for part, content in (("train", train), ("val", test)):
            save_json(Path(name), part, {**right, **content})
            save_image(Path(name) / part / "a.png", (9, 9))
    for name, content in (("text", "{"), ("list", "[]")):
        (Path(name) / "annotations").mkdir(parents=True)
        (Path(name) / "annotations" / "instances_train.json").write_text(content)
    save_image(Path("maskless/images/a.png"), (9, 9))
    fails(*flags.split(), words=[words])
