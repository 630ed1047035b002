"""Makes the built-in model: text, tokenizer, training, evaluation. See README.md.

python models/builtin/make.py all        everything, from nothing
python models/builtin/make.py evaluate   the accuracy of the weights that are there
python models/builtin/make.py chat       talk to it
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from recipe import corpus, evaluation, training
from recipe.tokenizer import save_tokenizer, train_tokenizer
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent


def make_tokenizer(folder: Path, seed: int) -> Tokenizer:
    """Train and write the tokenizer, and the held-back questions beside it."""
    tokenizer = train_tokenizer(corpus.tokenizer_text(seed, 6000))
    save_tokenizer(tokenizer, folder)
    corpus.write_cases(corpus.held_back(), folder / "heldback.jsonl")
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def make_model(folder: Path, args: argparse.Namespace) -> None:
    """Train and write the model."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = args.workers
    if workers < 0:
        workers = max(0, (os.cpu_count() or 1) - 2) if device != "cpu" else 0
    settings = training.Settings(
        steps=args.steps,
        tokens=args.tokens,
        rate=args.rate,
        minutes=args.minutes,
        workers=workers,
        seed=args.seed,
    )
    started = time.monotonic()
    config = training.model_config(tokenizer)
    model = training.train(config, tokenizer, settings, device)
    size = training.save(model, folder)
    print(f"trained on {device} for {time.monotonic() - started:.0f} s; {size} bytes of weights")


def evaluate(folder: Path, args: argparse.Namespace) -> float:
    """Print how often the written model answers the held-back questions right."""
    model, tokenizer = evaluation.load(folder, getattr(torch, args.dtype))
    if args.device not in ("auto", "cpu"):
        model = model.to(args.device)
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    outcomes = evaluation.ask(model, tokenizer, corpus.held_back(args.held_seed))
    share = evaluation.report(outcomes)
    print(f"asked in {time.monotonic() - started:.0f} s, weights in {args.dtype}")
    evaluation.show_wrong(outcomes)
    return share


def chat(folder: Path) -> None:
    """Talk to the model until an empty line."""
    model, tokenizer = evaluation.load(folder)
    messages: list[corpus.Message] = []
    while question := input("> "):
        messages.append(corpus.message("user", question))
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**ids, max_new_tokens=400)[0, ids["input_ids"].shape[1] :]
        messages.append(
            corpus.message("assistant", tokenizer.decode(made, skip_special_tokens=True))
        )
        print(messages[-1]["content"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=("all", "tokenizer", "train", "evaluate", "chat"))
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--steps", type=int, default=training.Settings.steps)
    parser.add_argument("--tokens", type=int, default=training.Settings.tokens, help="a step")
    parser.add_argument("--rate", type=float, default=training.Settings.rate)
    parser.add_argument("--minutes", type=float, default=0.0, help="end by then; 0: by steps")
    parser.add_argument("--workers", type=int, default=-1, help="text makers; -1: by the machine")
    parser.add_argument("--seed", type=int, default=training.Settings.seed)
    parser.add_argument("--held-seed", type=int, default=corpus.HELD_SEED)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads to evaluate with")
    parser.add_argument("--dtype", default="float32", help="to evaluate in")
    args = parser.parse_args()
    if args.what in ("all", "tokenizer"):
        make_tokenizer(args.folder, args.seed)
    if args.what in ("all", "train"):
        make_model(args.folder, args)
    if args.what in ("all", "train", "evaluate"):
        share = evaluate(args.folder, args)
        if share < 0.95:
            raise SystemExit(f"only {share:.2%} right; 95 % are needed")
    if args.what == "chat":
        chat(args.folder)


if __name__ == "__main__":
    main()
