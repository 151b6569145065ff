"""A registered model as MLflow's ``python_function``: its ``MLmodel`` names this module, which needs no MLflow.

``mlflow.pyfunc.load_model("models:/lilpipe@champion").predict(...)`` and ``mlflow models serve`` come here. Nothing
is pickled: the model is the checkpoint's files, and the code is this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lilpipe import distributed
from lilpipe.generation.engine import Engine
from lilpipe.generation.protocol import (
    ChatRequest,
    CompletionRequest,
    Envelope,
    Piece,
    Request,
    RequestError,
    can_chat,
)
from lilpipe.generation.text import token_bytes
from lilpipe.generation.transcript import Transcript, gather
from lilpipe.model.hub import load_model

MAX_ROWS = 32
"""ServedModel decoded at once."""
DEFAULTS = {"temperature": 0}
"""Greedy unless asked otherwise: a model that scores a table gives the same again."""


class ServedModel:
    """Gives answers to one request, or to each row of a table."""

    def __init__(self, directory: Path) -> None:
        model, self.tokenizer = load_model(directory)
        self.model = model.to(distributed.device())
        self.vocabulary = token_bytes(self.tokenizer)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """OpenAI's answer to OpenAI's request, or a list of texts for rows.

        A request is ``{"messages": [...]}`` or ``{"prompt": ...}``, with settings such as ``temperature`` beside it or
        in ``params``. A row is a question, a list of messages, or a mapping like a request; rows come as a list or a
        data frame. Raises ``RequestError``.
        """
        settings = {**DEFAULTS, **(params or {})}
        if isinstance(model_input, Mapping):
            request = _request({**settings, **model_input})
            ask = request.ask(self.tokenizer, max_seq_len=self.model.config.max_seq_len)
            (choices,) = self._answers([request])
            return Envelope(request, model="lilpipe", vocabulary=self.vocabulary).whole(choices, ask)
        requests = [_request({**settings, **self._row(row)}) for row in _rows(model_input)]
        return [choices[0].text for choices in self._answers(requests)]

    def _row(self, row: Any) -> dict[str, Any]:
        if isinstance(row, str):
            question = {"messages": [{"role": "user", "content": row}]}
            return question if can_chat(self.tokenizer) else {"prompt": row}
        return dict(row) if isinstance(row, Mapping) else {"messages": row}

    def _answers(self, requests: list[Request]) -> list[list[Piece]]:
        """The choices of each request, all decoded together. An engine of its own keeps callers' threads apart."""
        asks = [request.ask(self.tokenizer, max_seq_len=self.model.config.max_seq_len) for request in requests]
        engine = Engine(self.model, max_rows=MAX_ROWS)
        transcripts = [Transcript(engine, self.tokenizer, self.vocabulary, ask) for ask in asks]
        found: list[dict[int, Piece]] = [{} for _ in transcripts]
        while not all(transcript.done for transcript in transcripts):
            engine.step()
            for choices, transcript in zip(found, transcripts, strict=True):
                gather(choices, transcript.news())
        return [[choices[index] for index in sorted(choices)] for choices in found]


def _load_pyfunc(data_path: str) -> ServedModel:
    """What MLflow calls, by this name."""
    return ServedModel(Path(data_path))


def _request(values: dict[str, Any]) -> Request:
    request = (ChatRequest if "messages" in values else CompletionRequest).parse(values)
    if request.stream:
        raise RequestError("stream: got true, expected false: MLflow gives an answer at once", param="stream")
    return request


def _rows(table: Any) -> list[Any]:
    """The rows of a data frame as mappings, of one with a single column of another name its values; or of a list. A
    text by itself is a row.
    """
    if not hasattr(table, "columns"):
        return [table] if isinstance(table, str) else list(table)
    if len(table.columns) == 1 and table.columns[0] not in ("messages", "prompt"):
        return table.iloc[:, 0].tolist()
    return [{name: _plain(value) for name, value in row.items() if value == value} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    """Whole numbers as such: a data frame makes floats of them where a row of their column has none (NaN)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
