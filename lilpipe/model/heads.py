"""Decoder with a linear head instead of the output layer: reward, value and classification models.

Checkpoints have the usual layout (``lilpipe.model.hub``), with the head as ``score.weight`` and the corresponding class
of ``transformers``, such as ``LlamaForSequenceClassification``. That class reads the head at the last token, as
``last_outputs`` does.

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
from lilpipe.config.backend import BackendConfig
from lilpipe.config.model import ModelConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.backend import load_backend
from lilpipe.model.hub import CONFIG_FILE, copy_into, read_model_config, save_tensors
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.layers import Linear
from lilpipe.model.state_dict_adapters import Verbatim, adapter_for
from lilpipe.model.transformer import ModelPart, Transformer
from lilpipe.model.weights import NamedTensors, held_tensors, stored_tensors
from lilpipe.tokenizer.encoding import Tokenizer

HEAD = "score.weight"
TOKENS_AT_ONCE = 8_192
"""Tokens per batch, with padding, in inference."""
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
"""Suffixes of ``transformers`` class names that become ``ForSequenceClassification``."""


_TEXT_MODELS = {"Gemma3": "Gemma3Text"}
"""Families whose classification model for text has another name: that of Gemma 3 also reads images."""


class HeadModel(Transformer):
    """Decoder, or a pipeline stage of it, with a linear head of ``num_outputs`` on the final hidden states.

    Returns outputs ``[B, T, O]`` in float32 where ``Transformer`` returns logits or scores.
    """

    score: Linear
    """The head; only on the last stage."""

    def __init__(self, config: ModelConfig, vocab_size: int, num_outputs: int, part: ModelPart | None = None) -> None:
        super().__init__(config, vocab_size, part)
        self.num_outputs = num_outputs
        self.lm_head = None
        if self.part.last:
            self.score = Linear(config.hidden_size, num_outputs)

    def forward(self, tokens_BT: Tensor, *, targets_BT: Tensor | None = None, **inputs: Any) -> Tensor:  # noqa: ARG002
        """Return outputs at each token. Ignores targets; other inputs as in ``Transformer``."""
        return super().forward(tokens_BT, **inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return outputs ``[..., O]`` in float32 for final hidden states ``[..., D]``."""
        return self.score(hidden).float()


def with_head(model: Transformer, num_outputs: int, *, seed: int) -> HeadModel:
    """Replace the output layer by a newly initialized head. The result shares the decoder of ``model``."""
    with torch.device("meta"):
        result = HeadModel(model.config, model.vocab_size, num_outputs)
    result.model = model.model
    result.score.to_empty(device=model.device)
    with torch.no_grad():
        shape = result.score.weight.shape
        result.score.weight.copy_(initial_value(HEAD, shape, seed=seed, config=model.config))
    return result


def last_outputs(outputs_BTO: Tensor, lengths_B: Tensor) -> Tensor:
    """Return outputs ``[B, O]`` at the last token of each right-padded row."""
    return outputs_BTO[torch.arange(len(lengths_B), device=outputs_BTO.device), lengths_B - 1]


def pad_rows(rows: Sequence[Sequence[int]], *, padding_id: int) -> tuple[Tensor, Tensor]:
    """Return tokens [B, T], padded on the right, and the lengths of the rows [B]."""
    lengths_B = torch.tensor([len(row) for row in rows])
    tokens_BT = torch.full((len(rows), int(lengths_B.max())), padding_id)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
    return tokens_BT, lengths_B


