"""LLM as a judge: asks a language model which of two completions is better, by OpenAI's chat completions API.

Judges have a position bias (Zheng et al. 2023, "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena"). So each pair
is judged twice, in both orders, and a completion wins only if it wins in both. If the verdict changes with the order,
the game is a tie, and the share of such games is reported.

A judge may reply differently when asked again, even at temperature 0. Each reply is cached in scratch by the digest of
its request, so a resumed evaluation repeats no request.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lilpipe.artifact import write_atomically
from lilpipe.config.evaluate import JudgeConfig
from lilpipe.errors import ConfigError, DataError, StageFailure

Place = Literal["A", "B", "C"]
"""First completion, second completion, neither."""

FIRST_DELAY_SECONDS = 1.0
"""Delay before the first retry of a request; doubled before each further retry."""
BUSY = frozenset({408, 409, 425, 429})
"""HTTP status codes to retry, in addition to those from 500."""
SHOWN_CHARS = 300

_VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True)
class Pairing:
    """Two completions to one question."""

    question: str
    first: str
    second: str


@dataclass(frozen=True)
class Outcome:
    """Outcome of a game between two completions."""

    win: float | None
    """1 if the first completion won, 0 if the second won, 0.5 for a tie, ``None`` if no verdict was readable."""
    flipped: bool = False
    """Whether the verdict changed with the order of the completions (position bias)."""


def parse_verdict(reply: str) -> Place | None:
    """Return the verdict at the end of a reply; ``None`` if there is none, or if the reply contains different ones.

    Reasoning up to ``</think>`` is ignored.
    """
    said = reply.rpartition("</think>")[2].rstrip()
    found = set(_VERDICT.findall(said))
    if len(found) != 1 or _VERDICT.fullmatch(said[-5:]) is None:
        return None
    return cast(Place, found.pop())


def settle(straight: Place | None, swapped: Place | None) -> Outcome:
    """Return the outcome of two verdicts on the same completions, the second one in swapped order."""
    if straight is None or swapped is None:
        return Outcome(None)
    if (straight, swapped) == ("A", "B"):
        return Outcome(1.0)
    if (straight, swapped) == ("B", "A"):
        return Outcome(0.0)
    return Outcome(0.5, flipped=straight == swapped != "C")


class Judge:
    """Sends requests, caches replies under ``cache``, and parses verdicts."""

    def __init__(self, config: JudgeConfig, cache: Path, *, concurrency: int) -> None:
        self.config, self.cache, self.concurrency = config, cache, concurrency
        self._key = _read_key(config.api_key_variable)

    def decide(self, pairings: Sequence[Pairing]) -> list[Outcome]:
        """Return an outcome for each pairing. Equal completions tie without a request.

        Raises ``ConfigError`` if the server rejects a request, ``StageFailure`` if it is not reachable.
        """
        asked = [pairing for pairing in pairings if pairing.first != pairing.second]
        swapped = [Pairing(pairing.question, pairing.second, pairing.first) for pairing in asked]
        bodies = [self._body(pairing) for pairing in (*asked, *swapped)]
        distinct = list(dict.fromkeys(bodies))
        with ThreadPoolExecutor(self.concurrency) as pool:
            replies = dict(zip(distinct, pool.map(self._reply, distinct), strict=True))
        verdicts: list[Place | None] = [parse_verdict(replies[body]) for body in bodies]
        settled = iter(zip(verdicts[: len(asked)], verdicts[len(asked) :], strict=True))
        return [Outcome(0.5) if p.first == p.second else settle(*next(settled)) for p in pairings]

    def _body(self, pairing: Pairing) -> str:
        """Return the request body as JSON; equal pairings give equal bodies."""
        content = self.config.template.format(**vars(pairing))
        return json.dumps(
            {
                "model": self.config.model,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": self.config.max_new_tokens,
            },
            sort_keys=True,
        )

    def _reply(self, body: str) -> str:
        """Return the reply to a request, from the cache if it is there."""
        path = self.cache / f"{hashlib.sha256(body.encode()).hexdigest()}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        reply = self._ask(body)
        write_atomically(path, json.dumps(reply))
        return reply

    def _ask(self, body: str) -> str:
        delay, problem = FIRST_DELAY_SECONDS, ""
        for attempt in range(self.config.max_retries + 1):
            if attempt:
                time.sleep(delay)
                delay *= 2
            try:
                return read_reply(self._post(body), address=self.config.address)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in BUSY:
                    raise self._refused(error) from None
                problem = f"HTTP {error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:  # unreachable, connection lost, timeout
                problem = f"{type(error).__name__}: {error}"
        raise StageFailure(
            f"evaluate.judge.address: {self.config.address} did not answer in {self.config.max_retries + 1} tries, the "
            f"last ended in {problem}; check that the server runs. Received replies are cached and not requested again"
        )

    def _post(self, body: str) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.config.address.rstrip('/')}/chat/completions", body.encode(), headers)
        with urllib.request.urlopen(request, timeout=self.config.timeout_seconds) as response:
            return response.read()

    def _refused(self, error: urllib.error.HTTPError) -> ConfigError:
        said = error.read().decode("utf-8", "replace")[:SHOWN_CHARS]
        if self._key:
            said = said.replace(self._key, "***")
        return ConfigError(
            f"evaluate.judge: {self.config.address} refused model {self.config.model!r} with HTTP {error.code}: {said}"
            "; check judge.address, judge.model and judge.api_key_variable"
        )


def read_reply(body: bytes, *, address: str) -> str:
    """Return the text of a chat completion, empty if there is none. Raises ``ConfigError`` for other responses."""
    try:
        document: Any = json.loads(body)
        content = document["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        shown = body[:SHOWN_CHARS].decode("utf-8", "replace")
        raise ConfigError(
            f"evaluate.judge.address: {address} answered {shown!r}, expected a chat completion of OpenAI's API; "
            "for most servers the address ends in /v1"
        ) from error
    return content if isinstance(content, str) else ""


def check_readable(outcomes: Sequence[Outcome]) -> float:
    """Return the share of games without a verdict. Raises ``DataError`` if no game has one."""
    unread = sum(outcome.win is None for outcome in outcomes)
    if outcomes and unread == len(outcomes):
        raise DataError(
            f"evaluate.judge: none of the {len(outcomes)} games got a verdict that could be read; expected replies "
            "that end in [[A]], [[B]] or [[C]]; raise judge.max_new_tokens, or change judge.template or judge.model"
        )
    return unread / len(outcomes) if outcomes else 0.0


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise ConfigError(
            f"evaluate.judge.api_key_variable: the environment has no {variable}, expected the API key; set it"
        )
    return key
