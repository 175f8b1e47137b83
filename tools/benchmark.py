"""Time the parts of training: a step with and without contrast, a second step, an evaluation.

    python tools/benchmark.py --dataset synthetic --arch resnet32       # train.py's options

Prints a line of JSON, then for each part the median, minimum and maximum in ms, and the peak memory
so far: a part's own only if it is larger than the one before; of steps the dispatched operations.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows: no peak memory of the CPU
    resource = None

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import options
import train
from support.console import one_line_errors, say
from support.cuda_graphs import CUDAGraphs, check_graphs
from support.processes import Processes, be_deterministic, device_name, pick_device
from support.run import Run


class CountOperations(TorchDispatchMode):
    """Tensor operations that are dispatched, views left out: what a GPU has to launch."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not (op.is_view or "detach" in str(op))
        return op(*args, **(kwargs or {}))


def clock(function, n, skip, args):
    """Median, least and most ms of n calls after `skip` others; the peak memory so far in MiB."""
    times = []
    for _ in range(skip + n):
        start = time.perf_counter()
        function()
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        times.append(1e3 * (time.perf_counter() - start))
    times = sorted(times[skip:])
    row = dict(median_ms=times[len(times) // 2], min_ms=times[0], max_ms=times[-1], runs=n,
               peak_mib=peak_memory(args) / 2 ** 20)
    return {name: round(value, 2) for name, value in row.items()}


def peak_memory(args):
    """Bytes: the allocator's on CUDA (graphs keep pools of their own), the process's on the CPU."""
    if args.device.type == "cuda":
        kind = "reserved" if args.cuda_graph else "allocated"
        return torch.cuda.memory_stats(args.device)[f"{kind}_bytes.all.peak"]
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def operations(function):
    with CountOperations() as counter:
        function()
    return counter.count


def benchmark(args, dataset, processes, runs=50, warm_up=5):
    """A row for each part, by name."""
    rows = {}
    for name in dict.fromkeys(["deep-supervision", args.method]):  # one, if they are the same
        settings = argparse.Namespace(**{**vars(args), "method": name})
        method = train.build(settings, dataset)
        method.check()
        run = Run(settings, None, method, method.optimizers(), metadata={}, processes=processes,
                  signals=None, steps_per_epoch=dataset.steps_per_epoch(args.batch_size),
                  images_per_epoch=len(dataset.train_labels))
        run.start_epoch()
        epoch = dataset.train_batches(args.batch_size, args.seed, 0, pairs=args.batches == "pairs")
        some = []
        for images, labels, index in itertools.islice(epoch, 8):
            some.append((images, labels, method.bank.sample(index, 0, 0) if method.bank else None))
        size = len(some[0][1])
        batches = itertools.cycle([batch for batch in some if len(batch[1]) == size])
        step, second_step = train.make_steps(settings, dataset, method, run)
        row = clock(lambda: step(*next(batches)), runs, warm_up, args)
        plain_step = lambda: train.train_step(settings, method, run, *next(batches))
        row["operations"] = operations(plain_step)
        row["images_per_second"] = round(1e3 * size / row["median_ms"], 1)
        rows[f"step, {name}"] = row
    if method.second:
        batch = next(batches)
        _, outputs = step(*batch)
        warm_up = CUDAGraphs.WARM_UP + 1 if args.cuda_graph else 1
        row = clock(lambda: second_step(*batch, outputs), 3, warm_up, args)
        second = lambda: method.second.step(run.optimizers[1], run.lr, None, *batch, outputs)
        rows[method.second.name] = row | {"operations": operations(second)}
    backbones = [student.backbone for student in method.cohort.students]
    evaluate = lambda: train.evaluate(backbones, dataset.test_batches(), processes)
    rows["evaluation"] = clock(evaluate, 3, 1, args)
    return rows


def main(argv=None):
    args = options.parse(__doc__, argv, program="benchmark.py")
    with one_line_errors("benchmark.py", args):
        processes = Processes({})
        args.device = pick_device(args.device, processes)
        if args.deterministic:
            be_deterministic()
        torch.backends.cudnn.benchmark = not args.deterministic  # as train.py
        check_graphs(args, processes)
        dataset = train.load_data(args).to(args.device)
        rows = benchmark(args, dataset, processes)
        setting = dict(arch=args.arch, batch_size=args.batch_size, device=device_name(args.device),
                       amp=args.amp, cuda_graph=args.cuda_graph, torch=str(torch.__version__))
        say(json.dumps({**setting, **rows}))
        for name, row in rows.items():
            say(f"{name:24}" + "  ".join(f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
