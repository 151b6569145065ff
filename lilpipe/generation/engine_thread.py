"""One thread that owns the engine, so that requests of many clients are decoded together.

Nobody else touches the engine: others leave commands, which the thread takes between two steps, and are told what has
come for them after each step, in that thread.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from lilpipe.generation.engine import Engine
from lilpipe.generation.protocol import Ask, Piece
from lilpipe.generation.text import token_bytes
from lilpipe.generation.transcript import Transcript
from lilpipe.tokenizer.encoding import Tokenizer

logger = logging.getLogger(__name__)

Notify = Callable[[Sequence[Piece] | Exception], object]
"""Told the parts that came with a step, or why there will be no more."""


class Ticket:
    """A client's claim on one request."""

    def __init__(self, ask: Ask, notify: Notify) -> None:
        self.ask = ask
        self.notify = notify
        self.transcript: Transcript | None = None


class EngineThread:
    """Runs the engine while there is work, and sleeps while there is none."""

    def __init__(self, make_engine: Callable[[], Engine], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = token_bytes(tokenizer)
        self.tickets: list[Ticket] = []
        """Requests under way."""
        self._make_engine = make_engine
        self._engine = make_engine()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended: Exception | None = None
        """Why the thread has ended, if it failed; set before it empties the queue, so that no command is left there."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- for any thread -------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, ask: Ask, notify: Notify) -> Ticket:
        """Ask for completions; ``notify`` is called in the engine's thread until all have been given."""
        ticket = Ticket(ask, notify)
        self._commands.put(lambda: self._admit(ticket))
        if self._ended is not None:
            self._refuse_waiting()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Want nothing more of a request, finished or not."""
        self._commands.put(lambda: self._drop(ticket))

    def close(self) -> None:
        """End the thread after the step under way."""
        self._commands.put(None)
        self._thread.join()

    # --- in the engine's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._advance():
                pass
        except Exception as error:  # no other engine could be made
            self._ended = error
            self._refuse_waiting()
            raise

    def _refuse_waiting(self) -> None:
        """Take what waits for a thread that has ended: those who ask are told so."""
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None:
                command()

    def _advance(self) -> bool:
        """Take the commands that wait, then a step, and report. False if told to end."""
        try:
            while self._commands.qsize() or not self.tickets:
                if (command := self._commands.get()) is None:
                    return False
                command()
            self._engine.step()
            self._report()
        except Exception as error:  # whatever it is, those who wait must hear of it
            self._fail(error)
        return True

    def _admit(self, ticket: Ticket) -> None:
        if self._ended is not None:
            ticket.notify(self._ended)
            return
        try:
            ticket.transcript = Transcript(self._engine, self.tokenizer, self.vocabulary, ticket.ask)
        except Exception as error:
            ticket.notify(error)
        else:
            self.tickets.append(ticket)

    def _drop(self, ticket: Ticket) -> None:
        if ticket in self.tickets:
            self.tickets.remove(ticket)
            assert ticket.transcript is not None
            ticket.transcript.cancel(self._engine)

    def _report(self) -> None:
        for ticket in list(self.tickets):
            assert ticket.transcript is not None
            pieces = ticket.transcript.news()
            if ticket.transcript.done:
                self.tickets.remove(ticket)
            if pieces:
                ticket.notify(pieces)

    def _fail(self, error: Exception) -> None:
        """Tell all who wait, and go on with an engine of which nothing is left over."""
        logger.exception("the engine failed; the requests under way are given up")
        failed, self.tickets = self.tickets, []
        for ticket in failed:
            ticket.notify(error)
        self._engine = self._make_engine()
