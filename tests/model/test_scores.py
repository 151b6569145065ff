import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lilpipe.model import scores
from lilpipe.model.scores import IGNORED, token_scores

ROWS, TOKENS, WIDTH, VOCAB = 3, 5, 8, 11


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, TOKENS, WIDTH, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, dtype=dtype, generator=generator, requires_grad=True)
    targets = torch.randint(VOCAB, (ROWS, TOKENS), generator=generator)
    targets[0, 1] = targets[2, 4] = IGNORED
    return hidden, weight, targets


def naive(hidden, weight, targets, softcap):
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logprobs = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return logprobs.view(targets.shape), logits.logsumexp(-1) * (targets != IGNORED)


def mixed_loss(logprobs, normaliser):
    """Weighs tokens unequally and pulls at both outputs, as a policy gradient with z-loss does."""
    weights = torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype).view_as(logprobs)
    return (weights * logprobs).sum() + 0.1 * normaliser.square().sum()


@pytest.fixture(params=["kept", "recomputed"])
def parts(request, monkeypatch):
    """Parts of two tokens, so that the last one is short, kept for the backward pass or computed again."""
    monkeypatch.setattr(scores, "LOGITS_IN_CACHE", 0)
    monkeypatch.setitem(scores.LEAST_TOKENS, "cpu", 2)
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", 2**25 if request.param == "kept" else VOCAB)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scores_and_gradients_are_those_of_the_whole_softmax(softcap):
    hidden, weight, targets = inputs()
    expected = naive(hidden, weight, targets, softcap)
    wanted = torch.autograd.grad(mixed_loss(*expected), [hidden, weight])
    found = token_scores(hidden, weight, targets, softcap=softcap)
    gradients = torch.autograd.grad(mixed_loss(*found), [hidden, weight])
    torch.testing.assert_close(tuple(found), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_gradient_written_by_hand_is_that_of_finite_differences(softcap):
    hidden, weight, targets = inputs()
    assert torch.autograd.gradcheck(lambda h, w: tuple(token_scores(h, w, targets, softcap=softcap)), (hidden, weight))


def test_ignored_targets_score_zero_and_leave_no_gradient():
    hidden, weight, targets = inputs(torch.float32)
    found = token_scores(hidden, weight, targets)
    mixed_loss(*found).backward()
    assert hidden.grad is not None
    for column in (*found, hidden.grad.abs().sum(-1)):
        assert torch.equal(column == 0, targets == IGNORED)


def test_half_precision_is_as_good_as_its_inputs():
    """Logits, softmax and sums are float32; a target that is nearly certain keeps a gradient of the right size."""
    hidden, weight, targets = inputs(torch.float32)
    targets = targets.clamp(min=0)
    likely = hidden.detach() + 2 * weight.detach()[targets]
    halves = [likely.bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()]
    wholes = [half.detach().float().requires_grad_() for half in halves]
    found = token_scores(halves[0], halves[1], targets)
    expected = naive(wholes[0], wholes[1], targets, None)
    assert found.logprobs.dtype == torch.float32
    torch.testing.assert_close(tuple(found), expected, atol=0.1, rtol=0.02)
    gradients = torch.autograd.grad(mixed_loss(*found), halves)
    wanted = torch.autograd.grad(mixed_loss(*expected), wholes)
    for gradient, oracle in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - oracle).norm() < 0.02 * oracle.norm()


def test_autocast_multiplies_in_bfloat16_and_returns_float32_gradients():
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_scores(hidden, weight, targets)
    expected = token_scores(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(found.logprobs, expected.logprobs)
    gradients = torch.autograd.grad(mixed_loss(*found), [hidden, weight])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_extreme_logits_stay_finite():
    hidden, weight, targets = inputs(torch.float32)
    found = token_scores(1e4 * hidden, weight, targets)
    gradients = torch.autograd.grad(mixed_loss(*found), [hidden, weight])
    assert all(tensor.isfinite().all() for tensor in (*found, *gradients))


def test_no_buffer_holds_the_logits_of_all_tokens(monkeypatch):
    """What is saved for the backward pass of a large batch is smaller than its logits."""
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", 64 * 512)
    hidden, weight = torch.randn(4, 64, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    targets = torch.zeros(4, 64, dtype=torch.int64)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    monkeypatch.setitem(scores.LEAST_TOKENS, "cpu", 64)
    monkeypatch.setattr(scores, "LOGITS_IN_CACHE", 0)
    with Watch():
        token_scores(hidden, weight, targets).logprobs.sum().backward()
    assert max(made) == 64 * 512


def test_compiled_parts_score_the_same():
    hidden, weight, targets = inputs(torch.float32)
    eager = token_scores(hidden, weight, targets, softcap=2.0)
    wanted = torch.autograd.grad(mixed_loss(*eager), [hidden, weight])
    found = token_scores(hidden, weight, targets, softcap=2.0, compiled=True)
    gradients = torch.autograd.grad(mixed_loss(*found), [hidden, weight])
    torch.testing.assert_close(tuple(found), tuple(eager))
    torch.testing.assert_close(gradients, wanted)
