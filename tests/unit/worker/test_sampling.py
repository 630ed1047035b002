"""Every sampling parameter, each in a case that fails when it is ignored."""

import numpy as np
import pytest
import torch

from services.worker.engine.messages import SamplingParams
from services.worker.engine.sampling.filters import FilterRows, thresholds
from tests.unit.worker.sampling_rows import EOS, sample_rows

V = 64


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, **changes})


def logits_of(**values: float) -> torch.Tensor:
    """[1, V] zeros but for t<id>=value."""
    row = torch.zeros(1, V)
    for name, value in values.items():
        row[0, int(name[1:])] = value
    return row


def draws(logits: torch.Tensor, number: int, **changes: object) -> list[int]:
    """Tokens that `number` positions draw from the same logits."""
    one = params(**{"temperature": 1.0, "seed": 5, **changes})
    return sample_rows(
        logits.expand(number, -1), [one] * number, positions=list(range(1, number + 1))
    )


def test_temperature_zero_takes_the_largest_logit() -> None:
    assert sample_rows(logits_of(t9=0.1), [params(seed=3)]) == [9]


def test_a_tiny_temperature_is_greedy() -> None:
    assert sample_rows(logits_of(t9=0.1), [params(temperature=1e-30)]) == [9]


def test_temperature_flattens_and_sharpens() -> None:
    logits = logits_of(t9=4.0)
    cold = draws(logits, 400, temperature=0.5).count(9)
    warm = draws(logits, 400, temperature=1.0).count(9)
    hot = draws(logits, 400, temperature=3.0).count(9)
    assert cold > 350 > warm > 100 > hot


def test_seed_choice_and_position_each_change_the_draw() -> None:
    flat = torch.zeros(40, V)
    by_seed = sample_rows(flat, [params(temperature=1.0, seed=s) for s in range(40)])
    by_choice = sample_rows(flat, [params(temperature=1.0, seed=7)] * 40, choices=list(range(40)))
    by_position = draws(torch.zeros(1, V), 40, seed=7)
    for tokens in (by_seed, by_choice, by_position):
        assert len(set(tokens)) > 15


def test_seeds_that_differ_in_high_bits_only_differ() -> None:
    flat = torch.zeros(32, V)
    low = sample_rows(flat, [params(temperature=1.0, seed=1)] * 32, positions=list(range(32)))
    high = sample_rows(
        flat, [params(temperature=1.0, seed=1 + 2**40)] * 32, positions=list(range(32))
    )
    assert low != high


def test_a_row_samples_the_same_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, V, generator=generator)
    kinds = [
        params(),
        params(temperature=0.8, seed=1),
        params(temperature=1.0, seed=2, top_k=5),
        params(temperature=1.2, seed=3, top_p=0.7),
        params(temperature=1.0, seed=4, min_p=0.2, top_k=20, top_p=0.9),
        params(temperature=1.0, seed=5, frequency_penalty=1.0, logit_bias=((4, 3.0),)),
    ]
    rows = [kinds[i % len(kinds)] for i in range(12)]
    prompts = [[i, i + 1] for i in range(12)]
    together = sample_rows(logits, rows, prompts=prompts)
    for i in range(12):
        alone = sample_rows(logits[i : i + 1], [rows[i]], prompts=[prompts[i]])
        assert alone == together[i : i + 1]


def test_top_k_keeps_k_tokens() -> None:
    logits = torch.arange(V).float()[None] / 50
    assert set(draws(logits, 200, top_k=3)) == {V - 1, V - 2, V - 3}


