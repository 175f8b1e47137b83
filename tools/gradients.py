"""What each term of an `lmcl` checkpoint pulls at, and how alike its embeddings are.

    python tools/gradients.py out/RUN/last.pt --batches 10

Prints a Markdown table: the norm of each weighted term's gradient on the backbones, its share of
that of the students' own cross-entropy, and its cosine with that. Then the mean cosine of two
images' embeddings, stage by stage, the spread of lambda, and how far VCL and ICL are below chance.
All are means over batches of epoch 0, in training mode, at the soft losses' full weight. --meta
adds the norm of the meta-gradient for both values of --virtual-lambda, and their cosine.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import losses
import meta
import options
import train
from support.architectures import load_model_file
from support.arguments import Parser, at_least_1
from support.console import UserError, one_line_errors
from support.files import load_checkpoint, load_into


def main(argv=None):
    parser = Parser("gradients.py", __doc__)
    parser.add_argument("checkpoint", metavar="FILE", help="last.pt or best.pt of an lmcl run")
    parser.add_argument("--batches", type=at_least_1, default=10, help="of the training set (10)")
    parser.add_argument("--meta", action="store_true",
                        help="the gradient of phi, too, with lambda held and moving: slow")
    given = parser.parse_args(argv)
    given.device = torch.device("cpu")
    with one_line_errors("gradients.py", given):
        state = load_checkpoint(given.checkpoint)
        args = argparse.Namespace(**{**vars(options.parse("", [])), **state["args"]})
        if state["args"].get("method") != "lmcl" or len(args.arch) < 2:
            raise UserError(f"{given.checkpoint} is no checkpoint of lmcl with two students or "
                            "more")
        args.device = given.device
        if args.model_file:
            load_model_file(args.model_file)
        dataset = train.load_data(args)
        method = train.build(args, dataset, resumed=True)
        method.check()
        load_into(method, state["model"], given.checkpoint)
        measure(args, dataset, method.train(), given.batches)
        if given.meta:
            measure_meta(args, dataset, method, given.batches, state["logged_lr"])


def gradient(value, parameters):
    """Of a term, one vector; zeros for parameters that it does not depend on."""
    parts = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def measure(args, dataset, method, batches):
    backbones = [p for student in method.cohort.students for p in student.backbone.parameters()]
    sums, spreads, cosines, gains = {}, [], 0, 0
    plan = dataset.train_batches(args.batch_size, args.seed, 0, pairs=args.batches == "pairs")
    for images, labels, index in itertools.islice(plan, batches):
        rows = method.bank.sample(index, 0, 0) if method.bank else None
        with meta.batch_statistics(method):
            outputs = method(images)
            terms = method.terms(outputs, labels, rows)
        z, logits = outputs.embeddings, outputs.logits  # [N, L, B, D], [N, L, B, C]
        parts = {"ce, own heads": losses.cross_entropy(logits[:, -1:], labels),
                 "ce, branches": losses.cross_entropy(logits[:, :-1], labels)}
        parts |= {name: w * value for name, (w, value) in terms.items() if w and name != "ce"}
        parts["the sum"] = sum(parts.values())
        gradients = {name: gradient(value, backbones) for name, value in parts.items()}
        own = gradients["ce, own heads"]
        for name, g in gradients.items():
            cosine = torch.nn.functional.cosine_similarity(g, own, 0)
            row = torch.stack([g.norm(), g.norm() / own.norm(), cosine])
            sums[name] = sums.get(name, 0) + row.detach()
        B = len(labels)
        cosines += ((z @ z.mT).sum((-1, -2)) - B).detach() / (B * (B - 1))  # [N, L], rows are unit
        spreads.append(method.matching(outputs.features).detach())
        gains += torch.stack([terms["vcl_gain"][1], terms["icl_gain"][1]])
    print("| term | norm | share | cosine |\n|---|---|---|---|")
    n = len(spreads)  # an epoch may have fewer
    for name, values in sums.items():
        norm, share, cosine = (values / n).tolist()
        print(f"| {name} | {norm:.3g} | {share:.2f} | {cosine:.2f} |")
    print()
    matching = torch.cat(spreads, -1)  # [N, L, N, L, samples]
    N = len(matching)
    pairs = [matching[a, :, b] for a in range(N) for b in range(N) if a != b]
    pairs = torch.stack(pairs)  # [N * (N - 1), L, L, samples]
    for a, row in enumerate((cosines / n).tolist(), start=1):
        stages = " ".join(f"{x:.3f}" for x in row)
        print(f"student {a}: mean cosine of two images' embeddings, stage by stage: {stages}")
    print(f"lambda: mean {pairs.mean():.3f}, standard deviation {pairs.mean(-1).std():.3f} over "
          f"pairs of stages, {pairs.std(-1).mean():.3f} over samples")
    vcl, icl = (gains / n).tolist()
    print(f"below chance, nats an anchor, lambda left out: VCL {vcl:.3f}, ICL {icl:.3f}")


def measure_meta(args, dataset, method, batches, lr):
    """The gradient of phi at the checkpoint's learning rate, with lambda held and moving."""
    network, found = method.matching_network, []
    if network is None:
        raise UserError("--meta: this run has no matching network (--matching uniform)")
    still = torch.optim.SGD(network.parameters(), lr=0.0)
    plan = dataset.train_batches(args.batch_size, args.seed, 0, pairs=args.batches == "pairs")
    for images, labels, index in itertools.islice(plan, batches):
        rows = method.bank.sample(index, 0, 0) if method.bank else None
        for kind in ("held", "moving"):
            args.virtual_lambda = kind
            method.meta_step(still, lr, None, images, labels, rows, None)
            found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    held, moving = torch.stack(found[0::2]), torch.stack(found[1::2])  # [batches, parameters]
    cosine = torch.nn.functional.cosine_similarity(held, moving, -1).mean()
    print(f"gradient of phi: norm {held.norm(dim=-1).mean():.3g} with lambda held, "
          f"{moving.norm(dim=-1).mean():.3g} with lambda moving; cosine {cosine:.3g}")


if __name__ == "__main__":
    main()
