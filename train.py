"""Train N students together by layer-wise mutual contrastive learning (L-MCL), or by what it is compared with.

    python train.py --dataset synthetic --arch resnet8 --epochs 3      # two minutes on a laptop's CPU, no download
    python train.py --arch resnet32 --num-nets 2                       # CIFAR-100, the published recipe
    python train.py --arch resnet56 wrn_40_2                           # two different students
    python train.py --arch resnet32 --method independent               # the published baseline
    python train.py --dataset folder --data-dir my_images              # my_images/{train,test}/CLASS/*
    python train.py --arch resnet32 --resume                           # go on after an interruption
    python train.py --evaluate out/RUN/last.pt                         # top-1 and top-5 of every student

The method is that of Yang et al., TPAMI 2023 (arXiv 2207.11518). SIGINT and SIGTERM end a run after the present step,
with everything saved; a second one ends it at once.
"""

import argparse
import functools
import io
import itertools
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

try:
    import resource
except ImportError:                                        # Windows: no peak memory of the CPU in --benchmark
    resource = None

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import data
import losses
import meta
import models

METHODS = {
    "lmcl": "layer-wise mutual contrastive learning, with branches, aggregators and learned layer matching",
    "mcl": "mutual contrastive learning of the last stage, backbones alone (AAAI 2022)",
    "deep-supervision": "the same students and branches, cross-entropy of every head, nothing mutual",
    "dml": "backbones alone, deep mutual learning: KL towards every other's prediction (CVPR 2018)",
    "afd": "backbones alone, adversarial distillation of feature maps and mutual KL (ICML 2020)",
    "independent": "backbones alone, cross-entropy: the published baseline",
}
CHECKPOINT_FORMAT = 1


class UserError(Exception):
    """Something the user can mend; main() prints its one line and exits with status 1."""


class Interrupted(UserError):
    """A signal ended the run after a step; everything is saved."""


# ---------------------------------------------------------------- the objective

def weighted(args, terms):
    """alpha VCL + gamma Soft VCL + beta ICL + lam Soft ICL."""
    return (args.weight_vcl * terms["vcl"] + args.weight_soft_vcl * terms["soft_vcl"]
            + args.weight_icl * terms["icl"] + args.weight_soft_icl * terms["soft_icl"])


def objective(args, net, images, labels):
    """One batch's loss, its terms by name (unweighted), and what the second optimizer's step needs of it.

    lmcl:  sum_a sum_l CE(logits_a^l, y) + sum_a CE(agg_a, y) + sum_a sum_b KL_T(logits_a^L <- agg_b) + L_L-MCL
    mcl:   sum_a CE(logits_a^L, y) + L_MCL (+ sum_a KL_T(logits_a^L <- mean_b logits_b^L) with --logit-kd)
    dml:   sum_a CE(logits_a^L, y) + sum_a mean_{b != a} KL_1(logits_a^L <- logits_b^L)
    afd:   as dml with T = 3, + weight_fooling * sum_a (1 - D_a(map_a))^2
    deep-supervision, independent: cross-entropy of every head there is.

    The third value, `second`, is lambda for lmcl, the aligned maps for afd, else None.
    """
    if args.method in ("lmcl", "mcl"):
        features, embeddings, logits = net["students"](images)    # N x [L, B, d_a], [N, L, B, D], [N, L, B, C]
    elif args.method == "afd":
        maps, logits = net["students"].last_maps(images)
    else:
        features, logits = net["students"](images)
    terms, second = {"ce": losses.cross_entropy(logits, labels)}, None
    loss = terms["ce"]

    if args.method == "lmcl":
        aggregated = net["aggregator"](features, logits)                              # [N, B, C]
        terms["ce_agg"] = losses.cross_entropy(aggregated, labels)
        terms["kd"] = losses.distillation(logits[:, -1][:, None], aggregated, args.T).sum()   # [N, N]: a = b too
        with torch.no_grad():                                                         # lambda is a constant here
            second = net["matching"](features)                                        # [N, L, N, L, B]
        contrast = losses.lmcl_loss(embeddings, labels, second, args.tau, args.T)
        loss = loss + terms["ce_agg"] + terms["kd"] + weighted(args, contrast)
        terms.update(contrast)
    elif args.method == "mcl":
        contrast = losses.mcl_loss(embeddings[:, -1], labels, args.tau, args.T)
        loss = loss + weighted(args, contrast)
        terms.update(contrast)
        if args.logit_kd:
            terms["kd"] = losses.ensemble_distillation(logits[:, -1], args.T)
            loss = loss + terms["kd"]
    elif args.method == "dml":
        terms["kd"] = losses.mutual_distillation(logits[:, -1], T=1.0)
        loss = loss + terms["kd"]
    elif args.method == "afd":
        aligned = net["judges"].align(maps)                                           # N x [B, c, h, w]
        second = [m.detach().float() for m in aligned]
        terms["kd"] = losses.mutual_distillation(logits[:, -1], args.T)
        loss = loss + terms["kd"]
        if len(args.arch) > 1:
            terms["fooling"] = losses.fooling(net["judges"](aligned))
            loss = loss + args.weight_fooling * terms["fooling"]
    if args.method in ("lmcl", "mcl") and len(args.arch) > 1:
        terms["mi_bound"] = losses.mutual_information_bound(embeddings[:, -1], labels, args.tau)
    return loss, {"loss": loss, **terms}, second


