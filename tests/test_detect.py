"""detect.py: annotations, AP, the detector, runs that resume bit for bit,
and errors in one line."""

import contextlib
import functools
import itertools
import json
import os
import re
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
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import data
import detect
import models
from conftest import FAMILIES, Convolutions, assert_same, fork, read_log, wait
from support import coco as coco_module
from support.architectures import ARCHITECTURES
from support.coco import Pictures, load_splits
from support.console import ImageError, UserError
from support.files import CHECKPOINT_FORMAT, STUDENT_FILE, names_in_files, save_checkpoint
from support.images import read_image
from support.processes import Processes

tools = pytest.importorskip("pycocotools.mask")
COCO = pytest.importorskip("pycocotools.coco").COCO
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval

SMALL = ["--min-size", 48, "--max-size", 64, "--proposals", 8, "--device", "cpu", "--workers", 0,
         "--warmup", 1, "--epochs", 2]


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
        categories = [dict(id=7, name="wide"), dict(id=3, name="tall")]
        content = dict(images=[], annotations=[], categories=categories)
        for i in range(n):
            size, boxes = (64, 48) if i % 2 else (48, 64), [(4 + i, 6, 24, 14), (30, 20, 10, 22)]
            save_image(root / part / f"{i}.png", size, boxes, seed=i)
            content["images"].append(
                dict(id=i, file_name=f"{i}.png", width=size[0], height=size[1]))
            content["annotations"] += [dict(id=2 * i + k, image_id=i, category_id=(7, 3)[k], bbox=b,
                                            area=b[2] * b[3], iscrowd=0, segmentation=rectangle(*b))
                                       for k, b in enumerate(boxes)]
        save_json(root, part, content)
    return root


def save_json(root, part, content):
    path = root / "annotations" / f"instances_{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


def make_small(patch):
    patch.setattr(detect, "WIDTH", 8)
    few = functools.partial(detect.detection.MaskRCNN, box_detections_per_img=8)
    patch.setattr(detect.detection, "MaskRCNN", few)


def stand_in(truth, results):
    """For AP, which a few steps leave at 0: the sum of all that was found, by whatever process."""
    total = sum(sorted(r["score"] * (1 + r["image_id"]) + sum(r["bbox"]) / 100 for r in results))
    return {name: round(total, 2) for name in detect.SCORES}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("own"))


@pytest.fixture
def run(own, tmp_path, monkeypatch):
    """Run detect.py in this process and an empty folder; returns its log."""
    monkeypatch.chdir(tmp_path)

    def run(*more, out="out"):
        detect.main(training(own, out, *more))
        return read_log(out)

    return run


def training(own, out, *more):
    """2 steps an epoch."""
    return list(map(str, ["--dataset", "own", "--data-dir", own, "--arch", "shufflenet_v2_x0_5",
                          "--backbone", "random", "--batch-size", 2, "--lr", 0.01, *SMALL,
                          "--out-dir", out, *more]))


def use(*flags):
    """Run detect.py with --evaluate or --predict."""
    detect.main([*map(str, flags), "--device", "cpu", "--workers", "0"])


