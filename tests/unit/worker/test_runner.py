"""One runner: the same tokens however the work is cut, batched, cached and named."""

from pathlib import Path

import pytest

from services.worker.engine.batch import PromptLogprobRequest
from services.worker.engine.messages import LogprobSpec, SamplingParams
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.fakes.engines import PAGE_SIZE, open_driver, open_runner
from tests.fakes.step_driver import GREEDY, DrivenSequence, StepDriver

PROMPT = [(7 * i * i + 3 * i) % VOCAB_SIZE for i in range(37)]
NUM = 20
SEEDED = SamplingParams(temperature=0.9, seed=12345, top_p=0.95)
PENALISED = SamplingParams(
    temperature=0.7, seed=6, frequency_penalty=0.3, repetition_penalty=1.2, top_k=30
)
KINDS = pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, "Qwen3", use_sliding_window=True, sliding_window=24, max_window_layers=2)
    return path


@pytest.fixture
def driver(model_path: Path) -> StepDriver:
    return open_driver(model_path)


def alone(driver: StepDriver, prompt: list[int], sampling: SamplingParams) -> list[int]:
    return driver.generate([driver.start(prompt, sampling)], NUM)[0]


@KINDS
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunked_prefill_gives_the_same_tokens(
    driver: StepDriver, sampling: SamplingParams, chunk: int
) -> None:
    whole = alone(driver, PROMPT, sampling)
    assert driver.generate([driver.start(PROMPT, sampling)], NUM, chunk=chunk) == [whole]


@KINDS
def test_a_sequence_gets_the_same_tokens_alone_and_among_32(
    driver: StepDriver, sampling: SamplingParams
) -> None:
    prompts = [[(i * j + i) % VOCAB_SIZE for j in range(1, 4 + i)] for i in range(32)]
    kinds = [sampling if i % 2 else (GREEDY, SEEDED, PENALISED)[i % 3] for i in range(32)]
    sequences = [driver.start(p, k) for p, k in zip(prompts, kinds, strict=True)]
    together = driver.generate(sequences, NUM)
    for i in (0, 1, 17, 31):
        assert together[i] == alone(driver, prompts[i], kinds[i])


@KINDS
def test_a_cached_prefix_gives_the_same_tokens(
    driver: StepDriver, sampling: SamplingParams
) -> None:
    first = driver.start(PROMPT, sampling)
    cold = driver.generate([first], NUM)[0]
    pages = (len(PROMPT) - 1) // PAGE_SIZE
    warm = driver.start(PROMPT, sampling, shared=first, num_shared_pages=pages)
    assert driver.generate([warm], NUM) == [cold]


@KINDS
def test_a_continuation_elsewhere_goes_on_with_the_same_tokens(
    model_path: Path, driver: StepDriver, sampling: SamplingParams
) -> None:
    whole = alone(driver, PROMPT, sampling)
    other = open_driver(model_path)
    resumed = other.start(PROMPT + whole[:7], sampling, prompt_len=len(PROMPT))
    assert other.generate([resumed], NUM - 7) == [whole[7:]]


@KINDS
def test_ids_that_only_the_device_knows_are_resolved_there(
    driver: StepDriver, sampling: SamplingParams
) -> None:
    expected = [alone(driver, PROMPT, sampling), alone(driver, PROMPT[:9], sampling)]
    driver.names_last_sampled = True
    sequences = [driver.start(PROMPT, sampling), driver.start(PROMPT[:9], sampling)]
    assert driver.generate(sequences, NUM) == expected


def test_a_step_may_be_issued_before_the_last_one_is_read(model_path: Path) -> None:
    runner = open_runner(model_path)
    driver = StepDriver(runner, page_size=PAGE_SIZE)
    expected = alone(driver, PROMPT, SEEDED)[:3]
    ahead = StepDriver(runner, page_size=PAGE_SIZE, first_page=500)
    ahead.names_last_sampled = True
    sequence = ahead.start(PROMPT, SEEDED)
    plans = []
    for num_tokens in (len(PROMPT), 1, 1):
        plans.append(ahead.plan([(sequence, num_tokens)]))
        # Stands for the id that the device samples.
        sequence.token_ids.append(0)
    got = []
    for index, plan in enumerate(plans):
        runner.forward(plan)
        runner.sample()
        if index:
            got += runner.result().token_ids.tolist()
    got += runner.result().token_ids.tolist()
    assert got == expected


