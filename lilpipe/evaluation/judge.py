"""A language model as judge: which of two answers to a question is better, asked by OpenAI's chat protocol.

After Zheng et al. 2023 ("Judging LLM-as-a-judge with MT-Bench and Chatbot Arena"), who found that judges favour the
place in which an answer stands. So each pair is asked about twice, with the places swapped, and an answer wins only if
it wins in both; a verdict that goes with the place is a tie, and how often that happens is reported.

A judge's replies need not be the same when asked again, not even at temperature 0. Each is kept in scratch under the
digest of what was asked, so that a killed evaluation asks for none of them twice.
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
"""The answer that stands first, the one that stands second, neither."""

FIRST_DELAY_SECONDS = 1.0
"""Before the second try of a request; doubled before each further one."""
BUSY = frozenset({408, 409, 425, 429})
"""Statuses, beside those from 500, after which another try may succeed."""
SHOWN_CHARS = 300

_VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True)
class Pairing:
    """Two answers to one question."""

    question: str
    first: str
    second: str


@dataclass(frozen=True)
class Outcome:
    """How a game between two answers ended."""

    win: float | None
    """1 if the first answer won, 0 if the second did, 0.5 for a tie, none if no verdict could be read."""
    flipped: bool = False
    """Whether the verdict went with the place."""


def parse_verdict(reply: str) -> Place | None:
    """The verdict that ends a reply. None if there is none there, or if the reply holds another one as well.

    What a model thought before it replied, up to ``</think>``, does not count.
    """
    said = reply.rpartition("</think>")[2].rstrip()
    found = set(_VERDICT.findall(said))
    if len(found) != 1 or _VERDICT.fullmatch(said[-5:]) is None:
        return None
    return cast(Place, found.pop())


def settle(straight: Place | None, swapped: Place | None) -> Outcome:
    """The outcome of two verdicts on the same answers, the second with their places swapped."""
    if straight is None or swapped is None:
        return Outcome(None)
    if (straight, swapped) == ("A", "B"):
        return Outcome(1.0)
    if (straight, swapped) == ("B", "A"):
        return Outcome(0.0)
    return Outcome(0.5, flipped=straight == swapped != "C")


class Judge:
    """Asks, keeps what was replied under ``cache``, and reads the verdicts."""

    def __init__(self, config: JudgeConfig, cache: Path, *, concurrency: int) -> None:
        self.config, self.cache, self.concurrency = config, cache, concurrency
        self._key = _read_key(config.api_key_variable)

    def decide(self, pairings: Sequence[Pairing]) -> list[Outcome]:
        """An outcome for each pairing. Equal answers tie without being asked about.

        Raises ``ConfigError`` if the address refuses what is asked, ``StageFailure`` if it cannot be reached.
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
        """The request as JSON: the same text for the same question."""
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
        """The reply to a request, from scratch if it is there."""
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
            except (OSError, http.client.HTTPException) as error:  # not reached, cut off, too late
                problem = f"{type(error).__name__}: {error}"
        raise StageFailure(
            f"evaluate.judge.address: {self.config.address} did not answer in {self.config.max_retries + 1} tries, the "
            f"last ended in {problem}; check that it runs there. What it has answered is kept, and not asked again"
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


def read_reply(answer: bytes, *, address: str) -> str:
    """The text of a chat completion; empty where the model gave none. Raises ``ConfigError`` for anything else."""
    try:
        document: Any = json.loads(answer)
        content = document["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        shown = answer[:SHOWN_CHARS].decode("utf-8", "replace")
        raise ConfigError(
            f"evaluate.judge.address: {address} answered {shown!r}, expected a chat completion of OpenAI's protocol; "
            "the address ends in /v1 for most servers"
        ) from error
    return content if isinstance(content, str) else ""


def check_readable(outcomes: Sequence[Outcome]) -> float:
    """The share of games without a verdict. Raises ``DataError`` if that is all of them."""
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
            f"evaluate.judge.api_key_variable: the environment has no {variable}, expected it to hold the key; set it"
        )
    return key
