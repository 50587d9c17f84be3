"""The CUDA C++ kernels of the relation operations on a real device: pytest -m gpu."""

import pytest
import torch

from rdfkern import (
    RelationGraph,
    RelationSpec,
    relation_attention,
    relation_conv,
    relation_dot_attention,
)
from rdfkern.testing import assert_within_budget

IMPL = "cuda"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device is visible"),
]

GENERATOR = torch.Generator().manual_seed(0)
KEYS = torch.randint(3, (170,), generator=GENERATOR)
CU_SEQLENS = torch.tensor([0, 90, 91, 91, 170])
RULE = RelationSpec.dialoguegcn(3, past=9, future=None).bind(KEYS, CU_SEQLENS)
GRAPHS = {
    "rule": RULE,
    "list": RelationGraph.from_edges(*RULE.to_edges(), 170, RULE.num_relations),
}
# Function, widths behind the number of targets (d), sources (s) or relations (r), options.
CASES = {
    "sum": (relation_conv, (("s", 40), ("r", 40, 72)), {"aggr": "sum"}),
    "mean": (relation_conv, (("s", 40), ("r", 40, 72)), {"aggr": "mean"}),
    "max": (relation_conv, (("s", 40), ("r", 40, 72)), {"aggr": "max"}),
    "additive": (relation_attention, (("s", 2, 24), ("d", 2), ("s", 2), ("r", 2)), {}),
    "dot": (relation_dot_attention, (("d", 2, 16), ("s", 2, 16), ("s", 2, 24), ("r", 2)), {}),
    "dot within": (
        relation_dot_attention,
        (("d", 2, 16), ("s", 2, 16), ("s", 2, 24), ("r", 2)),
        {"softmax": "within"},
    ),
}


def results(impl, function, graph, tensors, upstream, options, *, device, dtype):
    leaves = [x.to(device, dtype).requires_grad_() for x in tensors]
    out = function(*leaves, graph.to(device), impl=impl, **options)
    gradients = torch.autograd.grad(out, leaves, upstream.to(device, dtype))
    values = [out.detach(), *gradients]
    return {("out", *"abcd")[at]: value.cpu() for at, value in enumerate(values)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("case", CASES)
def test_error_budget(case, kind, dtype):
    function, shapes, options = CASES[case]
    graph = GRAPHS[kind]
    sizes = {"d": graph.num_dst, "s": graph.num_src, "r": graph.num_relations}
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(sizes[of], *widths, generator=generator).to(dtype) for of, *widths in shapes
    ]
    with torch.no_grad():
        shape = function(*tensors, graph, impl="torch", **options).shape
    upstream = torch.randn(shape, generator=generator).to(dtype)
    problem = (function, graph, tensors, upstream, options)
    actual, repeated = (results(IMPL, *problem, device=DEVICE, dtype=dtype) for _ in range(2))
    plain = results("reference", *problem, device="cpu", dtype=dtype)
    truth = results("reference", *problem, device="cpu", dtype=torch.float64)
    # exp2f errs by up to two units in the last place there.
    assert_within_budget(actual, plain, truth, factor=6.0, rms=3.0)
    for name, value in actual.items():
        assert torch.equal(repeated[name], value), name
