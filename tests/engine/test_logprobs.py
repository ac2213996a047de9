"""Logprobs of chosen tokens: torch's log_softmax, in pieces or at once, and their gradients."""

from __future__ import annotations

import pytest
import torch

from roadie.logprobs import hidden_logprobs, target_logprobs


def case(dtype=torch.float64, n=7, k=2, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64).to(dtype) * 3
    return logits.requires_grad_(), torch.randint(0, vocabulary, (n, k), generator=generator)


def test_they_are_those_of_log_softmax():
    logits, targets = case()
    assert torch.allclose(target_logprobs(logits, targets), logits.log_softmax(-1).gather(1, targets), rtol=1e-14)
    assert torch.autograd.gradcheck(target_logprobs, (logits, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_float32_and_the_gradient_has_the_dtype_of_the_logits(dtype):
    logits, targets = case(dtype, k=1)
    found = target_logprobs(logits, targets)
    assert found.dtype == torch.float32
    exact = logits.detach().double().log_softmax(-1).gather(1, targets)
    assert (found.double() - exact).abs().max() <= 16 * 2**-24 * logits.abs().max()
    found.sum().backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("most_tokens", [1, 3, 7, 100])
def test_pieces_make_no_difference_and_no_piece_is_larger(most_tokens):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    _, targets = case()
    sizes = []

    def head(part, place):
        sizes.append(len(part))
        assert torch.equal(part, hidden[place])
        return part @ weight.T

    found = hidden_logprobs(hidden, head, targets, most_tokens)
    (gradient,) = torch.autograd.grad(found.square().sum(), hidden)
    whole = (hidden @ weight.T).log_softmax(-1).gather(1, targets)
    (expected,) = torch.autograd.grad(whole.square().sum(), hidden)
    assert torch.allclose(found, whole, rtol=1e-13)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-14)
    assert max(sizes) <= most_tokens
