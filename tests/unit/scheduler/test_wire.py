import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb
from services.common.errors import InvalidRequestError
from services.scheduler import wire
from services.scheduler.costs import DEFAULT_COST_MODEL


def test_a_fit_without_prefills_keeps_its_decode_times_only() -> None:
    report = pb.LoadReport(cost_model=pb.CostModel(decode_base_ns=3, decode_sequence_ns=4))
    costs = wire.load(report).cost_model
    assert costs is not None
    assert (costs.decode_base_ns, costs.decode_sequence_ns) == (3, 4)
    assert costs.prefill_token_ns == DEFAULT_COST_MODEL.prefill_token_ns


def test_a_report_without_a_fit_has_none() -> None:
    assert wire.load(pb.LoadReport(num_running=1)).cost_model is None


def test_unset_time_is_no_limit_and_unset_arrival_is_now() -> None:
    message = pb.ScheduleRequest(request_id="r")
    assert wire.remaining_s(message) is None
    assert wire.age_s(message, 50.0) == 0


@pytest.mark.parametrize(("arrival", "age"), [(47, 3.0), (60, 0.0)])
def test_age_counts_from_the_first_arrival_and_never_from_the_future(
    arrival: int, age: float
) -> None:
    message = pb.ScheduleRequest(first_arrival=Timestamp(seconds=arrival))
    assert wire.age_s(message, 50.0) == age


def test_a_request_has_at_least_one_choice() -> None:
    assert wire.placement_request(pb.ScheduleRequest(request_id="r")).num_choices == 1


def test_a_session_belongs_to_its_tenant() -> None:
    message = pb.ScheduleRequest(request_id="r", tenant="t", session_id="s")
    assert wire.placement_request(message).session == ("t", "s")
    assert wire.placement_request(pb.ScheduleRequest(request_id="r", tenant="t")).session is None


def test_more_hashes_than_tokens_are_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        wire.placement_request(pb.ScheduleRequest(request_id="r", prefix_hashes=[1]))
    assert caught.value.param == "prefix_hashes"


def test_a_report_carries_what_evictions_would_cost() -> None:
    assert wire.load(pb.LoadReport(eviction_cost_ns=[1.0, 3.5])).eviction_cost_ns == (1.0, 3.5)
    assert wire.load(pb.LoadReport()).eviction_cost_ns == ()
