"""One user's conversation: what it has asked, the pictures, the cache, and how its answers are stopped.

sessions = Sessions(shared)
session = sessions.get("a user's key")
for part in session.ask("What is this?", Upload([picture]), shared.start):
    ...                              # pieces of text and, last, a `Reply`
sessions.close("a user's key")       # the browser's tab is gone
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from ..chat.comparison import compare, layer_lengths
from ..chat.conversation import Answer, Conversation
from .shared import Settings, SharedModel
from .uploads import Upload


MAX_NEW_TOKENS = 256
COMPARING_SECONDS = 5.0  # that the two are timed in turn
MAX_PROMPT = 4000  # characters
WORKER = "shortv-answer"  # name of the threads that answer


class Stopped(Exception):
    """The user stopped the answer, or is gone."""


@dataclass(frozen=True)
class Reply:
    """An answer and what it took.

    Attributes:
        settings: that it was made with.
        cache_bytes: of the conversation's keys and values.
        from_cache: whether the turn went on from the cache of the turn before.
        kept: visual tokens that reached the decoder, of a prompt that was computed as a whole; else `None`.
    """

    answer: Answer
    settings: Settings
    cache_bytes: int
    from_cache: bool
    kept: int | None


@dataclass
class Session:
    """Not for several threads at once; `stop` and `close` may come from any.

    Attributes:
        prompt, upload: the last question, and all pictures and videos of the conversation.
        whole: the last reply whose prompt was computed as a whole.
        closed: the user is gone.
    """

    shared: SharedModel
    max_new_tokens: int = MAX_NEW_TOKENS
    prompt: str = ""
    upload: Upload = field(default_factory=Upload)
    whole: Reply | None = None
    closed: bool = False
    _conversation: Conversation | None = None
    _settings: Settings | None = None  # those that the cache was made with
    _stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, prompt: str, new: Upload, settings: Settings) -> Iterator[str | Reply]:
        """Ask the next question, with the `new` pictures and videos: pieces of the answer as they come, then the `Reply`.
        Other settings than the last turn's compute the whole conversation anew. After an error, or when it is
        stopped, the conversation is as it was before.

        Raises:
            Stopped: by `stop` or `close`.
            ValueError: the prompt is empty or too long, or as `Conversation.ask`.
        """
        prompt = prompt.strip()
        if not prompt:
            raise ValueError("ask something: the question is empty")
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"the question has {len(prompt)} characters; the limit is {MAX_PROMPT}")
        yield from self._run(partial(self._ask, prompt, new, settings), settings)

    def _ask(self, prompt: str, new: Upload, settings: Settings, model: Any, on_text: Callable[[str], None]) -> Reply:
        if self._conversation is None:
            self._conversation = Conversation(model, self.shared.processor, self.max_new_tokens)
        talk = self._conversation
        if settings != self._settings:  # its keys and values were made with other ones
            talk.forget_cache()
        from_cache = talk.cache_bytes() > 0
        self._settings = settings
        with layer_lengths(model) as lengths:
            answer = talk.ask(prompt, new.pictures, on_text, new.videos)
        self.prompt = prompt
        self.upload = Upload([*self.upload.pictures, *new.pictures], [*self.upload.videos, *new.videos])
        kept = None if from_cache else answer.visual_tokens - (answer.prompt_tokens - lengths[0])
        reply = Reply(answer, settings, talk.cache_bytes(), from_cache, kept)
        self.whole = self.whole if from_cache else reply
        return reply

    def compare(self, settings: Settings) -> Iterator[tuple[str, str] | dict]:
        """The last question to the dense model and to these settings, each on its own, without the turns before but with all
        pictures: names of the variants with pieces of their answers, then the result of `chat.comparison.compare`.

        Raises:
            Stopped: by `stop` or `close`.
            ValueError: nothing has been asked.
        """
        if not self.prompt:
            raise ValueError("ask something first: the comparison repeats your last question")
        yield from self._run(self._compare, settings)

    def _compare(self, model: Any, on_text: Callable[[Any], None]) -> dict:
        pictures, videos = self.upload.pictures, self.upload.videos
        return compare(
            model,
            self.shared.processor,
            self.prompt,
            pictures,
            self.max_new_tokens,
            videos,
            lambda name, text: on_text((name, text)),
            COMPARING_SECONDS,
        )

    def draw(self, settings: Settings, work: Callable[[Any, "Session"], Any]) -> Any:
        """What `work` makes of the model, which is this user's meanwhile, and of the session."""
        with self.shared.turn(self, settings) as model:
            return work(model, self)

    def _run(self, work: Callable, settings: Settings) -> Iterator[Any]:
        """What `work` tells while it runs in a thread of its own, and then what it returns; closing the iterator stops it.
        (Settings belong to a thread, and whoever asks for the next piece may do so from any.)"""
        told: SimpleQueue = SimpleQueue()
        self._stop.clear()

        def on_text(text: Any) -> None:
            if self._stop.is_set() or self.closed:
                raise Stopped
            told.put((False, text))

        def run() -> None:
            try:
                with self.shared.turn(self, settings) as model:
                    on_text("")  # not after a stop while others had the model
                    found = work(model, on_text)
                told.put((True, found))
            except BaseException as error:
                told.put((True, error))

        worker = threading.Thread(target=run, name=WORKER, daemon=True)
        worker.start()
        try:
            while True:
                is_last, found = told.get()
                if isinstance(found, BaseException):
                    raise found
                if found != "":
                    yield found
                if is_last:
                    return
        finally:
            self._stop.set()
            worker.join()

    def stop(self) -> None:
        """End the answer that is being made, at its next token."""
        self._stop.set()

    def forget_cache(self) -> None:
        """The next turn computes the whole conversation."""
        if self._conversation is not None:
            self._conversation.forget_cache()

    def clear(self) -> None:
        """Begin a new conversation."""
        self.stop()
        self._conversation, self._settings, self.whole = None, None, None
        self.prompt, self.upload = "", Upload()

    def close(self) -> None:
        """The user is gone: stop, and give memory back."""
        self.closed = True
        self.clear()
        self.shared.leave(self)


class Sessions:
    """The sessions of all users, by keys that nobody else knows."""

    def __init__(self, shared: SharedModel, max_new_tokens: int = MAX_NEW_TOKENS):
        self.shared, self.max_new_tokens = shared, max_new_tokens
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str) -> Session:
        """The user's session, a new one at first."""
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = Session(self.shared, self.max_new_tokens)
            return self._sessions[key]

    def close(self, key: str) -> None:
        """The user is gone."""
        with self._lock:
            session = self._sessions.pop(key, None)
        if session is not None:
            session.close()
