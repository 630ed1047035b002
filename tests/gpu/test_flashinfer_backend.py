"""FlashInfer against the torch backend, alone, in whole models and in CUDA graphs."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from services.common.model_files import builtin_model_path
from services.worker.engine.attention.backend import AttentionInputs, AttentionLayer
from services.worker.engine.attention.torch_backend import TorchAttention
from services.worker.engine.batch import StepResult
from services.worker.engine.kv.pool import PagePool
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner
from tests.fakes.attention_steps import write_step
from tests.fakes.step_driver import GREEDY, StepDriver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

HEAD_DIM = 128
MAX_LEN = 700
# bf16 has 8 bits: outputs are averages of values around 1, summed in float32.
TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}
# Log-probabilities in bf16 may be off by so many times what the torch backend's are.
ERROR_FACTOR = 1.3

PROMPT = [(7 * i * i + 3 * i) % 1500 for i in range(150)]


class Harness:
    """Both backends over equal pools of random keys and values."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        page_size: int,
        seed: int,
        num_slots: int = 12,
        max_len: int = MAX_LEN,
    ) -> None:
        flashinfer_backend = pytest.importorskip(
            "services.worker.engine.attention.flashinfer_backend"
        )
        triton_backend = pytest.importorskip("services.worker.engine.attention.triton_backend")
        self.random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.num_slots, self.page_size = num_slots, page_size
        self.heads, self.kv_heads = num_heads, num_kv_heads
        max_pages = -(-max_len // page_size)
        num_pages = self.num_slots * max_pages
        pools = [
            PagePool(
                num_layers=1,
                num_pages=num_pages,
                page_size=page_size,
                num_kv_heads=num_kv_heads,
                head_dim=HEAD_DIM,
                dtype=torch.bfloat16,
                device=torch.device("cuda"),
            )
            for _ in range(2)
        ]
        pools[0].tensor.normal_()
        pools[1].tensor.copy_(pools[0].tensor)
        self.reference = TorchAttention(pools[0])
        self.flashinfer = flashinfer_backend.FlashInferAttention(
            pools[1],
            num_heads=num_heads,
            others=triton_backend.TritonAttention(
                pools[1], num_heads=num_heads, max_rows=self.num_slots, dtype=torch.bfloat16
            ),
            has_other_layers=True,
        )
        self.pools = pools
        table = self.random.permutation(num_pages).reshape(self.num_slots, max_pages)
        self.table = table.astype(np.int32)

    def inputs(self, num_tokens: list[int], starts: list[int]) -> AttentionInputs:
        return AttentionInputs(
            slots=self.random.permutation(self.num_slots)[: len(starts)].astype(np.int32),
            num_tokens=np.array(num_tokens, np.int32),
            start_positions=np.array(starts, np.int32),
            host_page_table=self.table,
            page_table=torch.from_numpy(self.table).cuda(),
        )

    def compare(self, inputs: AttentionInputs, layer: AttentionLayer, *, captured: bool) -> None:
        total = int(inputs.num_tokens.sum())
        # Views of one tensor, so rows do not follow one another.
        packed = torch.randn(
            total, self.heads + 2 * self.kv_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda"
        )
        q, k, v = packed.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        for pool in self.pools:
            write_step(pool, inputs, layer, k, v)
        self.reference.plan(inputs)
        expected = self.reference.run(q, layer)
        if captured:
            self.flashinfer.plan_captured(inputs)
        else:
            self.flashinfer.plan(inputs)
        got = self.flashinfer.run(q, layer)
        torch.testing.assert_close(got, expected, **TOLERANCE)
        assert torch.equal(self.pools[0].tensor, self.pools[1].tensor)


LAYER = AttentionLayer(index=0, scale=HEAD_DIM**-0.5)


@pytest.mark.parametrize("page_size", [1, 16, 32, 64])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(8, 8), (8, 4), (6, 2), (32, 8), (5, 1), (14, 2), (8, 1)]
)
def test_random_steps_equal_the_reference(
    num_heads: int, num_kv_heads: int, page_size: int
) -> None:
    harness = Harness(
        num_heads=num_heads, num_kv_heads=num_kv_heads, page_size=page_size, seed=page_size
    )
    for _ in range(6):
        num_decodes, num_chunks = harness.random.integers(0, 6, 2)
        singles = [1] * int(num_decodes + (num_chunks == 0))
        num_tokens = singles + harness.random.integers(1, 200, num_chunks).tolist()
        starts = [int(harness.random.integers(0, MAX_LEN - n)) for n in num_tokens]
        inputs = harness.inputs(num_tokens, starts)
        harness.compare(inputs, LAYER, captured=False)
    for num_rows in (1, 5, 12, 5):
        starts = harness.random.integers(0, MAX_LEN, num_rows).tolist()
        harness.compare(harness.inputs([1] * num_rows, starts), LAYER, captured=True)


