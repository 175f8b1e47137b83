"""Transfer a student to detection and instance segmentation: its backbone under FPN and Mask R-CNN, then COCO's AP.

    pip install pycocotools                                 # the reference implementation of AP
    python detect.py --dataset pennfudan --data-dir DIR --arch resnet18 --backbone out/RUN/student_1_resnet18.pt
    torchrun --nproc-per-node 8 detect.py --dataset coco --data-dir DIR --backbone random     # to compare with
    python detect.py --evaluate out/RUN/last.pt             # AP of boxes and masks
    python detect.py --predict street.jpg --checkpoint out/RUN/last.pt      # draws what it finds

Mask R-CNN, FPN and their losses are torchvision's; --dataset coco has mmdetection's 1x recipe. A run leaves log.jsonl,
last.pt, best.pt (chosen on the test set) and detections.png, truth beside prediction, in --out-dir.
"""

import os
import signal

# Ctrl-C while libraries load, as in train.py
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"detect.py: interrupted\n"), os._exit(130)))

import argparse
import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import data
import devices
import experiment
import models
import options
from data import DataError
from devices import UserError
from experiment import say, shorten, write

try:
    from pycocotools import coco, cocoeval
    from pycocotools import mask as coco_mask
except ImportError:                                        # main says what to install
    coco = None

ARCHITECTURES = [name for name, net in models.ARCHITECTURES.items() if isinstance(net, models.ExistingNetwork)]
ONE_X = dict(epochs=12, batch_size=16, lr=0.02, milestones=[8, 11], warmup=500, min_size=800, max_size=1333,
             proposals=512)                                # mmdetection's 1x schedule, torchvision's sampling
SMALL = dict(epochs=10, batch_size=2, lr=0.005, milestones=[7, 9], warmup=100, min_size=256, max_size=512, proposals=64)
RECIPES = {"coco": ONE_X, "own": ONE_X, "pennfudan": SMALL}
SCORES = [f"{kind}_{ap}" for kind in ("box", "mask") for ap in ("ap", "ap50", "ap75")]
WIDTH = 256                                                # channels of FPN's maps
SHOWN = 0.5                                                # lowest score that is drawn
COLORS = ["red", "lime", "blue", "orange", "purple", "cyan", "magenta", "yellow"]


# ---------------------------------------------------------------- the algorithm

