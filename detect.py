"""Transfer a student to detection and instance segmentation: Mask R-CNN on its backbone, COCO's AP.

    pip install pycocotools                                 # the reference implementation of AP
    python detect.py --dataset pennfudan --data-dir DIR --arch resnet18 --backbone STUDENT_FILE
    torchrun --nproc-per-node 8 detect.py --dataset coco --data-dir DIR --backbone random
    python detect.py --evaluate out/RUN/last.pt             # AP of boxes and masks
    python detect.py --predict street.jpg --checkpoint out/RUN/last.pt      # draws what it finds

Mask R-CNN, FPN and their losses are torchvision's; --dataset coco has mmdetection's 1x recipe. A
run leaves log.jsonl, last.pt, best.pt (chosen on the test set), detections.png (truth, prediction).
"""

import support.interrupt  # noqa: F401  first: Ctrl-C while libraries load

import argparse
import contextlib
import hashlib
import io
import json
import os
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.models import detection
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import data
import models
from support import arguments, files, seeds
from support.architectures import architecture, load_model_file
from support.coco import load_splits
from support.console import Signals, UserError, one_line_errors, say, shorten
from support.images import pictures
from support.precision import mixed_precision
from support.processes import Processes, be_deterministic, device_name, pick_device
from support.run import OutDir, Run, fill_gradients, own_code

try:
    from pycocotools import cocoeval
    from pycocotools import mask as coco_mask
except ImportError:  # main says what to install
    cocoeval = None

# mmdetection's 1x schedule, torchvision's sampling
ONE_X = dict(epochs=12, batch_size=16, lr=0.02, milestones=[8, 11], warmup=500,
             min_size=800, max_size=1333, proposals=512)
SMALL = dict(epochs=10, batch_size=2, lr=0.005, milestones=[7, 9], warmup=100,
             min_size=256, max_size=512, proposals=64)
RECIPES = {"coco": ONE_X, "own": ONE_X, "pennfudan": SMALL}
SCORES = [f"{kind}_{ap}" for kind in ("box", "mask") for ap in ("ap", "ap50", "ap75")]
WIDTH = 256  # channels of FPN's maps
LOWEST = 0.5  # score that is drawn
COLORS = ["red", "lime", "blue", "orange", "purple", "cyan", "magenta", "yellow"]


# ---------------------------------------------------------------- the algorithm

def train(args, train_set, test_set, model, run):
    """One SGD step on every batch, evaluation after every epoch."""
    for epoch in run.epochs():
        for batch in run.timed(train_batches(args, train_set, run)):
            # torchvision samples regions: a resumed run draws the same
            key = f"{args.seed},{run.total_steps},{run.processes.rank}"
            seeds.seed_own(seeds.seed(key), args.device)
            run.set_lr(learning_rate(args, epoch, run.total_steps))
            images, targets = zip(*batch, strict=True)
            run.add(train_step(args, model, run, images, targets), len(batch))
            run.means()  # ends a run that is not finite; each step waits anyway
            run.after_step()
        run.end_epoch(*evaluate_epoch(args, test_set, model, run))


def train_step(args, model, run, images, targets):
    """One SGD step on the sum of Mask R-CNN's losses. Returns each by name, and "loss"."""
    images = [image.to(args.device).float() / 255 for image in images]  # each its own [3, H, W]
    targets = [{name: x.to(args.device) for name, x in target.items()} for target in targets]
    with mixed_precision(args):
        terms = model(images, targets)
    loss = sum(terms.values())
    run.optimizers[0].zero_grad()
    loss.backward()

    logged = {name: value.detach() for name, value in {"loss": loss, **terms}.items()}
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]  # none if frozen
    statistics = [s for m in norms for s in (m.running_mean, m.running_var)]
    gradients = fill_gradients(run.optimizers[0])
    run.processes.average_in_place([*gradients, *statistics, *logged.values()])
    run.optimizers[0].step()
    return logged


