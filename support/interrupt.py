"""Ctrl-C while libraries load: one line. A program imports this first, before PyTorch.

Some libraries swallow an exception that arrives while they load, so the handler ends the process.
"""

import os
import signal
import sys

PROGRAM = os.path.basename(sys.argv[0])


def end(*_):
    os.write(2, f"{PROGRAM}: interrupted\n".encode())
    os._exit(130)


def restore():
    """Ctrl-C raises KeyboardInterrupt again: all is loaded."""
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# a shell's `&` ignores SIGINT, and a program that imports train.py has its own ways
if PROGRAM in ("train.py", "detect.py", "predict.py"):
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
