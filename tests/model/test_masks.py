"""What a token may attend to, against loops over queries and keys, as a mask and as the kernel of a GPU takes it."""

import pytest
import torch

from lilpipe.model.masks import allow, attend, block_mask, document_mask

POSITIONS_BT = torch.tensor([[0, 5, 2], [4, 1, 3]])
POSITIONS_BS = torch.tensor([[3, 0, 1, 5, 4, 2], [0, 1, 2, 3, 4, 5]])
DOCUMENTS_BT = torch.tensor([[7, 8, 7], [1, 0, 1]])
DOCUMENTS_BS = torch.tensor([[8, 7, 7, 8, 7, 7], [0, 0, 1, 1, 1, 1]])


def by_loops(documents):
    allowed = torch.zeros(2, 1, 3, 6, dtype=torch.bool)
    for b in range(2):
        for t in range(3):
            for s in range(6):
                same = not documents or DOCUMENTS_BS[b, s] == DOCUMENTS_BT[b, t]
                allowed[b, 0, t, s] = bool(same and POSITIONS_BS[b, s] <= POSITIONS_BT[b, t])
    return allowed


def test_a_token_sees_what_is_not_after_it():
    torch.testing.assert_close(allow(POSITIONS_BT, POSITIONS_BS), by_loops(documents=False))


def test_a_token_sees_its_own_document_alone():
    got = allow(POSITIONS_BT, POSITIONS_BS, DOCUMENTS_BT, DOCUMENTS_BS)
    torch.testing.assert_close(got, by_loops(documents=True))


def test_the_mask_of_a_row_of_documents_is_written_out_here():
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    torch.testing.assert_close(document_mask(torch.tensor([[0, 0, 1, 1]])), expected[None, None])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", [False, True])
def test_the_kernel_of_a_gpu_attends_to_what_the_mask_allows(documents):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, 6, 16, generator=generator)
    of_documents = (DOCUMENTS_BT, DOCUMENTS_BS) if documents else (None, None)
    kernel = block_mask(POSITIONS_BT, POSITIONS_BS, *of_documents, compiled=False)
    got = attend(q, k, v, kernel, enable_gqa=True)
    torch.testing.assert_close(got, attend(q, k, v, by_loops(documents), enable_gqa=True))