def learning_rate(args, epoch, step):
    """Times 0.1 at each milestone; linear from lr / 1000 to lr in the first --warmup steps."""
    warm = min(1, 0.001 + 0.999 * step / max(1, args.warmup))
    return args.lr * warm * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)


def train_batches(args, pictures, run):
    """This process's share of what is left of the epoch: each a tuple of (image, target)."""
    items = pictures.read(train_order(args, pictures, run), args.workers)
    each = args.batch_size // run.processes.size
    return zip(*[items] * each, strict=True)


def train_order(args, pictures, run):
    """(id, flip) of this process's images in what is left of the epoch, of (seed, epoch) alone.

    A batch has one orientation, one an epoch may have both. Other images fill no batch each time.
    """
    generator = seeds.generator(f"{args.seed},{run.epoch}")
    steps, images = run.steps_per_epoch, [pictures.index.imgs[i] for i in pictures.ids]
    landscape = torch.tensor([image["width"] > image["height"] for image in images])
    index = torch.randperm(len(landscape), generator=generator)[:steps * args.batch_size]
    index = index[landscape[index].sort(stable=True).indices].view(steps, -1)  # [steps, B]
    index = index[torch.randperm(steps, generator=generator)]
    flip = torch.rand(index.shape, generator=generator) < 0.5  # [steps, B]
    rank, size = run.processes.share
    left = slice(run.step, run.step + run.steps_left)
    index, flip = (x[left, rank::size].flatten().tolist() for x in (index, flip))
    return [(pictures.ids[i], f) for i, f in zip(index, flip, strict=True)]


class Resizing(GeneralizedRCNNTransform):
    """torchvision's, but a side that would become less than a pixel is stretched first."""

    def resize(self, image, target=None):
        """float32 [3, H, W] and its target, whose boxes and masks follow."""
        size = h, w = image.shape[-2:]
        least = max(h, w) // self.max_size + 1  # pixels that become at least one
        if min(h, w) < least:
            size = max(h, least), max(w, least)
            image = interpolate(image[None], size)[0]
        if target is not None and size != (h, w):
            masks = interpolate(target["masks"][:, None], size)[:, 0]  # [n, 1, H, W] in between
            boxes = resize_boxes(target["boxes"], (h, w), size)
            target = {**target, "boxes": boxes, "masks": masks}
        return super().resize(image, target)