def build(args, num_classes):
    """All that is trained, drawn from the seed: students (theta) and, for lmcl, aggregators and meta-network."""
    torch.manual_seed(args.seed)
    cohort = models.Cohort(args.arch, num_classes, branches=args.method in ("lmcl", "deep-supervision"))
    net = nn.ModuleDict({"students": models.EmbeddedCohort(cohort) if args.method in ("lmcl", "mcl") else cohort})
    if args.method == "lmcl":
        net["aggregator"] = models.Aggregator(cohort.widths, cohort.stages)
        net["matching"] = meta.MatchingNetwork(cohort.widths, cohort.stages)
    if args.method == "afd":
        with torch.no_grad():
            net["judges"] = models.Judges(cohort.eval().last_maps(torch.zeros(1, 3, args.image_size, args.image_size))[0])
    return net.to(args.device, memory_format=torch.channels_last), cohort


# ---------------------------------------------------------------- the algorithm

def train(args, dataset, run):
    """The ordinary step on every batch, the meta step on every --meta-freq-th, evaluation after every epoch."""
    draw, step, match = steps(args, dataset, run)
    for epoch in range(run.epoch, args.epochs):
        if 0 < args.max_steps <= run.total_steps:
            return
        lr = args.lr / 2 * (1 + math.cos(math.pi * epoch / args.epochs))
        run.begin(lr)
        for images, labels in data.train_batches(dataset, args.batch_size, args.seed, epoch, run.step, draw):
            terms, second = step(images, labels)                                      # ordinary_step
            run.count(terms, second, len(labels))

            if args.method == "lmcl" and len(args.arch) > 1 and run.total_steps % args.meta_freq == 0:
                match(images, labels)                                                 # matching_step
            if args.method == "afd" and len(args.arch) > 1:
                judge_step(run.net["judges"], run.second_optimizer, second)
            if run.pause_after_step():
                return
        run.stop_clock()
        run.end_of_epoch(*evaluate(run.cohort, dataset))


def ordinary_step(args, run, images, labels):
    """One SGD step of all but the second optimizer's parameters. Returns the loss terms and what that one needs."""
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp == "bf16"):
        loss, terms, second = objective(args, run.net, images, labels)
    run.net.zero_grad()                                                               # the discriminators' too: see Recorded
    loss.backward()
    run.optimizer.step()
    return {name: term.detach() for name, term in terms.items()}, second


def matching_step(args, run, images, labels):
    """lmcl: one step of the meta-network along its exact hypergradient, always in float32."""
    meta.meta_step(
        run.net["students"], run.net["matching"], run.second_optimizer, images,
        contrast=lambda z, w: weighted(args, losses.lmcl_loss(z, labels, w, args.tau, args.T)),
        task=lambda logits: losses.cross_entropy(logits, labels),
        inner_steps=args.meta_steps, lr=run.rate, momentum=args.momentum, weight_decay=args.weight_decay)


def judge_step(judges, optimizer, maps):
    """afd: the discriminators learn to tell each student's map from the next one's; the maps are constant."""
    optimizer.zero_grad()                                                             # the students' step left some
    losses.judging(judges(maps), judges(maps[1:] + maps[:1])).backward()
    optimizer.step()


def steps(args, dataset, run):
    """Augmentation, ordinary_step and matching_step as functions of tensors alone; with --cuda-graph recorded and replayed."""
    functions = [data.drawing(dataset), *(functools.partial(step, args, run) for step in (ordinary_step, matching_step))]
    if args.cuda_graph and any(isinstance(m, nn.modules.dropout._DropoutNd) for m in run.net.modules()):
        raise UserError("--cuda-graph cannot draw a student's dropout masks again in the meta step: leave it out")
    return [Recorded(function) for function in functions] if args.cuda_graph else functions


