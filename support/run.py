"""A run of train.py or detect.py: its folder, counters, log and checkpoints, and how it goes on."""

import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import tree_map

from support.arguments import BEFORE, WHERE
from support.console import ImageError, Interrupted, UserError, on_terminal, say, show_line
from support.files import (
    CHECKPOINT_FORMAT,
    best_epoch_of,
    load_checkpoint,
    load_into,
    save_checkpoint,
    write,
)
from support.processes import device_name

try:
    import fcntl
except ImportError:  # Windows: an --out-dir is not locked there
    fcntl = None

# SGD and AdamW follow the rate, each group in its share of it; afd's Adam has its own.
FOLLOW = (torch.optim.SGD, torch.optim.AdamW)


class OutDir:
    """The folder of one run: made, and locked so that two runs never share it."""

    def __init__(self, name):
        self.path, self.lock, self.seen = Path(os.path.expanduser(name)), None, None

    def __truediv__(self, name):
        return self.path / name

    def __str__(self):
        return str(self.path)

    def find_checkpoint(self, args, processes):
        """The state in last.pt, or in previous.pt where that is missing; None without either.

        Raises UserError where a run is there and --resume is not given, or cannot go on with it.
        """
        last, previous = self / "last.pt", self / "previous.pt"
        found = [p for p in (last, previous) if os.path.exists(p)]  # Path.exists may raise
        self.seen = self.last_written()
        if not found:
            if any(self.path.glob("student_*.pt")):
                raise UserError(f"--out-dir {self} holds the students and the log of a run that "
                                "has ended, without its last.pt: give another one")
            return None
        if not args.resume:
            raise UserError(f"--out-dir {self} holds a run already: --resume goes on with it, "
                            "another --out-dir starts afresh")
        try:
            state = load_checkpoint(found[0], args.device)
        except UserError as error:
            earlier = f"to go on from the one before it: mv {previous} {last}"
            remedy = earlier if len(found) == 2 else "another --out-dir starts afresh"
            raise UserError(f"{error}; {remedy}") from None
        n = state["processes"]
        if n != processes.size:
            raise UserError(f"{found[0]} was made by {n} process{'es' * (n > 1)}, and this is "
                            f"{processes.size}: start as many")
        compare_arguments(args, state["args"], found[0])
        return state

    def last_written(self):
        """When last.pt was written; None without one."""
        with contextlib.suppress(OSError):
            return os.stat(self / "last.pt").st_mtime_ns

    def open(self):
        """Make the folder and lock it. Raises UserError if that fails or another process has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self / ".lock", "a+")  # held until the process ends
        except OSError as error:
            raise UserError(f"cannot make --out-dir {self} ({error.strerror}): "
                            "give another one") from None
        if not fcntl:
            return
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers would inherit flock's
        except (BlockingIOError, PermissionError):
            self.lock.seek(0)
            owner = self.lock.read().strip() or "unknown"
            raise UserError(f"--out-dir {self} is in use by process {owner}: wait for its end, or "
                            "give another one") from None
        except OSError:
            pass  # a file system without locks
        if self.last_written() != self.seen:  # a run has ended between find_checkpoint and the lock
            raise UserError(f"another process has just written {self / 'last.pt'}: start again "
                            "with --resume")
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()}\n")
        self.lock.flush()


def compare_arguments(args, saved, path):
    """Raises UserError if more differs than where and how far the run goes: see WHERE."""
    as_text = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    now, differing = vars(args), []
    saved = BEFORE | saved
    for name in saved:
        if name in now and name not in WHERE and now[name] != saved[name]:
            flag = f"--{name.replace('_', '-')}"
            differing.append(f"{flag} {as_text(saved[name])} (now {as_text(now[name])})")
    if differing:
        schedule = " (another --epochs would be another learning-rate schedule)"
        longer = schedule if now["epochs"] != saved["epochs"] else ""
        raise UserError(f"{path} was made with other arguments: {', '.join(differing)}; give the "
                        f"same ones, or another --out-dir{longer}")


class Run:
    """What changes while training, all of it in last.pt, and what a run leaves in its folder.

    args: all options. model: a module whose state is saved. optimizers: see FOLLOW.
    metadata: what else a checkpoint says: classes, digest of the data, ...
    steps_per_epoch, images_per_epoch: of all processes together.
    """

    SECONDS_BETWEEN_SAVES = 10
    PROGRESS = ("epoch", "step", "total_steps", "logged_lr", "best", "best_epoch", "log", "sums",
                "finite_steps", "images_seen", "seconds", "data_seconds")

    def __init__(self, args, out, model, optimizers, *, metadata, steps_per_epoch, images_per_epoch,
                 processes, signals):
        self.args, self.out, self.model, self.optimizers = args, out, model, optimizers
        self.metadata, self.processes, self.signals = metadata, processes, signals
        self.steps_per_epoch, self.images_per_epoch = steps_per_epoch, images_per_epoch
        self.is_main = processes.rank == 0  # process 0 alone prints, writes and draws
        self.board = board_writer() if getattr(args, "tensorboard", False) else None
        graphs = getattr(args, "cuda_graph", False)  # they read a tensor
        self.shares = [[float(group["lr"]) / args.lr for group in optimizer.param_groups]
                       for optimizer in optimizers if isinstance(optimizer, FOLLOW)]
        as_read = lambda lr: torch.tensor(lr, device=args.device) if graphs else lr
        self.rates = {share: as_read(args.lr * share) for share in {1, *sum(self.shares, [])}}
        self.lr, self.logged_lr = self.rates[1], args.lr
        self.epoch = self.step = self.total_steps = 0  # the next epoch and step in it, steps done
        self.best, self.best_epoch = -1.0, 0  # best mean score over epochs
        self.best_state = None  # of an epoch that best.pt does not hold yet
        command = shlex.join(["python", *sys.argv])
        self.log = [dict(command=command, args=vars(args), torch=str(torch.__version__),
                         device=device_name(args.device), processes=processes.size, **metadata)]
        self.reset()
        self.let_capture()
        self.last_shown = self.saved = self.clock = time.perf_counter()

    def let_capture(self):
        """Adam and AdamW ask to be told of --cuda-graph, which may differ in a resumed run."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "capturable" in group:
                    group["capturable"] = getattr(self.args, "cuda_graph", False)

    def reset(self):
        """What an epoch sums: terms, finite steps, images, seconds of training and of waiting."""
        self.sums, self.finite_steps, self.images_seen = {}, 0, 0
        self.seconds, self.data_seconds = 0.0, 0.0

    # ------------------------------------------------ steps

    def epochs(self):
        """The epochs that are left, until --epochs or --max-steps are done;
        one begun before comes first."""
        while self.step or not self.is_over:
            self.start_epoch()
            yield self.epoch
            if self.step:  # --max-steps ended it
                return

    def start_epoch(self):
        self.model.train()
        self.clock = time.perf_counter()

    def set_lr(self, lr):
        """lr: a float, for the optimizers that FOLLOW and for whoever reads self.lr."""
        for share, rate in self.rates.items():
            self.rates[share] = rate.fill_(lr * share) if torch.is_tensor(rate) else lr * share
        self.lr, self.logged_lr = self.rates[1], lr
        following = [optimizer for optimizer in self.optimizers if isinstance(optimizer, FOLLOW)]
        for optimizer, shares in zip(following, self.shares, strict=True):
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = self.rates[share]

    @property
    def steps_left(self):
        """Steps until the epoch ends or --max-steps are done."""
        left = self.steps_per_epoch - self.step
        if not self.args.max_steps:
            return left
        return min(left, max(0, self.args.max_steps - self.total_steps))

    @property
    def is_over(self):
        """Whether no step is left to do."""
        reached = 0 < self.args.max_steps <= self.total_steps
        return self.epoch >= self.args.epochs or reached

    def timed(self, batches):
        """The same batches; the time that the loop waits for them is counted as data_seconds."""
        batches = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.data_seconds += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def add(self, terms, images):
        """Add a step's terms, tensors by name, to the epoch's sums, on the device: no wait.

        images: how many this process had. From the first step that is not finite on, the sums stand
        still and `finite_steps` counts no further.
        """
        self.step += 1
        self.total_steps += 1
        self.images_seen += images * self.processes.size
        shapes = {name: list(value.shape) for name, value in terms.items()}
        summed = self.sums.get("shapes", shapes)
        if list(summed.items()) != list(shapes.items()):
            raise UserError(f"terms changed within an epoch, from {', '.join(summed)} to "
                            f"{', '.join(shapes)}: a method may change them in start_epoch only")
        values = torch.cat([value.flatten() for value in terms.values()])
        before = self.sums.get("values", torch.zeros_like(values))
        finite = before.isfinite().all()
        self.sums = {"shapes": shapes, "values": torch.where(finite, before + values, before)}
        self.finite_steps = self.finite_steps + self.sums["values"].isfinite().all()

    def means(self):
        """The epoch's means by name, floats or nested lists. Raises UserError for NaN or inf."""
        shapes = self.sums["shapes"]
        values = self.sums["values"].cpu().double() / self.step  # the host waits
        parts = values.split([math.prod(shape) for shape in shapes.values()])
        parts = dict(zip(shapes, parts, strict=True))
        if int(self.finite_steps) < self.step:
            bad = [name for name, part in parts.items() if not part.isfinite().all()]
            bad = ", ".join(name for name in bad if name != "loss") or "loss"
            step = self.total_steps - self.step + int(self.finite_steps) + 1
            raise UserError(f"{bad} became infinite or NaN at step {step}: try a smaller --lr; "
                            f"{self.what_is_kept()}")
        return {name: part.view(shapes[name]).tolist() for name, part in parts.items()}

    def what_is_kept(self):
        """After an error, in words."""
        last = self.out / "last.pt"
        return f"{last} is from before that" if last.exists() else "nothing was saved yet"

    def after_step(self):
        """Progress, --save-every and signals."""
        self.show_progress()
        minutes = self.args.save_every
        due = minutes and time.perf_counter() - self.saved > 60 * minutes
        wish = self.processes.largest(2 if self.signals.name else 1 if due else 0)
        if wish:
            self.save()
        if wish == 2:
            cause = self.signals.name or "another process was stopped"
            done = f"saved {self.out / 'last.pt'} after step {self.total_steps}"
            words = f"{cause}: {done}; the same command with --resume goes on"
            raise Interrupted(words if self.is_main else "")

    @contextlib.contextmanager
    def saving(self):
        """An image that cannot be read ends the run; a process alone saves what was trained."""
        try:
            yield
        except ImageError:
            if self.step and self.processes.size == 1:
                self.save()
            raise

    def stop_clock(self):
        """Training time is counted without evaluation and saving."""
        self.means()  # the host waits for the device
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    @contextlib.contextmanager
    def evaluating(self):
        """Evaluation is not training time."""
        self.stop_clock()
        self.show_progress("evaluation", every=0)
        yield
        self.clock = time.perf_counter()

    # ------------------------------------------------ progress

    def show_progress(self, doing="", every=1.0):
        """One line on a terminal, at most one a second; nothing into a pipe."""
        now = time.perf_counter()
        if not (self.is_main and on_terminal()) or now - self.last_shown < every:
            return
        self.last_shown = now
        epoch = f"epoch {self.epoch + 1}/{self.args.epochs}"
        if not self.step:
            return show_line(f"{epoch}  {doing}")
        speed = self.images_seen / (self.seconds + now - self.clock)
        left = (self.args.epochs - self.epoch) * self.images_per_epoch - self.images_seen
        if self.args.max_steps:
            steps = self.args.max_steps - self.total_steps
            left = min(left, steps * self.images_per_epoch / self.steps_per_epoch)
        left = int(left / speed)
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        # narrow terminals cut
        show_line(f"{epoch}  {clock} left  step {self.step}/{self.steps_per_epoch}  "
                  f"loss {self.means()['loss']:.3f}  {speed:.0f} images/s  {doing}")

    def begin(self, found):
        """Go on from a checkpoint's state if there is one (it is emptied), and write the log."""
        if found:
            self.load(found)
            found.clear()  # its tensors are not needed twice
        if not self.processes.all_equal(self.total_steps):
            raise UserError(f"not all processes found the same {self.out / 'last.pt'}: --out-dir "
                            "must be one folder that all of them see")
        self.say_where_it_starts()
        self.write_log()

    def say_where_it_starts(self):
        """--resume: from which step, or that there was nothing to go on from."""
        if not (self.is_main and self.args.resume):
            return
        last = self.out / "last.pt"
        if not self.total_steps:
            return say(f"resuming   no {last}: starting afresh")
        rest = "; no step is left to do" if self.is_over else ""
        say(f"resuming   {last}, {self.total_steps:,} steps done{rest}")

    def say_end(self, score, advice):
        """score: what `best` is. advice: what to do next."""
        if self.is_main:
            best = f", best epoch {self.best_epoch} ({score} {self.best:.2f}, best.pt)"
            best = best if self.best_epoch else ""
            say(f"ended      {self.total_steps:,} steps{best}; next: {advice}")

    # ------------------------------------------------ log and checkpoints

    def epoch_line(self, **scores):
        """The log's line for this epoch: counters, every term's mean, the scores, speed."""
        means = {name: rounded(value) for name, value in self.means().items()}
        return dict(epoch=self.epoch + 1, step=self.total_steps, **means, lr=self.logged_lr,
                    **scores, images_per_second=round(self.images_seen / self.seconds, 1),
                    seconds=round(self.seconds, 2), data_seconds=round(self.data_seconds, 2))

    def end_epoch(self, line, score):
        """Log the epoch, keep the best model for best.pt, save. score: what best.pt is chosen by.

        Where epochs are short, not each is saved: a save costs the host a good part of a second.
        """
        if self.step < self.steps_per_epoch:  # --max-steps: logged until --resume goes on
            self.save()
            return self.write_log(line)
        self.log.append(line)
        self.epoch, self.step = self.epoch + 1, 0
        self.reset()
        is_due = self.is_over or time.perf_counter() - self.saved > self.SECONDS_BETWEEN_SAVES
        is_due = self.processes.largest(int(is_due))
        if score > self.best:
            self.best, self.best_epoch = score, self.epoch
            if self.is_main:
                self.best_state = self.state() if is_due else tree_map(copied, self.state())
        if is_due:
            self.save()
        self.write_log()

    def to_tensorboard(self, line, picture=None):
        """--tensorboard: the line's numbers, and a picture (PNG, bytes) if there is one."""
        if not self.board:
            return
        with self.board(self.out.path, purge_step=line["epoch"]) as board:  # once if resumed, too
            for name, value in line.items():
                values = value if isinstance(value, list) else [value]
                if isinstance(values[0], list):  # lambda, which the picture shows
                    continue
                for a, number in enumerate(values, start=1):
                    tag = f"{name}/{a}" if isinstance(value, list) else name
                    board.add_scalar(tag, number, line["epoch"])
            if picture:
                pixels = np.asarray(Image.open(io.BytesIO(picture)))
                board.add_image("matching", pixels, line["epoch"], dataformats="HWC")

    def write_log(self, *unfinished):
        """log.jsonl from the checkpoint's copy: each line once, whatever was interrupted."""
        if self.is_main:
            lines = [json.dumps(line, default=str) + "\n" for line in [*self.log, *unfinished]]
            write(self.out / "log.jsonl", "".join(lines).encode())

    def state(self):
        """What a checkpoint holds."""
        state = dict(format=CHECKPOINT_FORMAT, processes=self.processes.size, **self.metadata)
        state["args"] = {**vars(self.args), "device": str(self.args.device)}
        state["model"] = self.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        return state | {name: getattr(self, name) for name in self.PROGRESS}

    def save(self):
        """Write best.pt, if a better epoch came,
        and last.pt, which leaves the one before as previous.pt.

        best.pt comes first: a run killed in between redoes the epoch. Every process calls.
        """
        if self.step:
            self.stop_clock()  # which also sees that the terms are finite
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            raise UserError("a weight became infinite or NaN by step "
                            f"{self.total_steps}: try a smaller --lr; {self.what_is_kept()}")
        alone = self.processes.size == 1
        if not (alone or self.processes.all_equal(fingerprint(self.model))):
            raise UserError("the processes' copies of the model differ: nothing was saved, "
                            f"{self.out / 'last.pt'} is from before that")
        if self.is_main:
            if self.best_state:
                save_checkpoint(self.out / "best.pt", self.best_state)
            save_checkpoint(self.out / "last.pt", self.state(), self.out / "previous.pt")
        self.best_state = None
        self.saved = self.clock = time.perf_counter()

    def load(self, state):
        """Go on from a checkpoint. Raises UserError if its images or its networks were others."""
        path, here = self.out / "last.pt", self.log[0]  # the header of this start
        if state["digest"] != self.metadata["digest"]:
            raise UserError(f"{path} was made on training images of other names or another number: "
                            "give the same --data-dir, or another --out-dir")
        if "code" in state and state["code"] != self.metadata.get("code"):
            raise UserError("the file of your own method or students has changed since "
                            f"{path} was made: give back what it was, or another --out-dir")
        load_into(self.model, state["model"], path)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.let_capture()
        for name in self.PROGRESS:
            setattr(self, name, state[name])
        header = self.log[0]  # of the first start; "resumed" lists starts on something else
        latest = header.get("resumed", [header])[-1]
        if any(latest[name] != here[name] for name in ("torch", "device")):
            moved = dict(after_step=self.total_steps, torch=here["torch"], device=here["device"])
            header["resumed"] = [*header.get("resumed", []), moved]
        best = self.out / "best.pt"
        others = not self.best_epoch or best_epoch_of(best) not in (self.best_epoch, None)
        if self.is_main and others:  # killed before its last.pt came, or went back to previous.pt
            best.unlink(missing_ok=True)
            self.best, self.best_epoch = -1.0, 0


