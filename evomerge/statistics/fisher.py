"""The diagonal of the Fisher information of a language model, from one gradient per text.

Imports: torch, `evomerge.statistics.texts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch

from evomerge.statistics.texts import Tokens

Estimator = Literal["sampled", "empirical"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


def diagonal_fisher(
    model: Any,
    names: Iterable[str],
    texts: Sequence[Tokens],
    *,
    estimator: Estimator = "sampled",
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, torch.Tensor]:
    """F = (1 / T) sum_s (d/dtheta sum_t log p(y_st | x_s up to t))^2 over texts s, T tokens scored in all.

    `sampled`: y_st is drawn from the model's own distribution at each scored place of the text, so that F
    is an unbiased estimate of the Fisher information of one next token (Matena 2022, equation 3).
    `empirical`: y_st is the text's own token; F is then large where the model fits the texts badly.

    Divided by tokens, so that models measured on texts of other lengths can be compared. Squares are summed
    in float32, or float64 for a model in float64; gradients have the model's dtype. Memory: four bytes per
    entry of the named parameters beside the model, and the activations of one text.

    Args:
        model: a causal language model of transformers, in evaluation mode; its parameters' `requires_grad`
            is left as it was, gradients are dropped.
        names: of parameters; a matrix with several names is one parameter.
        texts: one or more.
        estimator: where the scored tokens come from.
        seed: of the draws, which are made on the CPU: the same on every device.
        progress: told of the tokens of every text that is done.

    Returns:
        Name -> tensor shaped like the parameter, on its device.
    """
    everything = dict(model.named_parameters())
    wanted = {name: everything[name] for name in names}
    sums = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in wanted.items()
    }
    before = {name: p.requires_grad for name, p in everything.items()}
    handles = []
    generator = torch.Generator().manual_seed(seed)
    try:
        for name, parameter in everything.items():
            parameter.requires_grad_(name in wanted)
        for name, parameter in wanted.items():
            handles.append(parameter.register_post_accumulate_grad_hook(_square_into(sums[name])))
        for tokens in texts:
            _log_likelihood(model, tokens, generator if estimator == "sampled" else None).backward()  # type: ignore[no-untyped-call]
            progress(len(tokens.ids))
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in everything.items():
            parameter.requires_grad_(before[name])
    total = sum(tokens.scored for tokens in texts)
    return {name: result.div_(total) for name, result in sums.items()}


def _square_into(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's squared gradient to `total` and drops it: one is held at a time."""

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.to(total.dtype)
        total.addcmul_(gradient, gradient)
        parameter.grad = None

    return hook


def _log_likelihood(model: Any, tokens: Tokens, generator: torch.Generator | None) -> torch.Tensor:
    """Sum over the scored tokens, those of the text for None, or drawn ones."""
    ids = torch.tensor([tokens.ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, tokens.first - 1 : -1]
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    targets = ids[0, tokens.first :] if generator is None else _drawn(logp.detach(), generator)
    total: torch.Tensor = logp.gather(-1, targets[:, None]).sum()
    return total


def _drawn(logp: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token per row of log-probabilities: the first at which their sum exceeds a uniform number."""
    uniform = torch.rand(len(logp), 1, generator=generator, dtype=torch.float64).to(logp)
    running = logp.exp().cumsum(-1)
    return torch.searchsorted(running, uniform * running[:, -1:]).squeeze(-1).clamp_(max=logp.shape[-1] - 1)
