"""Two GPUs: the same tokens as one, one-shot sums as NCCL's, and the end of a group with a rank."""

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest
import torch

from services.common.model_files import builtin_model_path
from services.common.rpc import open_channel
from services.worker.engine.batch import Runner
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.build import build_runner
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.fakes.session_client import SessionClient, make_submit
from tests.fakes.step_driver import GREEDY, StepDriver
from tests.fakes.worker_bench import until
from tests.fakes.worker_process import WorkerProcess

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

SAMPLINGS = (
    GREEDY,
    SamplingParams(temperature=0.8, seed=5, top_p=0.9),
    SamplingParams(temperature=1.0, seed=6, frequency_penalty=0.5, logit_bias=((4, 1.0),)),
    GREEDY,
)
# Twice how far bf16 may be off in one of the built-in model's logits.
CHOICE_BOUND = 0.7
END_S = 30.0

# Ranks sum random messages of many sizes, in graphs and without, and compare with the reference.
_SUMS = """
import sys
import torch
from services.common.nodes import HostPort
from services.worker.engine.distributed.peer_memory import PeerMemory
from services.worker.engine.distributed.rendezvous import create_store, join_store
from services.worker.engine.kernels.one_shot import OneShotAllReduce, memory_bytes, reference

rank = int(sys.argv[1])
torch.cuda.set_device(rank)
if rank == 0:
    store, address = create_store(2)
    print(address.port, flush=True)
else:
    store = join_store(HostPort("127.0.0.1", int(sys.argv[3])), 2)
memory = PeerMemory(store, rank, [0, 1], memory_bytes(2), checked=True)
dtype = getattr(torch, sys.argv[2])
one_shot = OneShotAllReduce(memory.addresses, rank, dtype)
shared = torch.Generator().manual_seed(0)
for turn in range(40):
    most = (1 << 20) // dtype.itemsize
    length = int(torch.randint(1, most, (), generator=shared)) if turn % 4 else turn + 1
    tensors = [torch.randn(length, generator=shared).to(dtype) for _ in range(2)]
    mine = tensors[rank].cuda()
    if turn % 2:
        one_shot.all_reduce(torch.zeros_like(mine))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = one_shot.all_reduce(mine.clone())
        for _ in range(3):
            graph.replay()
    else:
        result = one_shot.all_reduce(mine)
    assert torch.equal(result.cpu(), reference(tensors)), (turn, length, dtype)
print("equal", flush=True)
"""


def build(path: Path, **changes: object) -> tuple[Runner, EnginePlan]:
    options = {
        "model_path": path,
        "tokenizer_path": path,
        "device": "cuda",
        "num_pages": 512,
        "max_running_sequences": 8,
        "chunked_prefill_size": 64,
        **changes,
    }
    return build_runner(EngineOptions(**options), lambda fraction, what: None)  # type: ignore[arg-type]


def generate(path: Path, vocab_size: int, **changes: object) -> list[list[int]]:
    runner, plan = build(path, **changes)
    driver = StepDriver(runner, page_size=plan.page_size)
    driver.names_last_sampled = True
    prompt = [(7 * i * i + 3 * i) % vocab_size for i in range(37)]
    sequences = [driver.start(prompt[i:], kind) for i, kind in enumerate(SAMPLINGS)]
    tokens = driver.generate(sequences, 24, chunk=11)
    # Greedy alone, where ranks exchange only their largest logits.
    tokens += driver.generate([driver.start(prompt), driver.start(prompt[5:])], 24)
    runner.close()
    return tokens


@pytest.mark.parametrize("disable_cuda_graph", [False, True])
@pytest.mark.parametrize("disable_custom_all_reduce", [False, True])
def test_two_ranks_give_the_tokens_of_one_in_float32(
    tmp_path: Path, disable_custom_all_reduce: bool, disable_cuda_graph: bool
) -> None:
    write_checkpoint(tmp_path, "Qwen3", vocab_size=VOCAB_SIZE + 1)
    pair = {
        "tp_size": 2,
        "disable_custom_all_reduce": disable_custom_all_reduce,
        "disable_cuda_graph": disable_cuda_graph,
    }
    for path, vocab_size in ((tmp_path, VOCAB_SIZE), (builtin_model_path(), 1000)):
        alone = generate(path, vocab_size, dtype="float32", attention_backend="torch")
        assert generate(path, vocab_size, dtype="float32", **pair) == alone