class Recorded:
    """A function of tensors, replayed as a CUDA graph: one launch by the host instead of one for each operation.

    For inputs of each size the first three calls are made as they are, in which libraries choose algorithms and
    optimizers make their buffers; the fourth is recorded, and it and all later ones are replayed: the same kernels
    on the same memory. So whatever changes from call to call must be an input, or a tensor changed in
    place, as run.rate is; nothing else made outside may be used, since it may be freed; and the outputs are good
    until the next call, of whatever size. Graphs of several sizes share their memory: each writes before it reads.
    """

    WARM_UP = 3

    def __init__(self, function):
        self.function, self.calls, self.graphs = function, {}, {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, *inputs):
        size = len(inputs[0])
        self.calls[size] = self.calls.get(size, 0) + 1
        if self.calls[size] <= self.WARM_UP:               # on the stream that records: autograd stays on its stream
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if size not in self.graphs:
            graph, inputs_here = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    outputs = self.function(*inputs_here)
            except RuntimeError as error:                  # where leaving the recording fails in turn, the first one counts
                error = error.__context__ or error
                if isinstance(error, torch.OutOfMemoryError):
                    raise error
                raise UserError(f"--cuda-graph cannot record this step ({str(error).splitlines()[0][:120]}): leave it out")
            self.graphs[size] = graph, inputs_here, outputs
        graph, inputs_here, outputs = self.graphs[size]
        for here, given in zip(inputs_here, inputs):
            here.copy_(given)
        graph.replay()
        return outputs


@torch.no_grad()
def evaluate(cohort, dataset):
    """Top-1 and top-5 accuracy in percent of every student's own head on the test set: two lists."""
    cohort.eval()
    hits = 0
    for images, labels in data.test_batches(dataset):
        logits = torch.stack([student.backbone(images) for student in cohort.students])     # [N, B, C]
        best = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]             # [N, B, 5]
        hits = hits + torch.stack([best[..., 0].sum(1), best.any(-1).sum(1)])               # [2, N]
    hits = (100 * hits / len(dataset.test_labels)).tolist()                                 # the host waits here
    return [[round(x, 2) for x in row] for row in hits]


# ---------------------------------------------------------------- a run: its state, log, checkpoints and pictures

