"""What a method's `terms` must be, {name: (weight, value)}, and what the log holds of them."""

import torch

from support.console import UserError

# What an epoch's line in the log holds beside the terms.
RESERVED = {"epoch", "step", "loss", "lr", "images_per_second", "seconds", "data_seconds"}


def check_terms(method, terms):
    """Raises UserError where a method's `terms` are not what train.py's loop takes."""
    name = f"{type(method).__name__}.terms"
    form = ("{name: (weight, value)}, the weight a number or None, "
            "the value a tensor with one number")
    if not isinstance(terms, dict) or not terms:
        raise UserError(f"{name} returns a {type(terms).__name__}: it must be a dict {form}")
    for term, pair in terms.items():
        if not isinstance(term, str) or term in RESERVED or term.endswith(("_top1", "_top5")):
            raise UserError(f"{name}: the log has another use for {term!r}: "
                            "give the term another name")
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UserError(f"{name}: {term!r} is no pair of weight and value: it must be {form}")
        weight, value = pair
        is_scalar = torch.is_tensor(weight) and weight.dim() == 0
        if not (weight is None or is_scalar or isinstance(weight, (int, float))):
            raise UserError(f"{name}: the weight of {term!r} is a {type(weight).__name__}: "
                            f"it must be {form}")
        if term == "matching" and torch.is_tensor(value) and value.dim() != 4:
            raise UserError(f"{name}: 'matching' is drawn, as lambda [N, L, N, L]: give a term "
                            "of another form another name")
        if not torch.is_tensor(value) or (weight is not None and value.dim()):
            raise UserError(f"{name}: the value of {term!r} is no tensor with one number: "
                            f"it must be {form}")
    if all(weight is None for weight, _ in terms.values()):
        raise UserError(f"{name} has no weight but None, so nothing is trained")


def unreached(method, terms):
    """Names of the parameters that the ordinary step would train, and no term reaches.

    terms: {name: (weight, value)}, with their graph. Raises UserError where none reaches any.
    """
    held = {p for group in method.optimizers()[0].param_groups for p in group["params"]}
    named = {name: p for name, p in method.named_parameters() if p.requires_grad and p in held}
    loss = sum(weight * value for weight, value in terms.values() if weight is not None)
    if not loss.requires_grad:
        raise UserError(f"{type(method).__name__}.terms: no term with a weight depends on a "
                        "parameter, so nothing is trained")
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return [name for name, found in zip(named, gradients, strict=True) if found is None]


def as_logged(loss, terms):
    """{"loss", each term by name and times its weight, "unweighted_" + name where that is not 1}.

    The terms sum to the loss, but for those of weight None, which are logged as they are.
    """
    logged, unweighted = {"loss": loss}, {}
    for name, (weight, value) in terms.items():
        logged[name] = value if weight is None else weight * value
        # a tensor's value is not asked for: the host would wait
        if weight is not None and (torch.is_tensor(weight) or weight != 1):
            unweighted[f"unweighted_{name}"] = value
    return {name: value.detach() for name, value in {**logged, **unweighted}.items()}