def test_random_weights_are_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama")
    options = {"dtype": "float32", "load_format": "dummy"}
    alone = generate(tmp_path, VOCAB_SIZE, **options)
    assert generate(tmp_path, VOCAB_SIZE, tp_size=2, enable_p2p_check=True, **options) == alone


def test_graphs_with_all_reduces_choose_as_well_as_float32() -> None:
    pytest.importorskip("flashinfer")
    path = builtin_model_path()
    runner, plan = build(path, dtype="bfloat16", attention_backend="flashinfer", tp_size=2)
    assert plan.graph_sizes
    assert plan.piece_graph_sizes
    driver = StepDriver(runner, page_size=plan.page_size)
    prompts = [list(range(300 + i, 340 + i)) for i in range(3)]
    tokens = driver.generate([driver.start(prompt) for prompt in prompts], 24, chunk=16)
    runner.close()
    runner, plan = build(path, dtype="float32", num_pages=2048)
    for prompt, forced in zip(prompts, tokens, strict=True):
        for step, token_id in enumerate(forced):
            spec = LogprobSpec(output=True, num_top=1, token_ids=(token_id,))
            driver = StepDriver(runner, page_size=plan.page_size)
            row = driver.start([*prompt, *forced[:step]], GREEDY, logprobs=spec)
            rows = driver.step([(row, len(row.token_ids))]).output_logprobs[0]
            assert rows.requested_logprobs[0] > rows.top_logprobs[0] - CHOICE_BOUND
    runner.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_shot_sums_are_the_reference_s(dtype: str) -> None:
    command = (sys.executable, "-c", _SUMS)
    with subprocess.Popen((*command, "0", dtype), stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        port = leader.stdout.readline().strip()
        other = subprocess.run(
            (*command, "1", dtype, port), capture_output=True, text=True, timeout=90
        )
        assert other.returncode == 0, other.stderr
        assert leader.stdout.read() == "equal\n"
        assert leader.wait(END_S) == 0


def test_too_few_gpus_are_refused_with_their_number() -> None:
    path = builtin_model_path()
    with pytest.raises(ValueError, match=f"this host has {torch.cuda.device_count()}"):
        build(path, tp_size=2, base_gpu_id=torch.cuda.device_count() - 1)


@pytest.mark.parametrize("is_idle", [False, True])
def test_a_killed_rank_ends_the_worker_in_seconds(tmp_path: Path, is_idle: bool) -> None:
    worker = WorkerProcess(
        tmp_path,
        *("--tp", "2", "--device", "cuda", "--max-total-tokens", "8192"),
        *("--max-running-requests", "8", "--chunked-prefill-size", "64"),
    )
    try:
        worker.wait_until_ready(90.0)
        (rank,) = worker.engine().children()
        if is_idle:
            rank.kill()
        else:
            asyncio.run(_kill_in_a_step(worker, rank))
        assert worker.wait(END_S) == 4
        assert "event=rank_lost" in worker.log.read_text()
    finally:
        print(worker.log.read_text()[-3000:])
        worker.close()


async def _kill_in_a_step(worker: WorkerProcess, rank: psutil.Process) -> None:
    """The request gets a status that says: try again."""
    async with open_channel(worker.address) as channel:
        client = SessionClient(channel)
        await client.open()
        submit = make_submit(1, list(range(300, 350)), max_new_tokens=3000)
        (received,) = await client.submit(submit)
        await until(lambda: bool(received.ids))
        rank.kill()
        await client.ended()
        assert received.error is not None
        assert received.error.code == grpc.StatusCode.ABORTED.value[0]
