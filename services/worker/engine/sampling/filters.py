"""Which tokens top-k, top-p and min-p leave: one threshold a row, on temperature-scaled logits.

A token stays when its value is at least the row's threshold, so tokens that tie with the last one
stay too and no order among equals matters. Thresholds combine as the larger one of
- top-k: the k-th largest value;
- top-p (Holtzman et al., arXiv 1904.09751), over what top-k left, renormalised: the smallest
  value whose larger ones have less than `top_p` of the probability;
- min-p (Nguyen et al., arXiv 2407.01082): the largest value plus log(min_p).

Shapes: R rows, V vocabulary, N values looked at, largest first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Values looked at first for top-p alone; few distributions need more.
_FIRST_LOOK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterRows:
    """The filters of R rows; rows without one hold its neutral value."""

    # [R] int64; V or more keeps all.
    top_k: torch.Tensor
    # [R] float32
    top_p: torch.Tensor
    min_p: torch.Tensor
    # Host facts: the largest top_k below V (1 if none), and whether top_p acts on a whole row.
    largest_k: int
    any_open_top_p: bool


def thresholds(scaled: torch.Tensor, filters: FilterRows) -> torch.Tensor:
    """[R, V] -> [R, 1]"""
    vocab_size = scaled.shape[1]
    num_values = filters.largest_k
    if not filters.any_open_top_p:
        return _thresholds(scaled, filters, min(num_values, vocab_size), None)[0]
    # In float64 and over the whole row, so that it is the same however many values are sorted.
    largest = scaled.amax(-1, keepdim=True)
    total = (scaled - largest).double().exp_().sum(-1, keepdim=True)
    num_values = min(max(num_values, _FIRST_LOOK), vocab_size)
    found, enough = _thresholds(scaled, filters, num_values, total)
    if num_values == vocab_size or bool(enough):
        return found
    return _thresholds(scaled, filters, vocab_size, total)[0]


def _thresholds(
    scaled: torch.Tensor, filters: FilterRows, num_values: int, total: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds from the `num_values` largest, and whether those were enough for every row."""
    vocab_size = scaled.shape[1]
    values = scaled.topk(num_values, dim=-1).values
    top_k, top_p = filters.top_k[:, None], filters.top_p[:, None].double()
    within_k = torch.arange(num_values, device=scaled.device) < top_k
    weights = (values - values[:, :1]).double().exp_().masked_fill_(~within_k, 0)
    cumulative = weights.cumsum(-1)
    is_open = top_k >= vocab_size
    mass = cumulative[:, -1:]
    if total is not None:
        mass = torch.where(is_open, total, mass)
    wanted = top_p * mass
    kept = (cumulative - weights < wanted) & within_k
    last = kept.sum(-1, keepdim=True).clamp_(min=1) - 1
    # Rows that neither top-k nor top-p touches.
    untouched = is_open & (top_p >= 1)
    by_rank = values.gather(-1, last).masked_fill(untouched, float("-inf"))
    by_share = values[:, :1] + filters.min_p[:, None].log()
    enough = (untouched | ~is_open | (cumulative[:, -1:] >= wanted)).all()
    return torch.maximum(by_rank, by_share), enough