@pytest.fixture(scope="module")
def whole(own, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(detect, "average_precision", stand_in)
        detect.main(training(own, out, "--warmup", 9))
    return out


@pytest.fixture
def fails(run, capsys):
    """Run detect.py, which is to end by this status and one line with all these words,
    and save nothing."""
    def fails(*flags, words=(), status=1):
        with pytest.raises(SystemExit) as end:
            run(*flags)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == status and len(lines) == 1, lines
        assert lines[0].startswith("detect.py: error: "), lines
        assert [w for w in words if w not in lines[0]] == [], lines
        assert not os.path.exists("out/last.pt")

    return fails


# ---------------------------------------------------------------- data

def test_odd_annotations(tmp_path):
    """What COCO's files hold: crowds, no objects, several polygons, RLE of both kinds;
    what others' do."""
    blob = np.zeros((40, 30), np.uint8, order="F")
    blob[5:15, 10:18] = 1
    packed = tools.encode(blob)
    packed["counts"] = packed["counts"].decode()
    counts = [len(list(g)) for _, g in itertools.groupby(blob.flatten("F"))]  # starts with zeros
    listed, usual = dict(size=[40, 30], counts=counts), dict(iscrowd=0, area=50)
    categories = [dict(id=9, name=1), dict(id=2, name="")]
    images = [dict(id=i, file_name=f"{i}.png", width=30, height=40) for i in (5, 0, 3, 8)]
    objects = [  # image, category, box, mask, the rest
        (0, 9, [0, 0, 15, 15], rectangle(0, 0, 4, 6) + rectangle(10, 10, 5, 5), usual),
        (0, 2, [10, 5, 8, 10], listed, dict(usual, iscrowd=1)),
        (0, 2, [10, 5, 8, 10], listed, usual),
        (0, 2, [10, 5, 8, 10], packed, dict(area=None, iscrowd=None)),
        (0, 2, [25, 30, 20, 20], rectangle(25, 30, 20, 20), {}),  # beyond the image
        (0, 2, [3, 3, 0, 9], rectangle(3, 3, 0, 9), usual),
        (0, 2, [1, 2, 3, 4], [[1, 2, 3, 4]], usual),
        (0, 2, [1, 2, 3, 4], [], usual),  # a box alone
        (3, 2, [3, 3, .5, 9], rectangle(3, 3, 1, 9), {}),
        (8, 2, [0, 0, 9, 9], rectangle(0, 0, 9, 9), dict(usual, iscrowd=1)),
    ]
    annotations = [dict(id=k, image_id=i, category_id=c, bbox=box, segmentation=mask, **rest)
                   for k, (i, c, box, mask, rest) in enumerate(objects)]
    for part in ("train", "val"):
        save_json(tmp_path, part,
                  dict(images=images, annotations=annotations, categories=categories))
    for i in (0, 3, 5, 8):
        save_image(tmp_path / "train" / f"{i}.png", (30, 40))
    train, test = load_splits("own", tmp_path)
    assert train.classes == ["", "1"] and test.ids == [0, 3, 5, 8]
    assert train.ids == [0, 8]  # 5 has no object, 3 one below a pixel; 8's crowd counts
    image, target = train.load(0)
    assert image.shape == (3, 40, 30) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [
        [0, 0, 15, 15], [10, 5, 18, 15], [10, 5, 18, 15], [25, 30, 30, 40]]
    assert target["labels"].tolist() == [2, 1, 1, 1]
    assert all(torch.equal(target["masks"][k], torch.from_numpy(blob)) for k in (1, 2))
    assert target["masks"].sum((1, 2)).tolist() == [49, 80, 80, 50]
    flipped_image, flipped = train.load(0, flip=True)
    assert torch.equal(flipped_image, image.flip(-1))
    assert torch.equal(flipped["masks"], target["masks"].flip(-1))
    assert flipped["boxes"].tolist() == [
        [15, 0, 30, 15], [12, 5, 20, 15], [12, 5, 20, 15], [0, 30, 5, 40]]
    _, empty = train.load(8)
    assert {k: v.shape for k, v in empty.items()} == dict(
        boxes=(0, 4), labels=(0,), masks=(0, 40, 30))


def compressed(h, w):
    blob = np.zeros((h, w), np.uint8, order="F")
    blob[5:15, 10:18] = blob[20:22, 1:3] = 1
    return {**tools.encode(blob), "counts": tools.encode(blob)["counts"].decode()}


def polygon(*more):
    return dict(segmentation=[[5, 5, 20, 5, 20, 20], [5, 5, *more, 20, 20]])


def mask(counts, size=(40, 30)):
    return dict(segmentation=dict(size=list(size), counts=counts))


NAN, INF = float("nan"), float("inf")
OUTSIDE, COUNTS = ("coordinates that are no finite numbers, or lie outside the image of 30x40",
                   "the counts of its mask")


@pytest.mark.parametrize("change, words", [
    *((dict(segmentation=compressed(*size)),
       f"its mask has the size {list(size)}, the image [40, 30]")
      for size in ((30, 40), (60, 50))),
    *((mask(counts), COUNTS) for counts in (
        [4, 10], [4, 10, 1187], [4, -10, 1206], [4.5, 10, 1185.5],
        [4, NAN, 1186], [4, None, 1186], [4, INF], [], [4, 10, 1186 + 2 ** 32],
        compressed(30, 30)["counts"], compressed(40, 30)["counts"][:-1], "no RLE", "é")),
    *((polygon(*point), OUTSIDE) for point in (
        (1e8, 5), (5, 1e12), (-1e8, 5), (5, -100), (INF, 5), (5, NAN), (None, 5), ("5", 5),
        (10 ** 400, 5))),
    (polygon(1, 2, 3), "odd number"),
    (dict(segmentation=[[31, 1, 35, 1, 35, 5]]), OUTSIDE),
    (dict(segmentation=[5, 5, 9, 5, 9, 9]), "TypeError"),
    *((dict(bbox=box), OUTSIDE) for box in (
        [NAN, 5, 8, 8], [1, 5, INF, 8], [1, 5, 1e8, 8], [31, 5, 8, 8], [*"1588"])),
    (dict(bbox=[20, 20, -5, 5], area=9), "below 0"),
    (dict(bbox=[1, None, 5, 5]), "TypeError"),
    *((dict(area=area), "its area") for area in (NAN, INF, -1)),
    (dict(iscrowd=2), "iscrowd is 2"),
    (dict(iscrowd=NAN), "NaN"),
    (dict(category_id=3), "no category has the id 3"),
    (dict(image_id=7), "annotation 5 is of image 7, which is not listed"),
])
def test_annotations_are_held_against_their_images(tmp_path, change, words):
    """One line at loading names the image; nothing is drawn or allocated by wrong numbers."""
    good = dict(id=4, image_id=0, category_id=2, bbox=[10, 5, 8, 10], area=None,
                segmentation=compressed(40, 30))
    content = dict(images=[dict(id=i, file_name=f"{i}.png", width=30, height=40) for i in (0, 1)],
                   annotations=[good, {**good, "id": 5, "image_id": 1} | change],
                   categories=[dict(id=2, name="a")])
    save_json(tmp_path, "val", content)
    with pytest.raises(UserError) as error:
        load_splits("own", tmp_path, splits=["val"])
    named = "" if "image_id" in change else "image 1 (1.png), annotation 5: "
    assert named in str(error.value) and words in str(error.value), error.value


@pytest.mark.parametrize("change, words", [
    (dict(id=0), "two images have the id 0: 0.png, 1.png"),
    (dict(width=NAN), "image 1 lacks a name or a size"),
    (dict(height=40.5), "image 1 lacks"),
    (dict(width="30"), "image 1 lacks"),
    (dict(file_name=5), "image 1 lacks"),
])
def test_images_of_one_id_or_of_no_size_are_named(tmp_path, change, words):
    images = [dict(id=i, file_name=f"{i}.png", width=30, height=40) for i in (0, 1)]
    save_json(tmp_path, "val",
              dict(images=[images[0], images[1] | change], annotations=[], categories=[]))
    with pytest.raises(UserError, match=re.escape(words)):
        load_splits("own", tmp_path, splits=["val"])


def test_one_reader(tmp_path):
    """Training and AP read a picture as --predict does, but as it is stored: boxes know no EXIF."""
    write_set(tmp_path, train=4, test=4)
    gray = (np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)
    colors = np.random.default_rng(0).integers(0, 256, (48, 64, 4), dtype=np.uint8)
    pictures = {"deep.png": gray,
                "real.tif": (gray / 65535).astype(np.float32),
                "clear.png": colors}
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / "val" / name)
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(colors[..., :3]).save(tmp_path / "val" / "turned.jpg", exif=turned)
    (test,) = load_splits("own", tmp_path, splits=["val"])
    for number, name in enumerate([*pictures, "turned.jpg"]):
        test.index.imgs[number] |= dict(file_name=name, width=64, height=48)
        image, upright = test.load(number)[0], read_image(tmp_path / "val" / name)
        assert (image.equal(upright.rot90(1, (1, 2)) if name == "turned.jpg" else upright)
                and image.float().std() > 40)