def train(args, train_set, test_set, model, run):
    """One SGD step on every batch, evaluation after every epoch."""
    for epoch in range(run.epoch, args.epochs):
        if 0 < args.max_steps <= run.total_steps and not run.step:
            return
        run.start_epoch(learning_rate(args, epoch, max(0, run.total_steps - 1)))       # the last step's, as it was saved
        images = data.read_items(train_set.load, train_plan(args, train_set, run, epoch), args.workers)
        for batch in run.timed(zip(*[images] * (args.batch_size // run.processes.size), strict=True)):
            key = f"{args.seed},{run.total_steps},{run.processes.rank}"
            torch.manual_seed(data.random_generator(key).initial_seed())        # torchvision samples regions
            run.add(train_step(args, model, run, *zip(*batch, strict=True)), len(batch))
            run.means()                                    # ends a run that is not finite; each step waits anyway
            run.after_step()
        line, score = scored(args, test_set, model, run)
        if run.step < run.steps_per_epoch:                 # --max-steps
            return run.end_early(line, score)
        run.end_epoch(line, score)


def train_step(args, model, run, images, targets):
    """One SGD step on the sum of Mask R-CNN's losses. Returns {"loss", each loss by torchvision's name}."""
    images = [image.to(args.device).float() / 255 for image in images]          # [3, H, W], each of its own size
    targets = [{name: value.to(args.device) for name, value in target.items()} for target in targets]
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        terms = model(images, targets)
    loss = sum(terms.values())
    run.optimizers[0].zero_grad()
    loss.backward()

    shown = {name: value.detach() for name, value in {"loss": loss, **terms}.items()}
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]       # none with --batch-norm frozen
    statistics = [s for m in norms for s in (m.running_mean, m.running_var)]
    (group,) = run.optimizers[0].param_groups
    run.processes.average_in_place([*(p.grad for p in group["params"]), *statistics, *shown.values()])
    group["lr"] = learning_rate(args, run.epoch, run.total_steps)
    run.optimizers[0].step()
    return shown


def learning_rate(args, epoch, step):
    """Times 0.1 at each milestone; from lr / 1000 up to lr in the first --warmup steps, linearly."""
    warm = min(1, 0.001 + 0.999 * step / max(1, args.warmup))
    return args.lr * warm * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)


# ---------------------------------------------------------------- data

@dataclass
class Pictures:
    """One split. index: pycocotools' COCO. ids: of the images in use. classes: names, in order of category id."""

    folder: Path
    index: object
    ids: list
    classes: list

    def load(self, item):
        """(id, flip) -> image uint8 [3, H, W] and target: boxes [n, 4] (x1, y1, x2, y2), labels [n] from 1 on, masks
        [n, H, W]. As in torchvision's references, crowds and boxes without area are left out."""
        (number, flip), order = item, sorted(self.index.cats)
        entry = self.index.imgs[number]
        path, h, w = self.folder / entry["file_name"], entry["height"], entry["width"]
        objects = [a for a in self.index.imgToAnns[number] if not a["iscrowd"]]
        with data.naming(path), Image.open(path) as image:
            if image.size != (w, h):
                raise ValueError(f"it is {image.width}x{image.height}, its annotation says {w}x{h}")
            image = F.pil_to_tensor(image.convert("RGB"))  # as it is stored: COCO's boxes know nothing of EXIF
            masks = np.array([self.index.annToMask(a) for a in objects], np.uint8)
            masks = torch.from_numpy(masks.reshape(-1, h, w))                   # [n, H, W]
        labels = torch.tensor([order.index(a["category_id"]) + 1 for a in objects], dtype=torch.int64)
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]                       # x, y, w, h -> x1, y1, x2, y2
        boxes = boxes.clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        if flip:
            image, masks = image.flip(-1), masks.flip(-1)
            boxes[:, [0, 2]] = w - boxes[:, [2, 0]]
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return image, dict(boxes=boxes[keep], labels=labels[keep], masks=masks[keep])


def train_plan(args, pictures, run, epoch):
    """This process's part of the steps that are left in the epoch: (id, flip) of each image, of (seed, epoch) alone.

    A batch holds one orientation; one batch an epoch may hold both. The images that fill no batch are others each time.
    """
    generator = data.random_generator(f"{args.seed},{epoch}")
    steps, images = run.steps_per_epoch, [pictures.index.imgs[i] for i in pictures.ids]
    landscape = torch.tensor([image["width"] > image["height"] for image in images])
    index = torch.randperm(len(landscape), generator=generator)[:steps * args.batch_size]
    index = index[landscape[index].sort(stable=True).indices].view(steps, -1)                # [steps, B]
    index = index[torch.randperm(steps, generator=generator)]
    flip = torch.rand(index.shape, generator=generator) < 0.5                                # [steps, B]
    rank, size = run.processes.part
    left = slice(run.step, run.step + run.steps_left)
    index, flip = (x[left, rank::size].flatten().tolist() for x in (index, flip))
    return [(pictures.ids[i], f) for i, f in zip(index, flip, strict=True)]


