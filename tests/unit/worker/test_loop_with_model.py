"""The engine loop over a real runner: the loop's tokens are those of the model."""

from services.common.model_files import builtin_model_path
from services.worker.engine.loop import build_loop
from services.worker.engine.messages import Request, SamplingParams
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner
from tests.fakes.engine_driver import ListInbox, ListOutbox, run_to_end
from tests.fakes.step_driver import StepDriver

SYSTEM = list(range(300, 350))


def test_cached_chunked_and_preempted_sequences_get_the_tokens_they_get_alone() -> None:
    path = builtin_model_path()
    options = EngineOptions(
        model_path=path,
        tokenizer_path=path,
        device="cpu",
        chunked_prefill_size=24,
        num_pages=14,
        max_running_sequences=8,
    )
    runner, plan = build_runner(options, lambda fraction, what: None)
    requests = [
        Request(
            key=key,
            request_id=str(key),
            token_ids=[*SYSTEM, *range(400 + key, 410 + 2 * key)],
            prompt_len=len(SYSTEM) + 10 + key,
            sampling=SamplingParams(
                temperature=0.0 if key % 2 else 0.8,
                seed=key,
                max_new_tokens=30,
                ignore_eos=True,
                frequency_penalty=0.2 if key % 3 == 0 else 0.0,
            ),
        )
        for key in range(6)
    ]
    inbox, outbox = ListInbox(), ListOutbox()
    loop = build_loop(runner, plan, inbox, outbox)
    tokens = run_to_end(loop, inbox, outbox, requests)
    # 14 pages hold three of them, which share three pages, at their full length of six or seven.
    assert outbox.outputs[-1].load.num_preemptions > 0
    assert outbox.outputs[-1].load.num_cached_tokens > 0
    roomy = build_runner(
        EngineOptions(model_path=path, tokenizer_path=path, device="cpu", num_pages=512),
        lambda fraction, what: None,
    )[0]
    driver = StepDriver(roomy, page_size=plan.page_size)
    for request in requests:
        sequence = driver.start(request.token_ids, request.sampling)
        assert tokens[request.key] == driver.generate([sequence], 30)[0]
