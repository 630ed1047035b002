"""The airlock inward: defaults applied, every limit checked, the wrong field named."""

import math
from typing import Any

import msgspec
import pytest
from google.protobuf.duration_pb2 import Duration

from rhizome.common.v1 import logprobs_pb2, pool_identity_pb2, sampling_params_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import DeadlineError, InvalidRequestError, PreconditionError
from services.worker import wire
from services.worker.engine.messages import LogprobSpec, Request, SamplingParams

LIMITS = wire.Limits(context_length=100, vocab_size=50, default_namespace="own")


def convert(submit: pb.Submit, token_ids: list[int] | None = None) -> Request:
    ids = list(submit.token_ids) if token_ids is None else token_ids
    return wire.request_from_submit(submit, ids, key=9, limits=LIMITS, now_ns=1000)


def make(sampling: dict[str, Any] | None = None, **fields: Any) -> pb.Submit:
    fields = {"prompt_len": 3, "num_token_ids": 3, "token_ids": [1, 2, 3], **fields}
    return pb.Submit(sampling=sampling_params_pb2.SamplingParams(**(sampling or {})), **fields)


def test_unset_means_the_documented_defaults() -> None:
    request = convert(make({"seed": 4}))
    assert request.sampling == SamplingParams(
        temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=97, seed=4
    )
    assert request.logprobs == LogprobSpec()
    assert (request.namespace, request.deadline_ns, request.arrival_ns) == ("own", None, 1000)


def test_a_seed_is_drawn_when_none_is_given() -> None:
    assert convert(make()).sampling.seed != convert(make()).sampling.seed


def test_zeros_are_choices() -> None:
    zeros = {"temperature": 0.0, "max_new_tokens": 0, "top_k": 0, "min_p": 0.0, "seed": 0}
    sampling = convert(make(zeros)).sampling
    assert (sampling.temperature, sampling.max_new_tokens, sampling.seed) == (0.0, 0, 0)
    # Zero and -1 both keep all tokens.
    assert sampling.top_k == -1


def test_everything_given_arrives() -> None:
    submit = make(
        {
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 7,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "frequency_penalty": -1.0,
            "presence_penalty": 2.0,
            "max_new_tokens": 20,
            "min_new_tokens": 5,
            "stop_token_ids": [4, 5],
            "ignore_eos": True,
            "logit_bias_ids": [6, 7],
            "logit_bias_values": [-100.0, 1.5],
            "seed": 2**64 - 1,
        },
        request_id="r",
        prompt_len=2,
        choice_index=3,
        namespace="space",
        reservation_id=2**63,
        priority=-4,
        remaining=Duration(seconds=2, nanos=5),
        logprobs=logprobs_pb2.LogprobOptions(
            output=True, num_top=5, prompt_start=0, token_ids=[8, 9]
        ),
    )
    assert convert(submit) == Request(
        key=9,
        request_id="r",
        token_ids=[1, 2, 3],
        prompt_len=2,
        sampling=SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=7,
            min_p=0.125,
            repetition_penalty=1.5,
            frequency_penalty=-1.0,
            presence_penalty=2.0,
            max_new_tokens=20,
            min_new_tokens=5,
            stop_token_ids=(4, 5),
            ignore_eos=True,
            logit_bias=((6, -100.0), (7, 1.5)),
            seed=2**64 - 1,
        ),
        logprobs=LogprobSpec(output=True, num_top=5, prompt_start=0, token_ids=(8, 9)),
        choice_index=3,
        namespace="space",
        reservation_id=2**63,
        deadline_ns=1000 + 2_000_000_005,
        arrival_ns=1000,
        priority=-4,
    )


def test_more_tokens_than_the_context_leaves_are_cut_to_what_it_leaves() -> None:
    assert convert(make({"max_new_tokens": 5000})).sampling.max_new_tokens == 97


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 2.5}, "repetition_penalty"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"logit_bias_ids": [1]}, "logit_bias"),
        ({"logit_bias_ids": [50], "logit_bias_values": [1.0]}, "logit_bias"),
        ({"logit_bias_ids": [1], "logit_bias_values": [100.5]}, "logit_bias"),
        ({"logit_bias_ids": [1], "logit_bias_values": [math.nan]}, "logit_bias"),
        ({"json_schema": "{}"}, "json_schema"),
        ({"regex": "a"}, "regex"),
        ({"ebnf": "a"}, "ebnf"),
        ({"structural_tag": "a"}, "structural_tag"),
    ],
)
def test_bad_sampling_is_refused_by_name(sampling: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError, match=param) as raised:
        convert(make(sampling))
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_len": 0}, "prompt_len"),
        ({"prompt_len": 100, "num_token_ids": 100, "token_ids": [1] * 100}, "prompt_len"),
        ({"prompt_len": 4}, "num_token_ids"),
        ({"num_token_ids": 101}, "num_token_ids"),
        ({"num_token_ids": 3, "token_ids": [1, 2, 3, 4]}, "token_ids"),
        ({"num_token_ids": 4}, "token_ids"),
        ({"token_ids": [1, 2, 50]}, "token_ids"),
        ({"namespace": "x" * 513}, "namespace"),
        ({"logprobs": logprobs_pb2.LogprobOptions(num_top=65)}, "logprobs.num_top"),
        ({"logprobs": logprobs_pb2.LogprobOptions(token_ids=[1] * 65)}, "logprobs.token_ids"),
        ({"logprobs": logprobs_pb2.LogprobOptions(token_ids=[50])}, "logprobs.token_ids"),
        ({"logprobs": logprobs_pb2.LogprobOptions(prompt_start=4)}, "logprobs.prompt_start"),
    ],
)
def test_what_breaks_a_limit_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        convert(make(**fields))
    assert raised.value.param == param


@pytest.mark.parametrize("remaining", [Duration(), Duration(seconds=-1), Duration(nanos=-1)])
def test_a_deadline_that_has_passed_is_refused(remaining: Duration) -> None:
    with pytest.raises(DeadlineError):
        convert(make(remaining=remaining))


def test_a_deadline_beyond_all_clocks_still_reaches_the_engine() -> None:
    request = convert(make(remaining=Duration(seconds=2**63 - 1)))
    assert request.deadline_ns is not None
    assert request.deadline_ns > 86_400 * 10**9
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request) == request


def test_the_highest_common_revision_is_spoken() -> None:
    def revision(low: int, high: int) -> int:
        theirs = pool_identity_pb2.ProtocolRange(min_revision=low, max_revision=high)
        return wire.common_revision(theirs)

    assert revision(1, 1) == 1
    assert revision(0, 7) == 1
    for low, high in ((2, 3), (0, 0)):
        with pytest.raises(PreconditionError):
            revision(low, high)
