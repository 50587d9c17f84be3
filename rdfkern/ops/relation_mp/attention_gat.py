"""Logits that are products of two vectors with the values, for kernels that take logits only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backends.autocast import without_autocast


def logits(value: Tensor, att_dst: Tensor, att_src: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H) each, of a value (N, H, C) and vectors (H, C)."""
    with without_autocast(value.device.type):
        att = torch.stack((att_dst, att_src), dim=1)  # [H, 2, C]
        products = torch.bmm(att, value.permute(1, 2, 0))  # [H, 2, N]
    return products.permute(1, 2, 0).unbind(0)


def gradients(
    value: Tensor, att_dst: Tensor, att_src: Tensor, dvalue: Tensor, ddst: Tensor, dsrc: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of value, att_dst and att_src; dvalue, ddst and dsrc are those of value and logits."""
    with without_autocast(value.device.type):
        att = torch.stack((att_dst, att_src), dim=1)
        to_logits = torch.stack((ddst.t(), dsrc.t()), dim=1)  # [H, 2, N]
        datt = torch.bmm(to_logits, value.transpose(0, 1))  # [H, 2, C]
        dvalue.transpose(0, 1).baddbmm_(to_logits.transpose(1, 2), att)
    return dvalue, datt[:, 0].contiguous(), datt[:, 1].contiguous()
