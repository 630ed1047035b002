"""Products with few tokens against float64, over random shapes and everything done in a launch."""

import pytest
import torch
import torch.nn.functional as F

from tests.fakes.few_tokens import Case, relative_error, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# One rounding to bf16's 8 bits, over many outputs, is about 0.0017; inputs are exact.
BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True, scope="module")
def matvec():
    return pytest.importorskip("services.worker.engine.kernels.matvec")


@DTYPES
@pytest.mark.parametrize("seed", range(24))
def test_one_token(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    case = Case.random(generator, num_tokens=1, dtype=dtype, device="cuda")
    assert relative_error(case, run(case)) < BOUND[dtype], case


@DTYPES
@pytest.mark.parametrize("seed", range(24))
def test_several_tokens(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = int(torch.randint(2, 65, (1,), generator=generator))
    case = Case.random(generator, num_tokens=num_tokens, dtype=dtype, device="cuda")
    assert relative_error(case, run(case)) < BOUND[dtype], case


def test_logits_are_not_rounded(matvec) -> None:
    x = torch.randn(3, 1024, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(5000, 1024, dtype=torch.bfloat16, device="cuda")
    expected = F.linear(x.double(), weight.double())
    for num_tokens in (1, 3):
        out = matvec.matvec(x[:num_tokens], weight, out_dtype=torch.float32)
        torch.testing.assert_close(out.double(), expected[:num_tokens], atol=1e-3, rtol=1e-4)


def test_a_rows_result_does_not_depend_on_its_neighbours(matvec) -> None:
    x = torch.randn(32, 4096, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(6144, 4096, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(matvec.matvec(x[:16], weight)[5], matvec.matvec(x[5:9], weight)[0])


def test_chains_in_a_graph_give_what_single_launches_give(matvec) -> None:
    """Kernels that start early must wait for what they read, replay after replay."""
    width = 2048
    weights = [
        torch.randn(width, width, dtype=torch.bfloat16, device="cuda") / width**0.5
        for _ in range(24)
    ]
    gains = torch.ones(width, dtype=torch.bfloat16, device="cuda")
    start = torch.randn(1, width, dtype=torch.bfloat16, device="cuda")

    def chain(synchronize: bool) -> torch.Tensor:
        x = start
        for weight in weights:
            x = matvec.matvec(x, weight, norm_weight=gains, eps=1e-5, residual=x)
            if synchronize:
                torch.cuda.synchronize()
        return x

    chain(synchronize=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(synchronize=False)
    for seed in range(20):
        torch.manual_seed(seed)
        start.normal_()
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, chain(synchronize=True))
