"""CUDA graphs of the decode step. On a GPU a small model's step is bound by launching its few hundred kernels.

A CUDA graph has fixed shapes. ``Rows`` therefore pads rows, pages and partial results to a few sizes, and one graph is
captured for each combination that occurs. Mixture-of-experts models (whose groups of tokens vary in size), latent
attention (which gathers) and sliding windows (whose masks depend on positions) run without graphs.

The padded layout is tested on a CPU. Capture and replay have not been tested: no GPU was available.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lilpipe.generation.paged_attention import DecodeView, Scratch
from lilpipe.model.transformer import Transformer

WARMUP_STEPS = 2
"""Steps before a capture, which PyTorch requires: libraries allocate memory in their first call."""


def fits(model: Transformer) -> bool:
    """Whether CUDA graphs support the model's decode step."""
    config = model.config
    plain = config.moe is None and config.mla is None and config.sliding_window is None
    return model.device.type == "cuda" and plain


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    logits_BV: Tensor


class DecodeGraphs:
    """Captures a graph once per shape, then replays it."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._pools: tuple[int, ...] = ()

    def __call__(self, tokens_B1: Tensor, positions_B1: Tensor, view: DecodeView) -> Tensor:
        """Return the logits ``[B, V]``; the next call overwrites them."""
        pools = tuple(pool.keys_LNKES.data_ptr() for pool in (view.answers, view.prompts))
        if pools != self._pools:  # a pool has grown: old graphs write to its former memory
            self._captured.clear()
            self._pools = pools
        inputs = [tokens_B1, positions_B1, view.page_B, view.place_B, view.layout.blocks_C, view.layout.partials_QM]
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        counts = (view.layout.num_answer_pages, view.layout.num_prompt_pages, view.layout.sharing)
        captured = self._captured.get((shapes, counts))
        if captured is None:
            captured = self._captured[shapes, counts] = self._capture(inputs, view)
        for static, tensor in zip(captured.inputs, inputs, strict=True):
            static.copy_(tensor)
        captured.graph.replay()
        return captured.logits_BV

    def _capture(self, inputs: list[Tensor], view: DecodeView) -> _Captured:
        static = [tensor.clone() for tensor in inputs]
        tokens_B1, positions_B1, page_B, place_B, blocks_C, partials_QM = static
        layout = replace(view.layout, blocks_C=blocks_C, partials_QM=partials_QM)
        own = DecodeView(view.answers, view.prompts, layout, page_B, place_B, Scratch())

        def step() -> Tensor:
            own.refresh()
            return self.model(tokens_B1, positions_BT=positions_B1, cache=own)[:, 0]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):  # writes the same keys and values each time
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_BV = step()
        return _Captured(graph, static, logits_BV)
