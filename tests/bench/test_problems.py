"""What is measured: shapes, conversations, problems, and the check of every candidate."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

import rdfkern
from bench import attention_candidates, attention_problem, relation_problem
from bench.attention_peers import Visible, two_calls, two_padded_calls, with_backend
from bench.attention_problem import AttentionProblem
from bench.candidates import Candidate, Run, Unsuitable, check_memory, fresh
from bench.checks import check, error_ratio
from bench.conversations import conversations
from bench.measure import Bench, LeftOut, Measured, Settings, candidates
from bench.relation_problem import RelationProblem
from bench.shapes import (
    ATTENTION_SHAPES,
    BOTH,
    DIFFUSION_SHAPES,
    FORWARD,
    GROUPS,
    RELATION_SHAPES,
    SHAPES,
    TEMPORAL_SHAPES,
    AttentionShape,
    select,
)

CPU = torch.device("cpu")
TINY = [shape.name for shape in select("tiny")]


@pytest.fixture(scope="module")
def bench():
    threads = torch.get_num_threads()
    yield Bench(Settings(CPU, threads=1, seconds=0.001))
    torch.set_num_threads(threads)


def names_of(shape: str) -> list[str]:
    """Candidates that need no compiler of torch's."""
    found = [candidate.name for candidate in candidates(SHAPES[shape], CPU)]
    return [name for name in found if "Flex" not in name and "compiled" not in name]


def test_the_table_holds_the_issue_shapes():
    square = SHAPES["square"]
    assert (square.batch, square.heads, square.queries) == (1, 4, 2048)
    assert (square.head_dim, square.value_dim, square.dtype) == (64, 128, torch.float32)
    assert replace(square, name="causal", is_causal=True) == SHAPES["causal"]
    assert {shape.group for shape in SHAPES.values()} == set(GROUPS)
    tables = (ATTENTION_SHAPES, TEMPORAL_SHAPES, DIFFUSION_SHAPES, RELATION_SHAPES)
    assert len(SHAPES) == sum(map(len, tables))
    assert SHAPES["window-9-speakers"].speakers == 9
    problem = RelationProblem(SHAPES["window-9-speakers"], CPU)
    assert problem.graph.num_relations == 162
    wide = RelationProblem(SHAPES["window-wide"], CPU)
    assert wide.graph.to_edges()[1].shape[0] == 65_440
    assert wide.most_edges >= 65_440


def test_shapes_are_chosen_by_name_and_group():
    assert [shape.name for shape in select("decode, square")] == ["square", "decode"]
    assert {shape.op for shape in select("headline")} == {
        "diff_attention",
        "temporal_diff_attention",
        "diffusion_attention",
        "relation_conv",
        "relation_attention",
    }
    with pytest.raises(ValueError, match="got 'squares'"):
        select("square,squares")


def test_generated_conversations_say_so():
    dialogues = conversations("dialogues", None)
    assert len(dialogues.lengths) == 64
    assert (min(dialogues.lengths), max(dialogues.lengths)) == (5, 110)
    assert "generated" in dialogues.source
    assert all(speakers[0] == 0 for speakers in dialogues.speakers)


def test_real_conversations(data_folder):
    dialogues = conversations("dialogues", data_folder)
    assert len(dialogues.lengths) == 64
    assert (min(dialogues.lengths), max(dialogues.lengths)) == (5, 110)
    assert "real" in dialogues.source
    assert conversations("meeting", data_folder).lengths == [1388]


def test_conversations_refuse_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="few, got 'calls'"):
        conversations("calls", None)
    with pytest.raises(ValueError, match="must be a folder"):
        conversations("dialogues", tmp_path / "nowhere")


@pytest.mark.parametrize("shape", TINY)
def test_every_candidate_that_runs_is_green(bench, shape):
    for direction in SHAPES[shape].directions:
        results = bench.measure(shape, direction, names_of(shape))
        assert results.keys() == set(names_of(shape))
        for name, result in results.items():
            if isinstance(result, LeftOut):
                assert not result.red, (name, result.reason)
                assert "installed" in result.reason or "implementation" in result.reason
            else:
                assert result.info["check"]["green"]
                assert result.info["numbers"]
                assert len(result.seconds) >= 2 and min(result.seconds) > 0
        assert sum(isinstance(result, Measured) for result in results.values()) >= 4
        usable = [result.info for result in results.values() if isinstance(result, Measured)]
        assert sum(info["automatic"] for info in usable) == 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny", "tiny-gqa", "tiny-ragged"])
