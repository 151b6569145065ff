"""Where an imported model comes from: a directory, a repository of the Hugging Face hub, or a GGUF file.

A hub revision is resolved to a commit, which pins it. Only config, weights in safetensors, tokenizer and model card are
downloaded, no code. A GGUF file is converted by transformers (extra ``hf``) to a directory, in float32.
"""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lilpipe.config.model import ImportModelConfig
from lilpipe.digests import digest_file
from lilpipe.errors import ArtifactError, ConfigError, DataError
from lilpipe.model.hub import model_files
from lilpipe.model.origin import read_card

CARD_FILE = "README.md"
HUB_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", CARD_FILE),
    *("tokenizer.json", "tokenizer.model", "*.tiktoken", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
"""Patterns of the files that are downloaded."""
TOKENIZER_SOURCES = (*("vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),)
"""Files beside those of ``model_files`` that may determine the tokenizer."""
MAX_GGUF_ENTRIES = 100_000
"""More tensors or settings than any GGUF file has."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def digests(config: ImportModelConfig) -> dict[str, str]:
    """Return digests of the source's files; for the hub, the commit. Raises ``DataError`` if there is no model."""
    if config.repo_id:
        return {"repo_id": config.repo_id, "commit": resolve_commit(config.repo_id, config.revision)}
    source = Path(config.path)
    if is_gguf(source):
        if not source.is_file():
            raise DataError(f"import_model.path: {source}: no such file; check the path")
        return {source.name: digest_file(source)}
    try:
        names = model_files(source)
        check_links(source, names)
    except ArtifactError as error:
        raise DataError(f"import_model.path: {error}") from error
    extra = [name for name in (*TOKENIZER_SOURCES, CARD_FILE) if (source / name).is_file()]
    return {name: digest_file(source / name) for name in (*names, *extra)}


def fetch(config: ImportModelConfig, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """Return the directory of the model's files, and its record for ``origin.json``.

    Raises ``DataError`` for a repository that cannot be read, ``ArtifactError`` for a damaged file.
    """
    if config.repo_id:
        commit = resolve_commit(config.repo_id, config.revision)
        directory = _download(config.repo_id, commit)
        origin = {"repo_id": config.repo_id, "revision": config.revision, "commit": commit}
    elif is_gguf(source := Path(config.path)):
        directory, origin = convert_gguf(source, scratch), {"gguf": source.name}
    else:
        directory, origin = source, {}
    check_links(directory, [path.name for path in directory.iterdir()] if directory.is_dir() else [])
    return directory, origin | read_card(directory / CARD_FILE)


def check_links(directory: Path, names: Iterable[str]) -> None:
    """Raise ``ArtifactError`` for a link to a file outside the directory, except in the hub's cache."""
    root = directory.resolve()
    roots = [root]
    if root.parent.name == "snapshots":  # the hub's cache links to blobs of the same repository
        roots.append(root.parents[1] / "blobs")
    for name in names:
        target = (directory / name).resolve()
        if not any(target.is_relative_to(allowed) for allowed in roots):
            raise ArtifactError(
                f"{directory / name}: got a link to {target}, expected a file in this directory; copy the file here"
            )


# --- the hub --------------------------------------------------------------------------------------------------------


def resolve_commit(repo_id: str, revision: str) -> str:
    """Return the commit of a branch, tag or commit; offline, that of the local cache. Raises ``DataError``."""
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    with _reading_hub(repo_id, revision):
        if constants.HF_HUB_OFFLINE:
            return _cached_commit(repo_id, revision)
        commit = HfApi().model_info(repo_id, revision=revision).sha
        if not isinstance(commit, str):
            raise ValueError("the hub gave no commit")
        return commit


def _cached_commit(repo_id: str, revision: str) -> str:
    """Return the commit of a revision in the local cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    return (folder / "refs" / revision).read_text(encoding="utf-8").strip()


def _download(repo_id: str, commit: str) -> Path:
    from huggingface_hub import snapshot_download

    with _reading_hub(repo_id, commit):
        return Path(
            snapshot_download(repo_id, revision=commit, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"])
        )


@contextmanager
def _reading_hub(repo_id: str, revision: str) -> Iterator[None]:
    """Turn errors of the hub's library into ``DataError``."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        advice = (
            "the hub is switched off (HF_HUB_OFFLINE=1) and the local cache has no such model: set HF_HUB_OFFLINE=0"
            if constants.HF_HUB_OFFLINE
            else "check name, revision and access (hf auth login)"
        )
        where = f"import_model.repo_id: {repo_id} at revision {revision}"
        raise DataError(f"{where}: cannot be read ({str(error)[:300]}); {advice}") from error


# --- GGUF -----------------------------------------------------------------------------------------------------------


def is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file."""
    return path.suffix == ".gguf"


def check_gguf(path: Path) -> None:
    """Raise ``ArtifactError`` for a file that is no GGUF, or whose header cannot be true."""
    with path.open("rb") as file:
        header = file.read(24)
    if len(header) < 24 or header[:4] != b"GGUF":
        raise ArtifactError(f"{path}: got a file that does not start with a GGUF header; copy it again")
    version, num_tensors, num_settings = struct.unpack("<IQQ", header[4:])
    if version not in (2, 3):
        raise ArtifactError(f"{path}: GGUF version: got {version}, expected 2 or 3; convert the file again")
    if max(num_tensors, num_settings) > MAX_GGUF_ENTRIES or num_tensors == 0:
        raise ArtifactError(
            f"{path}: got a header with {num_tensors:,} tensors and {num_settings:,} settings, expected 1 to "
            f"{MAX_GGUF_ENTRIES:,}; the file is damaged: copy it again"
        )


def _dequantized() -> dict[str, Any]:
    """Return the option by which transformers, from version 5.20 on, unpacks the weights."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def convert_gguf(path: Path, scratch: Path) -> Path:
    """Convert a GGUF file to a Hugging Face directory in ``scratch``, with the whole model in memory in float32.

    Raises ``ConfigError`` without the extra ``hf``, ``ArtifactError`` for a file that transformers cannot read.
    """
    check_gguf(path)
    try:
        import gguf  # noqa: F401 (transformers needs it)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"import_model.path: got a GGUF file, but {error.name} is not installed; install lilpipe[hf], or give a "
            "directory"
        ) from error
    directory = scratch / "converted"
    shutil.rmtree(directory, ignore_errors=True)
    try:
        options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options, **_dequantized())
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)  # its weights are plain tensors now
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(path.parent, **options).save_pretrained(directory)
    except Exception as error:  # damaged files fail in many ways in gguf and transformers
        raise ArtifactError(
            f"{path}: cannot be converted from GGUF ({type(error).__name__}: {str(error)[:300]}); if transformers "
            "supports its architecture, the file is damaged: copy it again"
        ) from error
    return directory
