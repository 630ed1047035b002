"""The Triton backend against the torch backend in float32, in CUDA graphs and in whole models."""

from pathlib import Path

import pytest
import torch

from services.worker.engine.attention.backend import AttentionLayer
from services.worker.engine.messages import SamplingParams
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner
from tests.fakes.attention_steps import AttentionSteps
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.fakes.step_driver import GREEDY, StepDriver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Outputs are averages of numbers around 1 and at most 5: rounding one to the type costs at most
# 5 * 2**-9 in bfloat16 and 5 * 2**-12 in float16, rounding probabilities about as much.
BOUNDS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}

# Query heads, key/value heads, head size, page size, type.
SHAPES = [
    (32, 8, 128, 16, torch.bfloat16),
    (8, 8, 64, 1, torch.bfloat16),
    (6, 2, 96, 32, torch.float16),
    (8, 4, 256, 64, torch.bfloat16),
    (7, 1, 128, 1, torch.float16),
    (14, 2, 64, 16, torch.float16),
    (71, 1, 64, 64, torch.bfloat16),
    (5, 1, 80, 16, torch.bfloat16),
    (16, 1, 256, 32, torch.float16),
    (4, 4, 128, 16, torch.float32),
    (8, 1, 256, 64, torch.float32),
    (9, 3, 96, 1, torch.float32),
    (40, 1, 24, 32, torch.float32),
]
LAYERS = [
    {},
    {"sliding_window": 90},
    {"soft_cap": 4.0},
    {"sliding_window": 1, "soft_cap": 20.0},
]


def make_steps(
    shape: tuple[int, int, int, int, torch.dtype], *, exact: bool = False
) -> AttentionSteps:
    backend = pytest.importorskip("services.worker.engine.attention.triton_backend")
    num_heads, num_kv_heads, head_dim, page_size, dtype = shape
    return AttentionSteps(
        lambda pool, heads, rows: backend.TritonAttention(
            pool, num_heads=heads, max_rows=rows, dtype=dtype, reduce_in_fp32=exact
        ),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        device="cuda",
        seed=head_dim + num_heads,
    )


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_random_steps_equal_the_reference(shape: tuple[int, int, int, int, torch.dtype]) -> None:
    steps = make_steps(shape)
    bound = BOUNDS[shape[-1]]
    for number, changes in enumerate(LAYERS):
        factor = float(steps.random.uniform(0.5, 2.0))
        layer = AttentionLayer(index=number % 2, scale=factor * shape[2] ** -0.5, **changes)
        for _ in range(3):
            lengths = steps.random.integers(1, 200, steps.random.integers(0, 5)).tolist()
            inputs = steps.mixed(int(steps.random.integers(not lengths, 6)), lengths)
            assert steps.worst_error(inputs, layer) < bound
        for num_rows in (1, 12):
            inputs = steps.mixed(num_rows, [])
            assert steps.worst_error(inputs, layer, captured=True) < bound


def test_long_chunks_equal_the_reference() -> None:
    steps = make_steps(SHAPES[0])
    for changes in LAYERS:
        layer = AttentionLayer(index=0, scale=0.1, **changes)
        assert steps.worst_error(steps.mixed(3, [700, 650, 200]), layer) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_in_float32_leave_the_outputs_rounding_only(dtype: torch.dtype) -> None:
    layer = AttentionLayer(index=0, scale=128**-0.5)
    excess = {}
    for exact in (False, True):
        steps = make_steps((8, 2, 128, 16, dtype), exact=exact)
        inputs = steps.mixed(6, [150, 60])
        q, k, v = steps.tensors(216)
        expected = steps.expected(inputs, layer, q, k, v)
        steps.backend.plan(inputs)
        error = (steps.backend.run(q, layer).float() - expected).abs()
        rounding = expected.abs() * torch.finfo(dtype).eps / 2
        excess[exact] = (error - rounding).max().item()
    assert excess[True] < 1e-5
    assert excess[False] > 2e-5


@pytest.mark.parametrize("changes", LAYERS[:3], ids=str)
def test_a_captured_launch_serves_other_rows(changes: dict[str, float]) -> None:
    steps = make_steps(SHAPES[0])
    layer = AttentionLayer(index=1, scale=0.1, **changes)  # type: ignore[arg-type]
    q, k, v = steps.tensors(8)
    steps.backend.plan_captured(steps.inputs([1] * 8, [0] * 8))
    steps.backend.run(q, layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = steps.backend.run(q, layer)
    for _ in range(5):
        inputs = steps.inputs([1] * 8, steps.random.integers(0, steps.max_len, 8).tolist())
        steps.backend.plan_captured(inputs)
        expected = steps.expected(inputs, layer, q, k, v)
        graph.replay()
        assert (out.float() - expected).abs().max().item() < BOUNDS[torch.bfloat16]


def generate(path: Path, device: str, **changes: object) -> list[list[int]]:
    runner, plan = build_runner(
        EngineOptions(
            model_path=path,
            tokenizer_path=path,
            device=device,
            dtype="float32",
            num_pages=256,
            **changes,  # type: ignore[arg-type]
        ),
        lambda fraction, what: None,
    )
    assert bool(plan.graph_sizes) == (device == "cuda" and "disable_cuda_graph" not in changes)
    assert plan.attention_backend == ("triton" if device == "cuda" else "torch")
    driver = StepDriver(runner, page_size=plan.page_size)
    driver.names_last_sampled = True
    samplings = [GREEDY, SamplingParams(temperature=0.8, seed=5, top_p=0.9), GREEDY]
    prompt = [(7 * i * i + 3 * i) % VOCAB_SIZE for i in range(60)]
    rows = [driver.start(prompt[9 * i :], kind) for i, kind in enumerate(samplings)]
    tokens = driver.generate(rows, 24, chunk=11)
    runner.close()
    return tokens


@pytest.mark.parametrize(
    ("family", "settings"),
    [("Llama", {}), ("Qwen3", {}), ("Mistral", {"sliding_window": 21})],
)
def test_tokens_in_float32_equal_the_cpus(
    family: str, settings: dict[str, object], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, family, **settings)
    expected = generate(tmp_path, "cpu")
    assert generate(tmp_path, "cuda") == expected
    assert generate(tmp_path, "cuda", disable_cuda_graph=True) == expected
