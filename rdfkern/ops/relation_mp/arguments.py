"""Checks of the public arguments of the relation operations, and their canonical form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._backends.autocast import autocast_inputs
from ..._backends.checks import check_floating, check_number, check_shape
from .graph import RelationGraph

_AGGREGATIONS = {"sum": "sum", "add": "sum", "mean": "mean", "max": "max"}

Weight = Tensor | tuple[Tensor, Tensor]
Features = Tensor | tuple[Tensor, Tensor | None]


def conv_arguments(
    x: Features,
    weight: Weight,
    graph: RelationGraph,
    *,
    aggr: str = "mean",
    edge_weight: Tensor | None = None,
    root_weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, Any]:
    """Validated arguments of `relation_conv`; weight and x come apart."""
    _check_graph(graph)
    if aggr not in _AGGREGATIONS:
        raise ValueError(f"aggr must be one of {', '.join(_AGGREGATIONS)}, got {aggr!r}")
    if isinstance(x, tuple | list):
        x_src, x_dst = _pair("x", x, "(x_src, x_dst)")
    else:
        x_src, x_dst = x, x if graph.num_src == graph.num_dst else None
    coefficients = None
    if isinstance(weight, tuple | list):
        coefficients, weight = _pair("weight", weight, "(coefficients, bases)")
        if coefficients is None:
            raise TypeError("weight[0] must be a tensor of coefficients, got None")
    names = ("x", "weight", "weight[0]", "edge_weight", "root_weight", "bias", "x[1]")
    tensors = autocast_inputs(x_src, weight, coefficients, edge_weight, root_weight, bias, x_dst)
    given = dict(zip(names, tensors, strict=True))
    optional = names[2:]
    check_floating({name: t for name, t in given.items() if t is not None or name not in optional})
    x_src, weight, coefficients, edge_weight, root_weight, bias, x_dst = tensors
    if x_dst is not None and not isinstance(x, tuple | list):
        x_dst = x_src  # one tensor after autocast too
    _check_on_device(graph, "x", x_src)
    check_shape("x", x_src, (graph.num_src, None), "(N_src, in)")
    width_out = _check_weight(weight, coefficients, graph, x_src.shape[1])
    if edge_weight is not None:
        if graph.is_implicit:
            raise ValueError(
                "edge_weight needs a graph with a list of edges, and this one is a rule: make it "
                "explicit with RelationGraph.from_edges(*graph.to_edges(), num_nodes, "
                "num_relations)"
            )
        edges = graph.to_edges()[1].shape[0]
        check_shape("edge_weight", edge_weight, (edges,), "(E,)")
    if x_dst is not None:
        check_shape("x[1]", x_dst, (graph.num_dst, None), "(N_dst, in_dst)")
    if root_weight is not None:
        if x_dst is None:
            raise ValueError("root_weight needs the targets' features: x must be (x_src, x_dst)")
        check_shape("root_weight", root_weight, (x_dst.shape[1], width_out), "(in_dst, out)")
    if bias is not None:
        check_shape("bias", bias, (width_out,), "(out,)")
    return {
        "x_src": x_src,
        "x_dst": x_dst,
        "weight": weight,
        "coefficients": coefficients,
        "graph": graph,
        "aggr": _AGGREGATIONS[aggr],
        "edge_weight": edge_weight,
        "root_weight": root_weight,
        "bias": bias,
    }


def attention_arguments(
    value: Tensor,
    logit_dst: Tensor,
    logit_src: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    *,
    negative_slope: float = 0.2,
    softmax: str = "across",
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    """Validated arguments of `relation_attention`."""
    _check_graph(graph)
    value, logit_dst, logit_src, logit_rel = autocast_inputs(value, logit_dst, logit_src, logit_rel)
    check_floating(
        {"value": value, "logit_dst": logit_dst, "logit_src": logit_src, "logit_rel": logit_rel}
    )
    heads = _check_values(value, logit_rel, graph)
    check_shape("logit_dst", logit_dst, (graph.num_dst, heads), "(N_dst, H)")
    check_shape("logit_src", logit_src, (graph.num_src, heads), "(N_src, H)")
    check_number("negative_slope", negative_slope)
    return {
        "value": value,
        "logit_dst": logit_dst,
        "logit_src": logit_src,
        "logit_rel": logit_rel,
        "graph": graph,
        "negative_slope": float(negative_slope),
        **_softmax_options(softmax, dropout_p),
    }


def gat_arguments(
    value: Tensor,
    att_dst: Tensor,
    att_src: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    *,
    negative_slope: float = 0.2,
    softmax: str = "across",
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    """Validated arguments of `relation_gat`."""
    _check_graph(graph)
    value, att_dst, att_src, logit_rel = autocast_inputs(value, att_dst, att_src, logit_rel)
    check_floating({"value": value, "att_dst": att_dst, "att_src": att_src, "logit_rel": logit_rel})
    if graph.num_src != graph.num_dst:
        raise ValueError(
            f"graph must have as many sources as targets, got {graph.num_src} and {graph.num_dst}; "
            "relation_attention takes the logits of both"
        )
    heads = _check_values(value, logit_rel, graph)
    check_shape("att_dst", att_dst, (heads, value.shape[2]), "(H, C)")
    check_shape("att_src", att_src, (heads, value.shape[2]), "(H, C)")
    check_number("negative_slope", negative_slope)
    return {
        "value": value,
        "att_dst": att_dst,
        "att_src": att_src,
        "logit_rel": logit_rel,
        "graph": graph,
        "negative_slope": float(negative_slope),
        **_softmax_options(softmax, dropout_p),
    }


def dot_attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    *,
    scale: float | None = None,
    softmax: str = "across",
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    """Validated arguments of `relation_dot_attention`, the scale filled in."""
    _check_graph(graph)
    query, key, value, logit_rel = autocast_inputs(query, key, value, logit_rel)
    check_floating({"value": value, "query": query, "key": key, "logit_rel": logit_rel})
    heads = _check_values(value, logit_rel, graph)
    check_shape("query", query, (graph.num_dst, heads, None), "(N_dst, H, D)")
    width = query.shape[2]
    if width < 1:
        raise ValueError(f"query must have D >= 1, got shape {tuple(query.shape)}")
    check_shape("key", key, (graph.num_src, heads, width), "(N_src, H, D)")
    if scale is None:
        scale = width**-0.5
    check_number("scale", scale)
    return {
        "query": query,
        "key": key,
        "value": value,
        "logit_rel": logit_rel,
        "graph": graph,
        "scale": float(scale),
        **_softmax_options(softmax, dropout_p),
    }


def _check_values(value: Tensor, logit_rel: Tensor, graph: RelationGraph) -> int:
    """Check what both forms of attention have and return the number of heads."""
    _check_on_device(graph, "value", value)
    check_shape("value", value, (graph.num_src, None, None), "(N_src, H, C)")
    check_shape("logit_rel", logit_rel, (graph.num_relations, value.shape[1]), "(R, H)")
    return value.shape[1]


def _softmax_options(softmax: str, dropout_p: float) -> dict[str, Any]:
    if softmax not in ("across", "within"):
        raise ValueError(f"softmax must be 'across' or 'within', got {softmax!r}")
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return {"softmax": softmax, "dropout_p": float(dropout_p)}


def _check_graph(graph: RelationGraph) -> None:
    if not isinstance(graph, RelationGraph):
        raise TypeError(f"graph must be a RelationGraph, got {type(graph).__name__}")


def _check_on_device(graph: RelationGraph, name: str, tensor: Tensor) -> None:
    if graph.device != tensor.device:
        raise ValueError(
            f"graph must be on the device of {name} ({tensor.device}), got {graph.device}; "
            f"move it with graph.to(device)"
        )


def _check_weight(
    weight: Tensor, coefficients: Tensor | None, graph: RelationGraph, width_in: int
) -> int:
    """Check every form of weight and return the output width."""
    if coefficients is not None:
        check_shape("weight[0]", coefficients, (graph.num_relations, None), "(R, B)")
        check_shape("weight[1]", weight, (coefficients.shape[1], width_in, None), "(B, in, out)")
        return weight.shape[2]
    if weight.dim() == 4:
        check_shape(
            "weight", weight, (graph.num_relations, None, None, None), "(R, NB, in/NB, out/NB)"
        )
        if weight.shape[1] < 1 or weight.shape[1] * weight.shape[2] != width_in:
            raise ValueError(
                f"weight must have NB >= 1 blocks that divide in = {width_in} into NB equal parts,"
                f" got shape {tuple(weight.shape)}"
            )
        return weight.shape[1] * weight.shape[3]
    check_shape("weight", weight, (graph.num_relations, width_in, None), "(R, in, out)")
    return weight.shape[2]


def _pair(name: str, value: Any, spelled: str) -> tuple[Any, Any]:
    if len(value) != 2:
        raise ValueError(f"{name} must be a tensor or {spelled}, got {len(value)} elements")
    return value[0], value[1]
