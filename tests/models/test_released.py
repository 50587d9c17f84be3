"""The released network against its formulas written out: loops, dense relation pairs, rolled keys.

`Written` works on a state dict under the released names, so that loading is tested as well.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rdfkern.models.data import Batch, Dialogue, collate
from rdfkern.models.outputs import Outputs
from rdfkern.models.released import VARIANTS, ReleasedReDiFu, released_loss
from rdfkern.models.released_layers import add_sinusoid, relation_codes
from rdfkern.models.released_names import RELEASED_NAMES, from_released

WIDTH, HEADS, FUSION_HEADS, WINDOW = 8, 4, 2, 2
DIMS = {"text": 5, "audio": 3, "visual": 4}
CLASSES = 3
SPEAKERS = 3
LENGTHS = (6, 4)


def released_shapes(variant):
    """Names and shapes as the public source has them."""
    d = WIDTH
    shapes = {"speaker_embeddings.weight": (SPEAKERS + 1, d)}

    def linear(name, out, into, bias=True):
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for name, dim in zip(("textf", "acouf", "visuf"), DIMS.values(), strict=True):
        linear(f"{name}_input", d, dim)
    for e in ("a_a", "v_v"):
        if variant == "meld":
            shapes[f"{e}.pos_emb.pe"] = (1, 512, d)
        else:
            shapes[f"{e}.pos_emb.inv_freq"] = (d // 2,)
            shapes[f"{e}.pos_emb.modality_scales"] = (3,)
        shapes[f"{e}.delta_net.alpha"] = (1,)
        shapes[f"{e}.delta_net.conv.weight"] = (d, 1, 3)
        shapes[f"{e}.delta_net.conv.bias"] = (d,)
        norm(f"{e}.delta_net.norm", d)
        linear(f"{e}.delta_net.gate.0", d, d)
        norm(f"{e}.context_gate.norm", 2 * d)
        linear(f"{e}.context_gate.w.0", d, 2 * d)
        linear(f"{e}.context_gate.w.2", 1, d)
        layer = f"{e}.internal_transformer.0"
        shapes[f"{layer}.self_attn.lambda_"] = ()
        linear(f"{layer}.self_attn.qkv", 3 * d, d)
        linear(f"{layer}.self_attn.out", d, d)
        linear(f"{layer}.feed_forward.w_1", d, d)
        linear(f"{layer}.feed_forward.w_2", d, d)
        for n in ("feed_forward.layer_norm", "norm1", "norm2"):
            norm(f"{layer}.{n}", d)
        norm(f"{e}.pre_norm", d)
    linear("agate.gate.0", d, d)
    linear("vgate.gate.0", d, d)
    for layer in ("gatTer", "gatT"):
        for part, into in (("attentions.0", d), ("attentions.1", d), ("out_att", 2 * d)):
            shapes[f"{layer}.{part}.W"] = (into, d)
            shapes[f"{layer}.{part}.a"] = (2 * d + 10, 1)
            shapes[f"{layer}.{part}.relation_embedding.weight"] = (6, 10)
            norm(f"{layer}.{part}.layer_norm", d)
        linear(f"{layer}.fc", d, d)
        norm(f"{layer}.layer_norm", d)
    for m in "tav":
        norm(f"mutual_former.norm_{m}", d)
        linear(f"mutual_former.attn_{m}.qkv", 3 * d, d, bias=False)
        linear(f"mutual_former.attn_{m}.proj", d, d)
        linear(f"mutual_former.gate_{m}.gate.0", d, 2 * d)
        for index, (out, into) in {0: (4, 1), 3: (4, 4), 6: (4, 4), 9: (1, 4)}.items():
            linear(f"mutual_former.mlp_{m}.layers.{index}", out * d, into * d)
        linear(f"{m}_output_layer.2", CLASSES, d)
    return shapes


def released_state(variant):
    generator = torch.Generator().manual_seed(3)
    state = {
        name: 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in released_shapes(variant).items()
    }
    shared = next(value for name, value in state.items() if "relation_embedding" in name)
    state |= dict.fromkeys((n for n in state if "relation_embedding" in n), shared)
    state["speaker_embeddings.weight"][-1] = 0.0
    return state


class Written:
    """The formulas of the released network, one line each; `drop(x, p)` stands for dropout."""

    def __init__(self, variant, state, drop=lambda x, p: x):
        self.meld = variant == "meld"
        self.state, self.drop = state, drop
        self.p = VARIANTS[variant].dropout

    def linear(self, name, x):
        y = x @ self.state[f"{name}.weight"].T
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def norm(self, name, x, eps=1e-5):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def codes(self, speaker, lengths, kind):
        batch, n = speaker.shape
        codes = torch.zeros(batch, n, n, dtype=torch.int64)
        for b, i, j in itertools.product(range(batch), range(n), range(n)):
            if max(i, j) >= lengths[b] or abs(i - j) > WINDOW:
                continue
            if i == j:
                codes[b, i, j] = 1
            elif kind == "cross" and speaker[b, i] != speaker[b, j]:
                codes[b, i, j] = 4 if i < j else 5
            elif kind == "self" and speaker[b, i] == speaker[b, j]:
                codes[b, i, j] = 2 if i > j else 3
        return codes

    def graph_attention(self, name, h, codes):
        wh = h @ self.state[f"{name}.W"]
        batch, n, d = wh.shape
        relation = self.state[f"{name}.relation_embedding.weight"][codes]
        target = wh[:, :, None].expand(batch, n, n, d)
        source = wh[:, None].expand(batch, n, n, d)
        dense = torch.cat([target, source, relation], -1)  # [B, N, N, 2d+10]
        e = F.leaky_relu((dense @ self.state[f"{name}.a"]).squeeze(-1), 0.2)
        alpha = self.drop(torch.where(codes > 0, e, -9e15).softmax(-1), 0.2)
        return self.norm(f"{name}.layer_norm", alpha @ wh)

    def rgat(self, name, x, codes):
        y = self.drop(x, 0.2)
        heads = [self.graph_attention(f"{name}.attentions.{i}", y, codes) for i in (0, 1)]
        y = self.drop(torch.cat([F.gelu(head) for head in heads], -1), 0.2)
        y = F.gelu(self.graph_attention(f"{name}.out_att", y, codes))
        return self.norm(f"{name}.layer_norm", self.linear(f"{name}.fc", y) + x)

    def position(self, x):
        out = x.clone()
        for t, i in itertools.product(range(x.shape[1]), range(0, WIDTH, 2)):
            angle = t / 10000 ** (i / WIDTH)
            sin, cos = math.sin(angle), math.cos(angle)
            if self.meld:
                out[:, t, i], out[:, t, i + 1] = x[:, t, i] + sin, x[:, t, i + 1] + cos
            else:
                out[:, t, i] = x[:, t, i] * cos - x[:, t, i + 1] * sin
                out[:, t, i + 1] = x[:, t, i] * sin + x[:, t, i + 1] * cos
        return out

    def diff_attention(self, name, x, lengths):
        batch, n, _ = x.shape
        q, k, v = self.linear(f"{name}.qkv", x).chunk(3, -1)
        q, k, v = (y.view(batch, n, HEADS, -1).transpose(1, 2) for y in (q, k, v))
        before = torch.stack([k[:, :, (t - 1) % n] for t in range(n)], 2)
        hidden = torch.stack([torch.arange(n) >= length for length in lengths])[:, None, None]
        maps = [
            (q @ keys.transpose(-1, -2) * WIDTH**-0.5).masked_fill(hidden, -1e9).softmax(-1)
            for keys in (k, before)
        ]
        mixed = self.state[f"{name}.lambda_"] * self.drop(maps[0] - maps[1], self.p) @ v
        return self.linear(f"{name}.out", mixed.transpose(1, 2).reshape(batch, n, WIDTH))

    def feed_forward(self, name, y):
        h = self.linear(f"{name}.w_1", self.norm(f"{name}.layer_norm", y, 1e-6))
        factor = 0.66 if self.meld else 0.5
        h = factor * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return y + self.drop(self.linear(f"{name}.w_2", self.drop(h, self.p)), self.p)

    def encoder(self, name, x, speaker, lengths):
        p = self.drop(self.position(x) + speaker, self.p)
        kernel = self.state[f"{name}.delta_net.conv.weight"][:, 0]  # [D, 3]
        padded = F.pad(x, (0, 0, 1, 1))
        conv = self.state[f"{name}.delta_net.conv.bias"] + sum(
            padded[:, s : s + x.shape[1]] * kernel[:, s] for s in range(3)
        )
        gate = self.linear(f"{name}.delta_net.gate.0", x).sigmoid()
        alpha = self.state[f"{name}.delta_net.alpha"]
        delta = x + alpha * gate * self.norm(f"{name}.delta_net.norm", conv)
        g = self.norm(f"{name}.context_gate.norm", torch.cat([p, delta], -1))
        g = self.linear(f"{name}.context_gate.w.0", g).tanh()
        g = self.linear(f"{name}.context_gate.w.2", g).sigmoid()
        h = self.norm(f"{name}.pre_norm", g * delta + (1 - g) * p + p, 1e-6)
        layer = f"{name}.internal_transformer.0"
        h = h + self.diff_attention(f"{layer}.self_attn", h, lengths)
        h = self.norm(f"{layer}.norm1", h, 1e-6)
        h = self.norm(f"{layer}.norm2", h + self.feed_forward(f"{layer}.feed_forward", h), 1e-6)
        return p + (1.0 if self.meld else 0.5) * h

    def cross_attention(self, name, x, other):
        batch, n, _ = x.shape
        q = self.linear(f"{name}.qkv", x)[..., :WIDTH]
        k, v = self.linear(f"{name}.qkv", other)[..., WIDTH:].chunk(2, -1)
        q, k, v = (y.view(batch, n, FUSION_HEADS, -1).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(-1, -2) * (WIDTH // FUSION_HEADS) ** -0.5
        out = (self.drop(scores.softmax(-1), self.p) @ v).transpose(1, 2)
        return self.drop(self.linear(f"{name}.proj", out.reshape(batch, n, WIDTH)), self.p)

    def fusion(self, x):
        normed = {m: self.norm(f"mutual_former.norm_{m}", x[m]) for m in x}
        out = {}
        for m in x:
            crossed = sum(
                self.cross_attention(f"mutual_former.attn_{m}", normed[m], normed[o])
                for o in x
                if o != m
            )
            gate = self.linear(f"mutual_former.gate_{m}.gate.0", torch.cat([x[m], crossed], -1))
            gate = gate.sigmoid()
            y = x[m] * gate + crossed * (1 - gate)
            for i in (0, 3, 6):
                y = F.gelu(self.linear(f"mutual_former.mlp_{m}.layers.{i}", y))
                y = self.drop(y, self.p)
            out[m] = x[m] + self.drop(self.linear(f"mutual_former.mlp_{m}.layers.9", y), self.p)
        return out

    def __call__(self, text, audio, visual, speaker, lengths):
        padded = torch.stack([torch.arange(speaker.shape[1]) >= length for length in lengths])
        voices = self.state["speaker_embeddings.weight"][speaker.masked_fill(padded, SPEAKERS)]
        t = self.rgat(
            "gatTer", self.linear("textf_input", text), self.codes(speaker, lengths, "cross")
        )
        t = self.rgat("gatT", t, self.codes(speaker, lengths, "self"))
        a = self.encoder("a_a", self.linear("acouf_input", audio), voices, lengths)
        v = self.encoder("v_v", self.linear("visuf_input", visual), voices, lengths)
        a = a * self.linear("agate.gate.0", a).sigmoid()
        v = v * self.linear("vgate.gate.0", v).sigmoid()
        x = {"t": t, "a": a, "v": v}
        logits = {}
        for m, fused in self.fusion(x).items():
            active = F.relu(fused) if self.meld else F.leaky_relu(fused + x[m])
            logits[m] = self.linear(f"{m}_output_layer.2", self.drop(active, self.p))
        weights = (3.0, 1.0, 0.3) if self.meld else (1.0, 1.0, 0.4)
        final = sum(w * y for w, y in zip(weights, logits.values(), strict=True))
        return final, *logits.values()


def make_network(variant, **changes):
    sizes = {"width": WIDTH, "heads": HEADS, "fusion_heads": FUSION_HEADS, "window": WINDOW}
    network = ReleasedReDiFu(variant, DIMS, CLASSES, SPEAKERS, **(sizes | changes))
    return network.double()


@pytest.fixture(params=["iemocap", "meld"])
def variant(request):
    return request.param


@pytest.fixture
def padded_inputs():
    generator = torch.Generator().manual_seed(1)
    n = max(LENGTHS)
    mask = torch.stack([torch.arange(n) < length for length in LENGTHS])
    features = [
        torch.randn(len(LENGTHS), n, dim, generator=generator, dtype=torch.float64)
        for dim in DIMS.values()
    ]
    speaker = torch.tensor([[0, 1, 0, 0, 2, 1], [1, 1, 0, 1, 0, 0]])
    return [x * mask[..., None] for x in features], speaker, mask


def pack(features, speaker, mask):
    return Batch(
        features={name: x[mask] for name, x in zip(DIMS, features, strict=True)},
        speaker=speaker[mask],
        speaker_id=torch.zeros_like(speaker[mask]),
        labels=torch.arange(int(mask.sum())) % CLASSES,
        cu_seqlens=F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32),
        max_seqlen=mask.shape[1],
        num_speakers=SPEAKERS,
    )


def compare_with_gradients(network, written, padded_inputs):
    features, speaker, mask = padded_inputs
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in written.state.items()
        if name in RELEASED_NAMES
    }
    shared = next(name for name in leaves if "relation_embedding" in name)
    leaves |= dict.fromkeys((n for n in leaves if "relation_embedding" in n), leaves[shared])
    written.state = leaves
    expected = written(*features, speaker, LENGTHS)
    actual = network.forward_padded(*features, speaker, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)

    for outputs in (expected, actual):
        sum((y[mask] * torch.arange(1, CLASSES + 1)).sin().sum() for y in outputs).backward()
    ours = dict(network.named_parameters())
    assert set(ours) == set(RELEASED_NAMES.values())
    for released, name in RELEASED_NAMES.items():
        want = leaves[released].grad
        if name == "speaker_embedding.weight":
            want[-1] = 0.0
        torch.testing.assert_close(ours[name].grad, want, rtol=1e-7, atol=1e-9, msg=name)
        assert want.abs().max() > 1e-6, f"no gradient reaches {name}"


def test_logits_and_gradients_equal_the_formulas(variant, padded_inputs):
    state = released_state(variant)
    network = make_network(variant).eval()
    network.load_released_state_dict(state)
    compare_with_gradients(network, Written(variant, state), padded_inputs)


def test_every_dropout_stands_where_it_was(variant, padded_inputs, monkeypatch):
    """Dropout is replaced by an affine map, so not a linear one, that depends on place and p."""

    def stand_in(x, p=0.5, training=True, inplace=False):
        pattern = torch.arange(x.numel(), dtype=x.dtype).view(x.shape).cos()
        return x * (1 + p * pattern) + p * pattern / 5 if training else x

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        assert attn_mask is None and not is_causal
        return stand_in((q @ k.mT * scale).softmax(-1), dropout_p) @ v

    monkeypatch.setattr(F, "dropout", stand_in)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    state = released_state(variant)
    network = make_network(variant).train()
    network.load_released_state_dict(state)
    compare_with_gradients(network, Written(variant, state, stand_in), padded_inputs)


def test_packed_dialogues_are_padded_inside(variant, padded_inputs):
    features, speaker, mask = padded_inputs
    network = make_network(variant).eval()
    fused, *per_modality = network.forward_padded(*features, speaker, mask)
    outputs = network(pack(features, speaker, mask))
    torch.testing.assert_close(outputs.fused, fused[mask])
    assert list(outputs.per_modality) == ["text", "audio", "visual"]
    for value, expected in zip(outputs.per_modality.values(), per_modality, strict=True):
        torch.testing.assert_close(value, expected[mask])


def test_padding_changes_results_as_released(variant, padded_inputs):
    features, speaker, mask = padded_inputs
    network = make_network(variant).eval()
    together = network(pack(features, speaker, mask)).fused[LENGTHS[0] :]
    alone = [x[1:, : LENGTHS[1]] for x in (*features, speaker, mask)]
    apart = network(pack(alone[:3], *alone[3:])).fused
    assert (together - apart).abs().max() > 1e-3


def test_empty_batches_and_dialogues(variant):
    network = make_network(variant).float().eval()
    empty = network(collate([], DIMS))
    assert empty.fused.shape == (0, CLASSES)
    assert all(value.shape == (0, CLASSES) for value in empty.per_modality.values())

    def dialogue(length):
        features = {name: np.ones((length, dim), np.float32) for name, dim in DIMS.items()}
        return Dialogue("d", ("a",) * length, np.zeros(length, np.int64), features)

    outputs = network(collate([dialogue(0), dialogue(2)], DIMS))
    assert outputs.fused.shape == (2, CLASSES) and outputs.fused.isfinite().all()
    assert network(collate([dialogue(0)], DIMS)).fused.shape == (0, CLASSES)


def test_dialogues_beyond_the_released_position_table():
    positions = add_sinusoid(torch.zeros(1, 600, 4, dtype=torch.float64))
    expected = [math.sin(599), math.cos(599), math.sin(5.99), math.cos(5.99)]
    torch.testing.assert_close(positions[0, 599], torch.tensor(expected, dtype=torch.float64))
    network = make_network("meld").float().eval()
    length = 520
    features = [torch.zeros(1, length, dim) for dim in DIMS.values()]
    speaker = torch.zeros(1, length, dtype=torch.int64)
    logits = network.forward_padded(*features, speaker, torch.ones(1, length, dtype=torch.bool))
    assert all(value.isfinite().all() for value in logits)


def test_relation_codes_by_hand():
    across, within = relation_codes(
        torch.tensor([[0, 1, 0, 0]]), torch.tensor([[True, True, True, False]]), window=1
    )
    assert across.tolist() == [[[1, 4, 0, 0], [5, 1, 4, 0], [0, 5, 1, 0], [0, 0, 0, 0]]]
    assert within.tolist() == [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]]
    _, within = relation_codes(torch.tensor([[0, 1, 0]]), torch.ones(1, 3, dtype=torch.bool), 2)
    assert within.tolist() == [[[1, 0, 3], [0, 1, 0], [2, 0, 1]]]


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_the_masked_mean_plus_tenths_of_squares(weighted):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
    labels = torch.tensor([0, 2, -1, 1, 2])
    weights = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64) if weighted else None

    def mean(values):
        total = norm = 0.0
        for row, label in zip(values.tolist(), labels.tolist(), strict=True):
            if label < 0:
                continue
            w = weights[label].item() if weighted else 1.0
            total += w * (math.log(sum(map(math.exp, row))) - row[label])
            norm += w
        return total / norm

    outputs = Outputs(logits[0], dict(zip(DIMS, logits[1:], strict=True)))
    expected = mean(logits[0]) + sum(mean(x) * mean(x) / 10 for x in logits[1:])
    assert released_loss(outputs, labels, weights).item() == pytest.approx(expected, rel=1e-12)


def test_loss_without_labels_is_zero():
    logits = torch.randn(2, 3, requires_grad=True)
    outputs = Outputs(logits, dict.fromkeys(DIMS, logits))
    loss = released_loss(outputs, torch.tensor([-1, -1]))
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()


def test_released_sizes():
    assert [(v.width, v.heads, v.fusion_heads, v.window, v.dropout) for v in VARIANTS.values()] == [
        (512, 64, 32, 20, 0.5),
        (256, 16, 16, 25, 0.6),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("gatT.fc.bias"), r"lacks .*gatT\.fc\.bias"),
        (lambda s: s.update({"gatT.fc.scale": torch.zeros(1)}), r"no parameters .*gatT\.fc\.scale"),
        (
            lambda s: s.update({"agate.gate.0.weight": torch.zeros(2, 8)}),
            r"agate\.gate\.0\.weight must have shape \(8, 8\).*got \(2, 8\)",
        ),
        (
            lambda s: s.update({"gatT.out_att.relation_embedding.weight": torch.zeros(6, 10)}),
            r"gatT\.out_att\.relation_embedding\.weight differs",
        ),
    ],
)
def test_damaged_state_dicts(variant, change, message):
    state = released_state(variant)
    change(state)
    with pytest.raises(ValueError, match=message):
        make_network(variant).load_released_state_dict(state)


def test_names_cover_both_sides(variant):
    network = make_network(variant)
    renamed = from_released(released_state(variant))
    assert {n: v.shape for n, v in renamed.items()} == {
        n: v.shape for n, v in network.state_dict().items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "released"}, "variant must be one of iemocap, meld"),
        ({"dims": {"text": 4, "audio": 4}}, "dims must name exactly"),
        ({"dims": DIMS | {"timing": 4}}, "dims must name exactly"),
        ({"dims": DIMS | {"audio": 0}}, r"dims\['audio'\] must be at least 1"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_speakers": 0}, "num_speakers"),
        ({"width": 7}, "width must be even"),
        ({"width": 12, "heads": 5}, "heads must divide the width 12, got 5"),
        ({"width": 12, "heads": 4, "fusion_heads": 5}, "fusion_heads must divide"),
        ({"window": -1}, "window"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_rejects_settings(arguments, message):
    settings = {"variant": "meld", "dims": DIMS, "num_classes": 3, "num_speakers": 2}
    with pytest.raises(ValueError, match=message):
        ReleasedReDiFu(**(settings | arguments))


def test_rejects_inputs(padded_inputs):
    features, speaker, mask = padded_inputs
    network = make_network("meld").eval()
    batch = pack(features, speaker, mask)
    with pytest.raises(ValueError, match="the batch has no visual features"):
        network(Batch(**(vars(batch) | {"features": {"text": 1, "audio": 1}})))
    with pytest.raises(ValueError, match="has 4 speakers, .* num_speakers=3"):
        network(Batch(**(vars(batch) | {"num_speakers": 4})))
    with pytest.raises(ValueError, match="audio must have shape"):
        network.forward_padded(features[0], features[0], features[2], speaker, mask)
    with pytest.raises(ValueError, match=r"speaker must be in \[0, 3\)"):
        network.forward_padded(*features, speaker + 1, mask)
    with pytest.raises(ValueError, match="utterances first .* dialogue 1"):
        network.forward_padded(*features, speaker, mask.flip(1))
    with pytest.raises(TypeError, match="mask must be bool"):
        network.forward_padded(*features, speaker, mask.long())
