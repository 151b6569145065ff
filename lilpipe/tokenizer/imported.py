"""Files of an imported tokenizer: what they say, and which tokens stand around a text.

``tokenizer.json`` defines the ids. ``tokenizer_config.json`` and the older ``special_tokens_map.json`` name tokens, and
may change flags of added tokens and ask for a token before each text, as in ``transformers``. The files are kept
unchanged. ``document_end.json`` is ours: which token ends a document follows from the model's ``config.json``, which is
not beside every copy of the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lilpipe.tokenizer.huggingface import leading_ids
from lilpipe.tokenizer.vocabulary import TOKENIZER_FILE

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
DOCUMENT_END_FILE = "document_end.json"
VERBATIM_FILES = (
    *(TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt"),
)
"""Files that are copied as they are."""

FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")

Files = dict[str, bytes]


def read_files(directory: Path) -> Files:
    """Return the contents of the tokenizer's files in a directory."""
    return {name: path.read_bytes() for name in VERBATIM_FILES if (path := directory / name).is_file()}


def read_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no such file. Raises ``ValueError`` naming the file."""
    if name not in files:
        return {}
    if files[name].startswith(b"\x80"):
        raise ValueError(f"{name}: got a pickle, which could run code, expected JSON")
    try:
        found = json.loads(files[name].decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: got a JSON {type(found).__name__}, expected an object")
    return found


def stated_settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the tokenizer's settings; names of tokens in ``tokenizer_config.json`` come before those in the map."""
    both = [read_object(files, name) for name in ("special_tokens_map.json", CONFIG_FILE)]
    return {key: value for each in both for key, value in each.items() if value is not None}


def token_names(stated: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens with a name, such as ``bos_token``; a chat template refers to them by it."""
    found = {key: value for key, value in stated.items() if key.endswith("_token") and isinstance(value, str | dict)}
    return {key: token["content"] if isinstance(token, dict) else token for key, token in found.items()}


def completed(content: dict[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``tokenizer.json`` with the added tokens that the settings name or change.

    ``transformers`` does the same: flags in ``added_tokens_decoder`` win, and a named token of the vocabulary is
    special. Tokens that the vocabulary lacks are left out: the model has no embedding for them.
    """
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    ids = _vocabulary(content)
    for number, token in sorted((stated.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        name = token["content"]
        if name in added or ids.get(name) == int(number):
            known = added.get(name, {"id": int(number), "content": name, **dict.fromkeys(FLAGS, False)})
            added[name] = {**known, **{flag: bool(token[flag]) for flag in FLAGS if flag in token}}
    for name in token_names(stated).values():
        if name in added:
            added[name] = {**added[name], "special": True}
        elif name in ids:
            added[name] = {"id": ids[name], "content": name, **dict.fromkeys(FLAGS, False), "special": True}
    return {**content, "added_tokens": sorted(added.values(), key=lambda token: token["id"])}


def start_ids(content: Mapping[str, Any], stated: Mapping[str, Any], special_ids: Mapping[str, int]) -> tuple[int, ...]:
    """Return the ids that the model expects before a text: those of the post-processor, else of ``add_bos_token``."""
    leading = tuple(leading_ids(content.get("post_processor")))
    begin = token_names(stated).get("bos_token", "") if stated.get("add_bos_token") else ""
    return leading or ((special_ids[begin],) if begin in special_ids else ())


def document_ends(directory: Path, content: Mapping[str, Any]) -> list[str]:
    """Return the names of tokens that end a text, by ``document_end.json``, else by the model's files."""
    beside = {name: path.read_bytes() for name in _BESIDE if (path := directory / name).is_file()}
    if DOCUMENT_END_FILE in beside:
        return [str(read_object(beside, DOCUMENT_END_FILE).get("document_end"))]
    names = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    names = {**{number: name for name, number in _vocabulary(content).items()}, **names}
    ids = [number for name in beside for number in _listed(read_object(beside, name).get("eos_token_id"))]
    return list(dict.fromkeys(names[number] for number in ids if number in names))


def with_special_tokens(content: dict[str, Any], names: Sequence[str], first_id: int) -> dict[str, Any]:
    """Return the content of ``tokenizer.json`` with more special tokens, whose ids start at ``first_id``."""
    added, known = list(content.get("added_tokens") or []), _vocabulary(content)
    model = dict(content["model"])
    flags = {**dict.fromkeys(FLAGS, False), "special": True}
    for number, name in enumerate(names, start=first_id):
        added.append({"id": number, "content": name, **flags})
    used = len(known.keys() | {token["content"] for token in content.get("added_tokens") or []})
    if used < first_id:  # ids with gaps: the library would fill them, unless the vocabulary states the id
        model["vocab"] = {**known, **{name: number for number, name in enumerate(names, start=first_id)}}
    return {**content, "added_tokens": added, "model": model}


def without_special_tokens(content: Mapping[str, Any], special: Collection[str]) -> list[Any]:
    """Return the parts of ``tokenizer.json`` that decide the ids of a text."""
    added = [token for token in content.get("added_tokens") or [] if token["content"] not in special]
    vocabulary = {name: number for name, number in _vocabulary(content).items() if name not in special}
    model = {**content["model"], "vocab": vocabulary}
    if model["type"] == "Unigram":
        model["scores"] = [score for name, score in content["model"]["vocab"] if name not in special]
    return [added, model, content.get("normalizer"), content.get("pre_tokenizer")]


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    found = content["model"]["vocab"]
    return found if isinstance(found, dict) else {name: index for index, (name, _) in enumerate(found)}


_BESIDE = (DOCUMENT_END_FILE, "config.json", "generation_config.json")


def _listed(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def chat_templates(files: Mapping[str, bytes], stated: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates in Jinja by name, of which ``default`` is used; empty if there is none."""
    if TEMPLATE_FILE in files:
        return {"default": files[TEMPLATE_FILE].decode("utf-8")}
    found = stated.get("chat_template")
    if isinstance(found, list):
        return {item["name"]: item["template"] for item in found}
    return {"default": found} if isinstance(found, str) else {}
