"""Every module in one compiled graph, forward and backward, exported, and under autocast."""

import pytest
import torch
from torch import nn

from rdfkern import RelationGraph, RelationSpec
from rdfkern.nn import (
    DiffTransformerEncoderLayer,
    MultiheadDiffAttention,
    MultiheadDiffAttentionV2,
    RelationAttention,
    RelationConv,
    TextGuidedDiffusion,
)

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
SPEC = RelationSpec(2, 1, torch.arange(12).view(2, 2, 3))
IMPLICIT = SPEC.bind(torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([0, 4, 6]))
EXPLICIT = RelationGraph.from_edges(*IMPLICIT.to_edges(), 6, 12)


class Attends(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, padding):
        return self.attention(x, x, x, padding, need_weights=False, is_causal=True)[0]


class Hears(nn.Module):
    """A graph layer, whose graph is no tensor that could be an input of an exported program."""

    def __init__(self, layer, graph):
        super().__init__()
        self.layer, self.graph = layer, graph

    def forward(self, x):
        return self.layer(x, self.graph)


def attention_modules():
    return {
        "v1": Attends(MultiheadDiffAttention(16, 2, batch_first=True)),
        "v1 with appended keys": Attends(
            MultiheadDiffAttention(16, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
        ),
        "v2": Attends(MultiheadDiffAttentionV2(16, 4, batch_first=True, num_kv_heads=2)),
        "encoder layer": DiffTransformerEncoderLayer(
            16, 2, dim_feedforward=8, dropout=0.0, batch_first=True
        ),
        "diffusion": TextGuidedDiffusion(16, 16, 2, steps=3, restart=0.2),
    }


def graph_modules():
    return {
        "conv": Hears(RelationConv(16, 8, 12), EXPLICIT),
        "conv of a rule": Hears(RelationConv(16, 8, 12, num_bases=3), IMPLICIT),
        "attention": Hears(RelationAttention(16, 4, 12, heads=2), EXPLICIT),
        "attention of a rule": Hears(RelationAttention(16, 4, 12, heads=2), IMPLICIT),
        "attention of one head": Hears(RelationAttention(16, 4, 12), IMPLICIT),
        "dot attention": Hears(RelationAttention(16, 4, 12, heads=2, logits="dot"), IMPLICIT),
    }


def case(name):
    """The module, and a function of it that takes one floating tensor."""
    torch.manual_seed(0)
    modules = attention_modules() | graph_modules()
    module = modules[name]
    if name in graph_modules():
        return module, (X[0],), {}
    if name == "encoder layer":
        return module, (X,), {"src_key_padding_mask": PADDING}
    if name == "diffusion":
        return module, (X, X.flip(1)), {"key_padding_mask": PADDING}
    return module, (X, PADDING), {}


NAMES = [*attention_modules(), *graph_modules()]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_forward_and_backward(name):
    module, (x, *rest), options = case(name)
    results = []
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        out = function(leaf, *rest, **options)
        out.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in module.named_parameters()}
        results.append((out.detach(), leaf.grad, gradients))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", NAMES)
def test_export(name):
    module, inputs, options = case(name)
    module.eval()
    with torch.no_grad():
        expected = module(*inputs, **options)
    program = torch.export.export(module, inputs, options)
    torch.testing.assert_close(program.module()(*inputs, **options), expected)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    module, inputs, options = case(name)
    exact = module(*inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*inputs, **options)
    # The norms at the end of an encoder layer are among what autocast leaves in float32.
    assert out.dtype == (torch.float32 if name == "encoder layer" else torch.bfloat16)
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)
    out.float().square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
