"""Faults planted in the C++ of relation convolution are noticed beside the formula."""

import subprocess

import pytest
import torch

import rdfkern
from rdfkern import RelationGraph, RelationSpec, relation_conv
from rdfkern._backends import jit

REASON = rdfkern.available_backends("relation_conv")["cpu"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

# The gradient of a weight is summed in parts of 128 of its rows or columns.
WIDTHS = (140, 150)
# direction whose library is rebuilt, file, correct text, fault
FAULTS = {
    "window one step short": (
        "fwd",
        "relation_bands.h",
        "? Limits::max() : behind_;",
        "? Limits::max() : behind_ - 1;",
    ),
    "one row too many lies before the counted ranges": (
        "fwd",
        "relation_bands.h",
        "lows -= distance > to_low;",
        "lows -= distance >= to_low;",
    ),
    "one row too many lies before the searched ranges": (
        "fwd",
        "relation_bands.h",
        "position[row] - position[at] > distance",
        "position[row] - position[at] >= distance",
    ),
    "present taken for the past": (
        "fwd",
        "relation_bands.h",
        "last == 2 ? furthest_ahead : -last;",
        "last == 2 ? furthest_ahead : -1;",
    ),
    "past and future not swapped": (
        "bwd",
        "relation_bands.h",
        "behind_(transposed ? graph.future : graph.past)",
        "behind_(graph.past)",
    ),
    "direction not turned round": (
        "bwd",
        "relation_bands.h",
        "* 3 + 2 - direction]",
        "* 3 + direction]",
    ),
    "mean over one more": (
        "fwd",
        "relation_bands.h",
        "ldz, width, 1.0f / counts[i]",
        "ldz, width, 1.0f / (counts[i] + 1)",
    ),
    "sum of a row that hears less": (
        "fwd",
        "relation_bands.h",
        "(low[i] == low[i - 1]) & (high[i] == high[i - 1])",
        "(low[i] == low[i - 1])",
    ),
    "product of the sum before": (
        "fwd",
        "relation_conv.h",
        "products + sum_of[n] * width",
        "products + std::max(sum_of[n] - 1, 0) * width",
    ),
    "prefix one row short": (
        "fwd",
        "relation_bands.h",
        "while (row < target.high[i]) join",
        "while (row + 1 < target.high[i]) join",
    ),
    "suffix of the next row": (
        "fwd",
        "relation_bands.h",
        "while (row > target.low[i]) join",
        "while (row > target.low[i] + 1) join",
    ),
    "products added to what was there before": (
        "fwd",
        "relation_conv.h",
        "run(std::integral_constant<Update, UPDATE>(), 0, first);",
        "run(std::integral_constant<Update, Update::kAdd>(), 0, first);",
    ),
    "totals overlap": ("fwd", "relation_bands.h", "row += kTotal;", "row += kTotal - 1;"),
    "weights of another relation": (
        "bwd",
        "relation_band_totals.h",
        "band.weights = slot->weights;",
        "band.weights = (begin)->weights;",
    ),
    "mean's gradient not divided": (
        "bwd",
        "relation_edges.h",
        "over_counts ? factor / float(edges_.count[e]) : factor",
        "over_counts ? factor : factor",
    ),
    "ties not shared": (
        "bwd",
        "relation_conv_max.h",
        "load(products + n * ldp + d) / maximum(Vec{} + 1.0f, load(ties + n * width + d))",
        "load(products + n * ldp + d)",
    ),
    "part of a matrix summed from its top": (
        "bwd",
        "relation_conv_bwd.cpp",
        "aggregated, block * whole + first,",
        "aggregated, block * whole,",
    ),
    "gradient of the root from the first rows": (
        "bwd",
        "relation_conv_bwd.cpp",
        "given.x.data + first,",
        "given.x.data,",
    ),
    "gradient of the bias from the first columns": (
        "bwd",
        "relation_conv_bwd.cpp",
        "given.grad_out.from(row).data + first",
        "given.grad_out.from(row).data",
    ),
    "edge gradient of the mean not divided": (
        "bwd",
        "relation_conv_bwd.cpp",
        "given.mean() ? 1.0f / float(run.end - run.begin) : 1.0f",
        "1.0f",
    ),
    "products of the wrong sources": (
        "fwd",
        "relation_conv_order.h",
        "runs[n].row * x.stride",
        "(runs[n].row / 2) * x.stride",
    ),
    "products of the wrong targets": (
        "bwd",
        "relation_conv_order.h",
        "runs[n].row * x.stride",
        "(runs[n].row / 2) * x.stride",
    ),
    "part of a matrix in the wrong columns": (
        "bwd",
        "relation_conv_bwd.cpp",
        "(OF_X ? first * columns : first)",
        "(OF_X ? first * columns : 0)",
    ),
    "last tile forgotten": (
        "fwd",
        "relation_conv.h",
        "w < tile.works.size(); ++w) {",
        "w < tile.works.size() && t != 7; ++w) {",
    ),
}


def graphs():
    torch.manual_seed(0)
    keys = torch.randint(2, (120,))
    cu_seqlens = torch.tensor([0, 80, 120])
    yield RelationSpec.dialoguegcn(2, 4, 9).bind(keys, cu_seqlens)
    yield RelationSpec.speaker_direction(2, 60, 30).bind(keys, cu_seqlens, torch.arange(120) // 2)
    keys = torch.randint(2, (600,))
    yield RelationSpec.dialoguegcn(2, None, None).bind(keys, torch.tensor([0, 600]))
    for num_nodes in ((50, 50), (4, 60), (60, 4)):
        edge_index = torch.stack([torch.randint(count, (400,)) for count in num_nodes])
        yield RelationGraph.from_edges(edge_index, torch.randint(3, (400,)), num_nodes, 3)


def compare():
    for graph in graphs():
        x = (torch.randn(graph.num_src, WIDTHS[0]) * 2).round()
        weight = torch.randn(graph.num_relations, *WIDTHS)
        # Edge weights of lists, the root weight of a rule.
        last = torch.randn(WIDTHS) if graph.is_implicit else torch.randn(400).sign()
        name = "root_weight" if graph.is_implicit else "edge_weight"
        bias, upstream = torch.randn(WIDTHS[1]), torch.randn(graph.num_dst, WIDTHS[1])
        for aggr in ("sum", "mean", "max"):
            results = []
            for impl, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
                leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, last, bias)]
                options = {"aggr": aggr, "impl": impl, name: leaves[2], "bias": leaves[3]}
                out = relation_conv(*leaves[:2], graph, **options)
                results.append([out, *torch.autograd.grad(out, leaves, upstream.to(dtype))])
            for got, want in zip(*results, strict=True):
                limit = 1e-5 * float(want.detach().abs().max())
                assert (got.double() - want).abs().max() <= limit