@pytest.mark.parametrize(
    "layer",
    [
        AttentionLayer(index=0, scale=HEAD_DIM**-0.5, sliding_window=40),
        AttentionLayer(index=0, scale=HEAD_DIM**-0.5, soft_cap=5.0),
        AttentionLayer(index=0, scale=0.2),
    ],
)
def test_layers_that_flashinfer_does_not_take_are_computed_too(layer: AttentionLayer) -> None:
    harness = Harness(num_heads=8, num_kv_heads=2, page_size=16, seed=1)
    harness.compare(harness.inputs([1, 1, 70, 1], [5, 300, 90, 0]), layer, captured=False)
    harness.compare(harness.inputs([1] * 5, [5, 300, 90, 0, 64]), layer, captured=True)


def test_one_long_row_among_many_equals_the_reference() -> None:
    harness = Harness(
        num_heads=32, num_kv_heads=8, page_size=16, seed=2, num_slots=40, max_len=4000
    )
    for num_rows in (40, 12):
        starts = [3999, *harness.random.integers(0, 60, num_rows - 1).tolist()]
        harness.compare(harness.inputs([1] * num_rows, starts), LAYER, captured=True)
        harness.compare(harness.inputs([1] * num_rows, starts), LAYER, captured=False)


def test_as_many_rows_as_run_at_once_fit_the_workspace_with_64_heads() -> None:
    harness = Harness(
        num_heads=64, num_kv_heads=8, page_size=16, seed=3, num_slots=512, max_len=128
    )
    starts = harness.random.integers(0, 128, 512).tolist()
    for num_rows in (512, 300, 512):
        inputs = harness.inputs([1] * num_rows, starts[:num_rows])
        harness.compare(inputs, LAYER, captured=True)
        harness.compare(inputs, LAYER, captured=False)


class Engine:
    """The built-in model in bf16 on the GPU."""

    def __init__(self, **changes: object) -> None:
        path = builtin_model_path()
        options = {
            "model_path": path,
            "tokenizer_path": path,
            "device": "cuda",
            "dtype": "bfloat16",
            "num_pages": 512,
            "max_running_sequences": 24,
            **changes,
        }
        self.runner, self.plan = build_runner(
            EngineOptions(**options),  # type: ignore[arg-type]
            lambda fraction, what: None,
        )

    def driver(self, first_page: int = 0) -> StepDriver:
        driver = StepDriver(self.runner, page_size=self.plan.page_size, first_page=first_page)
        driver.names_last_sampled = True
        return driver


@pytest.fixture(scope="module")
def graphs() -> Iterator[Engine]:
    pytest.importorskip("flashinfer")
    engine = Engine()
    assert engine.plan.attention_backend == "flashinfer"
    assert engine.plan.graph_sizes == (1, 2, 4, 8, 16, 24)
    yield engine
    engine.runner.close()


@pytest.fixture(scope="module")
def eager() -> Iterator[Engine]:
    engine = Engine(disable_cuda_graph=True)
    assert engine.plan.graph_sizes == ()
    yield engine
    engine.runner.close()