def test_flex_attention_is_green_and_forward_only(bench, shape):
    name = next(c.name for c in candidates(SHAPES[shape], CPU) if "Flex" in c.name)
    assert isinstance(bench.measure(shape, FORWARD, [name])[name], Measured)
    assert "no backward" in bench.measure(shape, BOTH, [name])[name].reason


def wrong_sign(problem: AttentionProblem) -> Run:
    leaves = fresh(problem.inputs)
    tensors = [leaves[name] for name in ("q1", "k1", "q2", "k2", "v")]
    return Run(lambda: rdfkern.diff_attention(*tensors, -leaves["lam"][:, None]), leaves)


def gradient_lost(problem: AttentionProblem) -> Run:
    leaves = fresh(problem.inputs)
    tensors = [leaves[name] for name in ("q1", "k1", "q2", "k2", "v")]
    lam = leaves["lam"][:, None]

    def forward():
        return rdfkern.diff_attention(*tensors, lam.detach() + 0 * lam)

    return Run(forward, leaves)


def fails(problem: AttentionProblem) -> Run:
    raise RuntimeError("No available kernel.\nMore words.")


@pytest.mark.parametrize(
    ("prepare", "red", "reason"),
    [
        (wrong_sign, True, "check red: "),
        (gradient_lost, True, "check red: lam"),
        (fails, False, "RuntimeError: No available kernel."),
    ],
)
def test_what_is_wrong_or_fails_gets_no_figure(bench, monkeypatch, prepare, red, reason):
    monkeypatch.setattr("bench.measure.candidates", lambda *_: [Candidate("planted", prepare)])
    bench._prepared = None
    result = bench.measure("tiny", FORWARD, ["planted"])["planted"]
    bench._prepared = None
    assert isinstance(result, LeftOut) and result.red == red
    assert result.reason.startswith(reason)


def test_an_implementation_of_ours_may_not_fail(bench, monkeypatch):
    planted = Candidate("rdfkern torch", fails, ours="torch")
    monkeypatch.setattr("bench.measure.candidates", lambda *_: [planted])
    bench._prepared = None
    assert bench.measure("tiny", FORWARD, ["rdfkern torch"])["rdfkern torch"].red
    bench._prepared = None


@pytest.mark.parametrize("causal", [False, True])
def test_last_queries_stand_for_all(monkeypatch, causal):
    shape = AttentionShape(
        "t",
        group="tiny",
        batch=2,
        heads=2,
        queries=19,
        keys=23,
        head_dim=4,
        value_dim=6,
        is_causal=causal,
    )
    monkeypatch.setattr(attention_problem, "LARGEST_TRUTH", 2 * 2 * 23 * 5)
    problem = AttentionProblem(shape, CPU)
    assert problem.rows == 5
    truth, plain = problem.truth(), problem.plain()
    assert truth["out"].shape == (2, 2, 5, 6)
    run = attention_problem.ours("torch").prepare(problem)
    out, gradients = run.both(problem.checked_gradient)
    assert check(problem.observed(out, gradients), plain, truth, ours=True).green
    out, gradients = run.both(problem.gradient)  # of all queries: other keys' gradients
    assert not check(problem.observed(out, gradients), plain, truth, ours=True).green


@pytest.mark.parametrize(
    "name",
    [
        "tiny-window",
        "tiny-explicit",
        "tiny-attention",
        "tiny-attention-alone",
        "tiny-dot",
        "tiny-dot-alone",
    ],
)
def test_some_targets_stand_for_all(monkeypatch, name):
    monkeypatch.setattr(relation_problem, "CHECKED_TARGETS", 4)
    problem = RelationProblem(SHAPES[name], CPU)
    assert len(problem.targets) == 4
    truth, plain = problem.truth(), problem.plain()
    run = relation_problem.ours("torch").prepare(problem)
    out, gradients = run.both(problem.checked_gradient)
    assert check(problem.observed(out, gradients), plain, truth, ours=True).green
    out, gradients = run.both(problem.gradient)
    assert not check(problem.observed(out, gradients), plain, truth, ours=True).green


def test_edges_into_targets_are_those_of_the_rule():
    graph = RelationProblem(SHAPES["tiny-window"], CPU).graph
    targets = torch.tensor([0, 6, 7, 20])
    source, number, kind = relation_problem._edges_into(graph, targets)
    (all_source, all_target), all_kind = graph.to_edges()
    kept = torch.isin(all_target, targets)
    found = set(zip(source.tolist(), targets[number].tolist(), kind.tolist(), strict=True))
    edges = (all_source[kept].tolist(), all_target[kept].tolist(), all_kind[kept].tolist())
    assert found == set(zip(*edges, strict=True))


