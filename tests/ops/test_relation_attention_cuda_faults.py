"""Faults planted in the CUDA kernels of relation attention: the emulated tests notice each."""

import pytest

TESTS = "tests/ops/test_relation_attention_cuda.py"
SANITIZED = (
    "test_error_budget[rule, isolated nodes-additive]",
    "test_error_budget[list, bipartite-dot]",
    "test_half_types[rule, positions in any order-dot-dtype0]",
    "test_softmax_within_relations[list, 300 relations-additive]",
    "test_widths[list, random-dot-1-33-140]",
    "test_strides[list, random-additive]",
)
SELECTED = (
    *SANITIZED,
    "test_error_budget[rule, window-dot]",
    "test_error_budget[rule, modalities share steps-additive]",
    "test_softmax_within_relations[rule, window-dot]",
    "test_softmax_within_relations[list, random-additive]",
    "test_minus_infinity_hides[list, random-additive-across]",
    "test_large_logits_stay_finite[additive]",
    "test_negative_slopes[1.7]",
    "test_scales[-0.8]",
    "test_dropout_on_lists_is_drawn_again_in_backward[dot-across]",
    "test_dropout_on_rules_is_that_of_the_cpu_kernels[dot-across]",
    "test_dropout_on_rules_is_that_of_the_cpu_kernels[dot-within]",
    "test_every_schedule_gives_the_same_bits[reverse-0-across]",
    "test_every_schedule_gives_the_same_bits[reverse-0-within]",
    "test_relation_gradients_in_few_parts[1]",
)
KERNELS, PAIRS = "relation_attention.cuh", "relation_pairs.cuh"
OUT_OF_BOUNDS = {
    "slots behind the last one": (
        PAIRS,
        "slot < end ? pairs.at(row, slot)",
        "slot < end + 1 ? pairs.at(row, slot)",
    ),
    "columns behind the last one": (
        KERNELS,
        "if (column < width)\n      sums[n] = fmaf",
        "sums[n] = fmaf",
    ),
    "rows behind the last one": (
        KERNELS,
        "if (row >= pairs.rows) return;\n"
        "#pragma unroll 1\n  for (int first = 0; first < given.value_dim; first",
        "#pragma unroll 1\n  for (int first = 0; first < given.value_dim; first",
    ),
    "a softmax for every relation of every edge": (
        PAIRS,
        "return pair.edge;",
        "return pair.edge * 300 + pair.relation;",
    ),
}
WRONG = {
    "a lane too few": (PAIRS, "having >> lane; ++lane)", "having >> (lane + 1); ++lane)"),
    "later sources are at the same position": (PAIRS, "? 1\n", "? 2\n"),
    "old sums are not rescaled": (KERNELS, "parts[n] *= rescale;", "parts[n] *= 1.0f;"),
    "old totals are not rescaled": (
        KERNELS,
        "fmaf(total, rescale, sum_of_warp",
        "fmaf(total, 1.0f, sum_of_warp",
    ),
    "old parts of delta are not rescaled": (
        KERNELS,
        "fmaf(delta, rescale, weight * terms.reaching)",
        "fmaf(delta, 1.0f, weight * terms.reaching)",
    ),
    "nothing but -inf": (KERNELS, "highest == kHiddenLogit ? 0.0f : highest", "highest"),
    "a slope of 1 in backward": (
        KERNELS,
        "(terms.reaching - gradients.delta[at]) * terms.slope",
        "(terms.reaching - gradients.delta[at])",
    ),
    "weights without their maximum": (KERNELS, "[at] = softmax.top;", "[at] = 0.0f;"),
    "delta without dropout": (
        KERNELS,
        "reaching = kept * Attention::product",
        "reaching = Attention::product",
    ),
    "dvalue without dropout": (
        KERNELS,
        "weight.probability * terms.kept;",
        "weight.probability;",
    ),
    "dropout before the normaliser": (
        KERNELS,
        "float weight = softmax.weight(logit, rescale);",
        "if (given.dropout.probability > 0 && pair.exists())\n"
        "          logit += logf(pairs.kept(given.dropout, head, pair));\n"
        "        float weight = softmax.weight(logit, rescale);",
    ),
    "dsrc without scale": (KERNELS, "write_row(keys, given.scale", "write_row(keys, 1.0f"),
    "ddst without scale": (KERNELS, "write_row(sums, given.scale", "write_row(sums, 1.0f"),
    "the first relation of every 32 edges": (
        KERNELS,
        "if (left == lowest) left = kNoRelation;",
        "left = kNoRelation;",
    ),
    "targets belong to two parts": (
        KERNELS,
        "row += gradients.chunks)",
        "row += max(gradients.chunks - 1, 1))",
    ),
    "one softmax is the sum of all": (
        KERNELS,
        "fmaf(parts[n], softmax.inverse(), sums[n])",
        "sums[n] ? sums[n] : parts[n] * softmax.inverse()",
    ),
    "edges of other relations take part": (
        PAIRS,
        "group.relation == kEveryRelation || group.relation == pair.relation",
        "true",
    ),
    "lists leave out the last edge of a relation": (
        PAIRS,
        "{begin, first_above(begin, end, lowest), lowest}",
        "{begin, max(begin + 1, first_above(begin, end, lowest) - 1), lowest}",
    ),
    "rules leave out relations that later edges have": (
        PAIRS,
        "minimum_of_warp(lowest)}",
        "__shfl_sync(kAllLanes, lowest, 0)}",
    ),
    "one softmax kept for all relations of a target": (
        PAIRS,
        "return pair.target * relations + pair.relation;",
        "return pair.target;",
    ),
    "softmaxes are read before they are kept": (KERNELS, "  __syncwarp();\n", ""),
}


def run_selected(emulator, library, names):
    return emulator.run_tests(library, *(f"{TESTS}::{name}" for name in names))


@pytest.mark.slow
@pytest.mark.parametrize("fault", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_access_out_of_bounds(fault, cuda_emulator, tmp_path):
    library = cuda_emulator.build("relation_attention.cu", tmp_path, sanitize=True, faults=(fault,))
    done = run_selected(cuda_emulator, library, SANITIZED)
    assert "AddressSanitizer: " in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG.values(), ids=WRONG)
def test_wrong_arithmetic(fault, cuda_emulator, tmp_path):
    library = cuda_emulator.build("relation_attention.cu", tmp_path, faults=(fault,))
    done = run_selected(cuda_emulator, library, SELECTED)
    assert "1 failed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_nothing_is_out_of_bounds(cuda_emulator, tmp_path):
    library = cuda_emulator.build("relation_attention.cu", tmp_path, sanitize=True)
    done = run_selected(cuda_emulator, library, SANITIZED)
    assert f"{len(SANITIZED)} passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
