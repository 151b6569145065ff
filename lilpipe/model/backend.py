"""Models of transformers behind the interface of the decoder: the architectures that the decoder does not compute.

A class of transformers computes the hidden states. Its output layer is replaced by the identity, so that what it would
return as logits are the inputs of the output layer, scaled as the class scales its logits. Log-probabilities are then
computed by chunks, as for the decoder. Code of a repository is never run (``trust_remote_code`` is off).

Nothing is assumed about attention: rows of several documents become one row per document, padded on the right. Dropout
of the class is off, because it would depend on the number of workers and on restarts.

Dimensions: B rows, T tokens, N documents, L tokens of the longest, D inputs of the output layer, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lilpipe.config.backend import BackendConfig
from lilpipe.config.overrides import explain
from lilpipe.errors import ArtifactError, ConfigError, DataError
from lilpipe.model.decoder import Decoder
from lilpipe.model.family import MAX_LAYERS, check_size
from lilpipe.model.scores import soften
from lilpipe.model.weights import held_tensors

LIMITS = "it is slower, without tensor, pipeline and context parallelism, fp8, compilation and the paged engine"
"""What is not available with the classes of transformers."""
PREFIX = "model.network."
"""Before the names of transformers in those of ``Transformer``."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
NO_CAP = 1e30
"""Soft cap that changes nothing; not all classes accept None."""
CONTEXTS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
"""Names of the maximum sequence length."""
UNLIMITED = 2048
"""Context of a model that has no maximum."""
PROBE = 8
"""Tokens of a row that is computed to check a class."""
NOT_READ = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation")
"""Keys of ``config.json`` that name code."""


def read_backend_config(path: Path, stated: Mapping[str, Any]) -> tuple[BackendConfig, int]:
    """Return the config and the vocabulary size of a model, without its weights.

    ``path`` is that of ``config.json``. Raises ``ConfigError`` without transformers, ``ArtifactError`` for a model that
    none of its causal language models computes.
    """
    try:
        network = _without_weights(json.dumps(stated, sort_keys=True))
    except ImportError as error:
        raise ConfigError(
            f"{path}: model_type: got {stated.get('model_type')!r}, which the decoder does not compute, "
            f"and transformers, which may, is not installed ({error}); install lilpipe[hf]"
        ) from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ArtifactError(f"{path}: {str(error)[:300]}") from error
    head = network.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ArtifactError(
            f"{path}: model_type: got {stated.get('model_type')!r}, whose class {type(network).__name__} has no output "
            "layer; expected a causal language model"
        )
    text = network.config.get_text_config()
    contexts = [getattr(text, name, None) for name in CONTEXTS]
    held = {name for name, _ in held_tensors(network)}
    by_token = {id(tensor) for tensor in (*head.parameters(), network.get_input_embeddings().weight)}
    try:
        config = BackendConfig(
            stated=dict(stated),
            class_name=type(network).__name__,
            num_parameters=sum(parameter.numel() for parameter in network.parameters()),
            duplicates=tuple(sorted(network.state_dict().keys() - held)),
            embeddings=tuple(PREFIX + name for name, each in network.named_parameters() if id(each) in by_token),
            hidden_size=head.in_features + (head.bias is not None),
            num_layers=getattr(text, "num_hidden_layers", None) or 1,
            num_heads=1,
            num_kv_heads=1,
            max_seq_len=next((length for length in contexts if length), UNLIMITED),
            position_embedding="learned",
            tie_embeddings=head.weight is network.get_input_embeddings().weight,
            logit_softcap=next((cap for name in SOFT_CAPS if (cap := getattr(text, name, None))), None),
        )
    except ValidationError as error:
        raise ArtifactError(f"{path}: {explain(error)}") from error
    return config, head.out_features


def with_vocabulary(config: BackendConfig, vocab_size: int) -> BackendConfig:
    """Return the config with another number of rows of the embeddings."""
    return config.model_copy(update={"stated": {**config.stated, "vocab_size": vocab_size}})


@cache
def _without_weights(stated: str) -> Any:
    """Return the model on the meta device."""
    with torch.device("meta"):
        return make_network(json.loads(stated))


