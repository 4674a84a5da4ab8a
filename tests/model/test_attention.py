"""Grouped, sparse, linear and two-way attention against literal loops and dense masks in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omniloom.model.attention import GroupedAttention, attend_fully, attend_linearly, modality_mass
from omniloom.model.position import document_lengths, picture_spans
from omniloom.model.sparse_attention import attend_sparsely, strides_at
from tiny_decoders import enliven, text_places, tiny_config

DOCUMENTS = [[0, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]


def seen_by_rule(t: int, window: int, stride: int, most: int, spans: list[tuple[int, int]] = ()) -> set[int]:
    """The keys of query t, by the words of the design: no arithmetic shared with the code."""
    while len(range(0, t + 1, stride)) > most:
        stride *= 2
    near = {j for j in range(t + 1) if t - j < window}
    far = set(range(0, t + 1, stride))
    own = {j for begin, end in spans if begin <= t < end for j in range(begin, end) if j > t - window}
    return near | far | own


def dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax under a mask in float64: (n, H, d), (n, K, d), (n, K, v), (n, n) → (n, H, v)."""
    query, key, value = query.double(), key.double(), value.double()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("thd,shd->hts", query, key) * scale
    return torch.einsum("hts,shv->thv", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)


def mask_of(seen: list[set[int]]) -> Tensor:
    return torch.tensor([[j in keys for j in range(len(seen))] for keys in seen])


def random_heads(tokens: int, heads: int, groups: int, width: int, value: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, width), (tokens, groups, width), (tokens, groups, value)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def assert_equal_with_gradients(out: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    ours = torch.autograd.grad(out, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream.double())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


def turned(x: Tensor, index: int, width: int, theta: float, interleave: bool) -> Tensor:
    out = x.clone()
    for pair in range(width // 2):
        a, b = (2 * pair, 2 * pair + 1) if interleave else (pair, pair + width // 2)
        angle = index / theta ** (2 * pair / width)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return out


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("head_dim", "share"), [(None, 1.0), (12, 0.5), (6, 1.0)])
def test_grouped_attention_equals_a_literal_loop_on_packed_rows(head_dim, share, groups, interleave):
    config = tiny_config(
        attention="grouped",
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=head_dim,
        partial_rotary_factor=share,
        rope_interleave=interleave,
        attention_bias=True,
    )
    config.check()
    module = GroupedAttention(config)
    enliven(module)
    hidden = torch.randn(2, 11, config.hidden_size, generator=torch.Generator().manual_seed(1))
    out = module(hidden, text_places(torch.tensor(DOCUMENTS), config))
    weight = {name: tensor.double() for name, tensor in module.state_dict().items()}
    width, rotary = config.head_width, int(config.head_width * share)
    for row, document in enumerate(DOCUMENTS):
        index = [sum(document[s] == document[t] >= 0 for s in range(t)) for t in range(11)]

        def heads(name: str, t: int, count: int, row: int = row) -> Tensor:
            projected = weight[f"{name}.weight"] @ hidden[row, t].double() + weight[f"{name}.bias"]
            return projected.view(count, width)

        keys = [[turned(k, index[t], rotary, 100.0, interleave) for k in heads("k_proj", t, groups)] for t in range(11)]
        values = [heads("v_proj", t, groups) for t in range(11)]
        for t in range(11):
            read = []
            for head, query in enumerate(heads("q_proj", t, 4)):
                query = turned(query, index[t], rotary, 100.0, interleave)
                seen = [s for s in range(t + 1) if document[s] == document[t]]
                group = head * groups // 4
                shares = torch.tensor([float(query @ keys[s][group]) / math.sqrt(width) for s in seen]).double().exp()
                read.append(sum(share / shares.sum() * values[s][group] for share, s in zip(shares, seen, strict=True)))
            expected = weight["o_proj.weight"] @ torch.cat(read) + weight["o_proj.bias"]
            torch.testing.assert_close(out[row, t].double(), expected, atol=3e-5, rtol=1e-5)


def test_lengths_are_those_of_the_runs_row_after_row():
    documents = torch.tensor([[0, 0, 1, 1, -1], [1, 1, 1, 1, 1], [4, 5, 6, -1, -1]])
    assert document_lengths(documents) == [2, 2, 1, 5, 1, 1, 1, 2]


def test_spans_are_pictures_and_frames_within_their_documents():
    document = torch.tensor([[0] * 8 + [1] * 4, [0] * 10 + [-1] * 2])
    modality = torch.tensor([[0, 1, 1, 1, 1, 1, 2, 0, 1, 1, 0, 0], [3, 3, 3, 3, 2, 2, 3, 1, 1, 0, 0, 0]])
    place = torch.zeros(2, 12, 3, dtype=torch.int32)
    for row, at, where in [
        (0, 2, (0, 0, 1)),
        (0, 3, (0, 1, 0)),
        (0, 5, (0, 0, 1)),
        (0, 9, (0, 1, 0)),
        (1, 1, (0, 0, 1)),
    ]:
        place[row, at] = torch.tensor(where)
    place[1, 2], place[1, 3], place[1, 8] = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 1, 0]])
    place[1, 5] = torch.tensor([1, 0, 0])  # sound has no spans
    assert picture_spans(document, modality, place) == [
        [(1, 4), (4, 6)],
        [(0, 2)],
        [(0, 2), (2, 4), (6, 7), (7, 9)],
        [],
    ]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("value", [3, 8, 13])
