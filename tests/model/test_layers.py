"""The local convolution against a literal loop."""

import pytest
import torch
from tiny_decoders import enliven

from omniloom.model.layers import LocalConvolution
from omniloom.model.position import running_index

DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


def tiny_convolution(tokens: int, width: int = 8) -> LocalConvolution:
    module = LocalConvolution(width, tokens)
    enliven(module)
    return module


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 12])
def test_output_and_gradients_equal_a_literal_loop_over_tokens_of_one_document(tokens):
    module = tiny_convolution(tokens)
    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = module(x, running_index(DOCUMENTS))
    weight = module.weight_KD.detach().double().requires_grad_()
    twin = x.detach().double().requires_grad_()
    rows = []
    for row in range(2):
        for t in range(10):
            total = twin[row, t]
            for back in range(tokens):
                if t - back >= 0 and DOCUMENTS[row, t - back] == DOCUMENTS[row, t]:
                    total = total + weight[back] * twin[row, t - back]
            rows.append(total)
    expected = torch.stack(rows).view(2, 10, 8)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(2))
    out.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), twin.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.weight_KD.grad.double(), weight.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("row", "at", "moved"), [(0, 1, [1, 2, 3]), (0, 3, [3]), (0, 4, [4, 5]), (1, 7, [7, 8, 9])])
@torch.no_grad()
def test_a_token_reaches_the_next_tokens_of_its_document_and_no_other(row, at, moved):
    module, index = tiny_convolution(3), running_index(DOCUMENTS)
    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[row, at] += 1.0
    difference = (module(changed, index) - module(x, index)).abs().amax(-1)
    assert difference.nonzero().tolist() == [[row, t] for t in moved]


@torch.no_grad()
def test_weights_of_zero_leave_the_embeddings_as_they_are():
    module = LocalConvolution(8, 3)
    module.weight_KD.zero_()
    x = torch.randn(2, 10, 8)
    assert torch.equal(module(x, running_index(DOCUMENTS)), x)
