"""The noise of sampling, against published and our own vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from services.worker.engine.messages import SamplingParams
from services.worker.engine.sampling import philox
from tests.unit.worker.sampling_rows import sample_rows

VECTORS = json.loads(Path(philox.__file__).with_name("vectors.json").read_text())

# Random123's kat_vectors, philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def _hex(words: str) -> np.ndarray:
    return np.array([int(word, 16) for word in words.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: str, key: str, words: str) -> None:
    assert philox.philox_numpy(_hex(counter), _hex(key)).tolist() == _hex(words).tolist()


def test_both_implementations_give_our_words() -> None:
    for case in VECTORS["words"]:
        token_ids, expected = case["token_ids"], case["words"]
        vocab_size = max(token_ids) + 1
        seeds = np.array([case["seed"]], np.uint64)
        choices, positions = np.array([case["choice_index"]]), np.array([case["position"]])
        by_numpy = philox.sampling_words_numpy(seeds, choices, positions, vocab_size)
        by_torch = philox.sampling_words(
            torch.from_numpy(philox.seed_key(seeds).astype(np.int64)),
            torch.from_numpy(choices),
            torch.from_numpy(positions),
            vocab_size,
        )
        assert by_numpy[0, token_ids].tolist() == expected
        assert by_torch[0, token_ids].tolist() == expected


def test_rows_do_not_depend_on_each_other() -> None:
    seeds = np.array([3, 2**40 + 5, 2**64 - 1], np.uint64)
    choices, positions = np.array([0, 4, 1]), np.array([9, 0, 70000])
    together = philox.sampling_words_numpy(seeds, choices, positions, 101)
    for row in range(3):
        one = slice(row, row + 1)
        alone = philox.sampling_words_numpy(seeds[one], choices[one], positions[one], 101)
        assert (together[one] == alone).all()
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_sampling_gives_our_tokens() -> None:
    shape = VECTORS["logits"]
    ids = torch.arange(shape["vocab_size"])
    logits = (ids * shape["multiplier"] % shape["modulus"]) / shape["divisor"]
    for case in VECTORS["choices"]:
        params = SamplingParams(
            temperature=case["temperature"], top_k=case["top_k"], seed=case["seed"]
        )
        got = sample_rows(
            logits[None],
            [params],
            positions=[case["position"]],
            choices=[case["choice_index"]],
        )
        assert got == [case["token_id"]], case


def test_noise_is_finite_at_both_ends_of_the_words() -> None:
    noise = philox.gumbel(torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1]))
    assert torch.isfinite(noise).all()
    # Falls as words rise; all 32 bits count where noise is large.
    assert (noise.diff() <= 0).all()
    assert noise[0] > noise[1]
    assert noise[0] == pytest.approx(33 * np.log(2), rel=1e-6)


def test_noise_has_the_moments_of_a_gumbel_distribution() -> None:
    words = philox.sampling_words_numpy(
        np.array([11], np.uint64), np.array([0]), np.array([5]), 200_000
    )
    noise = philox.gumbel(torch.from_numpy(words.astype(np.int64))).double()
    assert noise.mean().item() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=0.03)