def test_useful_flops_are_the_units_of_the_cost_table():
    unit = 2.0 * 4 * 2048**2 * 64
    square = AttentionProblem(SHAPES["square"], CPU)
    assert square.useful_flops(FORWARD) == 6 * unit
    assert square.useful_flops(BOTH) == 16 * unit
    causal = AttentionProblem(SHAPES["causal"], CPU)
    assert causal.useful_flops(FORWARD) == pytest.approx(3 * unit, rel=1e-3)


def test_error_ratio_counts_in_plain_errors_and_roundings():
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = truth.float()
    eps = torch.finfo(torch.float32).eps
    assert error_ratio(truth.float(), plain, truth) == 0
    off = (truth + torch.tensor([0.0, 6 * eps])).float()
    assert error_ratio(off, plain, truth) == pytest.approx(3, rel=0.2)
    assert error_ratio(plain[:1], plain, truth) == float("inf")
    assert error_ratio(torch.full((2,), torch.nan), plain, truth) == float("inf")


def test_memory_is_refused_beforehand():
    with pytest.raises(Unsuitable, match="more than half of the memory"):
        check_memory(1e18, CPU)


def test_one_peer_by_hand():
    problem = AttentionProblem(SHAPES["tiny"], CPU)
    inputs = problem.inputs
    q1, k1, q2, k2, v = (inputs[name] for name in ("q1", "k1", "q2", "k2", "v"))
    lam = inputs["lam"][:, None, None]
    maps = [(q @ k.mT / 4).softmax(-1) for q, k in ((q1, k1), (q2, k2))]
    out = two_calls(q1, k1, q2, k2, v, lam, Visible())
    torch.testing.assert_close(out, (maps[0] - lam * maps[1]) @ v)


def test_sdpa_backends_can_be_chosen():
    problem = AttentionProblem(SHAPES["tiny"], CPU)
    inputs = problem.inputs
    tensors = [inputs[name] for name in ("q1", "k1", "q2", "k2", "v")]
    arguments = (*tensors, inputs["lam"][:, None, None], Visible())
    chosen = with_backend(two_padded_calls, SDPBackend.FLASH_ATTENTION)
    torch.testing.assert_close(chosen(*arguments), two_calls(*arguments))
    with pytest.raises(RuntimeError):
        with_backend(two_padded_calls, SDPBackend.CUDNN_ATTENTION)(*arguments)


class StandInFlashAttention:
    """flash-attn's two functions, in its layouts, by SDPA: the package itself needs a GPU."""

    @staticmethod
    def flash_attn_func(q, k, v, causal, window_size):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert window_size == (-1, -1)
        swapped = (tensor.transpose(1, 2) for tensor in (q, k, v))
        options = {"is_causal": causal, "enable_gqa": q.shape[2] != k.shape[2]}
        return scaled_dot_product_attention(*swapped, **options).transpose(1, 2)

    @classmethod
    def flash_attn_varlen_func(cls, q, k, v, starts_q, starts_k, longest_q, longest_k):
        assert torch.equal(starts_q, starts_k) and longest_q == longest_k == 12
        sizes = starts_q.diff().tolist()
        parts = zip(*(tensor.split(sizes) for tensor in (q, k, v)), strict=True)
        packed = [tuple(tensor[None] for tensor in part) for part in parts]
        return torch.cat([cls.flash_attn_func(*part, False, (-1, -1))[0] for part in packed])


@pytest.mark.parametrize("shape", ["tiny", "tiny-ragged"])
def test_flash_attention_gets_its_layouts(monkeypatch, shape):
    monkeypatch.setitem(sys.modules, "flash_attn", StandInFlashAttention)
    problem = AttentionProblem(SHAPES[shape], CPU)
    names = [candidate.name for candidate in candidates(SHAPES[shape], torch.device("cuda"))]
    assert "4 FlashAttention calls" in names
    run = attention_candidates._flash(problem)
    out, gradients = run.both(run.to_layout(problem.gradient))
    gradients = {name: run.from_layout(gradient) for name, gradient in gradients.items()}
    seen = problem.observed(run.from_layout(out), gradients)
    truth, plain = problem.truth(), problem.plain()
    assert check(seen, plain, truth, ours=False).green


def test_flash_attention_is_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(Unsuitable, match="flash-attn is not installed"):
        attention_candidates._flash(AttentionProblem(SHAPES["tiny"], CPU))
