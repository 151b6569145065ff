"""The decoder with a linear head in place of the output layer: rewards, values and classes.

A checkpoint of it is laid out as any other (``lilpipe.model.hub``), with the head as ``score.weight`` and the class of
``transformers`` that computes the same, such as ``LlamaForSequenceClassification``: that one reads the head at the last
token, as ``last_outputs`` does.

Dimensions: B sequences, T tokens, D width, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilpipe.artifact import write_atomically
from lilpipe.config.model import ModelConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.hub import CONFIG_FILE, copy_into, read_model_config, save_tensors
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.layers import Linear
from lilpipe.model.state_dict_adapters import adapter_for
from lilpipe.model.transformer import ModelPart, Transformer
from lilpipe.model.weights import NamedTensors, stored_tensors
from lilpipe.tokenizer.encoding import Tokenizer

HEAD = "score.weight"
TOKENS_AT_ONCE = 8_192
"""Tokens, padding among them, of a batch that is only scored."""
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of classes in ``transformers`` that our head replaces the output layer of."""


class HeadModel(Transformer):
    """A decoder, or a pipeline stage of it, that ends in ``num_outputs`` linear functions of its final hidden states.

    It gives outputs ``[B, T, O]`` in float32 at each token where ``Transformer`` gives logits or scores.
    """

    score: Linear
    """The head, which the last stage alone has."""

    def __init__(self, config: ModelConfig, vocab_size: int, num_outputs: int, part: ModelPart | None = None) -> None:
        super().__init__(config, vocab_size, part)
        self.num_outputs = num_outputs
        self.lm_head = None
        if self.part.last:
            self.score = Linear(config.hidden_size, num_outputs)

    def forward(self, tokens_BT: Tensor, *, targets_BT: Tensor | None = None, **inputs: Any) -> Tensor:  # noqa: ARG002
        """Outputs at each token, given those before it, whatever the targets; further inputs as ``Transformer``'s."""
        return super().forward(tokens_BT, **inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Outputs ``[..., O]`` in float32 of final hidden states ``[..., D]``."""
        return self.score(hidden).float()


def with_head(model: Transformer, num_outputs: int, *, seed: int) -> HeadModel:
    """The decoder of ``model``, shared and not copied, with a fresh head in place of the output layer."""
    with torch.device("meta"):
        result = HeadModel(model.config, model.vocab_size, num_outputs)
    result.model = model.model
    result.score.to_empty(device=model.device)
    with torch.no_grad():
        shape = result.score.weight.shape
        result.score.weight.copy_(initial_value(HEAD, shape, seed=seed, config=model.config))
    return result


def last_outputs(outputs_BTO: Tensor, lengths_B: Tensor) -> Tensor:
    """Outputs ``[B, O]`` at the last token of each row, of rows that are padded on the right."""
    return outputs_BTO[torch.arange(len(lengths_B), device=outputs_BTO.device), lengths_B - 1]


def pad_rows(rows: Sequence[Sequence[int]], *, padding_id: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, T], padded on the right, and the rows' lengths [B]."""
    lengths_B = torch.tensor([len(row) for row in rows])
    tokens_BT = torch.full((len(rows), int(lengths_B.max())), padding_id)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
    return tokens_BT, lengths_B


@torch.inference_mode()
def outputs_of_rows(model: HeadModel, rows: Sequence[Sequence[int]], *, padding_id: int) -> Tensor:
    """Outputs ``[N, O]`` on the CPU at the last token of each of N rows of ids, rows of like lengths at a time."""
    outputs_NO = torch.zeros(len(rows), model.num_outputs)
    for batch in _batches(rows):
        tokens_BT, lengths_B = pad_rows([rows[row] for row in batch], padding_id=padding_id)
        outputs_BTO = model(tokens_BT.to(model.device))
        outputs_NO[torch.tensor(batch)] = last_outputs(outputs_BTO, lengths_B.to(model.device)).cpu()
    return outputs_NO


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices by rising length, as many together as make ``TOKENS_AT_ONCE``."""
    batch: list[int] = []
    for row in sorted(range(len(rows)), key=lambda row: len(rows[row])):
        if batch and (len(batch) + 1) * len(rows[row]) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


# --- directories --------------------------------------------------------------------------------------------------


def save_head_model(
    model: HeadModel, tokenizer: Tokenizer, directory: Path, *, labels: Sequence[str] | None = None
) -> None:
    """Write model and tokenizer, each file atomically; ``labels`` are the names of the outputs."""
    labels = labels or [f"output_{index}" for index in range(model.num_outputs)]
    save_head_tensors(model.config, model.vocab_size, model.state_dict().items(), tokenizer, directory, labels=labels)


def save_head_tensors(
    config: ModelConfig,
    vocab_size: int,
    tensors: NamedTensors,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    labels: Sequence[str],
) -> None:
    """``save_head_model`` for a model whose tensors come one by one, as in ``save_tensors``."""
    save_tensors(config, vocab_size, tensors, tokenizer, directory)
    path = directory / CONFIG_FILE
    stated = json.loads(path.read_text(encoding="utf-8"))
    stated["architectures"] = [_class_name(stated["architectures"][0])]
    stated["id2label"] = {str(index): name for index, name in enumerate(labels)}
    stated["label2id"] = {name: index for index, name in enumerate(labels)}
    write_atomically(path, json.dumps(stated, indent=2, sort_keys=True) + "\n")


def _class_name(language_model: str) -> str:
    for end in _LANGUAGE_MODELS:
        if language_model.endswith(end):
            return language_model.removesuffix(end) + "ForSequenceClassification"
    return HeadModel.__name__


def load_head_model(directory: Path) -> tuple[HeadModel, Tokenizer]:
    """The model in float32, on the CPU in evaluation mode, and its tokenizer.

    Raises ``ArtifactError`` if the directory holds no decoder with a head, such as a language model.
    """
    config, vocab_size, tensors = _read_checked(directory)
    model = HeadModel(config, vocab_size, len(tensors[HEAD]))
    model.load_state_dict(tensors)
    return model.eval(), Tokenizer.load(directory)


def load_head_weights(into: Mapping[str, Tensor], directory: Path) -> None:
    """``lilpipe.model.hub.load_weights`` for a model with a head. Raises ``ArtifactError`` as ``load_head_model``."""
    _, _, tensors = _read_checked(directory)
    with torch.no_grad():
        for name, tensor in tensors.items():
            copy_into(into.get(name), tensor)


def read_labels(directory: Path) -> list[str]:
    """The names of a model's outputs, in their order."""
    names: dict[str, str] = _stated(directory).get("id2label", {})
    return [names[str(index)] for index in range(len(names))]


def _read_checked(directory: Path) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    """Shape, vocabulary size and tensors by our names, of which none is missing, left over or of another shape."""
    config, vocab_size = read_model_config(directory)
    tensors = _read(directory, config)
    if HEAD not in tensors:
        raise ArtifactError(
            f"{directory}: holds no {HEAD}, expected a model with a head, as the stages reward_model and classify "
            "make; check the step's inputs"
        )
    with torch.device("meta"):
        expected = HeadModel(config, vocab_size, len(tensors[HEAD])).state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        got, wanted = (tuple(held[name].shape) if name in held else "nothing" for held in (tensors, expected))
        if got != wanted:
            raise ArtifactError(f"{directory}: {name}: got {got}, expected {wanted} by {CONFIG_FILE}")
    return config, vocab_size, tensors


def _read(directory: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by our names; the head's is the same everywhere."""
    stored = dict(stored_tensors(directory))
    head = {HEAD: stored.pop(HEAD)} if HEAD in stored else {}
    return adapter_for(config).from_hf(stored, config, _stated(directory)) | head


def _stated(directory: Path) -> dict[str, Any]:
    return json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