def _hf_config(stated: Mapping[str, Any]) -> Any:
    """Return the config of transformers. Raises ``ValueError`` for a model that is no causal language model."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = stated.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        code = " or code of its repository, which is never run," if "auto_map" in stated else ""
        raise ValueError(
            f"model_type: got {kind!r}, expected an architecture of the decoder or of the installed transformers; a "
            f"newer version of transformers{code} may have it"
        )
    read = json.dumps({key: value for key, value in stated.items() if key not in NOT_READ})
    config = CONFIG_MAPPING[kind].from_dict(json.loads(read, object_hook=_special_float))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model_type: got {kind!r}, which has no causal language model in transformers")
    check_size("number of layers", getattr(config.get_text_config(), "num_hidden_layers", 1), MAX_LAYERS)
    return config


def _special_float(value: dict[str, Any]) -> Any:
    """Return an infinity for transformers' ``{"__float__": "Infinity"}``."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def make_network(stated: Mapping[str, Any]) -> Any:
    """Return the model of transformers with initial weights, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(_hf_config(stated), dtype=torch.float32, trust_remote_code=False)


class Backend(Decoder):
    """A model of transformers with the interface of ``Decoder``."""

    def __init__(self, config: BackendConfig, network: Any = None) -> None:
        """``network`` is the model of transformers; by default one with initial weights."""
        nn.Module.__init__(self)
        self.config: BackendConfig = config
        self.network = make_network(config.stated) if network is None else network
        self.network.requires_grad_(True)
        self.expert_loads: dict[str, Tensor] = {}
        self.dropout_seed: int | None = None
        self.embed_positions = None
        self.one_pass = False
        """Whether to compute all documents in one forward pass, as sharding requires."""
        self.network.get_output_embeddings().forward = _identity
        for settings in (self.network.config, self.network.config.get_text_config()):
            for name in SOFT_CAPS:
                if getattr(settings, name, None):
                    setattr(settings, name, NO_CAP)  # the cap is applied to the logits, not to the hidden states
        self.network.generation_config = type(self.network.generation_config)()
        self.eval()

    def train(self, mode: bool = True) -> Backend:
        """Set the mode of adapters; the class stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    @property
    def layers(self) -> nn.ModuleDict:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The decoder layers by index; empty if they are not found."""
        lists = (module for module in self.network.modules() if isinstance(module, nn.ModuleList))
        found = next((each for each in lists if len(each) == self.config.num_layers), [])
        return nn.ModuleDict({str(number): layer for number, layer in enumerate(found)})

    @property
    def embed_tokens(self) -> nn.Embedding:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The input embedding."""
        return self.network.get_input_embeddings()

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output layer, ``[V, D]``; a bias is its last column."""
        head = self.network.get_output_embeddings()
        return head.weight if head.bias is None else torch.cat([head.weight, head.bias[:, None]], dim=1)

    def set_rope(self, theta: float) -> None:
        """Do nothing for the base of ``config``. Raises ``ConfigError`` for another."""
        if theta != self.config.rope_theta:
            raise ConfigError(
                f"rope_theta: got {theta}, expected no other base for a model of transformers; remove it from the phase"
            )

    def forward(
        self,
        x: Tensor,
        positions_BT: Tensor | None = None,  # noqa: ARG002
        documents_BT: Tensor | None = None,
        mask: Any = None,
        cache: Any = None,
        rows_B: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the inputs of the output layer ``[B, T, D]`` for tokens ``x [B, T]``.

        Positions are those in the document or row. Raises ``DataError`` for a sequence that is too long.
        """
        assert mask is None, "a model of transformers takes documents, no mask"
        assert cache is None, "a model of transformers has its own cache"
        if x.shape[1] > self.config.max_seq_len:
            raise DataError(
                f"sequence of {x.shape[1]} tokens: expected at most the model's {self.config.max_seq_len}; "
                "shorten the sequence"
            )
        if documents_BT is None:
            return self._hidden(x)
        return by_document(self._hidden, x, documents_BT, one_pass=self.one_pass)

    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        hidden_BTD = self.network(input_ids=tokens_BT, use_cache=False, return_dict=True).logits
        return self.with_bias(hidden_BTD)

    def with_bias(self, hidden: Tensor) -> Tensor:
        """Append a one to hidden states if the output layer has a bias."""
        if self.network.get_output_embeddings().bias is None:
            return hidden
        return torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def by_document(
    function: Callable[[Tensor], Tensor], tokens_BT: Tensor, documents_BT: Tensor, *, one_pass: bool
) -> Tensor:
    """Apply ``function`` to rows of one document each, ``[N, L] -> [N, L, D]``; return ``[B, T, D]``.

    Padding, with a negative id, counts to the document before it. Documents of similar length are computed together, so
    that the padded rows have at most about twice the tokens.
    """
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = (documents_BT[:, 1:] != documents_BT[:, :-1]) & (documents_BT[:, 1:] >= 0)
    tokens, document = tokens_BT.flatten(), begins_BT.flatten().cumsum(0) - 1
    first_N = begins_BT.flatten().nonzero()[:, 0]
    place = torch.arange(len(tokens), device=tokens.device) - first_N[document]
    lengths_N = document.bincount()
    group_N = torch.zeros_like(lengths_N) if one_pass else (2 * lengths_N - 1).log2().long()  # by powers of two
    parts, where = [], []
    for group in group_N.unique().tolist():
        chosen_N = group_N == group
        mine = chosen_N[document].nonzero()[:, 0]
        row = (chosen_N.cumsum(0) - 1)[document[mine]]
        rows_NL = tokens.new_zeros(int(chosen_N.sum()), int(lengths_N[chosen_N].max()))
        rows_NL[row, place[mine]] = tokens[mine]
        parts.append(function(rows_NL)[row, place[mine]])
        where.append(mine)
    order = torch.cat(where).argsort()
    return torch.cat(parts)[order].unflatten(0, tokens_BT.shape)


