"""Completions to one prompt behind it in one row, so that training reads the prompt once and not once for each
completion.

In a row stands the prompt but its last token, then of each completion the prompt's last token and the completion but
its last; behind them may stand another prompt with its completions. A token sees its prompt and what came before it in
its own completion, at the place that it would have alone, so its score is the same up to rounding (prefix sharing, as
"tree attention" in speculative decoding).

Dimensions: N completions, T inputs of the longest; B rows, S inputs of the longest row.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lilpipe.alignment.rollout.rollouts import CompletionBatch
from lilpipe.model.scores import IGNORED

ROW_LEN = 128
"""Inputs of a row, unless a completion alone needs more: attention grows with the square of a row."""


class SharedRows(NamedTuple):
    """Rows as the model takes them, and where the completions' targets are in them."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor
    """[B, 1, S, S], True where a token (third dimension) may attend."""
    places: Tensor
    """[N, T], the place in the flattened targets of each drawn token; 0 elsewhere."""


def share_prompts(completions: CompletionBatch, *, max_len: int) -> SharedRows:
    """The completions in rows of at most ``max_len`` inputs, which is no less than the longest alone."""
    inputs_NT, completion_mask_NT = completions.inputs.cpu().numpy(), completions.completion_mask.cpu().numpy()
    targets_NT = completions.targets.cpu().numpy()
    firsts = completion_mask_NT.argmax(axis=1)
    ends = completion_mask_NT.shape[1] - completion_mask_NT[:, ::-1].argmax(axis=1)
    row_len = min(max_len, max(ROW_LEN, int(ends.max())))
    rows = _rows(_branches(inputs_NT, firsts, ends, row_len), row_len)
    width = max(sum(branch.size for branch in row) for row in rows)
    inputs_BS, positions_BS = np.zeros((2, len(rows), width), dtype=np.int64)
    targets_BS = np.full((len(rows), width), IGNORED, dtype=np.int64)
    # Which prompt or completion a token is of, and which prompt it sees; numbers are of a row.
    owner_BS, prompt_BS = np.full((2, len(rows), width), -1, dtype=np.int64)
    places_NT = np.zeros(inputs_NT.shape, dtype=np.int64)
    for b, row in enumerate(rows):
        at = owner = 0
        for branch in row:
            first = firsts[branch.members[0]]
            prompt_BS[b, at : at + branch.size] = prompt = owner
            inputs_BS[b, at : at + first] = inputs_NT[branch.members[0], :first]
            owner_BS[b, at : at + first], positions_BS[b, at : at + first] = prompt, np.arange(first)
            at, owner = at + first, owner + 1
            for n in branch.members:
                own, stop = slice(first, ends[n]), at + ends[n] - first
                inputs_BS[b, at:stop], targets_BS[b, at:stop] = inputs_NT[n, own], targets_NT[n, own]
                owner_BS[b, at:stop], positions_BS[b, at:stop] = owner, np.arange(first, ends[n])
                places_NT[n, own] = b * width + np.arange(at, stop)
                at, owner = stop, owner + 1
    device = completions.inputs.device
    owner, prompt = torch.from_numpy(owner_BS).to(device), torch.from_numpy(prompt_BS).to(device)
    earlier_SS = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    seen = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == prompt[:, :, None])
    inputs, targets, positions, places = (
        torch.from_numpy(array).to(device) for array in (inputs_BS, targets_BS, positions_BS, places_NT)
    )
    return SharedRows(inputs, targets, positions, (seen & earlier_SS)[:, None], places)


class _Branch(NamedTuple):
    """Completions to one prompt that stand together behind it."""

    members: list[int]
    size: int
    """Inputs, with the prompt's."""


def _branches(inputs_NT: np.ndarray, firsts: np.ndarray, ends: np.ndarray, row_len: int) -> list[_Branch]:
    """All completions, as many of a prompt together as a row holds."""
    by_prompt: dict[bytes, list[int]] = defaultdict(list)
    for n, first in enumerate(firsts):
        by_prompt[inputs_NT[n, : first + 1].tobytes()].append(n)
    branches: list[_Branch] = []
    for members in by_prompt.values():
        branch = _Branch([], int(firsts[members[0]]))
        for n in members:
            size = int(ends[n] - firsts[n])
            if branch.members and branch.size + size > row_len:
                branches.append(branch)
                branch = _Branch([], int(firsts[n]))
            branch = _Branch([*branch.members, n], branch.size + size)
        branches.append(branch)
    return branches


def _rows(branches: list[_Branch], row_len: int) -> list[list[_Branch]]:
    """The branches in few rows: the longest first, each where there is room."""
    rows: list[list[_Branch]] = []
    room: list[int] = []
    for branch in sorted(branches, key=lambda branch: -branch.size):
        found = next((b for b, left in enumerate(room) if branch.size <= left), None)
        if found is None:
            rows.append([])
            room.append(row_len)
            found = len(rows) - 1
        rows[found].append(branch)
        room[found] -= branch.size
    return rows