def copied(x):
    """A tensor or a list of the log, as it is now."""
    return x.detach().clone() if torch.is_tensor(x) else x


def rounded(value, digits=6):
    """A float, or nested lists of floats, rounded for the log."""
    if isinstance(value, list):
        return [rounded(v, digits=4) for v in value]
    return round(value, digits)


def board_writer():
    """The class that writes TensorBoard's files. Raises UserError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard wants a package that is not here: "
                        "pip install tensorboard") from None
    return SummaryWriter


def fill_gradients(optimizer):
    """The gradients of its parameters, with zeros where a step gave none: alike in all processes.

    Stochastic depth, a mixture of parts, a layer that is unfrozen late: such a step's gradient is 0
    there. SGD's momentum starts from 0 everywhere, since its fused form takes all buffers or none.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if isinstance(optimizer, torch.optim.SGD) and "momentum_buffer" not in optimizer.state[p]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return [p.grad for p in trained]


def own_code(model_file, method):
    """SHA-256, 16 digits, of the files that hold a user's own method and --model-file;
    None without any."""
    modules = {c.__module__: sys.modules.get(c.__module__) for c in type(method).__mro__}
    texts = []
    for name, module in sorted(modules.items()):
        if name not in ("methods", "builtins") and not name.startswith("torch."):
            with contextlib.suppress(OSError, TypeError):  # made in an interpreter
                texts.append(inspect.getsource(module).encode())
    if model_file:
        texts.append(Path(model_file).read_bytes())
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16] if texts else None


def fingerprint(module):
    """SHA-256 of all parameters and buffers."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
