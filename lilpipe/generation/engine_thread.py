"""The engine's thread, which decodes the requests of all clients together.

Only this thread uses the engine. Other threads queue commands, which it runs between two steps. After each step it
calls each client's ``notify``.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from lilpipe.generation.engine import Engine
from lilpipe.generation.protocol import Ask
from lilpipe.generation.responses import Piece
from lilpipe.generation.text import token_bytes
from lilpipe.generation.transcript import Transcript
from lilpipe.tokenizer.encoding import Tokenizer

logger = logging.getLogger(__name__)

Notify = Callable[[Sequence[Piece] | Exception], object]
"""Called with the new parts after a step, or with the error that ends the request."""


class Ticket:
    """A client's request."""

    def __init__(self, ask: Ask, notify: Notify) -> None:
        self.ask = ask
        self.notify = notify
        self.transcript: Transcript | None = None


class EngineThread:
    """Runs the engine while there are requests; otherwise sleeps."""

    def __init__(self, make_engine: Callable[[], Engine], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = token_bytes(tokenizer)
        self.tickets: list[Ticket] = []
        """Requests in progress."""
        self._make_engine = make_engine
        self._engine = make_engine()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended: Exception | None = None
        """The error that ended the thread, if any. It is set before the queue is emptied, so no command stays there."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- called from any thread -----------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def submit(self, ask: Ask, notify: Notify) -> Ticket:
        """Add a request. The engine's thread calls ``notify`` until all completions have ended."""
        ticket = Ticket(ask, notify)
        self._commands.put(lambda: self._admit(ticket))
        if self._ended is not None:
            self._refuse_waiting()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Cancel a request; does nothing if it has ended."""
        self._commands.put(lambda: self._drop(ticket))

    def close(self) -> None:
        """Stop the thread after the current step."""
        self._commands.put(None)
        self._thread.join()

    # --- in the engine's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._advance():
                pass
        except Exception as error:  # a new engine could not be created
            self._ended = error
            self._refuse_waiting()
            raise

    def _refuse_waiting(self) -> None:
        """Run the commands queued for a thread that has ended: their clients get its error."""
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None:
                command()

    def _advance(self) -> bool:
        """Run queued commands, run one step, and notify clients. Returns False if told to stop."""
        try:
            while self._commands.qsize() or not self.tickets:
                if (command := self._commands.get()) is None:
                    return False
                command()
            self._engine.step()
            self._report()
        except Exception as error:  # clients must be notified of any error
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
        """Notify all clients of the error and continue with a new engine."""
        logger.exception("the engine failed; requests in progress are aborted")
        failed, self.tickets = self.tickets, []
        for ticket in failed:
            ticket.notify(error)
        self._engine = self._make_engine()
