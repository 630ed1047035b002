"""The online fit of step times."""

import random

import pytest

from services.worker.cost_model import CostModel
from services.worker.engine.messages import StepWork


def decode_step(sequences: int, context: int, scale: float = 1.0) -> StepWork:
    ns = scale * (4_000_000 + 20_000 * sequences + 3 * context)
    return StepWork(step_ns=int(ns), decode_sequences=sequences, decode_context_tokens=context)


def prefill_step(tokens: int, context: int) -> StepWork:
    ns = 1_000_000 + 50_000 * tokens + 2 * tokens * context
    return StepWork(step_ns=ns, prefill_tokens=tokens, prefill_context_products=tokens * context)


def test_nothing_is_claimed_before_enough_steps() -> None:
    model = CostModel()
    model.observe(decode_step(3, 100))
    assert model.coefficients() is None


def test_the_fit_finds_the_coefficients() -> None:
    model, draw = CostModel(), random.Random(1)
    for _ in range(400):
        model.observe(decode_step(draw.randint(1, 256), draw.randint(0, 500_000)))
        model.observe(prefill_step(draw.randint(16, 2048), draw.randint(0, 8000)))
    fitted = model.coefficients()
    assert fitted is not None
    assert fitted.decode_base_ns == pytest.approx(4_000_000, rel=0.02)
    assert fitted.decode_sequence_ns == pytest.approx(20_000, rel=0.05)
    assert fitted.decode_context_ns == pytest.approx(3, rel=0.05)
    assert fitted.prefill_base_ns == pytest.approx(1_000_000, rel=0.05)
    assert fitted.prefill_token_ns == pytest.approx(50_000, rel=0.02)
    assert fitted.prefill_context_ns == pytest.approx(2, rel=0.02)


def test_two_prompts_and_some_decoding_are_no_reason_to_think_that_prompts_are_free() -> None:
    # Measured on a CPU: the second prompt was a little slower a token than the first.
    model = CostModel()
    model.observe(StepWork(step_ns=750_000_000, prefill_tokens=512))
    for position in range(15):
        model.observe(decode_step(1, 512 + position))
    model.observe(
        StepWork(step_ns=431_000_000, prefill_tokens=400, prefill_context_products=80_000)
    )
    fitted = model.coefficients()
    assert fitted is not None
    assert fitted.prefill_token_ns == pytest.approx(1_200_000, rel=0.3)
    assert fitted.prefill_ns(400, 200) == pytest.approx(431_000_000, rel=0.3)


def test_the_fit_follows_a_change() -> None:
    model, draw = CostModel(forgetting=0.99), random.Random(2)
    for scale in (1.0, 3.0):
        for _ in range(1000):
            model.observe(decode_step(draw.randint(1, 256), draw.randint(0, 500_000), scale))
    fitted = model.coefficients()
    assert fitted is not None
    assert fitted.decode_base_ns == pytest.approx(12_000_000, rel=0.05)


def test_old_steps_fade_without_overflow() -> None:
    model = CostModel(forgetting=0.5)
    for _ in range(5000):
        model.observe(decode_step(8, 1000))
    fitted = model.coefficients()
    assert fitted is not None
    predicted = (
        fitted.decode_base_ns + 8 * fitted.decode_sequence_ns + 1000 * fitted.decode_context_ns
    )
    assert predicted == pytest.approx(decode_step(8, 1000).step_ns, rel=0.01)


def test_coefficients_are_never_negative() -> None:
    model = CostModel()
    for tokens in range(1, 200):
        # Longer prefills that take less time: nonsense, but no reason for negative times.
        model.observe(StepWork(step_ns=10_000_000 - 10_000 * tokens, prefill_tokens=tokens))
    fitted = model.coefficients()
    assert fitted is not None
    assert fitted.prefill_token_ns == 0
    assert fitted.prefill_base_ns > 0


def test_steps_that_computed_nothing_are_left_out() -> None:
    model = CostModel()
    for _ in range(100):
        model.observe(StepWork(step_ns=1000))
        model.observe(StepWork(step_ns=0, decode_sequences=1))
    assert model.coefficients() is None