def test_top_k_one_is_greedy() -> None:
    assert set(draws(logits_of(t9=0.1), 50, top_k=1)) == {9}


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    probabilities = torch.full((1, V), 1e-6)
    probabilities[0, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = probabilities.log()
    assert set(draws(logits, 200, top_p=0.65)) == {0, 1}
    assert set(draws(logits, 200, top_p=0.75)) == {0, 1, 2}


def test_top_p_zero_keeps_the_most_likely_token() -> None:
    assert set(draws(logits_of(t9=0.1), 50, top_p=0.0)) == {9}


def test_top_p_acts_on_what_top_k_left() -> None:
    probabilities = torch.full((1, V), 1e-6)
    probabilities[0, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Of the two that top-k leaves, the first has 4/7 = 0.57 of the probability.
    assert set(draws(probabilities.log(), 200, top_k=2, top_p=0.5)) == {0}
    assert set(draws(probabilities.log(), 200, top_k=2, top_p=0.6)) == {0, 1}


def test_min_p_drops_what_is_far_below_the_most_likely() -> None:
    probabilities = torch.full((1, V), 1e-4)
    probabilities[0, :4] = torch.tensor([0.5, 0.3, 0.1, 0.04])
    assert set(draws(probabilities.log(), 300, min_p=0.19)) == {0, 1, 2}


def test_filters_act_after_temperature() -> None:
    probabilities = torch.full((1, V), 1e-9)
    probabilities[0, :3] = torch.tensor([0.6, 0.3, 0.1])
    # Squared, the first has 0.36 / 0.46 = 0.78 of the probability.
    assert set(draws(probabilities.log(), 200, temperature=0.5, top_p=0.7)) == {0}


def test_top_p_looks_as_far_as_it_must() -> None:
    wide = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    wide[1] *= 8
    filters = FilterRows(
        top_k=torch.tensor([5000, 5000, 7]),
        top_p=torch.tensor([0.95, 0.95, 1.0]),
        min_p=torch.zeros(3),
        largest_k=7,
        any_open_top_p=True,
    )
    found = thresholds(wide, filters)
    for row in range(3):
        alone = FilterRows(
            top_k=filters.top_k[row : row + 1],
            top_p=filters.top_p[row : row + 1],
            min_p=filters.min_p[row : row + 1],
            largest_k=7 if row == 2 else 1,
            any_open_top_p=row != 2,
        )
        assert thresholds(wide[row : row + 1], alone).item() == found[row].item()
    kept = wide[0].softmax(-1)[wide[0] >= found[0]]
    assert kept.sum() >= 0.95
    assert kept.sum() - kept.min() < 0.95
    assert len(kept) > 1024
    assert int((wide[2] >= found[2]).sum()) == 7


def test_repetition_penalty_acts_on_prompt_and_output() -> None:
    logits = logits_of(t7=2.0, t8=1.9, t9=1.8)
    penalised = params(repetition_penalty=2.0)
    assert sample_rows(logits, [penalised], prompts=[[7]]) == [8]
    assert sample_rows(logits, [penalised], prompts=[[7]], outputs=[[8]]) == [9]


def test_repetition_penalty_lowers_negative_logits_too() -> None:
    logits = torch.full((1, V), -3.0)
    logits[0, 7], logits[0, 8] = -1.0, -1.5
    assert sample_rows(logits, [params(repetition_penalty=2.0)], prompts=[[7]]) == [8]


def test_frequency_penalty_counts_outputs_only() -> None:
    logits = logits_of(t7=2.0, t8=1.0)
    penalised = params(frequency_penalty=0.4)
    assert sample_rows(logits, [penalised], prompts=[[7, 7, 7]]) == [7]
    assert sample_rows(logits, [penalised], outputs=[[7, 7]]) == [7]
    assert sample_rows(logits, [penalised], outputs=[[7, 7, 7]]) == [8]


def test_presence_penalty_acts_once_and_on_outputs_only() -> None:
    logits = logits_of(t7=2.0, t8=1.0)
    assert sample_rows(logits, [params(presence_penalty=1.1)], prompts=[[7]]) == [7]
    assert sample_rows(logits, [params(presence_penalty=1.1)], outputs=[[7]]) == [8]
    assert sample_rows(logits, [params(presence_penalty=0.9)], outputs=[[7] * 9]) == [7]


def test_sampled_tokens_are_counted() -> None:
    logits = logits_of(t7=2.0, t8=1.0)
    assert sample_rows(logits, [params(frequency_penalty=0.4)], num_steps=3) == [7]
    assert sample_rows(logits, [params(frequency_penalty=0.4)], num_steps=4) == [8]


def test_penalties_of_one_row_leave_others_alone() -> None:
    logits = logits_of(t7=2.0, t8=1.9).expand(3, -1)
    rows = [params(), params(presence_penalty=1.0), params()]
    assert sample_rows(logits, rows, outputs=[[7]] * 3) == [7, 8, 7]


def test_logit_bias_adds_to_logits() -> None:
    logits = logits_of(t7=2.0)
    assert sample_rows(logits, [params(logit_bias=((9, 2.5), (7, 0.1)))]) == [9]
    assert sample_rows(logits, [params(logit_bias=((7, -100.0), (9, 0.5)))]) == [9]


def test_bias_comes_after_the_repetition_penalty() -> None:
    logits = logits_of(t7=2.0, t8=1.5)
    biased = params(repetition_penalty=2.0, logit_bias=((7, 1.0),))
    assert sample_rows(logits, [biased], prompts=[[7]]) == [7]


@pytest.mark.parametrize("banned", [EOS[1], 9])
def test_stop_ids_wait_for_min_new_tokens(banned: int) -> None:
    logits = logits_of(**{f"t{banned}": 5.0, "t20": 4.0})
    stopping = params(min_new_tokens=2, stop_token_ids=(9,))
    assert sample_rows(logits, [stopping], outputs=[[20]]) == [20]
    assert sample_rows(logits, [stopping], outputs=[[20, 20]]) == [banned]


def test_ignored_eos_is_not_barred() -> None:
    logits = logits_of(**{f"t{EOS[0]}": 5.0})
    free = params(min_new_tokens=4, ignore_eos=True)
    assert sample_rows(logits, [free]) == [EOS[0]]


def test_bias_cannot_lift_the_bar_on_stop_ids() -> None:
    logits = logits_of(t20=1.0)
    assert sample_rows(logits, [params(min_new_tokens=1, logit_bias=((EOS[0], 100.0),))]) == [20]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.8}])