def load_data(name, folder, known=None, splits=("train", "val")):
    """The Pictures of each split. known: the classes of a checkpoint. Raises DataError."""
    folder, year = Path(os.path.expanduser(folder or "data")), "2017" if name == "coco" else ""
    *train_sets, test_set = (
        pennfudan(folder, split) if name == "pennfudan" else
        annotated(folder / f"{split}{year}", folder / f"annotations/instances_{split}{year}.json") for split in splits)
    all_classes = [("the training set", pictures.classes) for pictures in train_sets]
    for what, classes in [*all_classes, ("the checkpoint", known or test_set.classes)]:
        if classes != test_set.classes:
            raise DataError(f"{what} has other classes ({shorten(classes)}) than the test set in {folder} "
                            f"({shorten(test_set.classes)})")
    for pictures in train_sets:                            # as torchvision's references: with a box above a pixel
        objects = pictures.index.imgToAnns
        pictures.ids = [i for i in pictures.ids if any(min(a["bbox"][2:]) > 1 for a in objects[i])]
    if not all(p.ids for p in train_sets) or all(a["iscrowd"] for a in test_set.index.anns.values()):
        raise DataError(f"no training image, or no test image, in {folder} has an object with a mask")
    return *train_sets, test_set


def annotated(folder, source, content=None):
    """Pictures in `folder` by a file in COCO's form, or by its `content`, less objects without polygon or RLE."""
    try:
        content = content or json.loads(source.read_bytes())
        names = {c["id"]: str(c["name"]) for c in content["categories"]}
        for image in content["images"]:
            if not (image["file_name"] and image["width"] > 0 and image["height"] > 0):
                raise ValueError(f"image {image['id']} lacks a name or a size")
        for a in content["annotations"]:
            if isinstance(a.get("segmentation"), list):    # of fewer than three points pycocotools would make boxes
                a["segmentation"] = [polygon for polygon in a["segmentation"] if len(polygon) >= 6]
        objects = [a for a in content["annotations"] if a.get("segmentation")]
        for number, a in enumerate(objects, start=1):      # COCOeval takes number 0 for no object
            _, (_, _, w, h) = names[a["category_id"]], map(float, a["bbox"])
            a |= dict(id=number, iscrowd=int(a.get("iscrowd") or 0), area=w * h if a.get("area") is None else a["area"])
        index = coco.COCO()
        index.dataset = {**content, "annotations": objects}
        with contextlib.redirect_stdout(io.StringIO()):
            index.createIndex()
        ids = sorted(index.imgs)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"annotations {source} are not in COCO's form ({type(error).__name__}: {error})") from None
    return Pictures(folder, index, ids, [names[c] for c in sorted(names)])


def pennfudan(folder, split):
    """Penn-Fudan's masks of instance numbers, brought into COCO's form; every fifth image is for testing."""
    paths = sorted(p for name in ("images", "PNGImages") for p in (folder / name).glob("*.[jp][pn]g"))
    if not paths:
        raise DataError(f"--data-dir {folder} holds neither images/ and masks/ nor PNGImages/ and PedMasks/")
    part = dict(images=[], annotations=[], categories=[dict(id=1, name="person")])
    for number, path in enumerate(paths):
        if (number % 5 == 4) != (split == "val"):
            continue
        original = path.parent.name == "PNGImages"         # the names in the archive
        mask = folder / (f"PedMasks/{path.stem}_mask.png" if original else f"masks/{path.stem}.png")
        with data.naming(mask), Image.open(mask) as image:
            numbers = np.array(image)                      # [H, W], 0 is background
        part["images"].append(dict(id=number, file_name=path.name, height=numbers.shape[0], width=numbers.shape[1]))
        for k in np.unique(numbers[numbers > 0]):
            rle = coco_mask.encode(np.asfortranarray(numbers == k, np.uint8))
            part["annotations"].append(dict(image_id=number, category_id=1, segmentation=rle,
                                            area=float(coco_mask.area(rle)), bbox=coco_mask.toBbox(rle).tolist()))
    return annotated(paths[0].parent, folder, part)


# ---------------------------------------------------------------- the detector