def logprobs(engine: Engine, prompts: list[list[int]], forced: list[list[int]]) -> np.ndarray:
    """Log-probabilities of `forced` after each prompt, one decode step at a time."""
    driver = engine.driver()
    driver.names_last_sampled = False
    spec = LogprobSpec(output=True, num_top=0, token_ids=(0, 100, 500, 1000))
    rows = [driver.start(prompt, GREEDY, logprobs=spec) for prompt in prompts]
    columns = []
    for step in range(len(forced[0])):
        result: StepResult = driver.step(
            [(row, len(row.token_ids) - row.num_computed) for row in rows]
        )
        columns.append(
            [
                [*result.output_logprobs[i].logprobs, *result.output_logprobs[i].requested_logprobs]
                for i in range(len(rows))
            ]
        )
        for row, ids in zip(rows, forced, strict=True):
            row.token_ids[-1] = ids[step]
    return np.array(columns)


@pytest.mark.parametrize("num_sequences", [1, 11])
def test_a_models_error_is_the_torch_backends(
    graphs: Engine, eager: Engine, num_sequences: int
) -> None:
    prompts = [PROMPT[i : 40 + 9 * i] for i in range(num_sequences)]
    exact = Engine(attention_backend="torch", dtype="float32")
    driver = exact.driver()
    forced = driver.generate([driver.start(prompt) for prompt in prompts], 40)
    expected = logprobs(exact, prompts, forced)
    exact.runner.close()
    rounded = Engine(attention_backend="torch")
    yardstick = np.abs(logprobs(rounded, prompts, forced) - expected)
    rounded.runner.close()
    for engine in (graphs, eager):
        error = np.abs(logprobs(engine, prompts, forced) - expected)
        assert error.mean() < ERROR_FACTOR * yardstick.mean()
        assert error.max() < 2 * ERROR_FACTOR * yardstick.max()


def test_graphs_and_single_launches_mostly_sample_the_same_tokens(
    graphs: Engine, eager: Engine
) -> None:
    kinds = [
        GREEDY,
        SamplingParams(temperature=0.7, seed=3),
        SamplingParams(temperature=0.7, seed=4, top_p=0.9),
        SamplingParams(temperature=0.7, seed=5, frequency_penalty=0.5),
    ]
    # Eight rows fill a graph: with padding the sums could be split in another way.
    outputs = []
    for engine in (graphs, eager):
        driver = engine.driver(first_page=100)
        rows = [driver.start(PROMPT[i : 50 + i], kinds[i % len(kinds)]) for i in range(8)]
        outputs.append(driver.generate(rows, 30, chunk=32))
    agreeing = np.mean(np.array(outputs[0]) == np.array(outputs[1]))
    assert agreeing > 0.5


def test_two_steps_in_flight_give_the_tokens_of_one(graphs: Engine) -> None:
    driver = graphs.driver()
    prompts = [PROMPT[i : 20 + 5 * i] for i in range(8)]
    expected = driver.generate([driver.start(prompt) for prompt in prompts], 25)
    ahead = graphs.driver(first_page=256)
    rows = [ahead.start(prompt) for prompt in prompts]
    got: list[list[int]] = []
    for step in range(25):
        plan = ahead.plan([(row, len(row.token_ids) - row.num_computed) for row in rows])
        graphs.runner.forward(plan)
        graphs.runner.sample()
        for row in rows:
            # Stands for the id that the device samples.
            row.token_ids.append(0)
        if step:
            got.append(graphs.runner.result().token_ids.tolist())
    got.append(graphs.runner.result().token_ids.tolist())
    assert np.array(got).T.tolist() == expected


def test_decode_steps_do_not_wait_for_the_device(graphs: Engine) -> None:
    driver = graphs.driver()
    rows = [
        driver.start(PROMPT[:20], GREEDY),
        driver.start(PROMPT[:30], SamplingParams(temperature=0.9, seed=1)),
    ]
    driver.generate(rows, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            plan = driver.plan([(row, 1) for row in rows])
            graphs.runner.forward(plan)
            graphs.runner.sample()
            result = graphs.runner.result()
            for row, token_id in zip(rows, result.token_ids.tolist(), strict=True):
                row.token_ids.append(token_id)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_float32_falls_back_to_triton() -> None:
    engine = Engine(dtype="float32")
    assert engine.plan.attention_backend == "triton"
    engine.runner.close()