@torch.inference_mode()
def outputs_of_rows(model: HeadModel, rows: Sequence[Sequence[int]], *, padding_id: int) -> Tensor:
    """Return outputs ``[N, O]`` on the CPU at the last token of N rows; batches rows of similar length."""
    outputs_NO = torch.zeros(len(rows), model.num_outputs)
    for batch in _batches(rows):
        tokens_BT, lengths_B = pad_rows([rows[row] for row in batch], padding_id=padding_id)
        outputs_BTO = model(tokens_BT.to(model.device))
        outputs_NO[torch.tensor(batch)] = last_outputs(outputs_BTO, lengths_B.to(model.device)).cpu()
    return outputs_NO


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield row indices sorted by length, in batches of up to ``TOKENS_AT_ONCE`` tokens."""
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
    """Write model and tokenizer, each file atomically. ``labels`` names the outputs."""
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
    """``save_head_model`` for a stream of tensors, as in ``save_tensors``."""
    save_tensors(config, vocab_size, tensors, tokenizer, directory)
    path = directory / CONFIG_FILE
    stated = json.loads(path.read_text(encoding="utf-8"))
    is_backend = isinstance(config, BackendConfig)
    stated["architectures"] = [HeadModel.__name__ if is_backend else _class_name(stated["architectures"][0])]
    stated["id2label"] = {str(index): name for index, name in enumerate(labels)}
    stated["label2id"] = {name: index for index, name in enumerate(labels)}
    write_atomically(path, json.dumps(stated, indent=2, sort_keys=True) + "\n")


def _class_name(language_model: str) -> str:
    for end in _LANGUAGE_MODELS:
        if language_model.endswith(end):
            family = language_model.removesuffix(end)
            return f"{_TEXT_MODELS.get(family, family)}ForSequenceClassification"
    return HeadModel.__name__


def load_head_model(directory: Path) -> tuple[HeadModel, Tokenizer]:
    """Load the model in float32 on the CPU, in evaluation mode, and its tokenizer.

    Raises ``ArtifactError`` if the directory holds no decoder with a head, for example a language model.
    """
    config, vocab_size, tensors = _read_checked(directory)
    model = HeadModel(config, vocab_size, len(tensors[HEAD]))
    model.load_state_dict(tensors, strict=False)  # the names are checked
    return model.eval(), Tokenizer.load(directory)


def load_head_weights(into: Mapping[str, Tensor], directory: Path) -> None:
    """``lilpipe.model.hub.load_weights`` for a model with a head. Raises ``ArtifactError`` as ``load_head_model``."""
    _, _, tensors = _read_checked(directory)
    with torch.no_grad():
        for name, tensor in tensors.items():
            copy_into(into.get(name), tensor)


def read_labels(directory: Path) -> list[str]:
    """Return the names of a model's outputs, in order."""
    names: dict[str, str] = _stated(directory).get("id2label", {})
    return [names[str(index)] for index in range(len(names))]


def _read_checked(directory: Path) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    """Return config, vocabulary size and tensors, after checking that names and shapes are as expected."""
    config, vocab_size = read_model_config(directory)
    tensors = _read(directory, config)
    if HEAD not in tensors:
        raise ArtifactError(
            f"{directory}: {HEAD} is missing, expected a model with a head, as from stage reward_model or classify; "
            "check the step's inputs"
        )
    with torch.device("meta"):
        expected = dict(held_tensors(HeadModel(config, vocab_size, len(tensors[HEAD]))))
    for name in sorted(expected.keys() | tensors.keys()):
        got, wanted = (tuple(held[name].shape) if name in held else "nothing" for held in (tensors, expected))
        if got != wanted:
            raise ArtifactError(f"{directory}: {name}: got {got}, expected {wanted} from {CONFIG_FILE}")
    return config, vocab_size, tensors


def _read(directory: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return tensors by the decoder's names; the head has the same name in all layouts."""
    stored = dict(stored_tensors(directory))
    head = {HEAD: stored.pop(HEAD)} if HEAD in stored else {}
    if isinstance(config, BackendConfig):
        return {f"model.{name}": tensor for name, tensor in held_tensors(load_backend(directory, config))} | head
    layout = adapter_for(config)
    assert not isinstance(layout, Verbatim)
    return layout.from_hf(stored, config, _stated(directory)) | head


def _stated(directory: Path) -> dict[str, Any]:
    return json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