def build(args, classes, mean, std, weights=None):
    """Mask R-CNN on the backbone. mean, std: of the images that it was trained on. weights: its state_dict, or None."""
    torch.manual_seed(args.seed)
    net = torchvision.models.get_model(args.arch, weights=None)
    if weights:
        net.load_state_dict(weights, strict=False)
    layers = (["maxpool", "stage2", "stage3", "stage4"] if hasattr(net, "stage2") else       # whose maps FPN reads:
              ["layer1", "layer2", "layer3", "layer4"])                                      # strides 4, 8, 16, 32
    parts = [name for name, _ in net.named_children()]
    frozen = parts[:parts.index(layers[args.freeze - 1]) + 1] if args.freeze else []         # the first maps' layers
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in frozen)
    for name, norm in list(net.named_modules()):
        if isinstance(norm, torch.nn.BatchNorm2d) and (args.batch_norm == "frozen" or name.split(".")[0] in frozen):
            constant = FrozenBatchNorm2d(norm.num_features, norm.eps)
            constant.load_state_dict(norm.state_dict())
            net.set_submodule(name, constant)
    channels = getattr(net, "_stage_out_channels", None) or [net.fc.in_features // k for k in (8, 4, 2, 1)]
    maps = {name: str(i) for i, name in enumerate(layers)}
    fpn = detection.backbone_utils.BackboneWithFPN(net, maps, channels[:4], WIDTH)
    n = args.proposals                                     # 512 gives torchvision's defaults
    model = detection.MaskRCNN(
        fpn, len(classes) + 1, args.min_size, args.max_size, list(mean), list(std), box_batch_size_per_image=n,
        **{f"rpn_{when}_nms_top_n_train": min(2000, 4 * n) for when in ("pre", "post")},
        **{f"rpn_{when}_nms_top_n_test": min(1000, 2 * n) for when in ("pre", "post")})
    # With --amp bf16, torchvision would decode boxes in the type of these outputs: 4 pixels off at 1,000 in bfloat16.
    fpn.register_forward_hook(lambda *call: {name: x.float() for name, x in call[2].items()})
    model.rpn.head.register_forward_hook(lambda *call: [[x.float() for x in outputs] for outputs in call[2]])
    return model.to(args.device)


def load_backbone(path, arch):
    """(tensors by torchvision's names, mean and std of the images that they are used to, what was taken)."""
    if path == "random":
        return None, *data.IMAGENET, "random weights"
    student = models.Backbone(arch, num_classes=1000)
    try:
        models.load_weights(student, arch, path)
        file = models.read_weights(path)
    except ValueError as error:
        raise UserError(f"--backbone: {error}") from None
    mean, std = (file["mean"], file["std"]) if models.is_student_file(file) else data.IMAGENET
    names, tensors = models.names_in_files(student, arch), student.state_dict()
    used = {names[k]: x for k, x in tensors.items() if not k.startswith(("tail.", "classifier."))}
    return used, mean, std, f"{path}: {len(used)} tensors taken, {len(names) - len(used)} after the last map left out"


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def detect(model, image, device):
    """uint8 [3, H, W] -> boxes [n, 4], labels [n], scores [n], masks bool [n, H, W], on the host."""
    (found,) = model.eval()([image.to(device).float() / 255])
    found["masks"] = found["masks"][:, 0] > 0.5            # [n, 1, H, W] -> [n, H, W]
    return {name: value.cpu() for name, value in found.items()}


def as_results(found, number, categories):
    """One image's detections in the form of COCO's result files. categories: the category id of label 1, 2, ..."""
    boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1)    # x, y, w, h
    masks = coco_mask.encode(np.asfortranarray(found["masks"].permute(1, 2, 0).numpy(), np.uint8))
    columns = found["labels"].tolist(), found["scores"].tolist(), boxes.tolist(), masks
    return [dict(image_id=number, category_id=categories[label - 1], score=score, bbox=box, segmentation=mask)
            for label, score, box, mask in zip(*columns, strict=True)]


def average_precision(truth, results):
    """COCOeval's AP, AP50 and AP75 of boxes and of masks, in percent, by the names in SCORES."""
    if not results:                                        # pycocotools reads the first one
        return dict.fromkeys(SCORES, 0.0)
    values = []
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(results)
        for kind in ("bbox", "segm"):
            evaluation = cocoeval.COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            values += [round(100 * float(x), 2) for x in evaluation.stats[:3]]
    return dict(zip(SCORES, values, strict=True))


