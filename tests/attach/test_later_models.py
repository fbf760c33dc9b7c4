"""Modules that a later transformers may bring: each breaks one rule, and is refused, or right."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import kvshrink
from kvshrink import RTN
from kvshrink.errors import CacheError, UnsupportedModelError
from tests.scenarios.families import FAMILIES

METHOD = RTN(bits=None, window=8)


def llama(forward):
    """A Llama of which every attention module has another forward."""
    model = FAMILIES["llama"].build()
    for layer in model.model.layers:
        own = type(layer.self_attn)
        layer.self_attn.__class__ = type("LaterAttention", (own,), {"forward": forward, "before": own.forward})
    return model


def ids_of(s):
    return torch.randint(3, 90, (1, s), generator=torch.Generator().manual_seed(1))


def with_a_keyword(self, hidden_states, **kwargs):
    return self.before(hidden_states, **kwargs, score_bonus=torch.ones(4))


def with_another_rope(self, hidden_states, position_embeddings=None, **kwargs):
    """Turned by the square of the angle, in effect: no frequency of its rotary module does that."""
    cos, sin = position_embeddings
    return self.before(hidden_states, position_embeddings=(cos * cos - sin * sin, 2 * cos * sin), **kwargs)


def with_another_call(self, hidden_states, past_key_values=None, **kwargs):
    """Reads its cache by another name than `update`."""
    if past_key_values is not None and hasattr(past_key_values, "layers"):
        past_key_values.append_and_rotate(hidden_states)
    return self.before(hidden_states, past_key_values=past_key_values, **kwargs)


def with_values_behind_the_cache(self, hidden_states, past_key_values=None, **kwargs):
    """Doubles what the cache returns of old tokens: keys and values that it holds are not those it attends to."""
    if past_key_values is None:
        return self.before(hidden_states, **kwargs)

    class Doubled:
        def update(inner, key, value, *args, **more):
            keys, values = past_key_values.update(key, value, *args, **more)
            return keys * 1.0, values * 2.0

    return self.before(hidden_states, past_key_values=Doubled(), **kwargs)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (with_a_keyword, "score_bonus"),
        (with_another_call, "append_and_rotate"),
        (with_values_behind_the_cache, "could not be recomputed"),
    ],
)
def test_what_breaks_a_rule_is_refused(forward, reason):
    model = llama(forward)
    with pytest.raises((UnsupportedModelError, CacheError), match=reason) as error:
        kvshrink.make_cache(model, METHOD)
    assert "\n" not in str(error.value)


def test_another_rope_is_seen_and_right():
    """Stored as attention uses it, whatever turned it; a method before RoPE is told."""
    model = llama(with_another_rope)
    assert all(info.moves and info.rope is None for info in kvshrink.attach(model).layers)
    cache, full = kvshrink.make_cache(model, METHOD), DynamicCache(config=model.config)
    with torch.no_grad():
        for part in (ids_of(90), ids_of(3)):
            got, wanted = (model(part, past_key_values=c).logits for c in (cache, full))
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_one_layer_alone_may_break_a_rule():
    """Every layer that is shrunken is asked, not the first of its kind."""
    model = FAMILIES["llama"].build()
    other = model.model.layers[1].self_attn
    own = type(other)
    other.__class__ = type("LaterAttention", (own,), {"forward": with_another_rope, "before": own.forward})
    first, second = kvshrink.attach(model).layers
    assert (first.rope is None, first.moves) == (False, False)
    assert (second.rope is None, second.moves) == (True, True)


def test_a_layer_without_rope_among_others_is_seen():
    model = FAMILIES["llama"].build()

    def without(self, hidden_states, position_embeddings=None, **kwargs):
        cos, sin = position_embeddings
        return self.before(hidden_states, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **kwargs)

    other = model.model.layers[1].self_attn
    own = type(other)
    other.__class__ = type("LaterAttention", (own,), {"forward": without, "before": own.forward})
    infos = kvshrink.attach(model).layers
    assert infos[0].rope is not None
    assert (infos[1].rope is None, infos[1].moves) == (True, False)


def test_projections_of_any_name():
    """Keys, values and queries of modules whose projections nobody knows, fitted from what they give."""
    model = FAMILIES["llama"].build()

    class Renamed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.config, self.layer_idx, self.scaling = inner.config, inner.layer_idx, inner.scaling
            self.attention_dropout, self.head_dim = 0.0, inner.head_dim
            self.num_key_value_groups, self.is_causal = inner.num_key_value_groups, True
            self.wq, self.wk, self.wv, self.wo = inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj
            self.real = (type(inner),)

        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
            names = {"q_proj": self.wq, "k_proj": self.wk, "v_proj": self.wv, "o_proj": self.wo}
            self.__dict__.update(names)
            try:
                return self.real[0].forward(
                    self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
                )
            finally:
                for name in names:
                    del self.__dict__[name]

    rows = torch.randint(3, 90, (4, 64), generator=torch.Generator().manual_seed(0))
    wanted = kvshrink.fit(model, kvshrink.CSKV(keep=0.5), rows, progress=False)
    for layer in model.model.layers:
        layer.self_attn = Renamed(layer.self_attn)
    found = kvshrink.fit(model, kvshrink.CSKV(keep=0.5), rows, progress=False)
    for name, tensor in wanted.layers[0].items():
        torch.testing.assert_close(found.layers[0][name].abs(), tensor.abs(), atol=1e-4, rtol=1e-3)
    with pytest.raises(UnsupportedModelError, match=r"does not show its key weight"):
        kvshrink.fit(model, kvshrink.CSKV(keep=0.5, init="asvd"), rows, progress=False)