class Run:
    """What changes while training, all of it in a checkpoint, and what a run leaves in --out-dir."""

    CARRIED = ("epoch", "step", "total_steps", "best", "log", "sums", "healthy", "matching", "images", "seconds")

    def __init__(self, args, dataset, signals):
        self.args, self.dataset, self.signals, self.out = args, dataset, signals, Path(args.out_dir)
        self.net, self.cohort = build(args, len(dataset.classes))
        sgd = dict(lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True, fused=True)
        self.second_optimizer = None                       # of the meta-network, or of afd's discriminators
        if args.method == "lmcl":
            self.second_optimizer = torch.optim.SGD(self.net["matching"].parameters(), **sgd)
        elif args.method == "afd":
            self.second_optimizer = torch.optim.Adam(self.net["judges"].discriminators.parameters(), lr=2e-4, betas=(0.5, 0.999))
        others = {p for group in self.second_optimizer.param_groups for p in group["params"]} if self.second_optimizer else set()
        self.optimizer = torch.optim.SGD([p for p in self.net.parameters() if p not in others], **sgd)
        self.rate = torch.tensor(args.lr, device=args.device) if args.cuda_graph else args.lr   # what the steps use
        self.epoch = self.step = self.total_steps = 0      # the next epoch, the next step in it, steps done in all
        self.steps_per_epoch = len(dataset.train_labels) // args.batch_size
        self.best = -1.0                                   # best mean top-1 over epochs
        self.log = [dict(command=shlex.join(["python", *sys.argv]), args=vars(args), torch=str(torch.__version__),
                         device=device_name(args.device), classes=dataset.classes)]
        self.reset()
        self.shown = self.saved = time.perf_counter()

    def reset(self):
        """What is summed over an epoch: terms, finite steps, matching weights, images, seconds of training."""
        self.sums, self.healthy, self.matching, self.images, self.seconds = {}, 0, 0, 0, 0.0

    def begin(self, lr):
        self.net.train()
        self.lr, self.clock = lr, time.perf_counter()
        self.rate = self.rate.fill_(lr) if self.args.cuda_graph else lr
        for optimizer in (self.optimizer, self.second_optimizer):
            if isinstance(optimizer, torch.optim.SGD):
                for group in optimizer.param_groups:
                    group["lr"] = self.rate

    def count(self, terms, second, images):
        """Add a step to the epoch's sums, on the device: the host does not wait.

        From the first step that is not finite on, the sums stand still and `healthy` counts no further.
        """
        self.step, self.total_steps, self.images = self.step + 1, self.total_steps + 1, self.images + images
        values = torch.stack(list(terms.values()))
        before = self.sums.get("values", torch.zeros_like(values))
        well = before.isfinite().all()
        self.sums = {"names": list(terms), "values": torch.where(well, before + values, before)}
        self.healthy = self.healthy + self.sums["values"].isfinite().all()
        if self.args.method == "lmcl":
            self.matching = self.matching + second.mean(-1)                   # [N, L, N, L]

    def means(self):
        """The epoch's mean of each term so far. Raises UserError if a term was not finite."""
        means = {k: v / self.step for k, v in zip(self.sums["names"], self.sums["values"].tolist())}   # the host waits
        bad = [name for name, value in means.items() if not math.isfinite(value) and name != "loss"]
        if int(self.healthy) < self.step:
            kept = self.out / "last.pt"
            raise UserError(f"{', '.join(bad) or 'loss'} became infinite or NaN at step "
                            f"{self.total_steps - self.step + int(self.healthy) + 1}: try a smaller --lr; "
                            + (f"{kept} is from before that" if kept.exists() else "nothing was saved yet"))
        return means

    def pause_after_step(self):
        """Progress, --save-every, signals and --max-steps. True if the run is to end here, inside an epoch."""
        now, args = time.perf_counter(), self.args
        if sys.stderr.isatty() and now - self.shown > 1:
            self.show_progress()
            self.shown = now
        if self.signals.name or args.save_every and now - self.saved > 60 * args.save_every:
            self.save("last.pt")
        if self.signals.name:
            raise Interrupted(f"{self.signals.name}: saved {self.out / 'last.pt'} after step {self.total_steps}; "
                              "the same command with --resume goes on")
        if self.total_steps == args.max_steps and self.step < self.steps_per_epoch:
            self.save("last.pt")
            self.write_log(self.line(*evaluate(self.cohort, self.dataset)))
            return True
        return False

    def stop_clock(self):
        """Training time is counted without evaluation and saving; the host waits for the device first."""
        self.means()
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def show_progress(self):
        rate = self.images / (self.seconds + time.perf_counter() - self.clock)
        left = ((self.args.epochs - self.epoch) * len(self.dataset.train_labels) - self.images) / rate
        print(f"\repoch {self.epoch + 1}/{self.args.epochs}  step {self.step}/{self.steps_per_epoch}  "
              f"loss {self.means()['loss']:.3f}  {rate:.0f} images/s  "
              f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f} left  ", end="", file=sys.stderr, flush=True)

    def line(self, top1, top5):
        """The log's line for this epoch, printed too."""
        means = self.means()
        line = dict(epoch=self.epoch + 1, step=self.total_steps, lr=self.lr, **{k: round(v, 6) for k, v in means.items()},
                    test_top1=top1, test_top5=top5, images_per_second=round(self.images / self.seconds, 1),
                    seconds=round(self.seconds, 2))
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        print(f"{clear}epoch {self.epoch + 1:3d}  step {self.total_steps}  lr {self.lr:.4f}  loss {means['loss']:.3f}  "
              f"ce {means['ce']:.3f}  top-1 {' '.join(f'{x:.2f}' for x in top1)}  "
              f"{line['images_per_second']:.0f} images/s", flush=True)
        if self.args.method == "lmcl" and len(self.args.arch) > 1:
            picture = io.BytesIO()
            meta.draw_matching(self.matching / self.step, self.args.arch, picture)
            checkpoint.write(self.out / "matching.png", picture.getvalue())
        return line

    def end_of_epoch(self, top1, top5):
        self.log.append(self.line(top1, top5))
        self.epoch, self.step = self.epoch + 1, 0
        self.reset()
        improved, self.best = sum(top1) / len(top1) > self.best, max(self.best, sum(top1) / len(top1))
        if improved:                                       # first: what follows last.pt is not done again after a kill
            self.save("best.pt")
        self.save("last.pt")
        self.write_log()

    def write_log(self, *unfinished):
        """log.jsonl from the checkpoint's own copy: no line twice, none missing, whatever was interrupted."""
        text = "".join(json.dumps(line) + "\n" for line in [*self.log, *unfinished])
        checkpoint.write(self.out / "log.jsonl", text.encode())

    def save(self, name):
        if self.step:
            self.stop_clock()                              # which also sees that nothing is saved that is not finite
        state = dict(format=CHECKPOINT_FORMAT, args=vars(self.args), classes=self.dataset.classes,
                     mean=self.dataset.mean, std=self.dataset.std, net=self.net.state_dict(),
                     optimizers=[o.state_dict() for o in (self.optimizer, self.second_optimizer) if o],
                     **{k: getattr(self, k) for k in self.CARRIED})
        checkpoint.save(self.out / name, state, keep=self.out / "previous.pt" if name == "last.pt" else None)
        self.saved = self.clock = time.perf_counter()

    def load(self, state):
        self.net.load_state_dict(state["net"])
        for optimizer, saved in zip((self.optimizer, self.second_optimizer), state["optimizers"]):
            optimizer.load_state_dict(saved)
        for name in self.CARRIED:
            setattr(self, name, state[name])

    def export(self):
        """Each student alone: the state of models.Backbone, whose keys need nothing else of this project."""
        for a, (name, student) in enumerate(zip(self.args.arch, self.cohort.students), start=1):
            content = io.BytesIO()
            torch.save(student.backbone.state_dict(), content)
            checkpoint.write(self.out / f"student_{a}_{name}.pt", content.getvalue())


