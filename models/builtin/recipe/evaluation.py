"""Asks the held-back questions and counts the answers that are right to the letter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .corpus import Case

BATCH_LETTERS: Final = 5_000


@dataclass(frozen=True)
class Outcome:
    """What the model said to one question, and how sure it was at its least sure token."""

    case: Case
    said: str
    margin: float

    @property
    def right(self) -> bool:
        """Whether the answer is exactly the expected one."""
        return self.said == self.case.answer


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model and its tokenizer, as transformers loads any Hugging Face directory."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


def _answers(model: Any, tokenizer: Any, cases: Sequence[Case]) -> list[Outcome]:
    prompts = [
        tokenizer.apply_chat_template(list(c.messages), tokenize=False, add_generation_prompt=True)
        for c in cases
    ]
    batch = tokenizer(
        prompts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left"
    ).to(model.device)
    longest = max(len(tokenizer(c.answer)["input_ids"]) for c in cases)
    made = model.generate(
        **batch,
        max_new_tokens=longest + 8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = made.sequences[:, batch["input_ids"].shape[1] :]
    best = torch.stack(made.logits, 1).float().topk(2).values
    margins = (best[..., 0] - best[..., 1]).masked_fill(
        tokens == tokenizer.pad_token_id, float("inf")
    )
    said = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [Outcome(*item) for item in zip(cases, said, margins.amin(1).tolist(), strict=True)]


def _length(case: Case) -> int:
    return len(case.answer) + sum(len(m["content"]) for m in case.messages)


def _batches(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    """Cut questions sorted by length into batches that hold few letters, padding included."""
    first = 0
    for end in range(1, len(cases) + 1):
        if end == len(cases) or (end + 1 - first) * _length(cases[end]) > BATCH_LETTERS:
            yield cases[first:end]
            first = end


def ask(model: Any, tokenizer: Any, cases: Sequence[Case]) -> list[Outcome]:
    """Ask all questions, greedily, in batches of one kind and similar length."""
    outcomes: list[Outcome] = []
    for kind in dict.fromkeys(case.kind for case in cases):
        some = sorted(
            (case for case in cases if case.kind == kind),
            key=_length,
        )
        for part in _batches(some):
            with torch.inference_mode():
                outcomes += _answers(model, tokenizer, part)
    return outcomes


def report(outcomes: Sequence[Outcome]) -> float:
    """Print the share of right answers, of each kind and of all; return the latter."""
    for kind in dict.fromkeys(o.case.kind for o in outcomes):
        some = [o for o in outcomes if o.case.kind == kind]
        right = sum(o.right for o in some)
        print(f"{kind:<24} {right:>4} of {len(some):>4}  {100 * right / len(some):6.2f} %")
    right = sum(o.right for o in outcomes)
    share = right / len(outcomes)
    print(f"{'all held-back questions':<24} {right:>4} of {len(outcomes):>4}  {100 * share:6.2f} %")
    margins = sorted(o.margin for o in outcomes)
    print(
        "least lead of the first token over the second in an answer: "
        f"median {margins[len(margins) // 2]:.2f}, lowest twentieth "
        f"{margins[len(margins) // 20]:.2f}, lowest {margins[0]:.2f} (in logits)"
    )
    return share


def show_wrong(outcomes: Sequence[Outcome], most: int = 20) -> None:
    """Print some of the wrong answers."""
    for outcome in [o for o in outcomes if not o.right][:most]:
        asked = outcome.case.messages[-1]["content"]
        print(
            f"  asked {asked[-120:]!r}\n  want  {outcome.case.answer!r}\n  said  {outcome.said!r}"
        )
