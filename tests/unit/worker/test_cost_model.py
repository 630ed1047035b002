"""The online fit of step times."""

import random

import pytest

from services.worker.cost_model import CostCoefficients, CostModel
from services.worker.engine.messages import StepWork

# Of an 8-billion-parameter model with grouped queries.
PAIR_WORK = 3.8e-5


def decode_step(sequences: int, context: int, scale: float = 1.0) -> StepWork:
    ns = scale * (4_000_000 + 20_000 * sequences + 3 * context)
    return StepWork(step_ns=int(ns), decode_sequences=sequences, decode_context_tokens=context)


def prefill_step(tokens: int, context: int) -> StepWork:
    ns = 1_000_000 + 50_000 * tokens + 2 * tokens * context
    return StepWork(step_ns=ns, prefill_tokens=tokens, prefill_context_products=tokens * context)


class Gpu:
    """A device as an H100 is with that model: products wait for weights or for arithmetic."""

    def __init__(self) -> None:
        self.draw = random.Random(3)

    def step(self, prompts: list[int], rows: int = 0, context: int = 0) -> StepWork:
        """Whole prompts beside decoding rows that see `context` tokens each."""
        tokens, pairs = sum(prompts), sum(length * (length - 1) // 2 for length in prompts)
        ns = 0.3e6 + max(4.9e6, 22e3 * (tokens + rows)) + 47.7 * rows * context + 1.35 * pairs
        return StepWork(
            step_ns=int(ns * self.draw.gauss(1, 0.02)),
            prefill_tokens=tokens,
            prefill_context_products=pairs,
            decode_sequences=rows,
            decode_context_tokens=rows * context,
        )

    def work_ns(self, length: int) -> float:
        """What a prompt adds to a full step."""
        return 22e3 * length + 1.35 * length * length / 2


def work_ns(fitted: CostCoefficients, length: int) -> float:
    return length * (fitted.prefill_token_ns + fitted.prefill_context_ns * length / 2)


def test_nothing_is_claimed_before_enough_steps() -> None:
    model = CostModel(PAIR_WORK)
    model.observe(decode_step(3, 100))
    assert model.coefficients() is None


def test_the_fit_finds_the_coefficients() -> None:
    model, draw = CostModel(PAIR_WORK), random.Random(1)
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
    model = CostModel(PAIR_WORK)
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


def test_prompts_of_one_length_beside_decoding_tell_what_others_cost() -> None:
    """They were thought ten times as dear, or free, when the load changed: prompts' tokens, their
    pairs, the rows beside them and the weights that both read once all come together."""
    gpu, model = Gpu(), CostModel(PAIR_WORK)
    for _ in range(8):
        model.observe(gpu.step([128]))
        for position in range(256):
            model.observe(gpu.step([], 1, 128 + position))
    for _ in range(160):
        model.observe(gpu.step([512], gpu.draw.randint(5, 20), 580))
        for _ in range(gpu.draw.randint(1, 12)):
            model.observe(gpu.step([], gpu.draw.randint(5, 20), 580))
    for at_once in (1, 2, 4):
        for _ in range(100):
            model.observe(gpu.step([1024] * at_once, 128, 1088))
        fitted = model.coefficients()
        assert fitted is not None
        for length in (128, 512, 1024):
            assert work_ns(fitted, length) == pytest.approx(gpu.work_ns(length), rel=0.3)
        assert work_ns(fitted, 8000) == pytest.approx(gpu.work_ns(8000), rel=0.6)
    for rows, context in ((1, 200), (16, 500), (128, 1088)):
        step = gpu.step([], rows, context)
        predicted = (
            fitted.decode_base_ns
            + rows * fitted.decode_sequence_ns
            + rows * context * fitted.decode_context_ns
        )
        assert predicted == pytest.approx(step.step_ns, rel=0.15)


def test_prompts_of_one_length_say_little_of_attention() -> None:
    gpu, model = Gpu(), CostModel(PAIR_WORK)
    for _ in range(100):
        model.observe(gpu.step([512] * gpu.draw.randint(1, 4)))
    fitted = model.coefficients()
    assert fitted is not None
    assert work_ns(fitted, 32_000) == pytest.approx(gpu.work_ns(32_000), rel=0.5)


def test_the_fit_follows_a_change() -> None:
    model, draw = CostModel(PAIR_WORK, forgetting=0.99), random.Random(2)
    for scale in (1.0, 3.0):
        for _ in range(1000):
            model.observe(decode_step(draw.randint(1, 256), draw.randint(0, 500_000), scale))
    fitted = model.coefficients()
    assert fitted is not None
    assert fitted.decode_base_ns == pytest.approx(12_000_000, rel=0.05)


def test_old_steps_fade_without_overflow() -> None:
    model = CostModel(PAIR_WORK, forgetting=0.5)
    for _ in range(5000):
        model.observe(decode_step(8, 1000))
    fitted = model.coefficients()
    assert fitted is not None
    predicted = (
        fitted.decode_base_ns + 8 * fitted.decode_sequence_ns + 1000 * fitted.decode_context_ns
    )
    assert predicted == pytest.approx(decode_step(8, 1000).step_ns, rel=0.01)


def test_coefficients_are_never_negative() -> None:
    model = CostModel(PAIR_WORK)
    for tokens in range(1, 200):
        # Longer prefills that take less time: nonsense, but no reason for negative times.
        model.observe(StepWork(step_ns=10_000_000 - 10_000 * tokens, prefill_tokens=tokens))
    fitted = model.coefficients()
    assert fitted is not None
    assert fitted.prefill_token_ns == 0
    assert fitted.prefill_base_ns > 0


def test_steps_that_computed_nothing_are_left_out() -> None:
    model = CostModel(PAIR_WORK)
    for _ in range(100):
        model.observe(StepWork(step_ns=1000))
        model.observe(StepWork(step_ns=0, decode_sequences=1))
    assert model.coefficients() is None
