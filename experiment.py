"""A run: its counters, log and checkpoints, whole files, signals, progress. train.py and detect.py both use it.

A checkpoint is what torch.save writes, followed by the SHA-256 of it (32 bytes, which torch.load passes over). It is
loaded with weights_only=True: no pickled code of whoever wrote the file is ever run.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from devices import UserError, device_name

try:
    import fcntl
except ImportError:                                        # Windows: an --out-dir is not locked there
    fcntl = None

DIGEST = hashlib.sha256().digest_size
CHECKPOINT_FORMAT = 2
STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class Interrupted(UserError):
    """A signal ended the run after a step; everything is saved."""


# ---------------------------------------------------------------- what a program prints

def say(text):
    """Print to standard output. A reader that has gone (| head) and a full disk do not end a run."""
    if sys.stderr.isatty():
        show_line("")                                      # progress gives way
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)       # what is still in the buffer goes there too


def warn(text):
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors(program, errors, args):
    """What the user can mend ends in one line and status 1: `errors`, too little memory, Ctrl-C."""
    with contextlib.suppress(AttributeError):              # a name that the terminal cannot show; tests replace stdout
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except Interrupted as end:
        message, status = f"{end}", 1
    except errors as error:
        message, status = f"error: {error}", 1
    except KeyboardInterrupt:                              # in training, Signals takes it
        message, status = "interrupted", 130
    except (MemoryError, RuntimeError) as error:
        message, status = f"error: {device_error(error, args)}", 1
    except OSError as error:                               # what nothing above has better words for: a disk, a mount
        message, status = f"error: {error}", 1
    else:
        return
    if message:
        if "RANK" in os.environ and os.environ["RANK"] != "0":
            time.sleep(1.5)                                # torchrun ends this process if process 0 had the same to say
        warn(f"{program}: {' '.join(message.split())}")
    sys.exit(status)


def device_error(error, args):
    """One line on an error of PyTorch that the user can mend; any other one is raised again."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):   # the last: CPU
        return f"out of memory on {args.device}: try a smaller --batch-size or smaller images"
    if "does not have a deterministic implementation" in str(error):
        return f"--deterministic cannot be had here ({str(error).split(',')[0][:120]}): leave it out"
    raise error


# ---------------------------------------------------------------- whole files

def write(path, content, keep=None):
    """Put bytes into path so that a reader finds the old file or the new one, whole, even after a power cut.

    keep: the name under which the previous file stays. Raises UserError, with the old file in place.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            link(path, keep)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):                 # on a read-only file system not even this
            temporary.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = f"make room for {len(content) / 2 ** 20:.1f} MiB or " if full else ""
        raise UserError(f"cannot write {path} ({error.strerror}): {what}give another --out-dir; "
                        "what was there before is untouched") from None


def link(path, name):
    """A second name for the file at path, put in the place of whatever had that name."""
    temporary = Path(f"{name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError as error:                               # FAT and some network file systems have no hard links
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)


def sync_folder(folder):
    """After a power cut a new name is there only if its folder was written too."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):          # some network file systems sync no folders
                raise
        finally:
            os.close(number)


