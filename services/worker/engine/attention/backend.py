"""What attention is told and asked: the interface of every attention backend.

Shapes: T tokens of the step, S rows (sequences) of the step, H query heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from services.worker.engine.batch import Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """One layer's constants."""

    index: int
    scale: float
    # A token sees itself and the sliding_window - 1 tokens before it; None: all before it.
    sliding_window: int | None = None
    # Scores become soft_cap * tanh(score / soft_cap).
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """One step's rows, on the host for planning and on the device for kernels.

    A row's tokens are consecutive in the step; token i of row s is at position
    start_positions[s] + i and sees every position up to its own.
    """

    # [S] on the host.
    slots: Int32Array
    num_tokens: Int32Array
    start_positions: Int32Array
    # [max slots, max pages of a sequence] page ids by slot, on the host and on the device.
    host_page_table: Int32Array
    page_table: torch.Tensor

    @property
    def num_single(self) -> int:
        """Rows with one token before the first row with several.

        Batches put rows with one token first; one among the others goes with them.
        """
        several = np.flatnonzero(self.num_tokens > 1)
        return int(several[0]) if several.size else len(self.num_tokens)


class AttentionBackend(Protocol):
    """Attention over the page pool, which it only reads.

    `plan` is called once a step, then `run` once a layer, after the model has written the layer's
    keys and values of all the step's tokens: rows of one step may share pages.
    """

    def plan(self, inputs: AttentionInputs) -> None:
        """Prepare for a step."""

    def run(
        self, q: torch.Tensor, layer: AttentionLayer, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, H, D], any stride in the first dimension -> [T, H, D].

        Rows beyond the planned tokens are padding, and zero in the result. The result is `out`,
        contiguous, where that is given.
        """


class CapturableAttention(AttentionBackend, Protocol):
    """A backend whose decode steps can be captured in CUDA graphs."""

    def wants_eager(
        self, slots: Int32Array, start_positions: Int32Array, host_page_table: Int32Array
    ) -> bool:
        """Whether a step of these rows, [S] with one token each, is better not captured.

        Then `plan` prepares a faster way for it than `plan_captured`.
        """

    def plan_captured(self, inputs: AttentionInputs) -> None:
        """Prepare for a step of rows with one token each.

        `run` then reads buffers whose addresses depend on the number of rows alone, so a capture
        of it may be replayed after a later call with as many rows.
        """
