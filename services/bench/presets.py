"""The named workloads that published figures are taken with, and the flags that make others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from services.bench.workloads import Range, Workload, WorkloadKind

# Below the vocabularies of the Llama 3 and Qwen families.
DEFAULT_VOCAB_SIZE = 127_000

PresetName = Literal["bs1", "batch512", "batch256", "poisson16", "shared32x16", "multiturn64x6"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """When requests are sent, and by how many client processes.

    The seeds of arrivals depend on the number of processes, so it is part of the definition.
    """

    # Mean of a Poisson process; None sends everything at once.
    request_rate: float | None = None
    # Conversations that run at once; None sets no limit.
    max_concurrency: int | None = None
    num_processes: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A workload and its arrivals."""

    workload: Workload
    arrival: Arrival


def _random(num_prompts: int, input_len: Range, output_len: Range, seed: int) -> Workload:
    return Workload(
        kind="random",
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        vocab_size=DEFAULT_VOCAB_SIZE,
        seed=seed,
    )


PRESETS: dict[PresetName, Preset] = {
    "bs1": Preset(
        workload=_random(8, (128, 128), (256, 256), seed=7),
        arrival=Arrival(max_concurrency=1, num_processes=1),
    ),
    "batch512": Preset(
        workload=_random(512, (1024, 1024), (128, 128), seed=1), arrival=Arrival(num_processes=8)
    ),
    "batch256": Preset(
        workload=_random(256, (100, 1024), (100, 1024), seed=2), arrival=Arrival(num_processes=8)
    ),
    "poisson16": Preset(
        workload=_random(480, (512, 512), (128, 128), seed=3),
        arrival=Arrival(request_rate=16.0, num_processes=4),
    ),
    "shared32x16": Preset(
        workload=Workload(
            kind="shared",
            num_groups=32,
            prompts_per_group=16,
            prefix_len=2048,
            input_len=(128, 128),
            output_len=(64, 64),
            vocab_size=DEFAULT_VOCAB_SIZE,
            seed=4,
        ),
        arrival=Arrival(num_processes=8),
    ),
    "multiturn64x6": Preset(
        workload=Workload(
            kind="multiturn",
            num_groups=64,
            prompts_per_group=6,
            prefix_len=512,
            input_len=(100, 200),
            output_len=(64, 64),
            vocab_size=DEFAULT_VOCAB_SIZE,
            seed=5,
        ),
        arrival=Arrival(num_processes=8),
    ),
}

# Where neither a preset nor a flag says otherwise.
_DEFAULTS: dict[WorkloadKind, dict[str, Any]] = {
    "random": {"num_prompts": 256, "input_len": (100, 1024), "output_len": (100, 1024)},
    "shared": {
        "num_groups": 16,
        "prompts_per_group": 16,
        "prefix_len": 2048,
        "input_len": (100, 1024),
        "output_len": (100, 1024),
    },
    "multiturn": {
        "num_groups": 16,
        "prompts_per_group": 16,
        "prefix_len": 2048,
        "input_len": (100, 1024),
        "output_len": (100, 1024),
    },
}

_Lengths = Annotated[tuple[int, ...] | None, Parameter(consume_multiple=True, negative="")]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadFlags:
    """What to send: a preset, a workload of one's own, or a preset with some values changed."""

    preset: PresetName | None = None
    """A named workload with its arrivals, seeds and lengths; other flags change parts of it."""

    workload: WorkloadKind | None = None
    """`random` requests, `shared` prefixes or `multiturn` conversations. Default: random."""

    num_prompts: int | None = None
    """Requests of a random workload."""

    input_len: _Lengths = None
    """Shortest and longest prompt (or the part of its own), or one number for both."""

    output_len: _Lengths = None
    """Fewest and most tokens to generate, or one number for both."""

    num_groups: int | None = None
    """Shared prefixes, or users of a multiturn workload."""

    prompts_per_group: int | None = None
    """Requests that share a prefix, or turns of a user."""

    prefix_len: int | None = None
    """Tokens of a shared prefix, or of the multiturn system prompt."""

    vocab_size: int | None = None
    """Prompts use ids from 1000 to below this. Default: 127000, or the model's if smaller."""

    seed: int | None = None
    """Seed of prompts, lengths and arrivals."""

    def __post_init__(self) -> None:
        if self.preset is not None and self.workload not in (
            None,
            PRESETS[self.preset].workload.kind,
        ):
            raise ValueError(
                f"preset {self.preset} is a {PRESETS[self.preset].workload.kind} workload, "
                f"not {self.workload}"
            )
        unused: tuple[str, ...] = ("num_groups", "prompts_per_group", "prefix_len")
        if self._kind != "random":
            unused = ("num_prompts",)
        for name in unused:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no meaning in a {self._kind} workload")
        self.resolve()

    @property
    def _kind(self) -> WorkloadKind:
        return PRESETS[self.preset].workload.kind if self.preset else self.workload or "random"

    def resolve(self, vocab_limit: int | None = None) -> Workload:
        """The workload. Its ids stay below `vocab_limit`, the model's vocabulary, if given.

        Raises ValueError for values that make no workload.
        """
        changes: dict[str, Any] = {
            name: value
            for name in ("num_prompts", "num_groups", "prompts_per_group", "prefix_len", "seed")
            if (value := getattr(self, name)) is not None
        }
        for name in ("input_len", "output_len"):
            if (lengths := getattr(self, name)) is not None:
                changes[name] = _length_range(name, lengths)
        limit = DEFAULT_VOCAB_SIZE if vocab_limit is None else vocab_limit
        if self.vocab_size is not None and vocab_limit is not None and self.vocab_size > limit:
            raise ValueError(f"vocab_size {self.vocab_size} exceeds the model's {limit}")
        changes["vocab_size"] = self.vocab_size or min(DEFAULT_VOCAB_SIZE, limit)
        if self.preset is not None:
            return replace(PRESETS[self.preset].workload, **changes)
        return Workload(kind=self._kind, **{"seed": 0, **_DEFAULTS[self._kind], **changes})

    @property
    def arrival(self) -> Arrival:
        """The preset's, or everything at once."""
        return PRESETS[self.preset].arrival if self.preset else Arrival()


def _length_range(name: str, lengths: tuple[int, ...]) -> Range:
    if len(lengths) not in (1, 2):
        raise ValueError(f"{name} takes one or two numbers, got {len(lengths)}")
    return lengths[0], lengths[-1]
