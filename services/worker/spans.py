"""A sequence's spans, made at its end from what the engine says of its times.

The engine knows nothing of traces, and nothing is recorded while a sequence runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from services.common.errors import error_from_code
from services.common.spans import Span, SpanKind, Tracer
from services.worker.engine.messages import Admission, Finish, Request, SequenceError

_SEQUENCE = "rhizome.worker.v1.WorkerService/Generate"


@dataclass(slots=True)
class SequenceTrace:
    """The span of a sequence that is recorded, while it runs. `end` is called once."""

    span: Span
    request: Request
    # From the engine's clock, which is this host's monotonic one, to Unix time.
    to_unix_ns: int

    def end(self, end: Finish | SequenceError, admission: Admission | None) -> None:
        """Export the whole and its phases, as far as it came."""
        request = self.request
        ended_ns = time.monotonic_ns() + self.to_unix_ns
        self.span.set(
            request_id=request.request_id,
            choice_index=request.choice_index,
            num_prompt_tokens=request.prompt_len,
            num_resumed_tokens=len(request.token_ids) - request.prompt_len or None,
        )
        arrived_ns = request.arrival_ns + self.to_unix_ns
        if isinstance(end, SequenceError):
            self.span.fail(error_from_code(end.code, end.message))
            admitted_ns = ended_ns if admission is None else arrived_ns + admission.queue_ns
            self._phase("queue", arrived_ns, admitted_ns)
        else:
            self._end_well(end, arrived_ns, ended_ns)
        self.span.end(ended_ns)

    def _end_well(self, finish: Finish, arrived_ns: int, ended_ns: int) -> None:
        self.span.set(
            finish_reason=finish.reason,
            num_output_tokens=finish.num_output_tokens,
            cached_tokens=finish.cached_tokens,
            num_preemptions=finish.num_preemptions,
        )
        admitted_ns = arrived_ns + finish.queue_ns
        prefilled_ns = admitted_ns + finish.prefill_ns
        done_ns = prefilled_ns + finish.decode_ns
        self._phase("queue", arrived_ns, admitted_ns)
        if not finish.prefill_ns:
            # It was cancelled while it waited, or had all of its tokens when it came.
            return
        preempted = [at + self.to_unix_ns for at in finish.preempted_ns]
        self._phase(
            "prefill",
            admitted_ns,
            prefilled_ns,
            [at for at in preempted if at < prefilled_ns],
            first_token=bool(finish.decode_ns),
        )
        if finish.decode_ns:
            late = [at for at in preempted if at >= prefilled_ns]
            self._phase("decode", prefilled_ns, min(done_ns, ended_ns), late)

    def _phase(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        preempted_ns: list[int] | None = None,
        *,
        first_token: bool = False,
    ) -> None:
        span = self.span.child(name, SpanKind.INTERNAL, start_ns)
        for at in preempted_ns or ():
            span.add_event("preempted", at)
        if first_token:
            span.add_event("first_token", end_ns)
        span.end(end_ns)


def begin_sequence(tracer: Tracer, traceparent: str, request: Request) -> SequenceTrace | None:
    """Its trace from its arrival on; None where it is not recorded."""
    if not tracer.is_on:
        return None
    to_unix_ns = time.time_ns() - time.monotonic_ns()
    span = tracer.begin(_SEQUENCE, traceparent, start_ns=request.arrival_ns + to_unix_ns)
    return SequenceTrace(span, request, to_unix_ns) if span.is_recording else None