def test_a_box_that_may_vanish_when_it_is_resized_is_left_out(own):
    train, _ = load_splits("own", own)
    first, second = train.index.imgToAnns[0]
    first["bbox"] = [20, 5, float(np.nextafter(np.float32(20), 99)) - 20, 10]
    second["bbox"] = [20, 5, 0.02, 10]
    assert train.load(0)[1]["boxes"].shape == (1, 4) == train.load(0, flip=True)[1]["boxes"].shape


@pytest.mark.parametrize("images,masks", [
    ("images", "masks/{}.png"),
    ("PNGImages", "PedMasks/{}_mask.png"),
])
def test_pennfudan(tmp_path, images, masks):
    for i in range(6):
        numbers = np.zeros((20, 24), np.uint8)
        numbers[2:9, 3:7], numbers[10:15, 12:20] = 1, 2
        save_image(tmp_path / images / f"{i}.png", (24, 20))
        path = tmp_path / masks.format(i)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(numbers).save(path)
    train, test = load_splits("pennfudan", tmp_path)
    assert (train.ids, test.ids, test.classes) == ([0, 1, 2, 3, 5], [4], ["person"])
    target = test.load(4)[1]
    assert target["boxes"].tolist() == [[3, 2, 7, 9], [12, 10, 20, 15]]
    assert target["labels"].tolist() == [1, 1]
    assert target["masks"].sum((1, 2)).tolist() == [28, 40]


NUMBERS = np.pad(np.array([[1, 1, 1, 0, 2, 2]] * 2, np.uint8), 1)  # [4, 8]
THREE, OPAQUE = NUMBERS[..., None].repeat(3, -1), np.full((4, 8, 1), 255, np.uint8)
UNLIKE = THREE + np.array([0, 0, 1], np.uint8)


@pytest.mark.parametrize("mask, ending, areas", [
    (NUMBERS, "PNG", [6, 4]),
    (NUMBERS, "bmp", [6, 4]),
    (NUMBERS.astype(np.uint16), "png", [6, 4]),
    (NUMBERS.astype(np.float32), "tif", [6, 4]),
    (NUMBERS > 0, "png", [10]),
    (THREE, "png", [6, 4]),
    (np.append(THREE, OPAQUE, -1), "png", [6, 4]),
    (np.append(THREE, THREE[..., :1] * 100, -1), "png", [6, 4]),
    (np.append(THREE[..., :1], OPAQUE, -1), "png", [6, 4]),
    (UNLIKE, "png", "mode RGB"),
    (np.append(UNLIKE, OPAQUE, -1), "png", "mode RGBA"),
    (np.append(THREE, 0 * OPAQUE, -1), "png", "mode RGBA"),
    (NUMBERS.astype(np.float32) / 2, "tif", "no whole numbers"),
    (NUMBERS, "jpg", "No such file"),
])
def test_pennfudan_as_people_save_it(tmp_path, mask, ending, areas):
    """Masks of any mode that leaves no doubt, endings in any case; what is in doubt is named."""
    for i, kind in enumerate(["jpg", "JPG", "jpeg", "PNG", "png"]):
        save_image(tmp_path / "images" / f"{i}.{kind}", (8, 4))
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.{ending}")
    if isinstance(areas, str):
        with pytest.raises(UserError, match=rf"masks/0\..*{areas}"):
            load_splits("pennfudan", tmp_path)
        return
    train, test = load_splits("pennfudan", tmp_path)
    assert (train.ids, test.ids) == ([0, 1, 2, 3], [4])
    assert test.load(4)[1]["masks"].sum((1, 2)).tolist() == areas


def test_a_mask_of_16_bits_in_several_channels_is_named(monkeypatch):
    """Pillow would read the upper 8, which are 0."""
    monkeypatch.setattr(coco_module, "raw_mode", lambda image: "RGB;16B")
    with pytest.raises(ValueError, match="mode RGB from which no number"):
        coco_module.instance_numbers(Image.fromarray(0 * THREE))


