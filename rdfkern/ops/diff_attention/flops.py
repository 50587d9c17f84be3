"""What the registered operators cost, for torch.utils.flop_counter.

As in torch's formulas for its own attention, masks are not subtracted: causal attention counts as
much as full attention. A multiply-add is two operations.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .formula import dim_of_values

COUNTER = "torch.utils.flop_counter"


def forward_flops(*arguments: Any, out_val: Any = None, **what_is_kept: bool) -> int:
    """Of `rdfkern::diff_attn_fwd`: for each map, its scores of D and its product with V of Dv."""
    named = _named(torch.ops.rdfkern.diff_attn_fwd, arguments)
    dim, value_dim = named["q1"].shape[-1], dim_of_values(named["v"])
    return 2 * _pairs(named) * _maps(named) * (dim + value_dim)


def backward_flops(*arguments: Any, out_val: Any = None) -> int:
    """Of `rdfkern::diff_attn_bwd` in one pass: scores, dQ and dK per map; dP and dV once."""
    named = _named(torch.ops.rdfkern.diff_attn_bwd, arguments)
    dim, value_dim = named["q1"].shape[-1], dim_of_values(named["v"])
    return 2 * _pairs(named) * (3 * _maps(named) * dim + 2 * value_dim)


def register_when_counted() -> None:
    """Register the formulas as soon as torch's counter is imported, or at once if it is.

    The counter reads its registry when it is made, so a later call would be too late; importing it
    here would take half a second, and Triton with it.
    """
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Lets the usual finders import the counter, registers the formulas, and is gone."""

    _asking_others = False

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER or self._asking_others:
            return None
        self._asking_others = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking_others = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def _register(counter: ModuleType) -> None:
    formulas = {"diff_attn_fwd": forward_flops, "diff_attn_bwd": backward_flops}
    for name, formula in formulas.items():
        operator = getattr(torch.ops.rdfkern, name)
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator, get_raw=True)(formula)


def _named(operator: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    names = (argument.name for argument in operator.default._schema.arguments)
    return dict(zip(names, arguments, strict=False))  # what has a default may not be there


def _maps(named: dict[str, Any]) -> int:
    return 1 if named["q2"] is None else 2


def _pairs(named: dict[str, Any]) -> int:
    """Pairs of a query and a key, over all sequences and heads."""
    cu_q, cu_k = named["cu_seqlens_q"], named["cu_seqlens_k"]
    if cu_q is None:
        batch, heads, rows, _ = named["q1"].shape
        return batch * heads * rows * named["k1"].shape[2]
    heads = named["q1"].shape[1]
    if _has_values(cu_q) and _has_values(cu_k):
        return heads * int((cu_q.diff().long() * cu_k.diff().long()).sum())
    sequences = cu_q.shape[0] - 1
    return heads * sequences * named["max_seqlen_q"] * named["max_seqlen_k"]


def _has_values(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor)
