"""DiffLlama with rdfkern's attention against the untouched model, small and random."""

import subprocess
import sys

import pytest
import torch

import rdfkern

transformers = pytest.importorskip("transformers", minversion="5.16")

from transformers import (  # noqa: E402
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention  # noqa: E402

from rdfkern.integrations import hf, hf_attention  # noqa: E402

UNTOUCHED = DiffLlamaAttention.forward
VOCABULARY = 61


def config(implementation="sdpa", **options):
    shape = {
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return DiffLlamaConfig(**(shape | options), attn_implementation=implementation)


def build(implementation="sdpa", dtype=None, **options):
    """float64 where transformers computes in it; its eager softmax is always in float32."""
    torch.manual_seed(0)
    dtype = dtype or (torch.float32 if implementation == "eager" else torch.float64)
    model = DiffLlamaForCausalLM(config(implementation, **options)).to(dtype).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            # Far from lambda_init, so that a lambda that is not read from the layer is noticed.
            layer.self_attn.lambda_q1.normal_(std=0.5)
            layer.self_attn.lambda_k1.normal_(std=0.5)
    return model


def tokens(batch=2, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def left_padded(batch=3, length=9):
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return {"input_ids": tokens(batch, length).masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture(autouse=True)
def leaves_transformers_as_it_was():
    yield
    assert DiffLlamaAttention.forward is UNTOUCHED


@pytest.fixture
def calls(monkeypatch):
    """How often differential attention ran."""
    counted = []
    real = hf.diff_attention
    for module in (hf, hf_attention):
        monkeypatch.setattr(
            module, "diff_attention", lambda *a, **o: counted.append(o) or real(*a, **o)
        )
    return counted


def run(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    labels = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(labels)).bool()
    logits = out.logits[valid]
    torch.nn.functional.cross_entropy(logits, labels[valid]).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_run(model, calls, calls_per_layer=1, **inputs):
    expected, expected_gradients = run(model, **inputs)
    assert not calls
    with hf.apply_rdfkern_to_diffllama(model):
        logits, gradients = run(model, **inputs)
    assert len(calls) == calls_per_layer * len(model.model.layers)
    torch.testing.assert_close(logits, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=lambda m, n=name: n + m)
        assert "lambda" not in name or gradient.abs().max() > 0
    calls.clear()
    again, _ = run(model, **inputs)
    assert torch.equal(again, expected) and not calls


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [2, 4, 8])
def test_logits_and_gradients_agree(implementation, kv_heads, calls):
    model = build(implementation, num_key_value_heads=kv_heads)
    assert_same_run(model, calls, input_ids=tokens())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_padding_agrees(implementation, calls):
    assert_same_run(build(implementation), calls, **left_padded())


def test_right_padding_and_an_own_mask_of_four_dimensions(calls):
    inputs = left_padded()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    assert_same_run(build(), calls, **inputs)
    window = torch.ones(9, 9).tril().triu(-3).bool()[None, None]
    own = {"input_ids": tokens(), "attention_mask": window.expand(2, 1, 9, 9)}
    model = build()
    expected = model(**own).logits
    with hf.apply_rdfkern_to_diffllama(model):
        torch.testing.assert_close(model(**own).logits, expected)
    assert len(calls) == 2


def test_float32_and_bfloat16_agree_within_rounding(calls):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        model = build(dtype=dtype)
        expected = model(**left_padded()).logits
        with hf.apply_rdfkern_to_diffllama(model):
            logits = model(**left_padded()).logits
        assert logits.dtype == dtype
        valid = left_padded()["attention_mask"].bool()
        torch.testing.assert_close(logits[valid], expected[valid], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_autocast(implementation, calls):
    model = build(implementation, dtype=torch.float32)
    valid = left_padded()["attention_mask"].bool()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**left_padded()).logits[valid]
        with hf.apply_rdfkern_to_diffllama(model):
            logits = model(**left_padded()).logits[valid]
    assert len(calls) == 2 and logits.dtype == expected.dtype
    torch.testing.assert_close(logits, expected, atol=3e-2, rtol=3e-2)


def test_packed_positions_and_bidirectional_attention(calls):
    model = build()
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    assert_same_run(model, calls, input_ids=tokens(1), position_ids=positions, use_cache=False)
    both_ways = {"input_ids": tokens(), "is_causal": False, "use_cache": False}
    expected = model(**both_ways).logits
    with hf.apply_rdfkern_to_diffllama(model):
        torch.testing.assert_close(model(**both_ways).logits, expected)


def caches(model, kind, length=16):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=length)


def stepwise(model, kind, inputs, steps):
    """Logits of prefill, of decoding token by token, and of three tokens at once."""
    cache, logits = caches(model, kind), []
    mask = inputs["attention_mask"]
    start = 0
    for step in steps:
        stop = start + step
        out = model(
            input_ids=inputs["input_ids"][:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:stop],
        )
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_and_decode_with_caches(implementation, kind, padded, calls):
    model = build(implementation)
    inputs = left_padded(length=12)
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    steps = (6, 1, 1, 3, 1)
    valid = inputs["attention_mask"].bool()
    expected = stepwise(model, kind, inputs, steps)[valid]
    with hf.apply_rdfkern_to_diffllama(model):
        logits = stepwise(model, kind, inputs, steps)[valid]
        whole = model(**inputs).logits[valid]
    torch.testing.assert_close(logits, expected)
    if not padded:
        torch.testing.assert_close(logits, whole)
    assert len(calls) == 2 * (len(steps) + 1)


@torch.no_grad()
def test_decoding_copies_no_values(monkeypatch):
    """What the attention gets of the values is the memory of the cache."""
    model, given = build(), []
    attend = hf.diff_attention
    monkeypatch.setattr(
        hf, "diff_attention", lambda *a, **options: (given.append(a[4]), attend(*a, **options))[1]
    )
    applied = hf.apply_rdfkern_to_diffllama(model)
    try:
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(tokens(2, 9), past_key_values=cache)
            model(tokens(2, 1), past_key_values=cache)
    finally:
        applied.undo()
    memory = {layer.values.untyped_storage().data_ptr() for layer in cache.layers}
    assert len(given) == 4 and {v.untyped_storage().data_ptr() for v in given} == memory


@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_generate_agrees(kind, options, calls):
    model = build(dtype=torch.float32)
    options = {"max_new_tokens": 6, "cache_implementation": kind, "disable_compile": True} | options

    def generate():
        torch.manual_seed(3)
        return model.generate(**left_padded(), **options)

    expected = generate()
    with hf.apply_rdfkern_to_diffllama(model):
        assert torch.equal(generate(), expected)
    assert len(calls) == 2 * 6


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_flash_names_need_no_flash_attention(padded, calls):
    model = build("sdpa")
    inputs = left_padded(length=12)
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    valid = inputs["attention_mask"].bool()
    expected = stepwise(model, "dynamic", inputs, (6, 1, 3, 2))[valid]
    with hf.apply_rdfkern_to_diffllama(model):
        model.config._attn_implementation_internal = "flash_attention_2"
        logits = stepwise(model, "dynamic", inputs, (6, 1, 3, 2))[valid]
    torch.testing.assert_close(logits, expected)
    assert all(call["attn_mask"] is None for call in calls)


def test_what_only_the_original_can_answer(calls):
    model = build("eager")
    expected = model(tokens(), output_attentions=True)
    with hf.apply_rdfkern_to_diffllama(model):
        out = model(tokens(), output_attentions=True)
        assert len(out.attentions) == 2 and not calls
        for maps, before in zip(out.attentions, expected.attentions, strict=True):
            assert torch.equal(maps, before)
        model.config.output_attentions = True
        assert len(model(tokens()).attentions) == 2 and not calls
        model.config.output_attentions = False
        per_map = torch.zeros(2, 8, 9, 9)
        model(tokens(), attention_mask=per_map)
        assert not calls
        model(tokens())
        assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_layer_by_itself_without_a_mask(implementation, calls):
    model = build(implementation)
    layer = model.model.layers[0].self_attn
    x = model.model.embed_tokens(tokens())
    angles = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    expected = layer(x, angles, None)[0]
    with hf.apply_rdfkern_to_diffllama(model):
        torch.testing.assert_close(layer(x, angles, None)[0], expected)
    assert len(calls) == 1


def test_other_implementations_and_packed_flash_reach_the_original(monkeypatch):
    layer = build().model.layers[0].self_attn
    reached = []
    forward = hf._fused_forward(lambda self, *a, **o: reached.append(o))
    x, angles = torch.zeros(1, 4, 48, dtype=torch.float64), torch.zeros(1, 4, 6)
    packed = torch.tensor([[0, 1, 0, 1]])
    for name, options in {
        "flex_attention": {},
        "paged|sdpa": {},
        "sdpa": {"cache": object()},
        "flash_attention_2": {"position_ids": packed},
        "flash_attention_3": {"cu_seq_lens_q": torch.tensor([0, 2, 4])},
    }.items():
        layer.config._attn_implementation_internal = name
        forward(layer, x, (angles, angles), **options)
    layer.config._attn_implementation_internal = "sdpa"
    layer.attention_dropout = 0.1
    forward(layer.train(), x, (angles, angles))
    assert len(reached) == 6


def test_whole_class_and_undo():
    first = build()
    expected = first(tokens()).logits
    with rdfkern.use_backend("torch"), hf.apply_rdfkern_to_diffllama() as applied:
        assert applied.changed == ["DiffLlamaAttention"]
        assert DiffLlamaAttention.forward is not UNTOUCHED
        again = hf.apply_rdfkern_to_diffllama()
        assert again.changed == []
        for model in (first, build()):
            torch.testing.assert_close(model(tokens()).logits, expected)
        again.undo()
        assert DiffLlamaAttention.forward is not UNTOUCHED
    assert DiffLlamaAttention.forward is UNTOUCHED
    applied.undo()


def test_one_model_and_undo(calls):
    model, other = build(), build()
    before = [dict(vars(layer)) for layer in model.modules()]
    first = hf.apply_rdfkern_to_diffllama(model)
    assert first.changed == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    second = hf.apply_rdfkern_to_diffllama(model)
    assert second.changed == []
    second.undo()
    other(tokens())
    assert not calls
    model(tokens())
    assert len(calls) == 2
    with hf.apply_rdfkern_to_diffllama():
        first.undo()
        assert [vars(layer) for layer in model.modules()] == before
        model(tokens())
    assert len(calls) == 4
    model(tokens())
    assert len(calls) == 4


def test_models_whose_layers_others_have_changed(calls):
    model = build()
    expected = model(tokens()).logits
    hooked, foreign = (layer.self_attn for layer in model.model.layers)
    # What accelerate's add_hook_to_module leaves behind.
    hooked._old_forward = hooked.forward
    hooked.forward = lambda *a, **o: hooked._old_forward(*a, **o)
    foreign.forward = lambda *a, **o: UNTOUCHED(foreign, *a, **o)
    before = hooked._old_forward
    with hf.apply_rdfkern_to_diffllama(model) as applied:
        assert applied.changed == ["model.layers.0.self_attn"]
        assert list(applied.left_alone) == ["model.layers.1.self_attn"]
        assert hf.apply_rdfkern_to_diffllama(model).changed == []
        torch.testing.assert_close(model(tokens()).logits, expected)
        assert len(calls) == 1
    assert hooked._old_forward == before


def test_a_class_of_its_own_is_left_alone(calls):
    class Own(DiffLlamaAttention):
        def forward(self, *arguments, **options):
            return super().forward(*arguments, **options)

    model = build()
    model.model.layers[0].self_attn.__class__ = Own
    with hf.apply_rdfkern_to_diffllama(model) as applied:
        assert applied.changed == ["model.layers.1.self_attn"]
        assert "not that of transformers" in applied.left_alone["model.layers.0.self_attn"]
        model(tokens())
    assert len(calls) == 1


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="model must have DiffLlamaAttention layers, Linear has"):
        hf.apply_rdfkern_to_diffllama(torch.nn.Linear(1, 1))


def test_gradient_checkpointing(calls):
    model = build().train()
    expected, expected_gradients = run(model, input_ids=tokens(), use_cache=False)
    model.gradient_checkpointing_enable()
    with hf.apply_rdfkern_to_diffllama(model):
        logits, gradients = run(model, input_ids=tokens(), use_cache=False)
    torch.testing.assert_close(logits, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])
    assert len(calls) == 4


