"""Vocabularies that were made elsewhere, such as GPT-2's and Llama 3's: whether tiktoken gives the same ids.

``tokenizer.json`` can say more than ranks, a pattern and special tokens. What would change ids is refused, so that an
imported model reads text as it was trained to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lilpipe.tokenizer.vocabulary import Merge, Vocabulary, recover_merges

TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
"""Special tokens that ``transformers`` gives a template by these names."""


def exact_merges(vocabulary: Vocabulary, *, ignore_merges: bool) -> tuple[Merge, ...]:
    """The merges by which tokens come about. Raises ``ValueError`` if the file's would not give tiktoken's ids.

    tiktoken merges by nothing but the pairs of ``recover_merges``, so a file that lists these among its own, in the
    order of ranks, merges alike. A token that no merge makes is found only as a whole piece, and ``ignore_merges``
    says that whole pieces are looked for.
    """
    merges = tuple(recover_merges(vocabulary.ranks))
    if vocabulary.merges is not None and (absent := set(merges) - set(vocabulary.merges)):
        raise ValueError(f"merges: got none of {min(absent)}, by which tiktoken would merge")
    if not ignore_merges and len(merges) + 256 < len(vocabulary.ranks):
        raise ValueError("ignore_merges: got false and tokens that no merge makes, expected true or no such token")
    return merges


def check_added_tokens(added: list[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` for added tokens that are looked for in plain text or take the spaces around them."""
    for token in added:
        flags = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip")}
        if not token.get("special", True) or any(flags.values()):
            raise ValueError(f"added_tokens: got {token['content']!r} that is not special or is stripped")


def document_end(directory: Path, special: Mapping[int, str]) -> str:
    """Name of the token that ends a text: the first end that ``config.json`` or ``tokenizer_config.json`` names.

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
    """The template of a model that talks, in Jinja, and the names of the special tokens by which it calls them.

    Of several by name, for tools and the like, it is the one named ``default``, which ``transformers`` takes too.
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
    """The object in a file; empty if there is no such file."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content if isinstance(content, dict) else {}