def test_nothing_is_noticed_without_a_fault():
    compare()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_noticed(fault, tmp_path, monkeypatch):
    direction, name, correct, wrong = FAULTS[fault]
    recipe = jit.recipe("cpu")
    for path in (*recipe.sources, *recipe.headers):
        text = path.read_text()
        if path.name == name:
            assert text.count(correct) == 1, "the text to replace stands once"
            text = text.replace(correct, wrong)
        (tmp_path / path.name).write_text(text)
    namespace = f"rdfkern_{tmp_path.name}"
    source = tmp_path / f"relation_conv_{direction}.cpp"
    text = source.read_text()
    source.write_text(
        text.replace("(rdfkern, m)", f"({namespace}, m)").replace(
            "(rdfkern, CPU,", f"({namespace}, CPU,"
        )
    )
    flags = ["-O1" if flag == "-O3" else flag for flag in recipe.flags]
    library = tmp_path / "faulty.so"
    subprocess.run(
        [
            jit._compiler("cpu"),
            *flags,
            "-shared",
            str(source),
            *recipe.link_flags,
            "-o",
            str(library),
        ],
        check=True,
        capture_output=True,
    )
    torch.ops.load_library(library)
    for kind in ("bands", "edges"):
        operator = f"_relation_conv_{kind}_{direction}_cpu"
        faulty = getattr(getattr(torch.ops, namespace), operator)
        monkeypatch.setattr(torch.ops.rdfkern, operator, faulty, raising=False)
    with pytest.raises(AssertionError):
        compare()
