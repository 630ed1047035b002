import random

from services.scheduler.overlay import GENERATION_S, STRIDE, PredictionOverlay
from tests.unit.scheduler.build import chain


def test_a_placed_prompt_counts_on_its_worker() -> None:
    overlay = PredictionOverlay()
    overlay.add("a", chain(1, 8), 0.0)
    assert overlay.match(chain(1, 8), 0.0) == {"a": 8}
    assert overlay.match(chain(1, 12), 0.0) == {"a": 8}
    assert overlay.match(chain(1, 4), 0.0) == {"a": 4}
    assert overlay.match(chain(2, 8), 0.0) == {}
    assert overlay.match([], 0.0) == {}


def test_a_match_is_rounded_down_to_the_stride() -> None:
    overlay = PredictionOverlay()
    overlay.add("a", chain(1, 3 * STRIDE - 1), 0.0)
    assert overlay.match(chain(1, 4 * STRIDE), 0.0) == {"a": 2 * STRIDE}
    assert overlay.match(chain(1, 2 * STRIDE - 1), 0.0) == {"a": STRIDE}
    assert overlay.match(chain(1, STRIDE - 1), 0.0) == {}


def test_workers_match_to_their_own_depths() -> None:
    overlay = PredictionOverlay()
    overlay.add("a", chain(1, 12), 0.0)
    overlay.add("b", chain(1, 4), 0.0)
    overlay.add("c", chain(1, 4) + chain(2, 8), 0.0)
    assert overlay.match(chain(1, 12), 0.0) == {"a": 12, "b": 4, "c": 4}
    assert overlay.match(chain(1, 4) + chain(2, 12), 0.0) == {"a": 4, "b": 4, "c": 12}


def test_a_page_is_forgotten_after_at_most_two_generations() -> None:
    overlay = PredictionOverlay()
    overlay.add("a", chain(1, 8), 0.0)
    assert overlay.match(chain(1, 8), GENERATION_S) == {"a": 8}
    assert overlay.match(chain(1, 8), 2 * GENERATION_S) == {}
    assert overlay.num_marks == 0


def test_both_generations_count() -> None:
    overlay = PredictionOverlay()
    overlay.add("a", chain(1, 4), 0.0)
    overlay.add("a", chain(1, 12), GENERATION_S)
    overlay.add("b", chain(1, 8), GENERATION_S)
    assert overlay.match(chain(1, 16), GENERATION_S) == {"a": 12, "b": 8}


def test_a_long_silence_forgets_everything() -> None:
    overlay = PredictionOverlay()
    overlay.add("a", chain(1, 4), 0.0)
    assert overlay.match(chain(1, 4), 100 * GENERATION_S) == {}


def test_pain_12_k_the_overlay_is_bounded_and_the_newest_stay() -> None:
    overlay = PredictionOverlay(max_marks=25)
    for name in range(50):
        overlay.add("a", chain(name, 28), 0.0)
        assert overlay.num_marks <= 50
        assert overlay.match(chain(name, 28), 0.0) == {"a": 28}
    assert overlay.match(chain(0, 28), 0.0) == {}


def test_a_chain_longer_than_the_bound_is_cut() -> None:
    overlay = PredictionOverlay(max_marks=25)
    overlay.add("a", chain(1, 250), 0.0)
    assert overlay.match(chain(1, 250), 0.0) == {"a": 100}


def test_a_gone_worker_does_not_match_and_its_slot_does_not_lie() -> None:
    overlay = PredictionOverlay()
    overlay.add("a", chain(1, 8), 0.0)
    overlay.forget_worker("a")
    overlay.add("b", chain(2, 8), 0.0)
    assert overlay.match(chain(1, 8), 0.0) == {}
    assert overlay.match(chain(2, 8), 0.0) == {"b": 8}


def test_slots_are_used_again_once_no_mark_has_their_bit() -> None:
    overlay = PredictionOverlay()
    for generation in range(40):
        now = generation * GENERATION_S
        overlay.add(f"w{generation}", chain(generation, 4), now)
        assert overlay.match(chain(generation, 4), now) == {f"w{generation}": 4}
        overlay.forget_worker(f"w{generation}")
        assert overlay.match(chain(generation, 4), now) == {}
    assert overlay.num_slots <= 4


def test_matches_agree_with_a_plain_model() -> None:
    rng = random.Random(5)
    overlay = PredictionOverlay()
    held: dict[str, set[int]] = {name: set() for name in "abcd"}

    def prompt() -> list[int]:
        """Prefixes of a binary tree of pages: many shared beginnings."""
        hashes, node = [], 1
        for _ in range(rng.randrange(1, 9)):
            node = 2 * node + rng.randrange(2)
            hashes += [STRIDE * node + page for page in range(STRIDE)]
        return hashes

    for _ in range(300):
        worker, hashes = rng.choice("abcd"), prompt()
        overlay.add(worker, hashes, 0.0)
        held[worker].update(hashes)
        asked = prompt()
        expected = {}
        for name, pages in held.items():
            depth = next((i for i, page in enumerate(asked) if page not in pages), len(asked))
            if depth:
                expected[name] = depth
        assert overlay.match(asked, 0.0) == expected
