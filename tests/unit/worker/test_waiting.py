import pytest

from services.worker.engine.batching.cache import SequenceCache
from services.worker.engine.batching.sequence import Sequence
from services.worker.engine.batching.waiting import WaitingQueue
from services.worker.engine.messages import Request, SamplingParams


@pytest.fixture
def queue() -> WaitingQueue:
    return WaitingQueue()


def sequence(key: int, *, priority: int = 0, arrival_ns: int = 0) -> Sequence:
    request = Request(
        key=key,
        request_id=str(key),
        token_ids=[1],
        prompt_len=1,
        sampling=SamplingParams(),
        priority=priority,
    )
    return Sequence(
        request=request,
        token_ids=[1],
        keys=[],
        end_len=2,
        stop_ids=frozenset(),
        arrival_ns=arrival_ns,
        tail=SequenceCache(1, 1).tree.root,
        next_prompt_logprob=None,
    )


def keys(queue: WaitingQueue) -> list[int]:
    return [entry.key for entry in queue]


def test_higher_priorities_then_earlier_arrivals_come_first(queue):
    queue.add(sequence(1, arrival_ns=20), 1)
    queue.add(sequence(2, arrival_ns=10), 1)
    queue.add(sequence(3, arrival_ns=30, priority=1), 1)
    queue.add(sequence(4, arrival_ns=10), 1)
    assert keys(queue) == [3, 2, 4, 1]


def test_a_preempted_sequence_is_the_head_of_its_priority(queue):
    preempted = sequence(1, arrival_ns=99)
    preempted.preempted_ns.append(100)
    queue.add(sequence(2, arrival_ns=1), 1)
    queue.add(sequence(3, arrival_ns=1, priority=1), 1)
    queue.add(preempted, 1)
    assert keys(queue) == [3, 1, 2]


def test_the_sequence_handed_out_may_be_removed_meanwhile(queue):
    for key in range(5):
        queue.add(sequence(key), 1)
    seen = []
    for entry in queue:
        seen.append(entry.key)
        if entry.key % 2 == 0:
            queue.remove(entry)
    assert seen == [0, 1, 2, 3, 4]
    assert keys(queue) == [1, 3]


def test_uncached_tokens_are_summed_as_sequences_come_and_go(queue):
    first, second = sequence(1), sequence(2)
    queue.add(first, 10)
    queue.add(second, 5)
    queue.update(first, 3)
    assert queue.num_uncached_tokens == 8
    queue.remove(first)
    assert queue.num_uncached_tokens == 5
    assert first not in queue
    assert second in queue
    assert len(queue) == 1
