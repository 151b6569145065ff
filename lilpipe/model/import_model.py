"""Stage ``import_model``: imports a checkpoint in Hugging Face's layout as an artifact.

Weights are copied unchanged, in their files and precision. Before that, the stage checks that the decoder computes the
model exactly and that the tokenizer gives the ids that the model was trained on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lilpipe.artifact import Inputs
from lilpipe.config.model import ImportModelConfig
from lilpipe.digests import digest_file
from lilpipe.errors import ArtifactError, DataError
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import check_model, model_files
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import TOKENIZER_FILES


def run(config: ImportModelConfig, inputs: Inputs, workspace: Workspace) -> Metrics:  # noqa: ARG001
    """Check the directory and copy it. Raises ``ArtifactError`` for a model that the decoder does not support."""
    source = Path(config.path)
    shape, vocab_size, tokenizer = check_model(source)
    # A retry starts over, because copying is all the work.
    shutil.rmtree(workspace.output)
    workspace.output.mkdir()
    names = [name for name in model_files(source) if name not in TOKENIZER_FILES]
    for done, name in enumerate(names):
        workspace.progress(done, len(names), "files")
        shutil.copyfile(source / name, workspace.output / name)
    tokenizer.save(workspace.output)
    check_model(workspace.output)
    return {"num_parameters": float(num_parameters(shape, vocab_size))}


def external(config: ImportModelConfig) -> dict[str, str]:
    """Return digests of the directory's files. Raises ``DataError`` if it holds no checkpoint."""
    source = Path(config.path)
    try:
        names = model_files(source)
    except ArtifactError as error:
        raise DataError(f"import_model.path: {error}") from error
    extra = [name for name in ("vocab.json", "merges.txt") if (source / name).exists()]
    return {name: digest_file(source / name) for name in (*names, *extra)}


STAGE = Stage(
    name="import_model",
    output="Checkpoint",
    config=ImportModelConfig,
    run=run,
    external=external,
    main_metric="num_parameters",
)