def torch_bytes(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def save_checkpoint(path, state, keep=None):
    """Write a dictionary of tensors and plain values as a checkpoint."""
    buffer = io.BytesIO()                                  # one copy in memory: with a bank it may be gigabytes
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write(path, buffer.getbuffer(), keep)


def load_checkpoint(path, device="cpu"):
    """The dictionary that `save_checkpoint` wrote. Raises UserError for anything else, damaged files included."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    if hashlib.sha256(memoryview(content)[:-DIGEST]).digest() != content[-DIGEST:]:
        raise UserError(f"{path} is damaged, or no checkpoint of this program")
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:                             # torch names no class for files that it does not understand
        reason = (str(error) or repr(error)).splitlines()[0][:60]
        raise UserError(f"{path} is no checkpoint of this program ({reason})") from None
    if not isinstance(state, dict) or not {"format", "args"} <= state.keys():
        raise UserError(f"{path} is no checkpoint of this program (last.pt and best.pt of an --out-dir are)")
    if state["format"] != CHECKPOINT_FORMAT:
        age = "newer" if state["format"] > CHECKPOINT_FORMAT else "older"
        raise UserError(f"{path} is of format {state['format']}, {age} than this program's {CHECKPOINT_FORMAT}: "
                        "use the version that its log.jsonl belongs to")
    return state


def load_into(module, state, path):
    """module.load_state_dict(state). Raises UserError if the networks are others than those in the file at path."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:150]
        raise UserError(f"{path} holds other networks ({reason}): has the program or --model-file changed since? "
                        "Give the one that it was made by") from None


class OutDir:
    """The folder of one run: made, and locked so that two runs never share it."""

    def __init__(self, name):
        self.path, self.lock, self.seen = Path(os.path.expanduser(name)), None, None

    def __truediv__(self, name):
        return self.path / name

    def __str__(self):
        return str(self.path)

    def find_checkpoint(self, args, free, processes):
        """The state in last.pt, or None without one. Raises UserError where --resume cannot go on from it.

        free: the names of options that may differ from the checkpoint's.
        """
        found = [p for p in (self / "last.pt", self / "previous.pt") if os.path.exists(p)]   # Path.exists may raise
        self.seen = self.last_written()
        if not found:
            return None
        if not args.resume:
            raise UserError(f"--out-dir {self} holds a run already: --resume goes on with it, another --out-dir starts "
                            "afresh")
        try:
            state = load_checkpoint(found[0], args.device)
        except UserError as error:
            raise UserError(f"{error}; " + (f"to go on from the one before it: mv {found[1]} {found[0]}" if found[1:]
                                            else "another --out-dir starts afresh")) from None
        if state["processes"] != processes.size:
            number = f"{state['processes']} process{'es' * (state['processes'] > 1)}"
            raise UserError(f"{found[0]} was made by {number}, and this is {processes.size}: start as many")
        compare_arguments(args, state["args"], free, found[0])
        return state

    def last_written(self):
        """When last.pt was written; None without one."""
        with contextlib.suppress(OSError):
            return os.stat(self / "last.pt").st_mtime_ns

    def open(self):
        """Make the folder and lock it. Raises UserError if that cannot be done or another process holds the lock."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self / ".lock", "a+")         # held until the process ends
        except OSError as error:
            raise UserError(f"cannot make --out-dir {self} ({error.strerror}): give another one") from None
        if fcntl:
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)   # not flock: worker processes would inherit it
            except (BlockingIOError, PermissionError):
                self.lock.seek(0)
                raise UserError(f"--out-dir {self} is in use by process {self.lock.read().strip() or 'unknown'}: "
                                "wait for its end, or give another one") from None
            except OSError:
                pass                                       # a file system without locks
            if self.last_written() != self.seen:           # a run has ended between find_checkpoint and the lock
                raise UserError(f"another process has just written {self / 'last.pt'}: start again with --resume")
            self.lock.truncate(0)
            self.lock.write(f"{os.getpid()}\n")
            self.lock.flush()


# ---------------------------------------------------------------- signals

class Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask for an end after the present step; a second one ends the process at once.

    Not under torchrun: it and a scheduler may both send one, and torchrun itself ends what still runs after 30 s.
    """

    def __init__(self, program="train.py", processes=None):
        self.name, self.program = None, program
        self.is_main = processes is None or processes.rank == 0
        self.once = processes is None or processes.size == 1

    def __enter__(self):
        numbers = [s for s in signal.Signals if s.name in STOPS and signal.getsignal(s) is not signal.SIG_IGN]   # nohup
        self.before = {s: signal.signal(s, self._ask) for s in numbers}
        return self

    def _ask(self, number, frame):
        self.name = signal.Signals(number).name
        for s in self.before if self.once else ():
            signal.signal(s, signal.SIG_DFL)
        if number == signal.SIGINT and self.is_main:
            with contextlib.suppress(OSError):
                again = " (Ctrl-C again: at once)" if self.once else ""
                os.write(2, f"\n{self.program}: stopping after this step{again}\n".encode())

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------- a run

class Run:
    """What changes while training, all of it in last.pt, and what a run leaves in --out-dir.

    args: all options. model: a module whose state is saved. optimizers: SGD ones follow the schedule. metadata:
    what else a checkpoint says (classes, digest of the data, ...). images: of an epoch, all processes' together.
    """

    PROGRESS = ("epoch", "step", "total_steps", "best", "best_epoch", "log", "sums", "finite_steps", "images",
                "seconds", "data_seconds")

    def __init__(self, args, out, model, optimizers, metadata, steps_per_epoch, images, processes, signals):
        self.args, self.out, self.model, self.optimizers, self.metadata = args, out, model, optimizers, metadata
        self.steps_per_epoch, self.images_per_epoch = steps_per_epoch, images
        self.processes, self.signals = processes, signals
        self.is_main = processes.rank == 0                 # process 0 alone prints, writes and draws
        self.board = board_writer() if getattr(args, "tensorboard", False) else None
        graphs = getattr(args, "cuda_graph", False)        # what the steps read: a tensor where a graph reads it
        self.lr = torch.tensor(args.lr, device=args.device) if graphs else args.lr
        self.epoch = self.step = self.total_steps = 0      # the next epoch, the next step in it, steps done in all
        self.best, self.best_epoch = -1.0, 0               # best mean score over epochs
        self.log = [dict(command=shlex.join(["python", *sys.argv]), args=vars(args), torch=str(torch.__version__),
                         device=device_name(args.device), processes=processes.size, **metadata)]
        self.reset()
        self.shown = self.saved = time.perf_counter()

    def reset(self):
        """What is summed over an epoch: terms, finite steps, images, seconds of training and of waiting for data."""
        self.sums, self.finite_steps, self.images, self.seconds, self.data_seconds = {}, 0, 0, 0.0, 0.0

    # ------------------------------------------------ steps

    def start_epoch(self, lr):
        """lr: a float, for the optimizers and for whoever reads self.lr."""
        self.model.train()
        self.clock = time.perf_counter()
        self.lr = self.lr.fill_(lr) if torch.is_tensor(self.lr) else lr
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.SGD):
                for group in optimizer.param_groups:
                    group["lr"] = self.lr

    @property
    def steps_left(self):
        """Steps until the epoch ends or --max-steps are done."""
        left = self.steps_per_epoch - self.step
        return min(left, max(0, self.args.max_steps - self.total_steps)) if self.args.max_steps else left

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
        """Add a step's terms, scalars by name, to the epoch's sums, on the device: the host does not wait.

        From the first step that is not finite on, the sums stand still and `finite_steps` counts no further.
        """
        self.step, self.total_steps = self.step + 1, self.total_steps + 1
        self.images += images * self.processes.size
        values = torch.stack(list(terms.values()))
        before = self.sums.get("values", torch.zeros_like(values))
        finite = before.isfinite().all()
        self.sums = {"names": list(terms), "values": torch.where(finite, before + values, before)}
        self.finite_steps = self.finite_steps + self.sums["values"].isfinite().all()

    def means(self):
        """The epoch's mean of each term so far. Raises UserError if a term was not finite."""
        sums = self.sums["values"].tolist()                # the host waits
        means = {k: v / self.step for k, v in zip(self.sums["names"], sums, strict=True)}
        bad = [name for name, value in means.items() if not math.isfinite(value) and name != "loss"]
        if int(self.finite_steps) < self.step:
            kept = self.out / "last.pt"
            raise UserError(f"{', '.join(bad) or 'loss'} became infinite or NaN at step "
                            f"{self.total_steps - self.step + int(self.finite_steps) + 1}: try a smaller --lr; "
                            + (f"{kept} is from before that" if kept.exists() else "nothing was saved yet"))
        return means

    def after_step(self):
        """Progress, --save-every and signals."""
        now, args = time.perf_counter(), self.args
        self.show_progress()
        due = args.save_every and now - self.saved > 60 * args.save_every
        wish = self.processes.largest(2 if self.signals.name else 1 if due else 0)
        if wish:
            self.save("last.pt")
        if wish == 2:
            cause = self.signals.name or "another process was stopped"
            raise Interrupted(f"{cause}: saved {self.out / 'last.pt'} after step {self.total_steps}; "
                              "the same command with --resume goes on" if self.is_main else "")

    @contextlib.contextmanager
    def saving_on(self, error):
        """An image that cannot be read ends the run; what is trained is kept. Under torchrun other processes go on."""
        try:
            yield
        except error:
            if self.step and self.processes.size == 1:
                self.save("last.pt")
            raise

    def stop_clock(self):
        """Training time is counted without evaluation and saving; the host waits for the device first."""
        self.means()
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    # ------------------------------------------------ progress

    def show_progress(self, doing="", every=1.0):
        """One line on a terminal, at most one a second; nothing into a pipe."""
        now = time.perf_counter()
        if not (self.is_main and sys.stderr.isatty()) or now - self.shown < every:
            return
        self.shown = now
        if not self.step:
            return show_line(f"epoch {self.epoch + 1}/{self.args.epochs}  {doing}")
        speed = self.images / (self.seconds + now - self.clock)
        left = (self.args.epochs - self.epoch) * self.images_per_epoch - self.images
        if self.args.max_steps:
            steps = self.args.max_steps - self.total_steps
            left = min(left, steps * self.images_per_epoch / self.steps_per_epoch)
        left = int(left / speed)
        show_line(f"epoch {self.epoch + 1}/{self.args.epochs}  step {self.step}/{self.steps_per_epoch}  "
                  f"loss {self.means()['loss']:.3f}  {speed:.0f} images/s  "
                  f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left  {doing}")

    def closing_words(self):
        best = f", best epoch {self.best_epoch} ({self.best:.2f}, best.pt)" if self.best_epoch else ""
        return (f"ended      {self.total_steps:,} steps{best}; next: --evaluate {self.out / 'last.pt'}, or "
                f"--predict IMAGE --checkpoint with a student file of {self.out}")

    # ------------------------------------------------ log and checkpoints

    def line(self, **scores):
        """The log's line for this epoch: counters, every term's mean, the scores, speed."""
        self.clock = time.perf_counter()                   # evaluation is not training time
        means = {k: round(v, 6) for k, v in self.means().items()}
        return dict(epoch=self.epoch + 1, step=self.total_steps, **means, **scores,
                    images_per_second=round(self.images / self.seconds, 1), seconds=round(self.seconds, 2),
                    data_seconds=round(self.data_seconds, 2))

    def end_epoch(self, line, score):
        """Log the epoch, keep the best model in best.pt, save. score: what best.pt is chosen by, larger is better."""
        self.log.append(line)
        self.epoch, self.step = self.epoch + 1, 0
        self.reset()
        if score > self.best:                              # best.pt first: a run killed in between redoes the epoch
            self.best, self.best_epoch = score, self.epoch
            self.save("best.pt")
        self.save("last.pt")
        self.write_log()

    def end_early(self, line, score):
        """--max-steps ended the run inside an epoch: log.jsonl and best.pt know it, until --resume goes on with it."""
        self.save("last.pt")
        if score > self.best:
            if self.is_main and self.best_epoch:
                link(self.out / "best.pt", self.out / "best_before.pt")
            self.best, self.best_epoch = score, self.epoch + 1
            self.save("best.pt")
        self.write_log(line)

    def to_tensorboard(self, line, picture=None):
        """--tensorboard: the line's numbers, and a picture (PNG, bytes) if there is one."""
        if not self.board:
            return
        with self.board(self.out.path, purge_step=line["epoch"]) as board:     # a run that was resumed writes it again
            for name, value in line.items():
                for a, v in enumerate(value if isinstance(value, list) else [value], start=1):
                    board.add_scalar(f"{name}/{a}" if isinstance(value, list) else name, v, line["epoch"])
            if picture:
                pixels = np.asarray(Image.open(io.BytesIO(picture)))
                board.add_image("matching", pixels, line["epoch"], dataformats="HWC")

    def write_log(self, *unfinished):
        """log.jsonl from the checkpoint's own copy: no line twice, none missing, whatever was interrupted."""
        if self.is_main:
            text = "".join(json.dumps(line, default=str) + "\n" for line in [*self.log, *unfinished])
            write(self.out / "log.jsonl", text.encode())

    def save(self, name):
        """Write a checkpoint; last.pt leaves the one before it as previous.pt. Every process calls this."""
        if self.step:
            self.stop_clock()                              # which also sees that nothing is saved that is not finite
        if self.processes.size > 1 and not self.processes.all_equal(fingerprint(self.model)):
            raise UserError("the processes' copies of the model differ: nothing was saved, "
                            f"{self.out / 'last.pt'} is from before that")
        if self.is_main:
            state = dict(format=CHECKPOINT_FORMAT, args={**vars(self.args), "device": str(self.args.device)},
                         processes=self.processes.size, model=self.model.state_dict(),
                         optimizers=[o.state_dict() for o in self.optimizers], **self.metadata,
                         **{k: getattr(self, k) for k in self.PROGRESS})
            save_checkpoint(self.out / name, state, keep=self.out / "previous.pt" if name == "last.pt" else None)
        self.saved = self.clock = time.perf_counter()

    def load(self, state):
        """Go on from a checkpoint. Raises UserError if it was made on other training images, or other networks."""
        if state.get("digest", self.metadata["digest"]) != self.metadata["digest"]:
            raise UserError(f"{self.out / 'last.pt'} was made on training images of other names or another number: "
                            "give the same --data-dir, or another --out-dir")
        load_into(self.model, state["model"], self.out / "last.pt")
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        here = {name: self.log[0][name] for name in ("torch", "device")}
        for name in self.PROGRESS:
            setattr(self, name, state[name])
        places = [self.log[0], *self.log[0].get("resumed", [])]
        if {name: places[-1][name] for name in here} != here:
            self.log[0]["resumed"] = [*places[1:], dict(after_step=self.total_steps, **here)]
        if self.is_main and not self.best_epoch:           # no epoch is done: best.pt was of an unfinished one
            (self.out / "best.pt").unlink(missing_ok=True)
        elif self.is_main and (self.out / "best_before.pt").exists():
            os.replace(self.out / "best_before.pt", self.out / "best.pt")
            (self.out / "best_before.pt").unlink(missing_ok=True)          # two names of one file: replace does nothing


def show_line(text):
    """Overwrite the terminal's present line, never more than one."""
    with contextlib.suppress(OSError):
        print("\r\033[K" + text[:shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)


def board_writer():
    """The class that writes TensorBoard's files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard wants a package that is not here: pip install tensorboard") from None
    return SummaryWriter


def shorten(names, most=6):
    """A list of names in a few words."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f", ... {len(names)} in all" if len(names) > most else "")


def fingerprint(module):
    """SHA-256 of all parameters and buffers."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def compare_arguments(args, saved, free, path):
    """Resuming goes on with the same run; only where it runs and how long this part lasts, `free`, may differ."""
    shown = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    other = [k for k in saved if k in vars(args) and k not in free and vars(args)[k] != saved[k]]
    if other:
        raise UserError(f"{path} was made with other arguments: " + ", ".join(
            f"--{k.replace('_', '-')} {shown(saved[k])} (now {shown(vars(args)[k])})" for k in other)
            + "; give the same ones, or another --out-dir"
            + (" (another --epochs would be another learning-rate schedule)" if "epochs" in other else ""))
