"""Message passing over typed relations: R-GCN convolution and R-GAT attention."""

from __future__ import annotations

from torch import Tensor

from ..._backends.autocast import without_autocast
from ..._backends.dispatch import Implementation, Operation, register
from .arguments import (
    Features,
    Weight,
    attention_arguments,
    conv_arguments,
    dot_attention_arguments,
    gat_arguments,
)
from .attention_config import can_run as attention_triton_reason
from .attention_cuda import can_run as attention_cuda_reason
from .attention_native import can_run as attention_cpu_reason
from .conv_config import can_run as conv_triton_reason
from .conv_cuda import can_run as conv_cuda_reason
from .conv_native import can_run as conv_cpu_reason
from .graph import RelationGraph


def relation_conv(
    x: Features,
    weight: Weight,
    graph: RelationGraph,
    *,
    aggr: str = "mean",
    edge_weight: Tensor | None = None,
    root_weight: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """R-GCN convolution (Schlichtkrull et al. 2018, eq. 2), without its non-linearity.

    out_i = x_i · root + bias + sum over relations r of AGG_{e = (j -> i) of r} (w_e x_j) · W_r.
    Duplicate edges count as separate ones; a node without edges gets root and bias only.

    Args:
        x: (N, in), or (x_src (N_src, in), x_dst (N_dst, in_dst)) of a bipartite graph, where
            x_dst may be None without `root_weight`. float16, bfloat16, float32 or float64; half
            types are computed in float32. Under autocast every input is cast to its dtype first.
        weight: (R, in, out); or (R, NB, in/NB, out/NB), NB diagonal blocks per relation; or a
            basis, (coefficients (R, B), bases (B, in, out)) with W_r = sum_b coefficients[r, b]
            bases[b].
        graph: `RelationGraph` on the device of x, with R relations.
        aggr: `sum` (or `add`); `mean`, over the edges of one relation at a target; `max`,
            elementwise over them, where ties share the gradient evenly.
        edge_weight: (E,), w_e in the order of the edges of an explicit graph; 1 if None. The mean
            divides by the number of edges, whatever their weights.
        root_weight: (in_dst, out).
        bias: (out,).
        impl: `auto`, `triton`, `cuda`, `cpu`, `torch` or `reference`.

    Returns:
        (N_dst, out), of x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendUnavailableError: `impl` was chosen explicitly and cannot run.

    `cpu` gives the same bits in every run, for any number of threads. `torch.compile` and
    `torch.export` see one operator per direction, and binding the graph may be traced too; only
    the implementation `torch` needs, with `fullgraph=True`, a graph that it has used once before.
    """
    arguments = conv_arguments(
        x,
        weight,
        graph,
        aggr=aggr,
        edge_weight=edge_weight,
        root_weight=root_weight,
        bias=bias,
    )
    with without_autocast(graph.device.type):
        return CONV.run(arguments, impl)


def relation_attention(
    value: Tensor,
    logit_dst: Tensor,
    logit_src: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    *,
    negative_slope: float = 0.2,
    softmax: str = "across",
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """R-GAT attention with additive logits (Busbridge et al. 2019).

    l_e = LeakyReLU(logit_dst[i] + logit_src[j] + logit_rel[relation of e]) for every edge
    e = (j -> i); a_e = softmax of l over the edges into i, all of them or those of e's relation;
    out_i = sum_e a_e value[j]. Duplicate edges count as separate ones. A target without edges, or
    whose logits are all -inf, gets exactly 0 and gives zero gradients; within relations that holds
    for every relation's share.

    Args:
        value: (N, H, C), the sources' features; N_src of a bipartite graph. float16, bfloat16,
            float32 or float64; half types are computed in float32. Under autocast every input is
            cast to its dtype first.
        logit_dst: (N, H), N_dst of a bipartite graph.
        logit_src: (N, H), N_src of a bipartite graph.
        logit_rel: (R, H).
        graph: `RelationGraph` on the device of value, with R relations.
        negative_slope: of the LeakyReLU.
        softmax: `across`, the weights of all edges into a target sum to 1 (ARGAT); or `within`,
            those of every relation do (WIRGAT).
        dropout_p: in [0, 1): every weight a_e is zeroed with this probability, else scaled by
            1 / (1 - dropout_p). Which ones depends on torch's generator and the implementation.
        impl: `auto`, `triton`, `cuda`, `cpu`, `torch` or `reference`.

    Returns:
        (N, H, C), N_dst of a bipartite graph, of value's dtype.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendUnavailableError: `impl` was chosen explicitly and cannot run.

    An implicit graph's edges are never stored by `cpu`. Under `torch.compile(fullgraph=True)`,
    `torch` needs a graph that it has used once before.
    """
    arguments = attention_arguments(
        value,
        logit_dst,
        logit_src,
        logit_rel,
        graph,
        negative_slope=negative_slope,
        softmax=softmax,
        dropout_p=dropout_p,
    )
    with without_autocast(graph.device.type):
        return ATTENTION.run(arguments, impl)


def relation_gat(
    value: Tensor,
    att_dst: Tensor,
    att_src: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    *,
    negative_slope: float = 0.2,
    softmax: str = "across",
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """`relation_attention` whose logits are products of attention vectors with the values.

    logit_dst[i] = att_dst . value[i] and logit_src[j] = att_src . value[j] per head, as in GAT
    layers (Velickovic et al. 2018, section 2.1). The same as making these first, with one node of
    the autograd graph instead of many: for small graphs that is most of the time.

    Args:
        value: (N, H, C), both the targets' and the sources' features.
        att_dst, att_src: (H, C).
        logit_rel: (R, H).
        graph: with as many sources as targets.
        negative_slope, softmax, dropout_p, impl: as in `relation_attention`, dtypes as well.

    Returns:
        (N, H, C), of value's dtype.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendUnavailableError: `impl` was chosen explicitly and cannot run.
    """
    arguments = gat_arguments(
        value,
        att_dst,
        att_src,
        logit_rel,
        graph,
        negative_slope=negative_slope,
        softmax=softmax,
        dropout_p=dropout_p,
    )
    with without_autocast(graph.device.type):
        return GAT.run(arguments, impl)


def relation_dot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    *,
    scale: float | None = None,
    softmax: str = "across",
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Attention over typed edges with dot-product logits and one logit per relation.

    l_e = scale * query[i] . key[j] + logit_rel[relation of e] for every edge e = (j -> i), without
    a LeakyReLU; everything else as in `relation_attention`.

    Args:
        query: (N, H, D), N_dst of a bipartite graph; D >= 1.
        key: (N, H, D), N_src of a bipartite graph.
        value: (N, H, C), N_src of a bipartite graph.
        logit_rel: (R, H).
        scale: default 1 / sqrt(D).
        graph, softmax, dropout_p, impl: as in `relation_attention`, dtypes as well.

    Returns:
        (N, H, C), N_dst of a bipartite graph, of value's dtype.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendUnavailableError: `impl` was chosen explicitly and cannot run.
    """
    arguments = dot_attention_arguments(
        query, key, value, logit_rel, graph, scale=scale, softmax=softmax, dropout_p=dropout_p
    )
    with without_autocast(graph.device.type):
        return DOT_ATTENTION.run(arguments, impl)


CONV = register(
    Operation(
        name="relation_conv",
        validate=conv_arguments,
        implementations={
            "triton": Implementation(".ops.relation_mp.conv_triton", conv_triton_reason),
            "cuda": Implementation(".ops.relation_mp.conv_cuda", conv_cuda_reason),
            "cpu": Implementation(".ops.relation_mp.conv_native", conv_cpu_reason),
            "torch": Implementation(".ops.relation_mp.composed"),
            "reference": Implementation(".ops.relation_mp.reference"),
        },
    )
)
_ATTENTION = {
    "triton": Implementation(".ops.relation_mp.attention_triton", attention_triton_reason),
    "cuda": Implementation(".ops.relation_mp.attention_cuda", attention_cuda_reason),
    "cpu": Implementation(".ops.relation_mp.attention_native", attention_cpu_reason),
    "torch": Implementation(".ops.relation_mp.composed"),
    "reference": Implementation(".ops.relation_mp.reference"),
}
ATTENTION = register(Operation("relation_attention", attention_arguments, _ATTENTION))
DOT_ATTENTION = register(Operation("relation_dot_attention", dot_attention_arguments, _ATTENTION))
GAT = register(Operation("relation_gat", gat_arguments, _ATTENTION))
