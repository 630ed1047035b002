"""Where a prompt was tried, and when it has been tried often enough."""

from __future__ import annotations

from services.common.errors import (
    InternalError,
    OverloadedError,
    RhizomeError,
    SessionBrokenError,
)

# Workers that may die under one request. The third death is its own: by then it ran on workers
# where no other request of two deaths was, so whatever else dies with it did not do it.
_MAX_LOSSES = 3
# Workers in turn that may give it up or refuse it while they live.
_MAX_REFUSALS = 4


class Attempts:
    """The attempts of one prompt: each ends with its end, or with the loss of its worker.

    A *loss* is a worker or engine that died while it ran the prompt (SessionBrokenError); all else
    is a refusal: a worker that drains, is full or was gone before.
    """

    def __init__(self) -> None:
        # Of the attempt under way, from 0.
        self.number = 0
        self.num_losses = 0
        # Workers that must not get it again.
        self.excluded_worker_ids: list[str] = []
        self._num_refusals = 0

    def give_up_on(self, worker_id: str, error: RhizomeError) -> None:
        """The attempt at this worker is over. Raises what the client is told when it was the last.

        Losses decide by themselves: a request that kills workers must not reach a fourth, one that
        met workers which drain or are full may need several.
        """
        self.number += 1
        self.excluded_worker_ids.append(worker_id)
        if isinstance(error, SessionBrokenError):
            self.num_losses += 1
            if self.num_losses >= _MAX_LOSSES:
                raise InternalError(
                    f"{self.num_losses} workers in turn died while they ran the request: "
                    f"{error.message}"
                )
            return
        self._num_refusals += 1
        if self._num_refusals >= _MAX_REFUSALS:
            if isinstance(error, OverloadedError):
                raise error
            raise InternalError(
                f"{self._num_refusals} workers in turn gave the request up: {error.message}"
            )