def evaluate(args, pictures, model, processes):
    """AP on all pictures, which the processes share; process 0 computes it for all."""
    rank, size = processes.part
    ids, categories, results = pictures.ids[rank::size], sorted(pictures.index.cats), []
    items = data.read_items(pictures.load, [(i, False) for i in ids], args.workers)
    for number, (image, _) in zip(ids, items, strict=True):
        results += as_results(detect(model, image, args.device), number, categories)
    results = [r for part in processes.gather_objects(results) for r in part]
    return processes.gather_objects(average_precision(pictures.index, results) if rank == 0 else None)[0]


def scored(args, test_set, model, run):
    """The epoch's line, printed and drawn, and the score that best.pt is chosen by: mean of box and mask AP."""
    run.stop_clock()
    run.show_progress("evaluation", every=0)
    scores = evaluate(args, test_set, model, run.processes)
    line = run.line(lr=learning_rate(args, run.epoch, run.total_steps - 1), **scores)         # of the last step
    if run.is_main:
        say(f"epoch {line['epoch']:3d}  step {line['step']}  lr {line['lr']:.5f}  loss {line['loss']:.3f}  "
            f"{words(scores)}  {line['images_per_second']:.1f} images/s")
        write(run.out / "detections.png", png(comparison(test_set, model, args.device)))
    return line, (scores["box_ap"] + scores["mask_ap"]) / 2


def words(scores):
    return "  ".join(f"{name.replace('_', ' ').replace('ap', 'AP')} {value:.2f}" for name, value in scores.items())


def comparison(pictures, model, device):
    """Four pictures, truth beside prediction: uint8 [3, H, W]."""
    rows = []
    for number in pictures.ids[::max(1, len(pictures.ids) // 4)][:4]:
        image, truth = pictures.load((number, False))
        both = truth, detect(model, image, device)
        rows.append(torch.cat([draw(image, found, pictures.classes) for found in both], 2))  # [3, H, 2W]
    width = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, [0, 0, width - row.shape[2], 4], fill=255) for row in rows], 1)


def draw(image, found, classes):
    """uint8 [3, H, W] with boxes, masks and names of a target, or of detections of at least SHOWN with their scores."""
    scores = found.get("scores", torch.ones(len(found["boxes"])))
    keep = scores >= SHOWN
    if not keep.any():
        return image
    labels = [classes[label - 1] + (f" {score:.2f}" if "scores" in found else "")
              for label, score in zip(found["labels"][keep].tolist(), scores[keep].tolist(), strict=True)]
    colors = COLORS * len(labels)
    for mask, color in reversed(list(zip(found["masks"][keep].bool(), colors, strict=False))):       # the best one last
        image = draw_segmentation_masks(image, mask, alpha=0.45, colors=color)      # of several it blackens the overlap
    return draw_bounding_boxes(image, found["boxes"][keep], labels, colors, width=2, fill_labels=True)


def png(image):
    """Bytes of a PNG of uint8 [3, H, W]."""
    buffer = io.BytesIO()
    F.to_pil_image(image).save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------- the command line

def use_checkpoint(args):
    """--evaluate: AP on the run's test set, or on another one. --predict: a line and a drawn copy for each picture."""
    path = args.evaluate or args.checkpoint
    state = experiment.load_checkpoint(path)
    if "backbone" not in state["args"]:
        raise UserError(f"{path} is no checkpoint of detect.py")
    saved = argparse.Namespace(**{**state["args"], "device": args.device, "workers": args.workers})
    model = build(saved, state["classes"], state["mean"], state["std"])
    experiment.load_into(model, state["model"], path)
    if args.evaluate:
        where = args.dataset or saved.dataset, args.data_dir or saved.data_dir
        (pictures,) = load_data(*where, state["classes"], splits=["val"])
        return say(words(evaluate(saved, pictures, model, devices.Processes({}))))
    folder, stems = Path(os.path.expanduser(args.out_dir or Path(path).parent)), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --out-dir {folder} ({error.strerror}): give another one") from None
    for name, image in data.pictures(args.predict):
        found = detect(model, image, args.device)
        pairs = zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
        shown = [f"{state['classes'][label - 1]} {score:.2f}" for label, score in pairs if score >= SHOWN]
        stems.append(stem := Path(name).stem)
        again = f"_{stems.count(stem)}" * (stems.count(stem) > 1)          # of another folder, or another suffix
        drawn = folder / f"{stem}{again}_detections.png"
        write(drawn, png(draw(image, found, state["classes"])))
        say(f"{name}  {shorten(shown) or 'nothing'}; drawn in {drawn}")


