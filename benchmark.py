"""Time the parts of training: a step with and without the contrastive losses, a second step, an evaluation.

    python benchmark.py --dataset synthetic --arch resnet32 --num-nets 2        # train.py's options

Prints a line of JSON, then for each part the median, minimum and maximum in ms, dispatched operations, and the peak
memory so far: the parts run in order, so a part's memory is its own only if it is larger than the one before.
"""

import argparse
import itertools
import json
import sys
import time

try:
    import resource
except ImportError:                                        # Windows: no peak memory of the CPU
    resource = None

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import devices
import experiment
import options
import train


class CountOperations(TorchDispatchMode):
    """Tensor operations that are dispatched, views left out: what a GPU has to launch."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not (op.is_view or "detach" in str(op))
        return op(*args, **(kwargs or {}))


def clock(function, n, skip, args):
    """Milliseconds of n calls after `skip` others: median, least, most; and the peak memory so far in MiB."""
    times = []
    for _ in range(skip + n):
        start = time.perf_counter()
        function()
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        times.append(1e3 * (time.perf_counter() - start))
    times = sorted(times[skip:])
    return {k: round(v, 2) for k, v in dict(median_ms=times[len(times) // 2], min_ms=times[0], max_ms=times[-1], runs=n,
                                            peak_mib=peak_memory(args) / 2 ** 20).items()}


def peak_memory(args):
    """Bytes: the allocator's on CUDA (graphs keep pools of their own), the process's on the CPU."""
    if args.device.type == "cuda":
        return (torch.cuda.max_memory_reserved if args.cuda_graph else torch.cuda.max_memory_allocated)(args.device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def operations(function):
    with CountOperations() as counter:
        function()
    return counter.count


def benchmark(args, dataset, processes, runs=50, warm_up=5):
    """A row for each part, by name."""
    rows = {}
    for name in dict.fromkeys(["deep-supervision", args.method]):
        settings = argparse.Namespace(**{**vars(args), "method": name})
        method = train.build(settings, dataset)
        run = experiment.Run(settings, None, method, train.make_optimizers(settings, method), {},
                             dataset.steps_per_epoch(args.batch_size), len(dataset.train_labels), processes, None)
        run.start_epoch(args.lr)
        epoch = dataset.train_batches(args.batch_size, args.seed, 0, pairs=args.batches == "pairs")
        some = [(images, labels, *(method.bank.draw(index, 0, 0) if method.bank else ()))
                for images, labels, index in itertools.islice(epoch, 8)]
        batches = itertools.cycle([batch for batch in some if len(batch[1]) == len(some[0][1])])      # of one size
        step, second_step = train.steps(settings, dataset, method, run)
        row = rows[f"step, {name}"] = clock(lambda: step(*next(batches)), runs, warm_up, args)       # noqa: B023
        row["operations"] = operations(lambda: train.train_step(settings, method, run, *next(batches)))   # noqa: B023
        row["images_per_second"] = round(1e3 * len(some[0][1]) / row["median_ms"], 1)
    if method.second_every:
        warm_up = devices.CUDAGraphs.WARM_UP + 1 if args.cuda_graph else 1
        row = rows["meta step" if args.method == "lmcl" else "second step"] = clock(
            lambda: second_step(*next(batches)), 3, warm_up, args)
        row["operations"] = operations(lambda: method.second_step(run.optimizers[-1], run.lr, None, *next(batches)))
    backbones = [student.backbone for student in method.cohort.students]
    rows["evaluation"] = clock(lambda: train.evaluate(backbones, dataset.test_batches(), processes), 3, 1, args)
    return rows


def main(argv=None):
    args = options.parse(__doc__, argv, program="benchmark.py")
    with experiment.one_line_errors("benchmark.py", (devices.UserError, data.DataError), args):
        processes = devices.Processes({})
        args.device = devices.pick_device(args.device, processes)
        if args.deterministic:
            devices.be_deterministic()
        devices.check_graphs(args, processes)
        dataset = train.load_data(args).to(args.device)
        rows = benchmark(args, dataset, processes)
        setting = dict(arch=args.arch, batch_size=args.batch_size, device=devices.device_name(args.device),
                       amp=args.amp, cuda_graph=args.cuda_graph, torch=str(torch.__version__))
        experiment.say(json.dumps({**setting, **rows}))
        for name, row in rows.items():
            experiment.say(f"{name:24}" + "  ".join(f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