def test_draws_follow_the_distribution(changes: dict[str, float]) -> None:
    """Pearson's chi-square against the filtered softmax, at fixed seeds."""
    number, vocab_size = 20_000, 12
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(3)) * 1.5
    scaled = logits[0].double() / changes.get("temperature", 1.0)
    expected = scaled.softmax(-1)
    order = expected.argsort(descending=True)
    if "top_k" in changes:
        expected[order[int(changes["top_k"]) :]] = 0
    if "top_p" in changes:
        before = expected[order].cumsum(-1) - expected[order]
        expected[order[before >= changes["top_p"]]] = 0
    expected = expected / expected.sum() * number
    observed = np.bincount(draws(logits, number, **changes), minlength=vocab_size)
    kept = expected.numpy() > 0
    assert observed[~kept].sum() == 0
    statistic = ((observed - expected.numpy())[kept] ** 2 / expected.numpy()[kept]).sum()
    degrees = kept.sum() - 1
    # Mean plus five standard deviations of a chi-square with so many degrees of freedom.
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


def test_choices_of_one_seed_draw_independently() -> None:
    """Chi-square of the joint distribution of two choices' tokens against the product."""
    number, vocab_size = 16_000, 4
    flat = torch.zeros(number, vocab_size)
    one = [params(temperature=1.0, seed=9)] * number
    at = list(range(number))
    first = sample_rows(flat, one, positions=at, choices=[0] * number)
    second = sample_rows(flat, one, positions=at, choices=[1] * number)
    joint = np.bincount(np.array(first) * vocab_size + second, minlength=vocab_size**2)
    expected = number / vocab_size**2
    assert ((joint - expected) ** 2 / expected).sum() < 15 + 5 * np.sqrt(30)