def build_parser():
    p = options.Parser(prog="detect.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what is trained")
    g.add_argument("--backbone", metavar="FILE", help="a student file, torchvision's weights, or: random")
    g.add_argument("--arch", default="resnet50", choices=ARCHITECTURES, help="of the backbone (resnet50)")
    g.add_argument("--freeze", type=int, metavar="N", help="keep the layers up to the N-th of FPN's four inputs as "
                   "they are; 1: ResNet's conv1, bn1, layer1, ShuffleNetV2's conv1 (1; random 0)")
    g.add_argument("--batch-norm", choices=["frozen", "train"], help="of the backbone (frozen; random train)")
    g.add_argument("--proposals", type=int, metavar="N", help="regions an image that the heads train on; RPN proposes "
                   "four times as many, at most 2000 (512; pennfudan 64)")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=RECIPES, help="coco: {train,val}2017/, annotations/instances_{train,val}2017."
                   "json; own: the same without 2017; pennfudan: images/, masks/, or PNGImages/, PedMasks/")
    g.add_argument("--data-dir", metavar="DIR", help="where it is (data)")
    g.add_argument("--min-size", type=int, metavar="PIXELS", help="images get this shorter side (800; pennfudan 256)")
    g.add_argument("--max-size", type=int, metavar="PIXELS", help="and no longer one above this (1333; pennfudan 512)")
    g.add_argument("--workers", type=int, default=4, help="processes that read images (4)")
    g = p.add_argument_group("recipe")
    g.add_argument("--epochs", type=int, help="(12; pennfudan 10)")
    g.add_argument("--batch-size", type=int, help="images a step, of all processes together (16; pennfudan 2)")
    g.add_argument("--lr", type=float, help="learning rate of SGD with momentum 0.9 (0.02; pennfudan 0.005)")
    g.add_argument("--milestones", type=int, nargs="+", metavar="EPOCH", help="times 0.1 at each (8 11; pennfudan 7 9)")
    g.add_argument("--warmup", type=int, metavar="STEPS", help="linear, from lr / 1000 (500; pennfudan 100)")
    g.add_argument("--weight-decay", type=float, default=1e-4, help="(1e-4)")
    g.add_argument("--seed", type=int, default=0, help="of initial weights, batches, flips and sampled regions (0)")
    g = options.running(p)
    g.add_argument("--evaluate", metavar="FILE", help="print AP of last.pt or best.pt, and end")
    g.add_argument("--predict", nargs="+", metavar="IMAGE", help="draw what --checkpoint, last.pt or best.pt, finds")
    g.add_argument("--checkpoint", metavar="FILE", help="of --predict")
    return p


def parse(argv=None):
    """The options, complete and checked; a wrong one ends the program with one line and status 2."""
    p = build_parser()
    args = p.parse_args(argv)
    whole = args.backbone == "random"                      # constant random layers would teach nothing
    p.set_defaults(**RECIPES[args.dataset or "coco"], freeze=1 - whole, batch_norm="train" if whole else "frozen")
    args = p.parse_args(argv)
    uses = args.evaluate or args.predict
    p.check(args, [("--predict", not (args.evaluate and args.predict) and bool(args.predict) == bool(args.checkpoint),
                    "given with --checkpoint, without --evaluate"),
                   ("--dataset", uses or args.dataset, "given"), ("--backbone", uses or args.backbone, "given"),
                   ("--freeze", 0 <= args.freeze <= 4, "0 to 4"), ("--proposals", args.proposals >= 8, "at least 8"),
                   ("--batch-size", args.batch_size >= 1, "at least 1"), ("--warmup", args.warmup >= 0, "0 or more"),
                   ("--min-size", args.min_size >= 32, "at least 32"),
                   ("--max-size", args.max_size >= args.min_size, "at least --min-size"),
                   ("--milestones", min(args.milestones) >= 1, "epochs from 1 on"), *options.running_rules(args)])
    if args.out_dir is None and not uses:
        origin = "-".join(Path(os.path.splitext(args.backbone)[0]).parts[-2:])
        first = dict(dataset=f"detect-{args.dataset}", arch=args.arch, backbone=origin, seed=args.seed)
        args.out_dir = options.default_name(args, p.parse_args([]), first)
    return args