def test_order():
    """An image comes once an epoch, with its like; shares make up the whole;
    a resumed order is the rest."""
    images = {10 * i: dict(width=2 + i % 3, height=3) for i in range(23)}
    pictures = Pictures(Path(), Namespace(imgs=images), list(images), [])

    def order(epoch=0, step=0, left=5, share=(0, 1)):
        run = Namespace(epoch=epoch, step=step, steps_per_epoch=5, steps_left=left,
                        processes=Namespace(share=share))
        items = detect.train_order(Namespace(seed=1, batch_size=4), pictures, run)
        return list(zip(*[iter(items)] * (4 // share[1]), strict=True))

    ids = [[i for i, _ in batch] for batch in order()]
    assert len(ids) == 5 and len({i for b in ids for i in b}) == 20
    assert sum(len({images[i]["width"] > 3 for i in b}) > 1 for b in ids) <= 1
    assert order(step=2) == order()[2:] and order(step=1, left=3) == order()[1:4]
    assert order(epoch=1) != order()
    assert {flip for batch in order() for _, flip in batch} == {True, False}
    halves = zip(order(share=(0, 2)), order(share=(1, 2)), strict=True)
    assert [sorted(a + b) for a, b in halves] == [sorted(batch) for batch in order()]


def test_broken_image(own):
    """An error of a worker process is one line."""
    train, _ = load_splits("own", own)
    train.index.imgs[1]["file_name"] = "none.png"
    with pytest.raises(ImageError, match="cannot read image .*none.png"):
        list(train.read([(0, False), (1, False)], 1))
    assert train.reader.workers == 1


# ---------------------------------------------------------------- AP

def test_evaluation_sees_each_image_as_it_is(own, monkeypatch):
    """In the order of the ids, not flipped."""
    _, test = load_splits("own", own)
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0), scores=torch.zeros(0),
                masks=torch.zeros(0, 1, 1))
    seen = []
    monkeypatch.setattr(detect, "detect", lambda model, image, device: seen.append(image) or none)
    detect.evaluate(Namespace(workers=0, device=torch.device("cpu")), test, None, Processes({}))
    assert all(torch.equal(image, test.load(i)[0]) for image, i in zip(seen, test.ids, strict=True))


def test_average_precision(own, tmp_path):
    """Perfect detections have 100, none 0, others what pycocotools gives for files of the same."""
    _, test = load_splits("own", own)

    def results(shift, score):
        found = []
        for i in test.ids:
            target = test.load(i)[1]
            target["masks"], target["boxes"] = (target["masks"].roll(shift, -1).bool(),
                                                target["boxes"] + shift)
            target["scores"] = torch.full((len(target["boxes"]),), score)
            found += detect.as_results(target, i, sorted(test.index.cats))
        return found

    assert detect.average_precision(test.index, results(0, 0.9)) == dict.fromkeys(
        detect.SCORES, 100.0)
    assert detect.average_precision(test.index, []) == dict.fromkeys(detect.SCORES, 0.0)
    mixed = results(2, 0.5) + results(1, 0.4)[::2]
    truth = json.loads((own / "annotations/instances_val.json").read_text())
    # pycocotools on files loses the object numbered 0
    for number, a in enumerate(truth["annotations"]):
        a["id"] = number + 1
    (tmp_path / "truth").write_text(json.dumps(truth))
    (tmp_path / "found").write_text(json.dumps(mixed, default=bytes.decode))
    coco, expected = COCO(str(tmp_path / "truth")), []
    for kind, key in (("bbox", "segmentation"), ("segm", "bbox")):
        found = json.loads((tmp_path / "found").read_text())
        part = [{k: v for k, v in result.items() if k != key} for result in found]
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
    usual = ["--dataset", "own", "--backbone", "x", "--arch", "resnet18", *SMALL]
    args = detect.parse(list(map(str, [*usual, *more])))
    return Namespace(**{**vars(args), "device": torch.device("cpu")})


def one_step(args, model, own):
    """A training step on two images. Returns the losses."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    run = Namespace(optimizers=[optimizer], processes=Processes({}), epoch=0, total_steps=9)
    train, _ = load_splits("own", own)
    torch.manual_seed(0)
    images = zip(train.load(0), train.load(2), strict=True)
    return detect.train_step(args, model.train(), run, *images)


@pytest.mark.parametrize("arch, layers", [
    ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
    ("shufflenet_v2_x0_5", ["maxpool", "stage2", "stage3", "stage4"])])
def test_backbones(arch, layers, tmp_path):
    """A student file and torchvision's weights give the maps
    that torchvision's own layers and FPN give, with the file's mean;
    the heads are drawn as over random weights."""
    net = torchvision.models.get_model(arch, num_classes=4).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(1, 2)
    file = dict(state_dict=net.state_dict(), architecture=arch, classes=[*"abcd"],
                mean=(.4, .5, .6), std=(.1, .2, .3), image_size=64, resize=64)
    torch.save(file, tmp_path / "student.pt")
    older = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / "plain.pth")
    image, whole = torch.rand(1, 3, 64, 64), len(models.Backbone(arch, 1000).state_dict())
    for name, mean in (("student.pt", [.4, .5, .6]), ("plain.pth", [.485, .456, .406])):
        taken, *mean_std, words = detect.load_backbone(str(tmp_path / name), arch)
        assert (f"{name}: {whole - 2} of {whole} tensors taken; "
                "the classifier stays as drawn") in words
        # BN is frozen
        model = detect.build(options("--arch", arch), ["a"], *mean_std, taken).train()
        assert model.transform.image_mean == mean
        with torch.no_grad():
            maps, found = model.backbone.body.maps(image), model.backbone(image)
            theirs = BackboneWithFPN(net, {layer: f"{i}" for i, layer in enumerate(layers)},
                                     [m.shape[1] for m in maps], detect.WIDTH, LastLevelMaxPool())
            theirs.fpn.load_state_dict(model.backbone.pyramid.state_dict())
            torch.testing.assert_close(maps, list(theirs.body(image).values()))
            torch.testing.assert_close(found, dict(theirs(image)))
        assert [m.shape[-1] for m in found.values()] == [
            64 // stride for stride in (4, 8, 16, 32, 64)]
    heads, state = (model.state_dict(),
                    detect.build(options("--arch", arch), ["a"], *mean_std).state_dict())
    assert all(torch.equal(state[k], heads[k]) for k in state if "backbone.body" not in k)
    assert not torch.equal(*(s["backbone.body.stages.3.0.conv1.weight" if arch == "resnet18" else
                               "backbone.body.stages.3.0.branch2.0.weight"]
                             for s in (heads, state)))


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_backbone_of_each_family(arch):
    """FPN reads the stages' maps at strides 4 to 32;
    batch norm, where there is any, is constant."""
    model = detect.build(options("--arch", arch), ["a"], *data.IMAGENET).train()
    body, found = model.backbone.body, model.backbone(torch.rand(1, 3, 64, 64))
    assert [m.shape[1:] for m in found.values()] == [(detect.WIDTH, n, n) for n in (16, 8, 4, 2, 1)]
    assert not [m for m in body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    trained = {name.split(".")[1] for name, p in body.named_parameters() if p.requires_grad}
    assert trained == {"1", "2", "3"} and not hasattr(body, "tail") and not hasattr(body, "pool")


def test_layers_of_a_transformer_that_learn(own):
    """LayerNorm does, stem and first stage do not."""
    model = detect.build(options("--arch", "little_swin"), ["a", "b"], *data.IMAGENET)
    body = model.backbone.body
    before = {name: p.clone() for name, p in body.named_parameters()}
    losses = one_step(options("--arch", "little_swin"), model, own)
    assert all(value.isfinite() for value in losses.values())
    same = {name.rsplit(".", 1)[0] for name, p in body.named_parameters()
            if torch.equal(p, before[name])}
    first = ("stem.", "stages.0.")
    assert same and all(name.startswith(first) for name in same)
    assert not [name for name in before if name.startswith(first)
                and not torch.equal(before[name], body.get_parameter(name))]


def test_a_student_of_ones_own(run, fails):
    """By --model-file; one whose maps are of other strides is refused in a line."""
    for name, stride in (("right", 2), ("wrong", 1)):
        Path(f"{name}.py").write_text(
            "from torch import nn\nfrom support.architectures import ARCHITECTURES\n"
            "layer = lambda inputs, stride: nn.Sequential("
            "nn.Conv2d(inputs, 8, 3, stride, 1), nn.ReLU())\n"
            "class Four:\n    stages, width = 4, 8\n"
            f"    def stem(self): return layer(3, {stride})\n"
            "    def stage(self, s): return layer(8, 2)\n    def tail(self): return nn.Identity()\n"
            f"    def initialise(self, module): pass\nARCHITECTURES['{name}'] = Four()\n")
    try:
        fails("--arch", "wrong", "--model-file", "wrong.py",
              words=["strides 4, 8, 16 and 32; this student's have 2, 4, 8"])
        fails("--arch", "right", words=["--arch", "unknown student 'right'"], status=2)
        log = run("--arch", "right", "--model-file", "right.py", "--epochs", 1)
        assert log[-1]["step"] == 2
    finally:
        for name in ("right", "wrong"):
            ARCHITECTURES.pop(name, None)


def test_backbones_of_another_architecture_are_refused(tmp_path):
    arch, other = "shufflenet_v2_x0_5", "shufflenet_v2_x1_0"
    state = torchvision.models.get_model(arch, num_classes=4).state_dict()
    torch.save(state, tmp_path / "plain.pth")
    file = dict.fromkeys(STUDENT_FILE) | dict(architecture=arch, state_dict=state)
    torch.save(file, tmp_path / "student.pt")
    for name, words in (("student.pt", f"holds a {arch}, not a {other}"),
                        ("plain.pth", f"does not fit {other}")):
        with pytest.raises(UserError, match=f"--backbone: .*{name} {words}"):
            detect.load_backbone(str(tmp_path / name), other)


@pytest.mark.parametrize("flags,trained,moving", [
    ((), "layer2 layer3 layer4", ""),
    (("--freeze", 0), "conv1 layer1 layer2 layer3 layer4", ""),
    (("--freeze", 2, "--batch-norm", "train"), "layer3 layer4", "layer3 layer4"),
    (("--backbone", "random"), "conv1 bn1 layer1 layer2 layer3 layer4",
     "bn1 layer1 layer2 layer3 layer4"),
    (("--freeze", 1, "--arch", "shufflenet_v2_x0_5"), "stage2 stage3 stage4", ""),
])
def test_frozen_layers(flags, trained, moving, own):
    """One SGD step changes the layers that are trained,
    and batch statistics only where batch norm is."""
    args = options(*flags)
    model = detect.build(args, ["a", "b"], *data.IMAGENET)
    body = model.backbone.body
    before, names = ({k: v.clone() for k, v in body.state_dict().items()},
                     names_in_files(body, args.arch))
    one_step(args, model, own)
    changed = [names[k] for k, v in body.state_dict().items() if not torch.equal(v, before[k])]
    assert {k.split(".")[0] for k in changed if k.endswith("weight")} == set(trained.split())
    assert {k.split(".")[0] for k in changed if "running" in k} == set(moving.split())


def test_frozen_stages_draw_no_stochastic_depth():
    x = torch.randn(2, 3, 64, 64)
    for freeze, same in ((4, True), (3, False)):
        args = options("--arch", "little_convnext", "--freeze", freeze)
        body = detect.build(args, ["a"], *data.IMAGENET).train().backbone.body
        # of the last stage, in which a block of two thirds is left out at times
        seen = {body.maps(x)[-1].sum().item() for _ in range(9)}
        assert (len(seen) == 1) is same


def test_proposals():
    """512 are torchvision's own defaults."""
    model = detect.build(options("--proposals", 512, "--arch", "shufflenet_v2_x0_5"),
                         ["a"], *data.IMAGENET)
    usual = detect.detection.MaskRCNN(model.backbone, 2)
    for a, b in ((model.rpn, usual.rpn),
                 (model.roi_heads.fg_bg_sampler, usual.roi_heads.fg_bg_sampler)):
        for name in ("_pre_nms_top_n", "_post_nms_top_n", "batch_size_per_image"):
            assert getattr(a, name, None) == getattr(b, name, None)


@pytest.mark.parametrize("size", [(2, 3000), (1000, 3), (1, 1), (1, 64), (128, 2)])
def test_a_side_has_at_least_a_pixel(size):
    """--predict, AP and training on pictures that torchvision would resize to nothing;
    others as torchvision."""
    model = detect.build(options("--arch", "shufflenet_v2_x0_5"), ["a"], *data.IMAGENET)
    image = torch.randint(255, (3, *size), dtype=torch.uint8)
    assert detect.detect(model, image, "cpu")["masks"].shape[1:] == size
    box, half = torch.tensor([[0, 0, size[1] / 2, size[0] / 2]]), max(1, size[1] // 2)
    target = dict(boxes=box, labels=torch.tensor([1]),
                  masks=(torch.arange(size[1]) < half).expand(1, *size).byte())
    assert all(loss.isfinite() for loss in model.train()([image / 255], [dict(target)]).values())
    small, its = model.transform.resize(image / 255, dict(target))
    wanted = box * torch.tensor([small.shape[2] / size[1], small.shape[1] / size[0]] * 2)
    assert its["masks"].shape[1:] == small.shape[1:] and min(small.shape[1:]) >= 1
    torch.testing.assert_close(its["boxes"], wanted)
    usual = torchvision.models.detection.transform.GeneralizedRCNNTransform(
        48, 64, [0] * 3, [1] * 3)
    for h, w in ((48, 64), (3, 190), (100, 2)):
        image = torch.rand(3, h, w)
        assert model.transform.resize(image)[0].equal(usual.resize(image)[0])


def test_bfloat16(own):
    """Losses are float32 and near those in float32; evaluation is float32 throughout."""
    losses, scores, image = [], [], torch.randint(255, (3, 48, 64), dtype=torch.uint8)
    for amp in ("no", "bf16"):
        args = options("--amp", amp, "--batch-norm", "train", "--arch", "shufflenet_v2_x0_5")
        model = detect.build(args, ["a", "b"], *data.IMAGENET)
        scores.append(detect.detect(model, image, "cpu")["scores"])
        with Convolutions() as convolutions:
            losses.append(one_step(args, model, own))
        assert convolutions.seen[True] == {torch.float32}  # the depthwise ones
    with torch.autocast("cpu", torch.bfloat16):  # what boxes are made of
        maps = list(model.backbone(torch.rand(1, 3, 64, 64)).values())
        assert {x.dtype for x in [*maps, *sum(model.rpn.head(maps), [])]} == {torch.float32}
    (plain, half), dtypes = losses, {v.dtype for v in losses[1].values()}
    assert torch.equal(*scores) and dtypes == {torch.float32} and plain["loss"] != half["loss"]
    torch.testing.assert_close(half, plain, rtol=0.1, atol=0.02)


# ---------------------------------------------------------------- runs

def test_a_resumed_run_ends_as_a_whole_one(run, whole, capsys, monkeypatch):
    """Stopped inside an epoch by --max-steps, after its last step by a signal,
    while the rate warms up."""
    monkeypatch.setattr(detect, "average_precision", stand_in)
    run("--warmup", 9, "--max-steps", 1)
    assert read_log("out")[-1]["step"] == 1 and not Path("out/best.pt").exists()  # of whole epochs
    step = detect.train_step
    with monkeypatch.context() as patch:
        patch.setattr(detect, "train_step", lambda args, model, run, *batch: (
            signal.raise_signal(signal.SIGTERM) if run.total_steps == 1 else None,
            step(args, model, run, *batch))[1])
        with pytest.raises(SystemExit) as end:
            run("--warmup", 9, "--resume")
    assert (end.value.code == 1
            and "SIGTERM: saved out/last.pt after step 2" in capsys.readouterr().err)
    run("--warmup", 9, "--resume")
    assert_same(whole, "out")


def test_an_edited_model_file_is_another_one(run, capsys, monkeypatch):
    monkeypatch.setattr(detect, "train", lambda args, train_set, test_set, model, run: run.save())
    Path("own.py").write_text("")
    assert len(run("--model-file", "own.py")[0]["code"]) == 16
    Path("own.py").write_text("# edited")
    with pytest.raises(SystemExit):
        run("--model-file", "own.py", "--resume")
    assert "own method or students has changed since out/last.pt" in capsys.readouterr().err


def test_the_log_and_the_rate(run, monkeypatch):
    """The rate is set once a step, before it, and the log has the last one."""
    set_lr, step, calls = detect.Run.set_lr, detect.train_step, []
    monkeypatch.setattr(detect.Run, "set_lr", lambda run, lr: calls.append(lr) or set_lr(run, lr))
    monkeypatch.setattr(detect, "train_step", lambda args, model, run, *batch: (
        calls.append(run.optimizers[0].param_groups[0]["lr"]), step(args, model, run, *batch))[1])
    log = run("--warmup", 2, "--milestones", 1)
    rates = [0.01 * 0.001, 0.01 * 0.5005, 0.001, 0.001]
    assert calls == pytest.approx([rate for rate in rates for _ in (0, 1)], rel=1e-9)
    assert [(line["step"], line["lr"]) for line in log[1:]] == [(2, calls[3]), (4, calls[7])]
    assert {"loss", "loss_mask", *detect.SCORES} <= log[-1].keys()
    assert Image.open("out/detections.png").size == (2 * 64, 64 + 48 + 64 + 3 * 4)


def test_evaluate(own, whole, tmp_path, capsys, monkeypatch):
    """AP is that of the log's last line; no training set is wanted."""
    monkeypatch.setattr(detect, "average_precision", stand_in)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("val", "annotations"):
        shutil.copytree(own / name, tmp_path / "other" / name)
    (tmp_path / "other" / "annotations" / "instances_train.json").unlink()
    use("--evaluate", whole / "last.pt", "--data-dir", "~/other")
    first, last = ({k: line[k] for k in detect.SCORES} for line in read_log(whole)[1:])
    assert (capsys.readouterr().out == detect.words(last) + "\n"
            and 0 < last["box_ap"] != first["box_ap"])


def test_evaluate_looks_for_all_pictures_first(own, whole, tmp_path, capsys, monkeypatch):
    shutil.copytree(own, tmp_path / "other")
    (tmp_path / "other" / "val" / "2.png").unlink()
    monkeypatch.setattr(detect, "evaluate", None)
    with pytest.raises(SystemExit):
        use("--evaluate", whole / "last.pt", "--data-dir", tmp_path / "other")
    assert "cannot read image" in (error := capsys.readouterr().err) and "2.png" in error


def test_predict(own, whole, tmp_path, capsys, monkeypatch):
    """A line and a drawn copy for each picture, beside the checkpoint or in --out-dir."""
    monkeypatch.setattr(detect, "LOWEST", 0.0)
    folder = shutil.copytree(whole, tmp_path / "copy")
    picture, namesake = own / "val" / "0.png", own / "train" / "0.png"
    use("--predict", picture, "--checkpoint", folder / "best.pt")
    assert re.match(rf"{picture}  (wide|tall) 0\.\d\d, ", capsys.readouterr().out)
    drawn = np.asarray(Image.open(folder / "0_detections.png"))
    assert drawn.shape == (64, 48, 3) and (drawn != np.asarray(Image.open(picture))).any()
    new = tmp_path / "new" / "folder"
    use("--predict", picture, namesake, "--checkpoint", folder / "best.pt", "--out-dir", new)
    assert {p.name for p in new.iterdir()} == {"0_detections.png", "0_2_detections.png"}


def test_what_is_likely_is_named_and_drawn(own, whole, tmp_path, capsys, monkeypatch):
    """Of two detections the one above LOWEST, by its class, 1 the first in the file's order."""
    monkeypatch.setattr(detect, "detect", lambda *_: dict(
        boxes=torch.tensor([[1.0, 1, 9, 9], [20, 30, 40, 60]]), labels=torch.tensor([1, 2]),
        scores=torch.tensor([0.9, 0.3]), masks=torch.zeros(2, 64, 48, dtype=torch.bool)))
    picture, classes = own / "val" / "0.png", read_log(whole)[0]["classes"]
    use("--predict", picture, "--checkpoint", whole / "last.pt", "--out-dir", tmp_path)
    assert capsys.readouterr().out.startswith(f"{picture}  {classes[0]} 0.90; drawn in ")
    drawn = np.asarray(Image.open(tmp_path / "0_detections.png"))
    changed = (drawn != np.asarray(Image.open(picture))).any(-1)
    assert changed[:20].any() and not changed[30:].any()


def test_best_pt_is_chosen_by_the_mean_of_box_and_mask(monkeypatch):
    monkeypatch.setattr(detect, "evaluate", lambda *_: dict(box_ap=10.0, mask_ap=50.0))
    run = Namespace(evaluating=contextlib.nullcontext, epoch_line=dict, is_main=False,
                    processes=None)
    assert detect.evaluate_epoch(None, None, None, run)[1] == 30


def test_recipes():
    """mmdetection's 1x schedule for COCO and own data; a short one for Penn-Fudan."""
    usual = dict(epochs=12, batch_size=16, lr=0.02, milestones=[8, 11], warmup=500, freeze=1,
                 min_size=800, max_size=1333, proposals=512, weight_decay=1e-4)
    short = dict(epochs=10, batch_size=2, lr=0.005, milestones=[7, 9], warmup=100, freeze=1,
                 min_size=256, max_size=512, proposals=64, weight_decay=1e-4)
    for dataset, recipe in (("coco", usual), ("own", usual), ("pennfudan", short)):
        parsed = vars(detect.parse(["--dataset", dataset, "--backbone", "x"]))
        assert parsed.items() >= recipe.items()


def test_resuming_on_other_images_is_refused(own, whole, tmp_path, capsys):
    for name in ("train", "val", "annotations"):
        shutil.copytree(own / name, tmp_path / "other" / name)
    changed = json.loads((own / "annotations" / "instances_train.json").read_text())
    changed["images"][0]["file_name"] = "other.png"
    save_json(tmp_path / "other", "train", changed)
    out = shutil.copytree(whole, tmp_path / "copy")
    with pytest.raises(SystemExit):
        detect.main(training(tmp_path / "other", out, "--warmup", 9, "--resume"))
    assert "was made on training images of other names" in capsys.readouterr().err


def test_two_processes(own, tmp_path, capsys, monkeypatch):
    """The shares' gradients are averaged, their detections gathered:
    AP is what one process finds."""
    monkeypatch.setattr(detect, "average_precision", stand_in)
    children = fork(2, lambda rank: detect.main(training(own, "two", "--max-steps", 1)), tmp_path)
    assert wait(children) == [0, 0], (tmp_path / "output0.txt").read_text()
    line = read_log(tmp_path / "two")[-1]
    use("--evaluate", tmp_path / "two" / "last.pt")
    assert (line["step"] == 1
            and detect.words({k: line[k] for k in detect.SCORES}) in capsys.readouterr().out)


def test_overlapping_masks_have_the_colour_of_the_best():
    found = dict(boxes=torch.tensor([[1., 1, 9, 9]] * 2), labels=torch.tensor([1, 1]),
                 scores=torch.tensor([0.9, 0.8]), masks=torch.ones(2, 10, 10))
    r, g, b = detect.annotate(
        torch.full((3, 10, 10), 200, dtype=torch.uint8), found, ["a"])[:, 9, 0].tolist()
    assert r > g > b > 0  # red over lime over gray


def test_not_finite(fails, monkeypatch):
    """The run ends at that step, not at the epoch's end."""
    fails("--lr", 1e30, words=["became infinite or NaN at step 2", "smaller --lr"])
    nan, calls = {"loss": torch.tensor(float("nan"))}, []
    monkeypatch.setattr(detect, "train_step", lambda *batch: calls.append(batch) or nan)
    fails(words=["loss became infinite or NaN at step 1"])
    assert len(calls) == 1


def test_without_pycocotools(fails, monkeypatch):
    monkeypatch.setattr(detect, "cocoeval", None)
    fails(words=["pip install pycocotools"])


@pytest.mark.parametrize("flags", [
    "--arch resnet32", "--backbone ''", "--freeze 5", "--proposals 0", "--milestones 0",
    "--min-size 8", "--max-size 40", "--surprise",
    "--predict x.png", "--predict x.png --checkpoint x.pt --evaluate x.pt"])
def test_wrong_flags(flags, fails):
    fails(*shlex.split(flags), words=[flags.split()[0]], status=2)


@pytest.mark.parametrize("flags,words", [
    ("--batch-size 6", "at most the 5 training images"),
    ("--backbone none.pt", "--backbone: cannot read none.pt"),
    ("--data-dir none", "FileNotFoundError"),
    ("--data-dir text", "not in COCO's form"),
    ("--data-dir list", "not in COCO's form"),
    ("--data-dir stray", "image 1 (a.png), annotation 1: no category has the id 1"),
    ("--data-dir boxes", "no training image"),
    ("--data-dir five", "too many values"),
    ("--data-dir flat", "image 1 lacks a name or a size"),
    ("--data-dir others", "has other classes (cat) than the test set"),
    ("--data-dir wrong", "a.png (it is 9x9, its annotation says 8x8)"),
    ("--data-dir gone", "cannot read image gone/val/b.png"),
    ("--data-dir rle",
     "image 1 (a.png), annotation 1: its mask has the size [3, 4], the image [9, 9]"),
    ("--dataset coco", "instances_train2017.json"),
    ("--dataset pennfudan --data-dir text", "neither images/ and masks/"),
    ("--dataset pennfudan --data-dir maskless", "masks/a.png"),
    ("--evaluate text.pt", "no checkpoint"),
    ("--evaluate train.pt", "train.pt is no checkpoint of detect.py"),
])
def test_errors_in_one_line(flags, words, fails, tmp_path):
    Path("text.pt").write_text("no weights")
    save_checkpoint("train.pt", dict(format=CHECKPOINT_FORMAT, args=dict(method="lmcl")))
    images = [dict(id=i, file_name="a.png", width=8, height=8) for i in (1, 2)]
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=[1, 1, 4, 4]) for i in (1, 2)]
    right = dict(images=images,
                 annotations=[{**b, "segmentation": rectangle(1, 1, 4, 4)} for b in boxes],
                 categories=[dict(id=1, name="cat")])
    rle = dict(images=[{**i, "width": 9, "height": 9} for i in images],
               annotations=[{**b, "segmentation": dict(size=[3, 4], counts="P")} for b in boxes])
    fit = dict(images=[{**i, "width": 9, "height": 9} for i in images])
    for name, train, test in (
            ("wrong", {}, {}),
            ("stray", dict(categories=[]), {}),
            ("rle", rle, {}),
            ("boxes", dict(annotations=boxes), {}),
            ("gone", fit, dict(images=[{**i, "file_name": "b.png"} for i in fit["images"]])),
            ("five", {}, dict(annotations=[{**right["annotations"][0], "bbox": [1] * 5}])),
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
