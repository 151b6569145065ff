"""The registered model as MLflow's ``python_function``. Its ``MLmodel`` file names this module, which does not import
MLflow.

``mlflow.pyfunc.load_model("models:/lilpipe@champion").predict(...)`` and ``mlflow models serve`` use it. Nothing is
pickled: the model is the checkpoint's files, the code is this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lilpipe.generation.engine import engine_for
from lilpipe.generation.frozen import load_frozen
from lilpipe.generation.protocol import (
    ChatRequest,
    CompletionRequest,
    Request,
    RequestError,
    can_chat,
)
from lilpipe.generation.responses import Envelope, Piece
from lilpipe.generation.text import token_bytes
from lilpipe.generation.transcript import Transcript, gather

MAX_ROWS = 32
"""Maximum number of completions decoded together."""
DEFAULTS = {"temperature": 0}
"""Greedy by default, so that scoring a table is reproducible."""


class ServedModel:
    """Completes one request, or each row of a table."""

    def __init__(self, directory: Path) -> None:
        self.model, self.tokenizer = load_frozen(directory)
        self.vocabulary = token_bytes(self.tokenizer)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Return OpenAI's response to OpenAI's request, or a list of texts for rows.

        A request is ``{"messages": [...]}`` or ``{"prompt": ...}``, with parameters such as ``temperature`` beside it
        or in ``params``. Rows are a list or a data frame. A row is a user message, a list of messages, or a request.
        Raises ``RequestError``.
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
        """Return the choices of each request, decoded together. Each call has its own engine, so it is thread-safe."""
        asks = [request.ask(self.tokenizer, max_seq_len=self.model.config.max_seq_len) for request in requests]
        engine = engine_for(self.model, max_rows=MAX_ROWS)
        transcripts = [Transcript(engine, self.tokenizer, self.vocabulary, ask) for ask in asks]
        found: list[dict[int, Piece]] = [{} for _ in transcripts]
        while not all(transcript.done for transcript in transcripts):
            engine.step()
            for choices, transcript in zip(found, transcripts, strict=True):
                gather(choices, transcript.news())
        return [[choices[index] for index in sorted(choices)] for choices in found]


def _load_pyfunc(data_path: str) -> ServedModel:
    """Load the model; MLflow calls this name."""
    return ServedModel(Path(data_path))


def _request(values: dict[str, Any]) -> Request:
    request = (ChatRequest if "messages" in values else CompletionRequest).parse(values)
    if request.stream:
        raise RequestError("stream: got true, expected false: MLflow does not stream responses", param="stream")
    return request


def _rows(table: Any) -> list[Any]:
    """Return the rows of a list or data frame; a single text is one row.

    A data frame with one column gives its values, unless the column is ``messages`` or ``prompt``; otherwise mappings.
    """
    if not hasattr(table, "columns"):
        return [table] if isinstance(table, str) else list(table)
    if len(table.columns) == 1 and table.columns[0] not in ("messages", "prompt"):
        return table.iloc[:, 0].tolist()
    return [{name: _plain(value) for name, value in row.items() if value == value} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    """Convert whole floats to int: a data frame stores integers as floats if the column has missing values (NaN)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
