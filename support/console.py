"""What programs print, their errors, signals that end a run; without PyTorch, for compare.py."""

import contextlib
import os
import shutil
import signal
import sys
import time

from support import interrupt

STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class UserError(ValueError):
    """Something that the user can mend: one line that says what is wrong and what to do."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


class Interrupted(UserError):
    """A signal ended the run after a step; everything is saved."""


class ImageError(UserError):
    """An image cannot be read; a run saves what it has trained before it ends."""


def say(text):
    """Print to standard output. A reader that has gone (| head) or a full disk ends no run."""
    if on_terminal():
        show_line("")  # progress gives way
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer goes there too


def on_terminal():
    """Whether progress has a line to be shown on; Python has no sys.stderr after 2>&-."""
    return bool(sys.stderr and sys.stderr.isatty())


def warn(text):
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def show_line(text):
    """Overwrite the terminal's present line, never more than one."""
    with contextlib.suppress(OSError):
        text = text[:shutil.get_terminal_size().columns - 1]
        print("\r\033[K" + text, end="", file=sys.stderr, flush=True)


def shorten(names, most=6):
    """A list of names in a few words."""
    names = list(map(str, names))
    rest = f", ... {len(names)} in all" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def first_line(error):
    """The first line of an exception's text, at most 200 characters."""
    return next(iter(str(error).strip().splitlines()), "")[:200]


@contextlib.contextmanager
def one_line_errors(program, args=None):
    """What the user can mend ends in one line and status 1, Ctrl-C in 130. args: the options."""
    interrupt.restore()
    with contextlib.suppress(AttributeError):  # tests replace stdout
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    try:
        yield
    except Interrupted as end:
        message, status = f"{end}", 1
    except (UserError, OSError) as error:  # OSError: nothing had better words for it
        message, status = f"error: {error}", 1
    except KeyboardInterrupt:  # in training, Signals takes it
        message, status = "interrupted", 130
    except (MemoryError, RuntimeError) as error:
        message, status = f"error: {device_error(error, args)}", 1
    else:
        return
    if message:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1.5)  # torchrun ends this process if process 0 had the same to say
        warn(f"{program}: {' '.join(message.split())}")
    sys.exit(status)


def device_error(error, args):
    """One line on an error of PyTorch that the user can mend; any other one is raised again."""
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "allocate memory" in str(error):  # the last: on the CPU
        return f"out of memory on {args.device}: try a smaller --batch-size or smaller images"
    if "does not have a deterministic implementation" in str(error):
        reason = str(error).split(",")[0][:120]
        return f"--deterministic cannot be had here ({reason}): leave it out"
    raise error


class Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask for an end after the present step.

    A second one ends it at once, but not under torchrun.
    """

    def __init__(self, program, processes):
        self.name, self.program = None, program
        self.is_main = processes.rank == 0
        self.once = processes.size == 1  # torchrun and a scheduler may both send one

    def __enter__(self):
        numbers = [s for s in signal.Signals if s.name in STOPS]
        heard = [s for s in numbers if signal.getsignal(s) is not signal.SIG_IGN]  # not under nohup
        self.before = {s: signal.signal(s, self._ask) for s in heard}
        return self

    def _ask(self, number, frame):
        self.name = signal.Signals(number).name
        if self.once:
            for s in self.before:
                signal.signal(s, signal.SIG_DFL)
        if number == signal.SIGINT and self.is_main:
            again = " (Ctrl-C again: at once)" if self.once else ""
            with contextlib.suppress(OSError):
                os.write(2, f"\n{self.program}: stopping after this step{again}\n".encode())

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)
