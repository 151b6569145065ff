import numpy as np
import torch

from lilpipe.generation.batch_layout import layout
from tests.model.checkpoints import SMALL


def test_a_prompt_page_meets_the_queries_of_all_who_share_it_in_one_block():
    prompts_BM = np.array([[0, 1], [2, -1], [0, 1], [0, 1]])
    answers_BM = np.array([[3], [0], [1], [2]])
    plan = layout(answers_BM, prompts_BM, SMALL, torch.device("cpu"))
    assert plan.sharing == 3
    assert plan.num_prompt_pages == 3
    kv_heads = SMALL.num_kv_heads
    blocks = plan.blocks_C[4 * kv_heads :].view(3, kv_heads, 3)
    assert blocks[0].tolist() == blocks[1].tolist() == [[0, 4, 6], [1, 5, 7]]
    assert blocks[2, :, 0].tolist() == [2, 3]
