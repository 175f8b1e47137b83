"""What each term of an `lmcl` checkpoint pulls at: norms of gradients on the backbones; how alike embeddings are.

    python docs/gradients.py out/RUN/last.pt --batches 10

Prints a Markdown table: each weighted term's norm, as a share of that of the cross-entropy of the students' own heads,
and its cosine with that; then the mean cosine of two images' embeddings, stage by stage, the spread of lambda, and VCL
and ICL without lambda beside chance, their value where all embeddings are equal. All are means over batches of epoch 0,
in training mode. The file stays as it is.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import devices
import experiment
import losses
import meta
import options
import train


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="FILE", help="last.pt or best.pt of an lmcl run")
    parser.add_argument("--batches", type=int, default=10, help="of the training set (10)")
    given = parser.parse_args(argv)
    if given.batches < 1:
        parser.error("argument --batches: must be at least 1")
    given.device = torch.device("cpu")
    with experiment.one_line_errors("gradients.py", (devices.UserError, train.data.DataError), given):
        state = experiment.load_checkpoint(given.checkpoint)
        args = argparse.Namespace(**{**vars(options.parse("", [])), **state["args"]})
        if state["args"].get("method") != "lmcl" or len(args.arch) < 2:
            raise devices.UserError(f"{given.checkpoint} is no checkpoint of lmcl with two students or more")
        args.device = given.device
        if args.model_file:
            train.as_user_error(train.models.load_model_file, args.model_file)
        dataset = train.load_data(args)
        method = train.build(args, dataset, resumed=True)
        experiment.load_into(method, state["model"], given.checkpoint)
        measure(args, dataset, method.train(), given.batches)


def measure(args, dataset, method, batches):
    backbones = [p for student in method.cohort.students for p in student.backbone.parameters()]
    sums, spreads, cosines, nats = {}, [], 0, 0
    plan = dataset.train_batches(args.batch_size, args.seed, 0, pairs=args.batches == "pairs")
    for images, labels, index in itertools.islice(plan, batches):
        rows = method.bank.draw(index, 0, 0) if method.bank else ()
        with meta.batch_statistics(method):
            terms = method.terms(images, labels, *rows)
            features, z, logits = method.students(images)      # N x [L, B, d_a], [N, L, B, D], [N, L, B, C]
        parts = {"ce, own heads": losses.cross_entropy(logits[:, -1:], labels),
                 "ce, branches": losses.cross_entropy(logits[:, :-1], labels)}
        parts |= {name: weight * value for name, (weight, value) in terms.items() if weight and name != "ce"}
        parts["the sum"] = sum(parts.values())
        gradients = {name: torch.cat([g.flatten() for g in torch.autograd.grad(
            value, backbones, retain_graph=True, materialize_grads=True)]) for name, value in parts.items()}
        own = gradients["ce, own heads"]
        for name, g in gradients.items():
            cosine = torch.nn.functional.cosine_similarity(g, own, 0)
            sums[name] = sums.get(name, 0) + torch.stack([g.norm(), g.norm() / own.norm(), cosine]).detach()
        B = len(labels)
        cosines += ((z @ z.mT).sum((-1, -2)) - B).detach() / (B * (B - 1))                    # [N, L], rows are unit
        spreads.append(method.matching(features).detach())
        N, L = z.shape[:2]
        plain = [method.contrast(z, labels, None, rows)[name][1] / (2 * N * (N - 1) * L * L) for name in ("vcl", "icl")]
        candidates = 1 + (~rows[-1]).sum(1) if rows else torch.tensor(B - 1.0)      # a positive and other classes' rows
        nats += torch.stack([*plain, candidates.log().mean()]).detach()
    print("| term | norm | share | cosine |\n|---|---|---|---|")
    n = len(spreads)                                       # an epoch may have fewer
    for name, values in sums.items():
        norm, share, cosine = (values / n).tolist()
        print(f"| {name} | {norm:.3g} | {share:.2f} | {cosine:.2f} |")
    print()
    matching = torch.cat(spreads, -1)                      # [N, L, N, L, samples]
    pairs = torch.stack([matching[a, :, b] for a in range(N) for b in range(N) if a != b])       # [.., L, L, samples]
    for a, row in enumerate((cosines / n).tolist(), start=1):
        stages = " ".join(f"{x:.3f}" for x in row)
        print(f"student {a}: mean cosine of two images' embeddings, stage by stage: {stages}")
    print(f"lambda: mean {pairs.mean():.3f}, standard deviation {pairs.mean(-1).std():.3f} over pairs of stages, "
          f"{pairs.std(-1).mean():.3f} over samples")
    print("nats an anchor, lambda left out: VCL {:.3f}, ICL {:.3f}, chance {:.3f}".format(*(nats / n).tolist()))


if __name__ == "__main__":
    main()
