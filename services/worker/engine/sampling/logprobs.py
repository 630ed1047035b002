"""Log-probabilities of tokens under the model's raw logits, before anything acts on them.

Shapes: N positions, V vocabulary, K most likely tokens, M requested ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.worker.engine.messages import LogprobRows, LogprobSpec


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Results on the device; K and M are the largest of any position's spec."""

    # [N], [N, K], [N, K], [N, M]
    chosen: torch.Tensor
    top_values: torch.Tensor
    top_ids: torch.Tensor
    requested: torch.Tensor

    def to_host(self) -> PositionLogprobs:
        """The same on the host; from a GPU, filled once the stream has come so far."""
        chosen, top_values, top_ids, requested = (
            each.to("cpu", non_blocking=True)
            for each in (self.chosen, self.top_values, self.top_ids, self.requested)
        )
        return PositionLogprobs(chosen, top_values, top_ids, requested)


def compute_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, specs: list[LogprobSpec]
) -> PositionLogprobs:
    """[N, V] raw logits in float32 and the N tokens that follow; one spec a position."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    num_top = min(max(spec.num_top for spec in specs), logits.shape[1])
    top_values, top_ids = logits.topk(num_top, dim=-1)
    num_requested = max(len(spec.token_ids) for spec in specs)
    wanted = [[*spec.token_ids, *(0,) * (num_requested - len(spec.token_ids))] for spec in specs]
    requested = torch.tensor(wanted, dtype=torch.int64, device=logits.device)
    return PositionLogprobs(
        (logits.gather(-1, token_ids[:, None]) - normaliser).squeeze(-1),
        top_values - normaliser,
        top_ids,
        logits.gather(-1, requested.view(len(specs), num_requested)) - normaliser,
    )


def concatenate(parts: list[PositionLogprobs]) -> PositionLogprobs:
    """Consecutive positions of one spec."""
    return PositionLogprobs(
        torch.cat([part.chosen for part in parts]),
        torch.cat([part.top_values for part in parts]),
        torch.cat([part.top_ids for part in parts]),
        torch.cat([part.requested for part in parts]),
    )


def logprob_rows(
    results: PositionLogprobs, positions: slice, start: int, token_ids: list[int], spec: LogprobSpec
) -> LogprobRows:
    """The message for some of the N positions, the first of which is at `start`."""
    num_top = min(spec.num_top, results.top_ids.shape[1])
    return LogprobRows(
        start_position=start,
        token_ids=token_ids,
        logprobs=results.chosen[positions].tolist(),
        num_top=num_top,
        top_token_ids=results.top_ids[positions, :num_top].flatten().tolist(),
        top_logprobs=results.top_values[positions, :num_top].flatten().tolist(),
        requested_logprobs=results.requested[positions, : len(spec.token_ids)].flatten().tolist(),
    )