@pytest.mark.parametrize("spans", [[], [(2, 5), (5, 7), (9, 11)], [(0, 11)]])
def test_full_attention_equals_a_dense_mask_with_its_gradients(spans, value, groups):
    inputs = random_heads(11, 4, groups, 8, value)
    out = attend_fully(*inputs, spans, scale=0.7)
    visible = mask_of([seen_by_rule(t, 11, 1, 11, spans) for t in range(11)])
    assert_equal_with_gradients(out, dense(*inputs, visible, 0.7), inputs)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 37, 64])
@pytest.mark.parametrize(("window", "stride", "most"), [(4, 2, 3), (4, 8, 64), (1, 1, 1), (7, 3, 2), (16, 64, 4)])
@pytest.mark.parametrize("spans", [[], [(1, 4), (4, 9), (20, 23), (33, 37)]])
def test_sparse_attention_equals_dense_attention_under_the_same_mask(spans, window, stride, most, tokens):
    spans = [span for span in spans if span[1] <= tokens]
    inputs = random_heads(tokens, 4, 2, 6, 5, seed=tokens)
    out = attend_sparsely(*inputs, spans, 0.7, window, stride, most)
    visible = mask_of([seen_by_rule(t, window, stride, most, spans) for t in range(tokens)])
    assert_equal_with_gradients(out, dense(*inputs, visible, 0.7), inputs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sparse_attention_is_the_same_for_a_prefix_and_obeys_the_rule_for_any_sizes(data):
    tokens, window, stride, most = (data.draw(st.integers(1, most)) for most in (70, 20, 9, 12))
    query, key, value = (x.detach() for x in random_heads(tokens, 2, 1, 4, 4, seed=tokens))
    out = attend_sparsely(query, key, value, [], 0.5, window, stride, most)
    visible = [seen_by_rule(t, window, stride, most) for t in range(tokens)]
    assert all(len(seen) <= window + most for seen in visible)
    torch.testing.assert_close(out.double(), dense(query, key, value, mask_of(visible), 0.5), atol=1e-5, rtol=1e-5)
    prefix = data.draw(st.integers(1, tokens))
    shorter = attend_sparsely(query[:prefix], key[:prefix], value[:prefix], [], 0.5, window, stride, most)
    torch.testing.assert_close(shorter, out[:prefix], atol=1e-5, rtol=1e-5)


def test_the_stride_doubles_whenever_a_query_would_see_more_than_the_cap():
    index = torch.tensor([0, 63, 64, 127, 128, 255, 256, 65_535, 65_536, 1_048_575, 1_048_576, 1 << 40])
    strides = strides_at(index, 64, 1_024).tolist()
    for t, stride in zip(index.tolist(), strides, strict=True):
        assert t // stride + 1 <= 1_024
        assert stride == 64 or t // (stride // 2) + 1 > 1_024
    assert strides[:4] == [64] * 4
    assert strides[7:11] == [64, 128, 1_024, 2_048]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_sparse_attention_grows_with_the_square_of_the_length():
    sizes = {}
    for tokens in (4_096, 8_192, 16_384):
        inputs = random_heads(tokens, 1, 1, 4, 4)
        with Largest() as largest:
            attend_sparsely(*inputs, [], 0.5, 64, 16, 32).sum().backward()
        sizes[tokens] = largest.elements
        assert largest.elements <= tokens * (2 * 64 + 32)
    assert sizes[16_384] <= 4.1 * sizes[4_096]


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 150])
@pytest.mark.parametrize("groups", [1, 2])
def test_linear_attention_equals_a_literal_loop_with_its_gradients(groups, tokens):
    inputs = random_heads(tokens, 2, groups, 4, 3, seed=tokens)
    out = attend_linearly(*inputs)
    query, key, value = (x.double().repeat_interleave(2 // x.shape[1], dim=1) for x in inputs)

    def phi(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

    expected = []
    for t in range(tokens):
        for head in range(2):
            weights = torch.stack([phi(query[t, head]) @ phi(key[s, head]) for s in range(t + 1)])
            expected.append((weights[:, None] * value[: t + 1, head]).sum(0) / weights.sum())
    assert_equal_with_gradients(out, torch.stack(expected).view(tokens, 2, 3), inputs)


@torch.no_grad()
def test_linear_attention_sums_in_float32_under_autocast_and_stays_finite_where_its_weights_vanish():
    query, key, value = random_heads(150, 2, 2, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_linearly(query, key, value)
    torch.testing.assert_close(out, attend_linearly(query, key, value), atol=0, rtol=0)
    assert attend_linearly(query - 200, key - 200, value).isfinite().all()


@pytest.mark.parametrize("pattern", ["full", "sparse"])
def test_the_mass_between_modalities_equals_sums_of_dense_attention(pattern):
    config = tiny_config(attention_pattern=pattern, window_tokens=3, global_stride=2, max_global_tokens=2)
    query, key, _ = (x.detach() for x in random_heads(11, 4, 2, 8, 8))
    document, modality = DOCUMENTS[0], [0, 1, 1, 0, 2, 2, 0, 0, 3, 0, 0]
    places = text_places(torch.tensor([document]), config)
    mass = modality_mass(query[None], key[None], torch.tensor([modality]), places, 0.7, config)
    index = [sum(document[s] == document[t] for s in range(t)) for t in range(11)]
    limits = (3, 2, 2) if pattern == "sparse" else (11, 1, 11)
    visible = mask_of([{t - index[t] + j for j in seen_by_rule(index[t], *limits)} for t in range(11)])
    shares = dense(query, key, torch.eye(11)[:, None].expand(-1, 2, -1), visible, 0.7).mean(1)
    for i in range(4):
        asked = [t for t in range(9) if modality[t] == i]
        for j in range(4):
            given = [float(shares[t, [s for s in range(11) if modality[s] == j]].sum()) for t in asked]
            assert float(mass[i, j]) == pytest.approx(sum(given) / len(given), abs=1e-5)
