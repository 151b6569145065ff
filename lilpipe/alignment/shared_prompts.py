"""Answers to one prompt in one row, so that training reads the prompt once and not once for each answer.

A row is the prompt but its last token, then of each answer the prompt's last token and the answer but its last. A
token sees the prompt and what came before it in its own answer, at the place that it would have alone, so its score is
the same up to rounding (prefix sharing, as "tree attention" in speculative decoding).

Dimensions: N answers, T inputs of the longest; B rows, S inputs of the longest row.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lilpipe.alignment.rollouts import Answers
from lilpipe.model.scores import IGNORED

ANSWERS_IN_A_ROW = 4
"""Most: attention grows with the square of a row, and the time of 128 answers of 20 tokens was least with four."""


class SharedRows(NamedTuple):
    """Rows as the model takes them, and where the answers' targets are in them."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor
    """[B, 1, S, S], True where a token (third dimension) may attend."""
    places: Tensor
    """[N, T], the place in the flattened targets of each drawn token; 0 elsewhere."""


def share_prompts(answers: Answers, *, max_len: int) -> SharedRows:
    """The answers with those to one prompt in rows of up to ``max_len`` inputs; one that is longer stands alone."""
    inputs_NT, drawn_NT = answers.inputs.cpu().numpy(), answers.drawn.cpu().numpy()
    firsts = drawn_NT.argmax(axis=1)
    ends = drawn_NT.shape[1] - drawn_NT[:, ::-1].argmax(axis=1)
    rows = _fill(inputs_NT, firsts, ends, max_len)
    width = max(firsts[row[0]] + sum(ends[n] - firsts[n] for n in row) for row in rows)
    inputs_BS, positions_BS = np.zeros((2, len(rows), width), dtype=np.int64)
    targets_BS = np.full((len(rows), width), IGNORED, dtype=np.int64)
    owner_BS = np.full((len(rows), width), -1, dtype=np.int64)  # 0 is the prompt, 1 and up the answers
    places_NT = np.zeros(inputs_NT.shape, dtype=np.int64)
    targets_NT = answers.targets.cpu().numpy()
    for b, row in enumerate(rows):
        at = firsts[row[0]]
        inputs_BS[b, :at], owner_BS[b, :at], positions_BS[b, :at] = inputs_NT[row[0], :at], 0, np.arange(at)
        for number, n in enumerate(row, start=1):
            own, stop = slice(firsts[n], ends[n]), at + ends[n] - firsts[n]
            inputs_BS[b, at:stop], targets_BS[b, at:stop] = inputs_NT[n, own], targets_NT[n, own]
            owner_BS[b, at:stop], positions_BS[b, at:stop] = number, np.arange(firsts[n], ends[n])
            places_NT[n, own] = b * width + np.arange(at, stop)
            at = stop
    device = answers.inputs.device
    owner = torch.from_numpy(owner_BS).to(device)
    earlier_SS = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    mask = ((owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)) & earlier_SS
    inputs, targets, positions, places = (
        torch.from_numpy(array).to(device) for array in (inputs_BS, targets_BS, positions_BS, places_NT)
    )
    return SharedRows(inputs, targets, positions, mask[:, None], places)


def _fill(inputs_NT: np.ndarray, firsts: np.ndarray, ends: np.ndarray, max_len: int) -> list[list[int]]:
    """The numbers of the answers in each row; they have one prompt."""
    by_prompt: dict[bytes, list[int]] = defaultdict(list)
    for n, first in enumerate(firsts):
        by_prompt[inputs_NT[n, : first + 1].tobytes()].append(n)
    rows: list[list[int]] = []
    for members in by_prompt.values():
        room = 0
        for n in members:
            size = ends[n] - firsts[n]
            if size > room or len(rows[-1]) == ANSWERS_IN_A_ROW:
                rows.append([])
                room = max_len - firsts[n]
            rows[-1].append(n)
            room -= size
    return rows
