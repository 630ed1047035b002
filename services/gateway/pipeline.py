"""A prompt's way through the services: tokenize, schedule, run on a worker, become text.

`Pipeline` holds the parts; `Generation.run` is one prompt's life, migrations included.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator, Sequence

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from rhizome.common.v1.logprobs_pb2 import LogprobOptions
from rhizome.scheduler.v1.scheduler_service_pb2 import Placement, RequestOutcome, ScheduleRequest
from services.common.errors import (
    DeadlineError,
    InvalidRequestError,
    RhizomeError,
    SessionBrokenError,
    UnavailableError,
)
from services.common.prefix_hash import cache_namespace, prefix_hashes
from services.common.spans import Span, SpanKind
from services.common.tenants import TenantSet
from services.gateway.attempt_spans import describe_attempt, describe_placement
from services.gateway.attempts import Attempts
from services.gateway.control_plane import ControlPlane, ServedModel, duration
from services.gateway.generation import (
    Choice,
    ChoiceListener,
    GenerationSpec,
    Hops,
    Prompt,
    output_rows,
    prompt_rows,
    remaining_time,
    time_limit,
)
from services.gateway.inflight import InflightPrompts
from services.gateway.metrics import GatewayMetrics
from services.gateway.model_limits import check_parameters, check_token_ids, fit_context
from services.gateway.prompt_records import PromptRecords
from services.gateway.rate_limits import RateLimits
from services.gateway.tokenizers import TokenizerPool
from services.gateway.worker_pool import WorkerSessions
from services.gateway.worker_sessions import WorkerSession

logger = logging.getLogger(__name__)

# How long a prompt that lost its worker waits for another one.
_MIGRATION_PATIENCE_S = 20.0
_MIGRATION_RETRY_S = 0.2


class Pipeline:
    """The services behind the gateway, and what every prompt shares."""

    def __init__(
        self,
        control: ControlPlane,
        tokenizers: TokenizerPool,
        workers: WorkerSessions,
        metrics: GatewayMetrics,
        max_inflight_requests: int,
        tenants: TenantSet,
    ) -> None:
        self.control = control
        self.tokenizers = tokenizers
        self.workers = workers
        self.metrics = metrics
        self.inflight = InflightPrompts(max_inflight_requests, metrics)
        self.rates = RateLimits(tenants, metrics)
        self.records = PromptRecords(metrics.of_prompts, tenants, self.rates)
        self._tenants = tenants
        self.closing = False

    @property
    def ready(self) -> bool:
        """Whether requests should come: one could be served, and the gateway is not to end."""
        return not self.closing and self.tokenizers.usable and self.control.table.has_ready_worker()

    @contextlib.contextmanager
    def admitted(self, prompts: Sequence[Prompt], tenant: str) -> Iterator[None]:
        """Serve these prompts until the block ends. Raises OverloadedError."""
        try:
            self.rates.require(tenant)
            self.inflight.admit(len(prompts), tenant)
        except RhizomeError as error:
            for prompt in prompts:
                self.records.count(prompt, error)
            raise
        num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self.rates.charge(tenant, num_requests=len(prompts), num_tokens=num_tokens)
        try:
            yield
        finally:
            self.inflight.leave(len(prompts), tenant)

    async def prepare(self, model: ServedModel, specs: Sequence[GenerationSpec]) -> list[Prompt]:
        """Tokenize and hash prompts and hold them against the tenant's and the model's limits."""
        prompts: list[Prompt | None] = [None] * len(specs)
        page_size = model.identity.page_size
        by_namespace: dict[str, list[int]] = {}
        for index, spec in enumerate(specs):
            self._tenants.check_priority(spec.tenant, spec.priority)
            namespace = cache_namespace(model.identity.model_revision, salt=spec.cache_salt)
            check_parameters(spec, model, namespace)
            if spec.input is None:
                check_token_ids(spec.token_ids, model, spec.input_param)
                hashes = prefix_hashes(spec.token_ids, page_size, namespace)
                prompts[index] = Prompt(
                    spec=spec,
                    token_ids=spec.token_ids,
                    prefix_hashes=hashes,
                    namespace=namespace,
                    model=model.name,
                )
            else:
                by_namespace.setdefault(namespace, []).append(index)
        for namespace, indices in by_namespace.items():
            inputs = [value for i in indices if (value := specs[i].input) is not None]
            try:
                with specs[indices[0]].span.child("tokenize", SpanKind.CLIENT) as span:
                    results = await self.tokenizers.tokenize(
                        inputs, namespace, page_size, span.traceparent
                    )
            except InvalidRequestError as error:
                error.param = error.param or specs[indices[0]].input_param
                raise
            for index, result in zip(indices, results, strict=True):
                spec = specs[index]
                if result.template_stop:
                    known = spec.text_options.stop
                    known.extend(stop for stop in result.template_stop if stop not in known)
                prompts[index] = Prompt(
                    spec=spec,
                    token_ids=list(result.token_ids),
                    prefix_hashes=list(result.prefix_hashes),
                    namespace=namespace,
                    model=model.name,
                )
        prepared = [prompt for prompt in prompts if prompt is not None]
        for prompt in prepared:
            fit_context(prompt, model)
        return prepared


class Generation:
    """One prompt's choices, from placement to their ends, on whichever workers they need.

    `placed` completes when a worker has them for the first time.
    """

    def __init__(
        self, pipeline: Pipeline, prompt: Prompt, listener: ChoiceListener, arrival_s: float
    ) -> None:
        spec = prompt.spec
        self.prompt = prompt
        self.hops = Hops()
        self.arrival_s = arrival_s
        self.end_s = 0.0
        self.placed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pipeline = pipeline
        self._first_arrival = Timestamp()
        self._first_arrival.GetCurrentTime()
        self._sessions: dict[Choice, WorkerSession] = {}
        self._lost: list[Choice] = []
        self._num_ended = 0
        self._loss: RhizomeError | None = None
        self._error: RhizomeError | None = None
        self._changed = asyncio.Event()
        if not spec.sampling.HasField("seed"):
            spec.sampling.seed = secrets.randbits(64)
        options = spec.logprobs
        self.choices = [
            Choice(
                prompt=prompt,
                index=index,
                owner=self,
                listener=listener,
                trim_stop_id=not spec.text_options.no_stop_trim,
                prompt_logprobs=prompt_rows(options, index),
                output_logprobs=output_rows(options, len(prompt.token_ids)),
            )
            for index in range(spec.num_choices)
        ]

    async def run(self) -> None:
        """Return when every choice has ended. Raises what stops the prompt for good."""
        end: BaseException | None = None
        try:
            async with time_limit(self.prompt.spec.deadline):
                await self._run_attempts()
        except TimeoutError as error:
            end = DeadlineError("the request's time is over")
            raise end from error
        except BaseException as error:
            end = error
            raise
        finally:
            self.end_s = time.monotonic()
            for choice in self.choices:
                if not choice.ended and (session := self._sessions.get(choice)) is not None:
                    session.cancel(choice)
            self._pipeline.records.ended(self, end)

    async def _run_attempts(self) -> None:
        pending = self.choices
        attempts = Attempts()
        metrics = self._pipeline.metrics
        while pending:
            with metrics.queued.track_inprogress():
                placement = await self._place(len(pending), attempts)
            with (
                metrics.running.track_inprogress(),
                self.prompt.spec.span.child("attempt", SpanKind.CLIENT) as span,
            ):
                pending = await self._attempt(pending, placement, attempts.number, span)
            if pending:
                self._move_on(attempts, placement.worker_id)

    async def _attempt(
        self, choices: list[Choice], placement: Placement, number: int, span: Span
    ) -> list[Choice]:
        """Run choices where they were placed; returns those that their worker lost."""
        self._submit(choices, placement, span)
        code = grpc.StatusCode.CANCELLED.value[0]
        try:
            lost = await self._losses()
            code = 0
            if lost and self._loss is not None:
                code = self._loss.code
                span.fail(self._loss)
            return lost
        except RhizomeError as error:
            code = error.code
            raise
        finally:
            self._report(number, placement, code)
            if span.is_recording:
                describe_attempt(span, placement, number, choices)

    def choice_ended(self, choice: Choice) -> None:
        self._num_ended += 1
        if self._num_ended == len(self.choices):
            self._changed.set()

    def choice_failed(self, choice: Choice, error: RhizomeError) -> None:
        self._error = error
        self._changed.set()

    def choice_lost(self, choice: Choice, error: RhizomeError) -> None:
        self._lost.append(choice)
        # A death says more than what its choices met otherwise.
        if not isinstance(self._loss, SessionBrokenError):
            self._loss = error
        self._changed.set()

    async def _place(self, num_choices: int, attempts: Attempts) -> Placement:
        """Ask for a worker; a prompt that lost one may have to wait for the next."""
        with self.prompt.spec.span.child("schedule", SpanKind.CLIENT) as span:
            placement = await self._ask_for_placement(num_choices, attempts, span.traceparent)
            if span.is_recording:
                describe_placement(span, placement)
                self.hops.queue_s += placement.queued_for.ToNanoseconds() / 1e9
        self.hops.worker_ids.append(placement.worker_id)
        self.hops.policy = placement.policy
        self.hops.predicted_cached_tokens = placement.predicted_cached_tokens
        return placement

    async def _ask_for_placement(
        self, num_choices: int, attempts: Attempts, traceparent: str
    ) -> Placement:
        spec = self.prompt.spec
        started = time.monotonic()
        request = ScheduleRequest(
            request_id=spec.schedule_id,
            attempt=attempts.number,
            model=self.prompt.model,
            prefix_hashes=self.prompt.prefix_hashes,
            num_prompt_tokens=len(self.prompt.token_ids),
            max_new_tokens=spec.sampling.max_new_tokens,
            num_choices=num_choices,
            tenant=spec.tenant,
            priority=spec.priority,
            first_arrival=self._first_arrival,
            excluded_worker_ids=attempts.excluded_worker_ids,
            num_losses=attempts.num_losses,
            session_id=spec.session_id,
            traceparent=traceparent,
        )
        while True:
            if (left := remaining_time(spec.deadline)) is not None:
                request.remaining.CopyFrom(left)
            try:
                placement = await self._pipeline.control.schedule(request)
                break
            except UnavailableError:
                if attempts.number == 0 or time.monotonic() - started > _MIGRATION_PATIENCE_S:
                    raise
            # Nobody else: the worker that failed it may be back under a new epoch.
            del request.excluded_worker_ids[:]
            await asyncio.sleep(_MIGRATION_RETRY_S)
        self.hops.schedule_s += time.monotonic() - started
        return placement

    def _submit(self, choices: list[Choice], placement: Placement, span: Span) -> None:
        session = self._pipeline.workers.session(
            placement.worker_id, placement.address, placement.epoch
        )
        for choice in choices:
            choice.span = span
            self._sessions[choice] = session
            session.submit(choice, placement.reservation_id, self._logprob_options(choice))
        if not self.placed.done():
            self.placed.set_result(None)

    def _logprob_options(self, choice: Choice) -> LogprobOptions | None:
        """What is still wanted: prompt rows once, and only of the first choice."""
        options = self.prompt.spec.logprobs
        if options is None or not options.HasField("prompt_start"):
            return options
        wanted = LogprobOptions()
        wanted.CopyFrom(options)
        rows = choice.prompt_logprobs
        if rows is None or len(rows) == len(self.prompt.token_ids) - rows.start_position:
            wanted.ClearField("prompt_start")
        return wanted

    async def _losses(self) -> list[Choice]:
        """Wait until all choices ended, or some lost their worker; returns those."""
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            raise self._error
        lost, self._lost = self._lost, []
        return lost

    def _move_on(self, attempts: Attempts, worker_id: str) -> None:
        """Choices lost their worker. Raises what ends the request when that happened too often."""
        loss, self._loss = self._loss, None
        assert loss is not None, "a choice is lost for a reason"
        attempts.give_up_on(worker_id, loss)
        self._pipeline.metrics.migrations.inc()
        span = self.prompt.spec.span
        span.add_event("migration", worker_id=worker_id, reason=loss.message)
        logger.warning(
            "event=request_migrates request_id=%s attempt=%d error=%s",
            self.prompt.spec.schedule_id,
            attempts.number,
            loss.message,
            extra=span.log_fields,
        )

    def _report(self, attempt: int, placement: Placement, code: int) -> None:
        first = self.first_token_s
        self._pipeline.control.report(
            RequestOutcome(
                request_id=self.prompt.spec.schedule_id,
                attempt=attempt,
                reservation_id=placement.reservation_id,
                worker_id=placement.worker_id,
                code=code,
                num_prompt_tokens=len(self.prompt.token_ids),
                cached_tokens=self.cached_tokens,
                output_tokens=self.num_output_tokens,
                time_to_first_token=duration(first - self.arrival_s) if first else None,
                total_time=duration(time.monotonic() - self.arrival_s),
            )
        )

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were cached for the first choice; its siblings share them."""
        return self.choices[0].cached_tokens

    @property
    def queued_s(self) -> float:
        """Spent until workers were named, over all attempts."""
        return self.hops.schedule_s

    @property
    def elapsed_s(self) -> float:
        """From the request's arrival to its end, or to now."""
        return (self.end_s or time.monotonic()) - self.arrival_s

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.output_ids) for choice in self.choices)

    @property
    def first_token_s(self) -> float:
        """Monotonic time of the first token of any choice; 0 before."""
        return min((c.first_token_s for c in self.choices if c.first_token_s), default=0.0)