def main(argv=None):
    """Run the command line; whatever the user can mend ends in one line and status 1 (2 for a wrong flag)."""
    args = parse(argv)
    with experiment.one_line_errors("detect.py", (UserError, DataError), args):
        processes = devices.Processes()
        args.device = devices.pick_device(args.device, processes)
        if args.deterministic:
            devices.be_deterministic()
        if coco is None:                                   # before anything is read or trained
            raise UserError("COCO's annotations and AP want a package that is not here: pip install pycocotools")
        if args.evaluate or args.predict:
            processes.be_alone("--evaluate" if args.evaluate else "--predict")
            use_checkpoint(args)
        else:
            start(args, processes)


def start(args, processes):
    """Load what the run needs, connect the processes, say what will be done, train."""
    out = experiment.OutDir(args.out_dir)
    state = out.find_checkpoint(args, options.WHERE, processes) or {}
    weights, mean, std, source = ((None, state["mean"], state["std"], "from last.pt") if state else
                                  load_backbone(args.backbone, args.arch))
    train_set, test_set = load_data(args.dataset, args.data_dir, state.get("classes"))
    steps = len(train_set.ids) // args.batch_size
    if steps == 0 or args.batch_size % processes.size:
        raise UserError(f"--batch-size {args.batch_size} must be at most the {len(train_set.ids)} training images and "
                        f"divide by the {processes.size} processes")
    model = build(args, test_set.classes, mean, std, weights)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    names = [(i, train_set.index.imgs[i]["file_name"]) for i in train_set.ids]
    metadata = dict(classes=test_set.classes, mean=list(mean), std=list(std),
                    digest=hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16])
    with experiment.Signals("detect.py", processes) as signals:
        if processes.rank == 0:
            out.open()
        processes.start(args.device)
        processes.broadcast(model)
        images = steps * args.batch_size
        run = experiment.Run(args, out, model, [optimizer], metadata, steps, images, processes, signals)
        if state:
            run.load(state)
            state.clear()                                  # its tensors are not needed twice
        if run.is_main:
            say(f"backbone   {args.arch}, {source}; --freeze {args.freeze}, batch norm {args.batch_norm}\n"
                f"detector   Mask R-CNN with FPN: {models.parameters(model):,} parameters, "
                f"{sum(p.numel() for p in trained):,} trained\n"
                f"data       {args.dataset}: {len(train_set.ids):,} training images with objects, "
                f"{len(test_set.ids):,} test images; classes {shorten(test_set.classes)}\n"
                f"device     {processes.size} x {devices.device_name(args.device)}, torch {torch.__version__}\n"
                f"steps      {args.epochs} epochs of {steps} steps of {args.batch_size}; drops at {args.milestones}\n"
                f"output     {out}" + (f", going on after step {run.total_steps:,}" if run.total_steps else ""))
        run.write_log()
        with run.saving_on(DataError):
            train(args, train_set, test_set, model, run)
        if run.is_main:
            say(f"ended      {run.total_steps:,} steps, best epoch {run.best_epoch} (mean of box and mask AP "
                f"{run.best:.2f}); next: --evaluate {out}/best.pt, or --predict IMAGE --checkpoint {out}/best.pt")
        processes.stop()


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
