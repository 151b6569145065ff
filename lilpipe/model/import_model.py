"""Stage ``import_model``: imports a model as an artifact, from a directory, the Hugging Face hub, or a GGUF file.

Weights are copied unchanged, in their files and precision, unless a chat template is added. Before that, the stage
checks that the decoder computes the model exactly and that the tokenizer gives the ids that the model was trained on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from lilpipe.artifact import Inputs
from lilpipe.config.backend import BackendConfig
from lilpipe.config.model import ImportModelConfig, ModelConfig
from lilpipe.errors import ConfigError
from lilpipe.model.backend import LIMITS, Backend, check_backend, with_vocabulary
from lilpipe.model.continuation import embeddings_of
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import CONFIG_FILE, check_model, load_model, model_files, read_tensors, save_tensors
from lilpipe.model.model_sources import digests, fetch
from lilpipe.model.origin import write_origin
from lilpipe.model.weights import stored_dtype
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import TOKENIZER_FILES, ImportedTokenizer, Tokenizer
from lilpipe.tokenizer.jinja_template import CHATML, CHATML_TOKENS


def run(config: ImportModelConfig, inputs: Inputs, workspace: Workspace) -> Metrics:  # noqa: ARG001
    """Check the model and copy it.

    Raises ``ArtifactError`` for a model that neither the decoder nor a class of transformers computes exactly.
    """
    source, origin = fetch(config, workspace.scratch)
    shape, vocab_size, tokenizer = check_model(source)
    # A retry starts over, because copying is all the work.
    shutil.rmtree(workspace.output)
    workspace.output.mkdir()
    if config.chat_template == "chatml":
        vocab_size = _add_chatml(source, workspace.output, shape, vocab_size, tokenizer)
    else:
        names = [name for name in model_files(source) if name not in TOKENIZER_FILES]
        for done, name in enumerate(names):
            workspace.progress(done, len(names), "files")
            shutil.copyfile(source / name, workspace.output / name)
        tokenizer.save(workspace.output)
    if isinstance(shape, BackendConfig):
        origin = {**origin, "backend": "transformers"}
        because = f" ({shape.reason})" if shape.reason else ""
        workspace.log(f"{shape.class_name} of transformers computes this model, not the decoder{because}: {LIMITS}")
    write_origin(origin, workspace.output)
    for key, value in origin.items():
        workspace.log(f"{key}: {value}")
    check_model(workspace.output)
    if isinstance(shape, BackendConfig):
        backend = load_model(workspace.output)[0].model
        assert isinstance(backend, Backend)
        check_backend(backend, source / CONFIG_FILE)
    return {"num_parameters": float(num_parameters(shape, vocab_size))}


def _add_chatml(source: Path, target: Path, shape: ModelConfig, vocab_size: int, tokenizer: Tokenizer) -> int:
    """Write the model with the chat template ChatML; return its vocabulary size.

    Raises ``ConfigError`` if the model was trained here: it has a chat template.
    """
    if not isinstance(tokenizer, ImportedTokenizer):
        raise ConfigError(
            "import_model.chat_template: got 'chatml' for a model that lilpipe made, expected 'own': it has a template"
        )
    extended = tokenizer.extended(CHATML_TOKENS, template=CHATML)
    new_ids = [extended.special_ids[name] for name in CHATML_TOKENS if name not in tokenizer.special_ids]
    rows = max(vocab_size, *(number + 1 for number in new_ids), 0)

    if isinstance(shape, BackendConfig):
        shape = with_vocabulary(shape, rows)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read_tensors(source):
            if name in embeddings_of(shape) and new_ids:
                mean_D = tensor[: tokenizer.vocab_size].double().mean(0).to(tensor.dtype)
                grown_VD = mean_D.expand(rows, *tensor.shape[1:]).clone()
                grown_VD[: len(tensor)] = tensor
                grown_VD[new_ids] = mean_D
                tensor = grown_VD
            yield name, tensor

    save_tensors(shape, rows, tensors(), extended, target, dtype=stored_dtype(source))
    return rows


STAGE = Stage(
    name="import_model",
    output="Checkpoint",
    config=ImportModelConfig,
    run=run,
    external=digests,
    main_metric="num_parameters",
)
