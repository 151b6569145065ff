"""How layers and sequences are cut."""

import pytest
import torch

from lilpipe.model.transformer import ModelPart
from lilpipe.parallel.context import head_and_tail
from lilpipe.parallel.pipeline_parallel import split_model


def test_a_part_of_a_sequence_is_a_chunk_of_its_head_and_one_of_its_tail():
    assert head_and_tail(12, part=0, num_parts=3).tolist() == [0, 1, 10, 11]
    assert head_and_tail(12, part=2, num_parts=3).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_have_equally_many_pairs_of_tokens_to_attend_and_leave_none_out(num_parts):
    parts = [head_and_tail(64, part=part, num_parts=num_parts) for part in range(num_parts)]
    assert torch.cat(parts).sort().values.tolist() == list(range(64))
    assert len({int((part + 1).sum()) for part in parts}) == 1


def test_layers_are_shared_out_over_stages_and_the_last_one_has_no_more_than_the_others():
    assert split_model(5, 1) == [ModelPart(range(5), first=True, last=True)]
    assert split_model(7, 3) == [
        ModelPart(range(3), first=True, last=False),
        ModelPart(range(3, 5), first=False, last=False),
        ModelPart(range(5, 7), first=False, last=True),
    ]