def read_checkpoint(path, device):
    state = checkpoint.load(path, device)
    if not isinstance(state, dict) or not {"format", "args", "net"} <= state.keys():
        raise UserError(f"{path} is no checkpoint of this program (last.pt and best.pt of an --out-dir are)")
    if state["format"] > CHECKPOINT_FORMAT:
        raise UserError(f"{path} is of format {state['format']}, newer than this program's {CHECKPOINT_FORMAT}: update it")
    return state


# ---------------------------------------------------------------- measuring

class CountOperations(TorchDispatchMode):
    """Tensor operations that are dispatched, views left out: what a GPU has to launch."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not (op.is_view or "detach" in str(op))
        return op(*args, **(kwargs or {}))


def benchmark(args, dataset, runs=50, warm_up=5):
    """Milliseconds (median, min, max) of an ordinary step by cross-entropy alone and by --method, of a meta step and of an
    evaluation; operations of a step; peak memory so far. One JSON line and a table."""
    cuda, rows = torch.device(args.device).type == "cuda", {}

    def clock(name, function, n, skip):
        times = []
        for _ in range(skip + n):
            start = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize(args.device)
            times.append(1e3 * (time.perf_counter() - start))
        allocated = torch.cuda.max_memory_reserved if args.cuda_graph else torch.cuda.max_memory_allocated   # graphs' pools
        times, peak = sorted(times[skip:]), allocated(args.device) if cuda else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) if resource else 0
        rows[name] = dict(median_ms=times[len(times) // 2], min_ms=times[0], max_ms=times[-1], runs=n, peak_mib=peak / 2 ** 20)
        rows[name] = {k: round(v, 2) for k, v in rows[name].items()}

    def count(name, function):
        with CountOperations() as counter:
            function()
        rows[name].update(operations=counter.count)

    for method in dict.fromkeys(["deep-supervision", args.method]):
        settings = argparse.Namespace(**{**vars(args), "method": method})
        run = Run(settings, dataset, signals=None)
        run.begin(args.lr)
        some = list(itertools.islice(data.train_batches(dataset, args.batch_size, args.seed, 0), 8))
        batches = itertools.cycle([batch for batch in some if len(batch[1]) == len(some[0][1])])      # of one size
        _, step, match = steps(settings, dataset, run)
        row = f"step, {method}"
        clock(row, lambda: step(*next(batches)), runs, warm_up)
        count(row, lambda: ordinary_step(settings, run, *next(batches)))
        rows[row].update(images_per_second=round(1e3 * args.batch_size / rows[row]["median_ms"], 1))
    if args.method == "lmcl" and len(args.arch) > 1:
        clock("meta step", lambda: match(*next(batches)), 3, Recorded.WARM_UP + 1 if args.cuda_graph else 1)
        count("meta step", lambda: matching_step(args, run, *next(batches)))
    clock("evaluation", lambda: evaluate(run.cohort, dataset), 3, 1)
    print(json.dumps(dict(arch=args.arch, batch_size=args.batch_size, device=device_name(args.device), amp=args.amp,
                          cuda_graph=args.cuda_graph, torch=str(torch.__version__), **rows)))
    for name, row in rows.items():
        print(f"{name:24}" + "  ".join(f"{k} {v}" for k, v in row.items()))


# ---------------------------------------------------------------- the command line

def parse_arguments(argv=None):
    p = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what is trained")
    g.add_argument("--arch", nargs="+", default=["resnet32"], metavar="NAME", help="students: " + ", ".join(models.FAMILIES))
    g.add_argument("--num-nets", type=int, metavar="N", help="how many students, if one NAME is given (2)")
    g.add_argument("--method", choices=METHODS, default="lmcl", help="; ".join(f"{k}: {v}" for k, v in METHODS.items()))
    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=data.DATASETS, help="cifar100 (default) and cifar10 are downloaded at first use; "
                   "folder: DATA_DIR/{train,test}/CLASS/*; synthetic: drawn at start")
    g.add_argument("--data-dir", metavar="DIR", help="where the data set is or is downloaded to (data)")
    g.add_argument("--image-size", type=int, default=32, metavar="PIXELS", help="side of folder's and synthetic's images (32)")
    g = p.add_argument_group("recipe")
    g.add_argument("--epochs", type=int, default=300, help="length of the cosine schedule (300)")
    g.add_argument("--max-steps", type=int, default=0, metavar="STEPS", help="end after so many steps; 0: never (0)")
    g.add_argument("--batch-size", type=int, default=128, help="images a step, an even number; a few more where the set "
                   "does not divide, so that every image comes once an epoch (128)")
    g.add_argument("--lr", type=float, default=0.1, help="initial learning rate of SGD with Nesterov momentum (0.1)")
    g.add_argument("--momentum", type=float, default=0.9, help="(0.9)")
    g.add_argument("--weight-decay", type=float, default=5e-4, help="(5e-4)")
    g.add_argument("--seed", type=int, default=0, help="of initial weights, batches and augmentation (0)")
    g = p.add_argument_group("losses")
    g.add_argument("--weight-vcl", type=float, default=0.1, metavar="ALPHA", help="alpha, of VCL (0.1)")
    g.add_argument("--weight-icl", type=float, default=0.1, metavar="BETA", help="beta, of ICL (0.1)")
    g.add_argument("--weight-soft-vcl", type=float, default=1.0, metavar="GAMMA", help="gamma, of Soft VCL (1)")
    g.add_argument("--weight-soft-icl", type=float, default=1.0, metavar="LAM", help="lam, of Soft ICL (1)")
    g.add_argument("--tau", type=float, default=0.1, help="temperature of the contrastive distributions (0.1)")
    g.add_argument("--T", type=float, default=3.0, help="temperature of the KL terms (3)")
    g.add_argument("--logit-kd", action="store_true", help="mcl: each student also distils the mean of all logits")
    g.add_argument("--weight-fooling", type=float, default=0.05, metavar="W", help="afd: of the adversarial term; at 1 it "
                   "drowns the others at this learning rate (0.05)")
    g.add_argument("--meta-freq", type=int, default=50, metavar="STEPS", help="a meta step every so many steps (50)")
    g.add_argument("--meta-steps", type=int, default=2, metavar="K", help="virtual steps on the contrastive loss (2)")
    g = p.add_argument_group("running")
    g.add_argument("--device", default="auto", help="cpu, cuda or cuda:1; auto takes CUDA if it is there (auto)")
    g.add_argument("--out-dir", metavar="DIR", help="log, checkpoints, students, picture (out/DATASET-METHOD-ARCH-SEED)")
    g.add_argument("--resume", action="store_true", help="go on from last.pt in --out-dir")
    g.add_argument("--save-every", type=float, default=0, metavar="MINUTES", help="save inside epochs too; 0: after each (0)")
    g.add_argument("--amp", choices=["no", "bf16"], default="no", help="bf16: convolutions and linear maps in bfloat16; "
                   "losses and the meta step stay in float32 (no)")
    g.add_argument("--cuda-graph", action="store_true", help="record the ordinary and the meta step as CUDA graphs and replay them")
    g.add_argument("--benchmark", action="store_true", help="time 50 steps with and without the contrastive losses, the "
                   "meta step and the evaluation, print them, and end")
    g.add_argument("--deterministic", action="store_true", help="bit-equal runs on CUDA too, slower (always so on the CPU)")
    g.add_argument("--evaluate", metavar="CKPT", help="print top-1 and top-5 of every student of a checkpoint, and end")
    args = p.parse_args(argv)

    if args.num_nets is None:
        args.num_nets = 2 if len(args.arch) == 1 else len(args.arch)
    if len(args.arch) == 1:
        args.arch = args.arch * args.num_nets
    for flag, good, rule in [
            ("--num-nets", 1 <= args.num_nets == len(args.arch), "at least 1, and the number of names if --arch has several"),
            ("--batch-size", args.batch_size >= 2 and args.batch_size % 2 == 0, "even and at least 2: batches are made of pairs"),
            ("--epochs", args.epochs >= 1, "at least 1"), ("--max-steps", args.max_steps >= 0, "0 (no end) or more"),
            ("--lr", 0 < args.lr < math.inf, "above 0"),
            ("--momentum", 0 < args.momentum < 1, "between 0 and 1: Nesterov needs it"),
            *((f"--weight-{k}", 0 <= vars(args)[f"weight_{k.replace('-', '_')}"] < math.inf, "0 or more")
              for k in ("vcl", "icl", "soft-vcl", "soft-icl", "fooling")),
            ("--weight-decay", 0 <= args.weight_decay < math.inf, "0 or more"),
            ("--tau", 0 < args.tau < math.inf, "above 0"), ("--T", 0 < args.T < math.inf, "above 0"),
            ("--meta-freq", args.meta_freq >= 1, "at least 1"), ("--meta-steps", args.meta_steps >= 1, "at least 1"),
            ("--save-every", 0 <= args.save_every < math.inf, "0 (only after epochs) or more"),
            ("--image-size", args.image_size >= 8, "at least 8"), ("--seed", 0 <= args.seed < 2 ** 63, "0 or more")]:
        if not good:
            p.error(f"argument {flag}: must be {rule}")
    try:
        stages = {models.family(name).stages for name in args.arch}
    except ValueError as error:
        p.error(f"argument --arch: {error}")
    if args.logit_kd and args.method != "mcl":
        p.error("argument --logit-kd: goes with --method mcl")
    if len(stages) > 1:
        p.error(f"argument --arch: {', '.join(args.arch)} have different numbers of stages, which cannot be matched")
    return args


def pick_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()                   # "meta" exists, but computes nothing
    except Exception as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0][:80]}); try --device cpu")
    return name


def device_name(device):
    if torch.device(device).type == "cuda":                  # PyTorch's default: convolutions in TF32, matrix products not
        return torch.cuda.get_device_name(device) + (", convolutions in TF32" if torch.backends.cudnn.allow_tf32 else "")
    return f"{device} ({torch.get_num_threads()} threads)"


def report(args, dataset, run):
    """What will be trained, on what, for how long."""
    for a, (name, student) in enumerate(zip(args.arch, run.cohort.students), start=1):
        size = dataset.train_images.shape[1]
        own, whole = (models.multiply_adds(m, size) / 1e6 for m in (student.backbone, student))
        print(f"student {a}  {name}: {models.parameters(student.backbone):,} parameters, {own:.1f}M multiply-adds"
              + (f"; with branches {models.parameters(student):,}, {whole:.1f}M" if len(student.branches) else ""))
    print(f"data       {dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images, "
          f"{len(dataset.classes)} classes, {size}x{size}")
    print(f"device     {device_name(args.device)}, torch {torch.__version__}")
    contrast = (f" + {args.weight_vcl:g} vcl + {args.weight_icl:g} icl + {args.weight_soft_vcl:g} soft_vcl"
                f" + {args.weight_soft_icl:g} soft_icl; tau {args.tau:g}, T {args.T:g}")
    extra = {"lmcl": " + ce_agg + kd", "mcl": " + kd" * args.logit_kd, "dml": " + kd", "afd": f" + kd + {args.weight_fooling:g} fooling"}
    print(f"loss       {args.method}: ce" + extra.get(args.method, "")
          + (contrast if args.method in ("lmcl", "mcl") else ""))
    print(f"steps      {args.epochs} epochs of {run.steps_per_epoch} steps of {args.batch_size} = "
          f"{args.epochs * run.steps_per_epoch:,}" + (f", ending at {args.max_steps:,}" if args.max_steps else ""))
    print(f"output     {args.out_dir}", flush=True)


def run_command(args):
    args.device = pick_device(args.device)
    if args.cuda_graph:
        if torch.device(args.device).type != "cuda":
            raise UserError(f"--cuda-graph wants a CUDA device, and this is {args.device}: leave it out")
        torch.cuda.set_device(torch.device(args.device).index or 0)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if args.evaluate:
        return evaluate_checkpoint(args)
    args.dataset, args.data_dir = args.dataset or "cifar100", args.data_dir or "data"
    if args.out_dir is None:
        names = "+".join(args.arch) if len(set(args.arch)) > 1 else f"{args.arch[0]}x{len(args.arch)}"
        args.out_dir = f"out/{args.dataset}-{args.method}-{names}-{args.seed}"
    out, found = Path(args.out_dir), None
    kept = [path for path in (out / "last.pt", out / "previous.pt") if os.path.exists(path)]   # Path.exists may raise
    if args.benchmark:
        kept = []                                          # it neither reads nor writes a run
    if kept and not args.resume:
        raise UserError(f"--out-dir {out} holds a run already: --resume goes on with it, another --out-dir starts afresh")
    if kept:
        try:
            found = read_checkpoint(kept[0], args.device)
        except checkpoint.CheckpointError as error:
            raise UserError(f"{error}" + (f"; to go on from the one before it: mv {kept[1]} {kept[0]}" if kept[1:]
                                          else "; another --out-dir starts afresh"))
        compare_arguments(args, found["args"], kept[0])

    dataset = data.load(args.dataset, args.data_dir, args.image_size).to(args.device)
    if args.batch_size > len(dataset.train_labels):
        raise UserError(f"--batch-size {args.batch_size} is larger than the training set ({len(dataset.train_labels)} images)")
    if found and found["classes"] != dataset.classes:
        raise UserError(f"{kept[0]} was trained on other classes than those in --data-dir {args.data_dir}: give its own")
    if args.benchmark:
        return benchmark(args, dataset)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --out-dir {out} ({error.strerror}): give another one")
    with checkpoint.Signals() as signals:
        run = Run(args, dataset, signals)
        if found:
            run.load(found)
        run.write_log()
        report(args, dataset, run)
        if args.resume:
            print(f"resuming   {kept[0]}, {run.total_steps:,} steps done" if found else f"resuming   no {out / 'last.pt'}: "
                  "starting afresh", flush=True)
        train(args, dataset, run)
        run.export()


def compare_arguments(args, saved, path):
    """Resuming goes on with the same run; only where it runs and how long this part lasts may differ."""
    free = {"device", "data_dir", "out_dir", "max_steps", "save_every", "resume", "evaluate", "benchmark", "cuda_graph"}
    other = [k for k in saved if k in vars(args) and k not in free and vars(args)[k] != saved[k]]
    if other:
        raise UserError(f"{path} was made with other arguments: " + ", ".join(
            f"--{k.replace('_', '-')} {shown(saved[k])} (now {shown(vars(args)[k])})" for k in other)
            + "; give the same ones, or another --out-dir"
            + (" (another --epochs would be another learning-rate schedule)" if "epochs" in other else ""))


def shown(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def evaluate_checkpoint(args):
    state = read_checkpoint(args.evaluate, args.device)
    saved = argparse.Namespace(**state["args"])
    saved.device = args.device
    dataset = data.load(args.dataset or saved.dataset, args.data_dir or saved.data_dir, saved.image_size)
    if dataset.classes != state["classes"]:
        raise UserError(f"{args.evaluate} was trained on other classes than those of --dataset {dataset.name} "
                        f"--data-dir {args.data_dir or saved.data_dir}: give its own data set")
    dataset = dataset._replace(mean=state["mean"], std=state["std"]).to(args.device)
    net, cohort = build(saved, len(dataset.classes))
    net.load_state_dict(state["net"])
    for a, (name, top1, top5) in enumerate(zip(saved.arch, *evaluate(cohort, dataset)), start=1):
        print(f"student {a}  {name}: top-1 {top1:.2f}  top-5 {top5:.2f}")


def main(argv=None):
    """Run the command line; whatever the user can mend ends in one line and status 1 (2 for a wrong flag)."""
    args = parse_arguments(argv)
    try:
        run_command(args)
    except (UserError, data.DataError, checkpoint.CheckpointError) as error:
        print(f"train.py: {'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:                              # in training checkpoint.Signals takes it
        print("train.py: interrupted before training began", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):   # the last: CPU
            message = f"out of memory on {args.device}: try a smaller --batch-size or --image-size"
        elif "does not have a deterministic implementation" in str(error):
            message = f"--deterministic cannot be had here ({str(error).split(',')[0][:120]}): leave it out"
        else:
            raise
        print(f"train.py: error: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