class FPN(torch.nn.Module):
    """A feature pyramid over the maps of a backbone's four stages, of strides 4, 8, 16, 32."""

    def __init__(self, backbone, frozen=()):
        super().__init__()
        self.body, self.out_channels, self.frozen = backbone, WIDTH, list(frozen)
        with models.evaluation(backbone):
            maps = backbone.maps(torch.zeros(1, 3, 128, 128))
        strides = [128 / m.shape[-1] for m in maps]
        if strides != [4, 8, 16, 32]:
            raise UserError("detection wants stages at strides 4, 8, 16 and 32; this student's "
                            f"have {', '.join(f'{stride:g}' for stride in strides)}")
        self.pyramid = FeaturePyramidNetwork([m.shape[1] for m in maps], WIDTH, LastLevelMaxPool())

    def train(self, mode=True):
        """Frozen parts stay in eval mode: their stochastic depth, too, stays as it is."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, x):
        """[B, 3, H, W] -> five maps by name, float32: of bfloat16 ones boxes are 4 pixels off."""
        maps = {f"{i}": m for i, m in enumerate(self.body.maps(x))}
        return {level: m.float() for level, m in self.pyramid(maps).items()}


def build(args, classes, mean, std, backbone=None):
    """Mask R-CNN on the backbone (None: a new one). mean, std: of the images it was trained on."""
    torch.manual_seed(args.seed)
    drawn = models.Backbone(args.arch, num_classes=1000)  # always: the heads are then drawn alike
    backbone = backbone or drawn
    del backbone.tail, backbone.pool, backbone.classifier
    frozen = [backbone.stem, *backbone.stages[:args.freeze]] if args.freeze else []
    for part in frozen:
        part.requires_grad_(False)
    freeze_norms(torch.nn.ModuleList(frozen if args.batch_norm == "train" else [backbone]))
    n = args.proposals  # 512 gives torchvision's defaults
    limits = {f"rpn_{when}_nms_top_n_train": min(2000, 4 * n) for when in ("pre", "post")}
    limits |= {f"rpn_{when}_nms_top_n_test": min(1000, 2 * n) for when in ("pre", "post")}
    model = detection.MaskRCNN(
        FPN(backbone, frozen), len(classes) + 1, box_batch_size_per_image=n, **limits)
    model.transform = Resizing(args.min_size, args.max_size, list(mean), list(std))
    in_float32 = lambda head, inputs, outputs: [[x.float() for x in level] for level in outputs]
    model.rpn.head.register_forward_hook(in_float32)
    return model.to(args.device)


def freeze_norms(module):
    """Batch norms become constant maps, in place."""
    for path, norm in list(module.named_modules()):
        if isinstance(norm, torch.nn.BatchNorm2d):
            constant = FrozenBatchNorm2d(norm.num_features, norm.eps)
            constant.load_state_dict(norm.state_dict())
            module.set_submodule(path, constant)


def load_backbone(path, arch):
    """(models.Backbone or None, its images' mean and std, what was taken). Raises UserError."""
    if path == "random":
        return None, *data.IMAGENET, "random weights"
    backbone = models.Backbone(arch, num_classes=1000)
    try:
        content, taken = files.load_pretrained(backbone, arch, path)
    except UserError as error:
        raise UserError(f"--backbone: {error}") from None
    mean, std = data.IMAGENET
    if files.is_student_file(content):
        mean, std = content["mean"], content["std"]
    return backbone, mean, std, f"{path}: {taken}, those after the last map left out"


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def detect(model, image, device):
    """uint8 [3, H, W] -> boxes [n, 4], labels [n], scores [n], masks bool [n, H, W] on the host."""
    (found,) = model.eval()([image.to(device).float() / 255])
    found["masks"] = found["masks"][:, 0] > 0.5  # [n, 1, H, W] -> [n, H, W]
    return {name: value.cpu() for name, value in found.items()}


def as_results(found, number, categories):
    """One image's detections as COCO's result files have them. categories: id of label 1, 2, ..."""
    corner, end = found["boxes"].split(2, 1)  # [n, 2] each
    boxes = torch.cat([corner, end - corner], 1)  # x, y, w, h
    masks = coco_mask.encode(np.asfortranarray(found["masks"].permute(1, 2, 0).numpy(), np.uint8))
    columns = found["labels"].tolist(), found["scores"].tolist(), boxes.tolist(), masks
    return [dict(image_id=number, category_id=categories[label - 1], score=score, bbox=box,
                 segmentation=mask) for label, score, box, mask in zip(*columns, strict=True)]


def average_precision(truth, results):
    """COCOeval's AP, AP50 and AP75 of boxes and of masks, in percent, by the names in SCORES."""
    if not results:  # pycocotools reads the first one
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
    rank, size = processes.share
    ids, categories, results = pictures.ids[rank::size], sorted(pictures.index.cats), []
    items = pictures.read([(number, False) for number in ids], args.workers)
    for number, (image, _) in zip(ids, items, strict=True):
        results += as_results(detect(model, image, args.device), number, categories)
    results = [result for some in processes.gather_objects(results) for result in some]
    scores = average_precision(pictures.index, results) if rank == 0 else None
    return processes.gather_objects(scores)[0]


def evaluate_epoch(args, test_set, model, run):
    """The epoch's line, printed and drawn, and best.pt's criterion: the mean of box and mask AP."""
    with run.evaluating():
        scores = evaluate(args, test_set, model, run.processes)
    line = run.epoch_line(**scores)
    if run.is_main:
        say(f"epoch {line['epoch']:3d}  step {line['step']}  lr {line['lr']:.5f}  loss "
            f"{line['loss']:.3f}  {words(scores)}  {line['images_per_second']:.1f} images/s")
        drawn = png(comparison(test_set, model, args.device))
        files.write(run.out / "detections.png", drawn)
    return line, (scores["box_ap"] + scores["mask_ap"]) / 2


def words(scores):
    text = "  ".join(f"{name} {value:.2f}" for name, value in scores.items())
    return text.replace("_", " ").replace("ap", "AP")


def comparison(pictures, model, device):
    """Four pictures, truth beside prediction: uint8 [3, H, W]."""
    rows = []
    for number in pictures.ids[::max(1, len(pictures.ids) // 4)][:4]:
        image, truth = pictures.load(number)
        found = detect(model, image, device)
        both = [annotate(image, some, pictures.classes) for some in (truth, found)]
        rows.append(torch.cat(both, 2))  # [3, H, 2W]
    width = max(row.shape[2] for row in rows)
    rows = [transforms.pad(row, [0, 0, width - row.shape[2], 4], fill=255) for row in rows]
    return torch.cat(rows, 1)


def annotate(image, found, classes):
    """uint8 [3, H, W] with a target's objects, or with detections of a score of at least LOWEST."""
    scores = found.get("scores", torch.ones(len(found["boxes"])))
    keep = scores >= LOWEST
    if not keep.any():
        return image
    labels = []
    for label, score in zip(found["labels"][keep].tolist(), scores[keep].tolist(), strict=True):
        labels.append(classes[label - 1] + (f" {score:.2f}" if "scores" in found else ""))
    colors = COLORS * len(labels)
    masks = list(zip(found["masks"][keep].bool(), colors, strict=False))
    for mask, color in reversed(masks):  # one by one, the best last: of several overlaps are black
        image = draw_segmentation_masks(image, mask, alpha=0.45, colors=color)
    boxes = found["boxes"][keep]
    return draw_bounding_boxes(image, boxes, labels, colors, width=2, fill_labels=True)


def png(image):
    """Bytes of a PNG of uint8 [3, H, W]."""
    buffer = io.BytesIO()
    transforms.to_pil_image(image).save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------- the command line

def use_checkpoint(args):
    """--evaluate: AP on the run's test set, or another. --predict: a line and a drawing of each."""
    path = args.evaluate or args.checkpoint
    state = files.load_checkpoint(path)
    if "backbone" not in state["args"]:
        raise UserError(f"{path} is no checkpoint of detect.py")
    saved = argparse.Namespace(**{**state["args"], "device": args.device, "workers": args.workers})
    model = build(saved, state["classes"], state["mean"], state["std"])
    files.load_into(model, state["model"], path)
    if args.evaluate:
        where = args.dataset or saved.dataset, args.data_dir or saved.data_dir
        (test_set,) = load_splits(*where, state["classes"], splits=["val"])
        test_set.check_files()
        return say(words(evaluate(saved, test_set, model, Processes({}))))
    folder, stems = files.make_folder(args.out_dir or Path(path).parent, "--out-dir"), Counter()
    for picture, image in pictures(args.predict):
        found = detect(model, image, args.device)
        pairs = zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
        good = [(label, score) for label, score in pairs if score >= LOWEST]
        names = [f"{state['classes'][label - 1]} {score:.2f}" for label, score in good]
        stem = Path(picture).stem
        stems[stem] += 1
        again = f"_{stems[stem]}" if stems[stem] > 1 else ""  # of another folder, or another suffix
        drawn = folder / f"{stem}{again}_detections.png"
        files.write(drawn, png(annotate(image, found, state["classes"])))
        say(f"{picture}  {shorten(names) or 'nothing'}; drawn in {drawn}")


def build_parser():
    p = arguments.Parser("detect.py", __doc__)
    g = p.add_argument_group("what is trained")
    g.add_argument("--backbone", metavar="FILE", help="student, torchvision's weights, or: random")
    g.add_argument("--arch", default="resnet50", metavar="NAME",
                   help="its network, one of four stages: see train.py --help (resnet50)")
    g.add_argument("--model-file", metavar="FILE", help="Python, adds architectures (README)")
    stages = arguments.limited(int, lambda x: 0 <= x <= 4, "0 to 4")
    g.add_argument("--freeze", type=stages, metavar="N",
                   help="keep stem and first N stages as they are (1; random 0)")
    g.add_argument("--batch-norm", choices=["frozen", "train"],
                   help="where the network has any (frozen; random train)")
    g.add_argument("--proposals", type=arguments.at_least(8), metavar="N",
                   help="regions an image that the heads train on; RPN proposes four times as "
                   "many, at most 2000 (512; pennfudan 64)")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=RECIPES,
                   help="coco: {train,val}2017/, annotations/instances_{train,val}2017.json; own: "
                   "same without 2017; pennfudan: images/, masks/, or PNGImages/, PedMasks/")
    g.add_argument("--data-dir", metavar="DIR", help="where it is (data)")
    g.add_argument("--min-size", type=arguments.at_least(32), metavar="PIXELS",
                   help="images get this shorter side (800; pennfudan 256)")
    g.add_argument("--max-size", type=int, metavar="PIXELS",
                   help="and no longer one above this (1333; pennfudan 512)")
    g.add_argument("--workers", type=arguments.at_least_0, default=arguments.WORKERS,
                   help="processes that read images (4, or the number of CPUs)")
    g = p.add_argument_group("recipe")
    g.add_argument("--epochs", type=arguments.at_least_1, help="(12; pennfudan 10)")
    g.add_argument("--batch-size", type=arguments.at_least_1, help="of a step (16; pennfudan 2)")
    g.add_argument("--lr", type=arguments.positive, help="momentum is 0.9 (0.02; pennfudan 0.005)")
    g.add_argument("--milestones", type=arguments.milestone, nargs="+", metavar="EPOCH",
                   help="times 0.1 at each (8 11; pennfudan 7 9)")
    g.add_argument("--warmup", type=arguments.at_least_0, help="linear, steps (500; pennfudan 100)")
    g.add_argument("--weight-decay", type=arguments.not_negative, default=1e-4, help="(1e-4)")
    g.add_argument("--seed", type=arguments.seed, default=0,
                   help="of initial weights, batches, flips and sampled regions (0)")
    g = arguments.add_running(p)
    file = arguments.name("a file's name")
    g.add_argument("--evaluate", type=file, metavar="FILE", help="print AP of last.pt or best.pt")
    g.add_argument("--predict", nargs="+", metavar="IMAGE", help="draw what --checkpoint finds")
    g.add_argument("--checkpoint", metavar="FILE", help="last.pt or best.pt")
    return p


def parse(argv=None):
    """The options, complete and checked; a wrong one: one line and status 2."""
    p = build_parser()
    args = p.parse_args(argv)
    p.set_defaults(**RECIPES[args.dataset or "coco"], freeze=1, batch_norm="frozen")
    if args.backbone == "random":  # constant random layers would teach nothing
        p.set_defaults(freeze=0, batch_norm="train")
    args = p.parse_args(argv)
    both = args.evaluate and args.predict
    if both or bool(args.predict) != bool(args.checkpoint):
        p.error("argument --predict: must be given with --checkpoint, without --evaluate")
    uses = args.evaluate or args.predict
    for option in ("dataset", "backbone"):
        if not (uses or vars(args)[option]):
            p.error(f"argument --{option}: must be given")
    try:
        if args.model_file:
            load_model_file(args.model_file)
        stages = architecture(args.arch).stages
    except UserError as error:
        p.error(f"argument --arch or --model-file: {error}")
    if stages != 4:
        p.error(f"argument --arch: {args.arch} has {stages} stages, "
                "detection wants four, at strides 4, 8, 16 and 32")
    if args.max_size < args.min_size:
        p.error("argument --max-size: must be at least --min-size")
    if args.out_dir is None and not uses:
        origin = "-".join(Path(os.path.splitext(args.backbone)[0]).parts[-2:])
        name = f"detect-{args.dataset}"
        first = dict(dataset=name, arch=args.arch, backbone=origin, seed=args.seed)
        args.out_dir = arguments.default_name(args, p.parse_args([]), first)
    return args


def main(argv=None):
    """Run the command line; what the user can mend: one line and status 1 (2 for a wrong flag)."""
    args = parse(argv)
    with one_line_errors("detect.py", args):
        processes = Processes()
        args.device = pick_device(args.device, processes)
        if args.deterministic:
            be_deterministic()
        if cocoeval is None:  # before anything is read or trained
            raise UserError("COCO's annotations and AP want a package that is not here: "
                            "pip install pycocotools")
        if args.evaluate or args.predict:
            processes.be_alone("--evaluate" if args.evaluate else "--predict")
            use_checkpoint(args)
        else:
            start(args, processes)


def start(args, processes):
    """Load what the run needs, connect the processes, say what will be done, train."""
    out = OutDir(args.out_dir)
    found = out.find_checkpoint(args, processes)
    if found:
        backbone, mean, std, source = None, found["mean"], found["std"], "from last.pt"
    else:
        backbone, mean, std, source = load_backbone(args.backbone, args.arch)
    train_set, test_set = load_splits(args.dataset, args.data_dir, found and found["classes"])
    steps = len(train_set.ids) // args.batch_size
    if steps == 0 or args.batch_size % processes.size:
        raise UserError(f"--batch-size {args.batch_size} must be at most the {len(train_set.ids)} "
                        f"training images and divide by the {processes.size} processes")
    for split in () if found else (train_set, test_set):  # a run that goes on has begun with them
        split.check_files()
    model = build(args, test_set.classes, mean, std, backbone)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    names = [(i, train_set.index.imgs[i]["file_name"]) for i in train_set.ids]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    metadata = dict(classes=test_set.classes, mean=list(mean), std=list(std), digest=digest,
                    code=own_code(args.model_file, None))
    with Signals("detect.py", processes) as signals:
        if processes.rank == 0:
            out.open()
        processes.start(args.device)
        processes.broadcast(model)
        run = Run(args, out, model, [optimizer], metadata=metadata, steps_per_epoch=steps,
                  images_per_epoch=steps * args.batch_size, processes=processes, signals=signals)
        if run.is_main:
            report(args, source, train_set, test_set, model, run)
        run.begin(found)
        with run.saving():
            train(args, train_set, test_set, model, run)
        best = shlex.quote(f"{out}/best.pt")
        run.say_end("mean of box and mask AP",
                    f"python detect.py --predict IMAGE --checkpoint {best}")
        processes.stop()


def report(args, source, train_set, test_set, model, run):
    """What will be trained, on what, for how long. source: of the backbone's weights."""
    whole = models.parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"backbone   {args.arch}, {source}; --freeze {args.freeze}, batch norm {args.batch_norm}")
    say(f"detector   Mask R-CNN with FPN: {whole:,} parameters, {trained:,} trained")
    say(f"data       {args.dataset}: {len(train_set.ids):,} training images with objects, "
        f"{len(test_set.ids):,} test images; classes {shorten(test_set.classes)}")
    say(f"device     {run.processes.size} x {device_name(args.device)}, torch {torch.__version__}")
    say(f"steps      {args.epochs} epochs of {run.steps_per_epoch} steps of {args.batch_size}; "
        f"drops at {args.milestones}")
    say(f"output     {run.out}")


if __name__ == "__main__":
    main()