def test_a_slot_forgets_its_last_sequence(driver: StepDriver) -> None:
    expected = alone(driver, PROMPT, GREEDY)
    biased = SamplingParams(
        temperature=1.0,
        presence_penalty=2.0,
        logit_bias=((5, 100.0),),
        min_new_tokens=50,
        stop_token_ids=tuple(expected),
    )
    first = driver.start(PROMPT, biased)
    assert driver.generate([first], 5) != [expected[:5]]
    second = driver.start(PROMPT, GREEDY)
    second.slot = second.assignment.slot = first.slot
    assert driver.generate([second], NUM) == [expected]


def test_rows_that_do_not_end_their_tokens_sample_nothing(driver: StepDriver) -> None:
    one, two = driver.start(PROMPT), driver.start(PROMPT[:4])
    result = driver.step([(one, 10), (two, 4)])
    assert len(result.token_ids) == 1
    assert driver.step([(one, 10)]).token_ids.tolist() == []


def test_output_logprobs_are_of_raw_logits(driver: StepDriver) -> None:
    every = tuple(range(VOCAB_SIZE))
    spec = LogprobSpec(output=True, num_top=3, token_ids=every)
    plain = driver.step([(driver.start(PROMPT, logprobs=spec), len(PROMPT))])
    sampling = SamplingParams(
        temperature=3.0, seed=4, presence_penalty=1.0, logit_bias=((3, 50.0),), top_k=4
    )
    biased_sequence = driver.start(PROMPT, sampling, logprobs=spec)
    silent = driver.start(PROMPT[:3])
    biased = driver.step([(silent, 3), (biased_sequence, len(PROMPT))])
    assert list(plain.output_logprobs) == [0]
    assert list(biased.output_logprobs) == [1]
    assert biased.token_ids[1] == 3
    raw, got = plain.output_logprobs[0], biased.output_logprobs[1]
    assert got.requested_logprobs == pytest.approx(raw.requested_logprobs, abs=1e-5)
    assert got.start_position == len(PROMPT)
    assert got.token_ids == [3]
    assert got.logprobs == pytest.approx([raw.requested_logprobs[3]], abs=1e-5)
    ranked = sorted(raw.requested_logprobs, reverse=True)
    assert got.num_top == 3
    assert got.top_logprobs == pytest.approx(ranked[:3], abs=1e-5)
    assert [raw.requested_logprobs[i] for i in got.top_token_ids] == pytest.approx(
        ranked[:3], abs=1e-5
    )


def test_each_row_gets_the_logprobs_it_asked_for(driver: StepDriver) -> None:
    specs = [
        LogprobSpec(output=True),
        LogprobSpec(output=True, num_top=2),
        LogprobSpec(output=True, num_top=1, token_ids=(4, 5, 6)),
    ]
    sequences = [driver.start(PROMPT, logprobs=spec) for spec in specs]
    rows = driver.step([(each, len(PROMPT)) for each in sequences]).output_logprobs
    shapes = [
        (len(rows[i].logprobs), len(rows[i].top_logprobs), len(rows[i].requested_logprobs))
        for i in range(3)
    ]
    assert shapes == [(1, 0, 0), (1, 2, 0), (1, 1, 3)]


def test_prompt_logprobs_are_the_same_in_chunks(driver: StepDriver) -> None:
    spec = LogprobSpec(num_top=2, prompt_start=3)

    def run(cuts: list[int]) -> list[float]:
        sequence: DrivenSequence = driver.start(PROMPT, logprobs=spec)
        other = driver.start(PROMPT[:5])
        driver.step([(other, 5)])
        logprobs: list[float] = []
        start = 0
        for stop in cuts:
            # A position's log-probability comes with the token before it.
            first, last = max(3, start + 1), min(stop + 1, len(PROMPT))
            request = PromptLogprobRequest(
                row=1, start=first, stop=last, token_ids=PROMPT[first:last], spec=spec
            )
            result = driver.step([(other, 1), (sequence, stop - start)], [request])
            rows = result.prompt_logprobs[0]
            assert rows.start_position == first
            assert rows.token_ids == PROMPT[first:last]
            assert len(rows.top_logprobs) == 2 * (last - first)
            logprobs += rows.logprobs
            start = stop
        return logprobs

    whole = run([len(PROMPT)])
    assert len(whole) == len(PROMPT) - 3
    assert run([3, 9, 30, len(PROMPT)]) == pytest.approx(whole, abs=1e-5)
