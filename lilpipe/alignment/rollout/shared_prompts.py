"""Prefix sharing in training: the completions to a prompt share one copy of the prompt in a row.

A row has the prompt without its last token; then, for each completion, the prompt's last token and the completion
without its last token. Further prompts with their completions can follow. A token attends to its prompt and to earlier
tokens of its own completion, with the positions of an unshared row, so scores are equal up to rounding ("tree
attention" in speculative decoding).

Dimensions: N completions, T inputs of the longest; B rows, S inputs of the longest row.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lilpipe.alignment.rollout.completion_batch import CompletionBatch
from lilpipe.config.model import ModelConfig
from lilpipe.model.flops import block_parameters, head_widths
from lilpipe.model.scores import IGNORED

ROW_LEN = 128
"""Least inputs per row. The cost of attention is quadratic in row length."""
MULTIPLES = (1, 1.5, 2, 3, 4, 6, 8)
"""Row lengths that are considered, as multiples of the least."""
ATTENTION_SLOWDOWN = 3
"""How much longer an operation of attention with a mask takes than one of the matrix products, on a CPU."""


class SharedRows(NamedTuple):
    """Packed model inputs, and the positions of the completions' targets in them."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor
    """[B, 1, S, S], True where a query (third dimension) may attend to a key."""
    places: Tensor
    """[N, T], index of each sampled token in the flattened targets; 0 elsewhere."""


class PromptSharing(NamedTuple):
    """How prompts are shared in the rows of a model."""

    max_len: int
    """Most inputs of a row, which must fit the longest completion."""
    attention_cost: float
    """Time to attend to a key, relative to that of a token's matrix products."""


def sharing_of(config: ModelConfig) -> PromptSharing:
    """Return how prompts are shared for a model on a CPU."""
    key, value = head_widths(config)
    parameters = block_parameters(config, config.num_layers - 1, active=True)
    return PromptSharing(config.max_seq_len, ATTENTION_SLOWDOWN * config.num_heads * (key + value) / parameters)


def share_prompts(completions: CompletionBatch, sharing: PromptSharing) -> SharedRows:
    """Pack completions into rows of the length that is expected to take the least time: in longer rows more completions
    share a prompt, but attention costs more.
    """
    inputs_NT, completion_mask_NT = completions.inputs.cpu().numpy(), completions.completion_mask.cpu().numpy()
    targets_NT = completions.targets.cpu().numpy()
    firsts = completion_mask_NT.argmax(axis=1)
    ends = completion_mask_NT.shape[1] - completion_mask_NT[:, ::-1].argmax(axis=1)
    groups = _same_prompts(inputs_NT, firsts)
    least = min(sharing.max_len, max(ROW_LEN, int(ends.max())))
    lengths = dict.fromkeys(min(sharing.max_len, int(least * multiple)) for multiple in MULTIPLES)
    packings = [_rows(_branches(groups, firsts, ends, length), length) for length in lengths]
    rows = min(packings, key=lambda rows: len(rows) * _width(rows) * (1 + sharing.attention_cost * _width(rows)))
    width = _width(rows)
    inputs_BS, positions_BS = np.zeros((2, len(rows), width), dtype=np.int64)
    targets_BS = np.full((len(rows), width), IGNORED, dtype=np.int64)
    # owner: the prompt or completion of a token; prompt: the prompt it attends to. Ids are unique within a row.
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
    """Completions that share one copy of a prompt."""

    members: list[int]
    size: int
    """Number of inputs, including the prompt's."""


def _width(rows: list[list[_Branch]]) -> int:
    return max(sum(branch.size for branch in row) for row in rows)


def _same_prompts(inputs_NT: np.ndarray, firsts: np.ndarray) -> list[list[int]]:
    """Return the completions to each prompt."""
    by_prompt: dict[bytes, list[int]] = defaultdict(list)
    for n, first in enumerate(firsts):
        by_prompt[inputs_NT[n, : first + 1].tobytes()].append(n)
    return list(by_prompt.values())


def by_prompt(completions: CompletionBatch, parts: int) -> list[Tensor]:
    """Split rows into parts of equal size that hold the completions to as few prompts as possible."""
    firsts = completions.completion_mask.cpu().numpy().argmax(axis=1)
    groups = _same_prompts(completions.inputs.cpu().numpy(), firsts)
    groups.sort(key=lambda members: (int(firsts[members[0]]), members[0]))
    order = torch.tensor([n for members in groups for n in members], device=completions.inputs.device)
    return list(order.tensor_split(parts))


def _branches(groups: list[list[int]], firsts: np.ndarray, ends: np.ndarray, row_len: int) -> list[_Branch]:
    """Divide the completions to each prompt into branches of at most ``row_len`` inputs."""
    branches: list[_Branch] = []
    for members in groups:
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
    """Pack branches into rows by first-fit decreasing."""
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
