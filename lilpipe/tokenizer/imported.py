"""Imported vocabularies, such as those of GPT-2 and Llama 3: checks that tiktoken gives the same ids.

``tokenizer.json`` can contain more than ranks, a pattern and special tokens. Whatever would change ids is rejected, so
that an imported model gets the ids that it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lilpipe.tokenizer.vocabulary import Merge, Vocabulary, recover_merges

TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
"""Special tokens that ``transformers`` passes to a chat template by these names."""


def exact_merges(vocabulary: Vocabulary, *, ignore_merges: bool) -> tuple[Merge, ...]:
    """Return the vocabulary's merges. Raises ``ValueError`` if the file's merges would not give tiktoken's ids.

    tiktoken applies exactly the merges of ``recover_merges``, so a file gives the same ids if it contains these in
    order of rank. A token without a merge is only found as a whole piece, which ``ignore_merges`` enables.
    """
    merges = tuple(recover_merges(vocabulary.ranks))
    if vocabulary.merges is not None and (absent := set(merges) - set(vocabulary.merges)):
        raise ValueError(f"merges: got none of {min(absent)}, by which tiktoken would merge")
    if not ignore_merges and len(merges) + 256 < len(vocabulary.ranks):
        raise ValueError("ignore_merges: got false and tokens that no merge forms, expected true or no such token")
    return merges


def check_added_tokens(added: list[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` for added tokens that match in plain text or strip surrounding spaces."""
    for token in added:
        flags = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip")}
        if not token.get("special", True) or any(flags.values()):
            raise ValueError(f"added_tokens: got {token['content']!r} that is not special or is stripped")


def document_end(directory: Path, special: Mapping[int, str]) -> str:
    """Return the name of the end-of-text token: the first one in ``config.json``, else in ``tokenizer_config.json``.

    Raises ``ValueError`` if there is none.
    """
    ids = _read(directory / "config.json").get("eos_token_id")
    first: Any = ids[0] if isinstance(ids, list) and ids else ids
    if first in special:
        return special[first]
    named = _read(directory / "tokenizer_config.json").get("eos_token")
    name: Any = named.get("content") if isinstance(named, dict) else named
    if name in special.values():
        return name
    raise ValueError("eos_token: got none in config.json or tokenizer_config.json that is a special token")


def chat_template(directory: Path) -> tuple[str, dict[str, str]] | None:
    """Return the chat template in Jinja and the special tokens that it refers to, or ``None`` if there is no template.

    Of several named templates it is ``default``, as in ``transformers``.
    """
    stated = _read(directory / "tokenizer_config.json")
    path = directory / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.exists() else stated.get("chat_template")
    if isinstance(source, list):
        source = {item["name"]: item["template"] for item in source}.get("default")
    if not isinstance(source, str):
        return None
    names = {
        key: token["content"] if isinstance(token, dict) else token
        for key, token in stated.items()
        if key in TEMPLATE_TOKENS and token
    }
    return source, names


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file does not exist."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content if isinstance(content, dict) else {}