@torch.no_grad()
def check_backend(model: Backend, path: Path) -> None:
    """Raise ``ArtifactError`` if log-probabilities would be wrong: the class does not compute its logits by its output
    layer alone, or tokens depend on later ones.
    """
    vocab_size, kind = len(model.output_weight), model.config.class_name
    tokens_BT = torch.arange(2, 2 + 2 * PROBE).view(2, PROBE) % vocab_size
    hidden_BTD = model(tokens_BT)
    del model.network.get_output_embeddings().forward
    caps = [cap for cap in [model.config.logit_softcap] if cap]
    logits_BTV = model.network(input_ids=tokens_BT, use_cache=False).logits
    model.network.get_output_embeddings().forward = _identity
    for cap in caps:
        logits_BTV = cap * torch.tanh(logits_BTV / cap)
    own_BTV = soften(hidden_BTD @ model.output_weight.T, model.config.logit_softcap)
    if not torch.allclose(own_BTV.log_softmax(-1), logits_BTV.log_softmax(-1), atol=1e-3):
        raise ArtifactError(
            f"{path}: model_type: {kind} changes the logits of its output layer, expected at most a factor or a soft "
            "cap; its log-probabilities cannot be computed by chunks"
        )
    if not torch.allclose(model(tokens_BT[:, : PROBE // 2]), hidden_BTD[:, : PROBE // 2], atol=1e-3, rtol=1e-3):
        raise ArtifactError(
            f"{path}: model_type: got {kind} with tokens that depend on later ones, expected a causal language model; "
            "set is_decoder if it was trained so"
        )


# --- files ----------------------------------------------------------------------------------------------------------


def load_backend(directory: Path, config: BackendConfig) -> Backend:
    """Load the weights in float32 on the CPU. Raises ``ArtifactError`` for files that do not fit ``config.json``."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=_hf_config(config.stated),
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below
        )
    except (OSError, ValueError, TypeError, RuntimeError, LookupError) as error:
        raise ArtifactError(f"{directory}: cannot be loaded by transformers ({str(error)[:300]})") from error
    network, info = loaded
    because = f" (by its class, because of {config.reason})" if config.reason else ""
    problems = {"missing": info["missing_keys"], "of another shape": [name for name, *_ in info["mismatched_keys"]]}
    for problem, names in problems.items():
        if names:
            raise ArtifactError(
                f"{directory}: {min(names)}: {problem}, expected it from config.json{because}; copy all files from the "
                "same checkpoint"
            )
    return Backend(config, network)


def published_tensors(tensors: Mapping[str, Tensor], config: BackendConfig) -> dict[str, Tensor]:
    """Return tensors, named as in ``Transformer``, by their names in a published checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    own = {name: tensor for name, tensor in named.items() if name not in config.duplicates}
    return revert_weight_conversion(_without_weights(json.dumps(config.stated, sort_keys=True)), own)