def test_compiles_in_one_graph():
    model = build(dtype=torch.float32)
    expected = model(tokens()).logits
    with torch.no_grad(), hf.apply_rdfkern_to_diffllama(model):
        compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
        hidden = compiled(tokens(), use_cache=False).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), expected)
    torch._dynamo.reset()


class TestRegisteredAttention:
    """The name "rdfkern" of transformers' attention interface, without and with patched layers."""

    @pytest.fixture(autouse=True)
    def registered(self):
        hf.register_attention()

    def both(self, **options):
        plain, ours = build("sdpa", **options), build("rdfkern", **options)
        ours.load_state_dict(plain.state_dict())
        return plain, ours

    @pytest.mark.parametrize("kv_heads", [2, 8])
    @pytest.mark.parametrize("patched", [False, True])
    @pytest.mark.parametrize("inputs", [{"input_ids": tokens()}, left_padded()])
    def test_logits_and_gradients_agree(self, inputs, patched, kv_heads, calls):
        plain, ours = self.both(num_key_value_heads=kv_heads)
        expected, expected_gradients = run(plain, **inputs)
        applied = hf.apply_rdfkern_to_diffllama(ours) if patched else None
        logits, gradients = run(ours, **inputs)
        assert len(calls) == (2 if patched else 4)
        assert all(call["attn_mask"] is None for call in calls)
        torch.testing.assert_close(logits, expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name])
        if applied:
            applied.undo()

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("patched", [False, True])
    def test_prefill_and_decode(self, kind, padded, patched):
        plain, ours = self.both()
        inputs = left_padded(length=12)
        if not padded:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        valid, steps = inputs["attention_mask"].bool(), (6, 1, 3, 1, 1)
        expected = stepwise(plain, kind, inputs, steps)[valid]
        applied = hf.apply_rdfkern_to_diffllama(ours) if patched else None
        torch.testing.assert_close(stepwise(ours, kind, inputs, steps)[valid], expected)
        if applied:
            applied.undo()

    @torch.no_grad()
    def test_static_cache_with_a_mask_of_its_whole_length(self):
        plain, ours = self.both()
        mask = (torch.arange(16) < 9).long().expand(2, -1)
        last = []
        for model in (plain, ours):
            cache = caches(model, "static")
            out = model(tokens()[:, :4], attention_mask=mask, past_key_values=cache)
            last.append(out.logits)
        torch.testing.assert_close(last[1], last[0])

    def test_packed_positions(self):
        plain, ours = self.both()
        positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
        inputs = {"input_ids": tokens(1), "position_ids": positions, "use_cache": False}
        torch.testing.assert_close(ours(**inputs).logits, plain(**inputs).logits)

    def test_masks_of_other_patterns_are_those_of_sdpa(self):
        padding = torch.ones(2, 5, dtype=torch.bool)
        padding[1, :2] = False
        sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5, "attention_mask": padding}
        assert hf_attention.attention_mask(**sizes) is padding

        def nearby(batch, head, query, key):
            return (key <= query) & (key > query - 2)

        mask = hf_attention.attention_mask(mask_function=nearby, **sizes)
        assert mask.shape == (2, 1, 5, 5) and not mask[0, 0, 4, 0] and not mask[1, 0, 2, 1]

    @torch.no_grad()
    def test_several_tokens_after_a_cache_and_without_a_mask(self):
        plain, ours = self.both()
        for model in (plain, ours):
            cache = DynamicCache(config=model.config)
            model(tokens()[:, :4], past_key_values=cache)
            model.last = model(tokens()[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(ours.last, plain.last)
        torch.testing.assert_close(ours.last, plain(tokens()).logits[:, 4:])

    @torch.no_grad()
    def test_generate_and_switching(self):
        plain, ours = self.both(dtype=torch.float32)
        options = {"max_new_tokens": 5}
        expected = plain.generate(**left_padded(), **options)
        assert torch.equal(ours.generate(**left_padded(), **options), expected)
        plain.set_attn_implementation("rdfkern")
        assert plain.config._attn_implementation == "rdfkern"
        assert torch.equal(plain.generate(**left_padded(), **options), expected)

    def test_ordinary_attention_is_refused(self):
        small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        model = LlamaForCausalLM(
            LlamaConfig(**small, vocab_size=VOCABULARY, attn_implementation="rdfkern")
        )
        with pytest.raises(ValueError, match="serves DiffLlamaAttention, got LlamaAttention"):
            model(tokens())
        layer = build("rdfkern").model.layers[0].self_attn
        x = torch.zeros(1, 8, 4, 6)
        with pytest.raises(ValueError, match="dropout must be 0"):
            hf.attention_forward(layer, x, x[:, :4], x[:, :4], None, dropout=0.5)


def test_importing_changes_nothing():
    code = (
        "from transformers import AttentionInterface\n"
        "from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention as A\n"
        "before = A.forward\n"
        "import rdfkern.integrations.hf\n"
        "assert A.forward is before and 'rdfkern' not in AttentionInterface._global_mapping\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
