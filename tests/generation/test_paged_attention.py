"""Attention over pages against attention of each row over its own keys and values laid side by side."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lilpipe.generation.batch_layout import layout
from lilpipe.generation.paged_attention import DecodeView, PromptView, Scratch
from lilpipe.generation.pages import PAGE_SIZE, PagePool, pages_for
from lilpipe.generation.rows import table
from tests.model.checkpoints import SMALL, small_model

PROMPTS = {0: 5, 1: 37, 2: 16}
ROWS = [(1, 0), (0, 3), (1, 20), (2, 15), (1, 47), (0, 16)]
"""Of each row its prompt, and tokens of its own that are in the cache before the step."""

sdpa: Any = partial(F.scaled_dot_product_attention, enable_gqa=True)


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(model, *, stale):
    """Pools that hold prompts and rows, pages in an odd order, with something left over in all other places."""
    config = model.config
    heads, size = config.num_kv_heads, config.head_size
    answers, prompts = PagePool(model), PagePool(model)
    unused = answers.take(4)
    of_row = [answers.take(pages_for(own + 1)) for _, own in ROWS]
    of_row[2], of_row[4] = of_row[4][: len(of_row[2])], of_row[2] + of_row[4][len(of_row[2]) :]
    answers.give(unused[1:3])
    of_prompt = [prompts.take(pages_for(length)) for length in PROMPTS.values()]
    for pool in (answers, prompts):
        pool.keys_LNKES.fill_(stale)
        pool.values_LNKSF.fill_(stale)
    prompt_kv, own_kv = {}, {}
    lengths = np.array(list(PROMPTS.values()))
    view = PromptView(prompts, table(of_prompt), lengths)
    padded = [random(2, len(PROMPTS), int(lengths.max()), heads, size, seed=layer) for layer in range(2)]
    for layer in range(2):
        view.update(layer, padded[layer][0], padded[layer][1])
        for number, length in PROMPTS.items():
            prompt_kv[layer, number] = padded[layer][:, number, :length]
        for row, (_, own) in enumerate(ROWS):
            own_kv[layer, row] = random(2, own + 1, heads, size, seed=100 + 10 * row + layer)
            for place in range(own):
                page = of_row[row][place // PAGE_SIZE]
                answers.keys_LNKES[layer, page, :, :, place % PAGE_SIZE] = own_kv[layer, row][0, place]
                answers.values_LNKSF[layer, page, :, place % PAGE_SIZE] = own_kv[layer, row][1, place]
                answers.closed_NS[page, place % PAGE_SIZE] = 0.0
    return answers, prompts, of_row, of_prompt, prompt_kv, own_kv


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("stale", [0.0, 1e4])
def test_rows_attend_to_their_prompt_and_their_own_tokens_alone(kv_heads, scale, stale):
    config = SMALL.model_copy(update={"num_kv_heads": kv_heads})
    model = small_model(config, vocab_size=30).double()
    answers, prompts, of_row, of_prompt, prompt_kv, own_kv = filled(model, stale=stale)
    answers_BM, prompts_BM = table(of_row), table([of_prompt[prompt] for prompt, _ in ROWS])
    plan = layout(answers_BM, prompts_BM, config, torch.device("cpu"))
    own = [own for _, own in ROWS]
    page_B = torch.tensor([of_row[row][count // PAGE_SIZE] for row, count in enumerate(own)])
    place_B = torch.tensor(own) % PAGE_SIZE
    view, gathering = (DecodeView(answers, prompts, plan, page_B, place_B, Scratch()) for _ in range(2))
    for layer in range(2):
        q = scale * random(len(ROWS), 1, 4, config.head_size, seed=7 + layer)
        new_k, new_v = (torch.stack([own_kv[layer, row][i, -1] for row in range(len(ROWS))])[:, None] for i in (0, 1))
        got = view.attend(layer, q, new_k, new_v)
        keys, values = gathering.update(layer, new_k, new_v)
        gathered = sdpa(*(x.transpose(1, 2) for x in (q, keys, values)), attn_mask=gathering.mask(None))
        for row, (prompt, _) in enumerate(ROWS):
            k, v = torch.cat([prompt_kv[layer, prompt], own_kv[layer, row]], dim=1).transpose(1, 2)
            expected = sdpa(q[row].transpose(0, 1)[None], k[None], v[None])
            torch.testing.assert_close(got[row, 0], expected[0, :, 0], atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(gathered[row, :, 0], expected[0, :, 0], atol=1e-10, rtol=1e-10)


def test_scores_are_summed_in_float32_where_the_model_is_narrower():
    model = small_model(vocab_size=30).bfloat16()
    answers, prompts = PagePool(model), PagePool(model)
    view = PromptView(prompts, table([prompts.take(1)]), np.array([3]))
    k, v = random(2, 1, 3, 2, 8, seed=0).bfloat16()
    view.update(0, k, v)
    page = answers.take(1)
    plan = layout(table([page]), np.array([[0]]), SMALL, torch.device("cpu"))
    new_k, new_v, q = (random(1, 1, heads, 8, seed=heads).bfloat16() for heads in (2, 2, 4))
    got = DecodeView(answers, prompts, plan, torch.tensor(page), torch.tensor([0]), Scratch()).attend(
        0, q, new_k, new_v
    )
    assert got.dtype == torch.bfloat16
    k, v = torch.cat([k, new_k], dim=1), torch.cat([v, new_v], dim=1)
    expected = sdpa(*(x.float().transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(got.float()[0, 0], expected[0, :, 0], atol=2e-2, rtol=2e-2)
