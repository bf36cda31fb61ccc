"""What happens when something on the page is clicked: what is shown where, as `{part of the page: value}`. No Gradio."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from ..command_line.errors import one_line
from . import views
from .options import read
from .session import Reply, Session, Sessions, Stopped
from .shared import Settings
from .uploads import read_uploads


class Actions:
    """For users by their keys. Values are those of the page's controls.

    Args:
        options: by method of token reduction, the names of its options; the controls of all of them, in this order, follow
            those of the number of layers and of the method.
    """

    def __init__(self, sessions: Sessions, options: dict[str, list[str]]):
        self.sessions, self.shared, self.options = sessions, sessions.shared, options

    def chosen(self, number: float, method: str, *values: Any) -> Settings:
        """Raises `ValueError`: the model cannot have it."""
        names = [(each, option) for each, own in self.options.items() for option in own]
        own = {option: value for (each, option), value in zip(names, values, strict=True) if each == method}
        return self.shared.settings(int(number), read(method, own))

    def ask(
        self, key: str, message: dict, history: list, compare_too: bool, controls: Sequence
    ) -> Iterator[dict[str, Any]]:
        """Answer a `message`, `{"text": ..., "files": [path]}`; `history` is what the chat shows."""
        session = self.sessions.get(key)
        before = list(history) if session.prompt else []  # what the page shows may be of a session that was closed
        is_lost = bool(history and not before)
        lost = " · The conversation before it was lost: the page had been disconnected." if is_lost else ""
        files = message["files"]
        try:
            wanted = self.chosen(*controls)
            try:
                upload = read_uploads(files, self.shared.takes_video)
            except ValueError:
                files = []  # the next try is without them
                raise
            shown = [*before, *({"role": "user", "content": {"path": file}} for file in files)]
            shown.append(said_by("user", message["text"]))
            yield {"box": None, "chat": shown, "status": note("The model reads the prompt…"), "costs": ""}
            text, reply = "", None
            for part in session.ask(message["text"], upload, wanted):
                if isinstance(part, Reply):
                    reply = part
                else:
                    text += part
                    yield {"chat": [*shown, said_by("assistant", text)], "status": note("Answering…")}
            assert reply is not None  # `ask` ends with it
            shown.append(said_by("assistant", reply.answer.text or "(an empty answer)"))
            yield {
                "chat": shown,
                "status": note(views.summary(reply) + lost),
                **self._pictures(session, wanted, reply),
            }
        except Exception as error:
            said = note("Stopped; the question was not kept.") if isinstance(error, Stopped) else failure(error)
            yield {"chat": before, "box": {"text": message["text"], "files": files}, "status": said}
            return
        if compare_too:
            yield from self._compare(session, wanted)

    def compare(self, key: str, controls: Sequence) -> Iterator[dict[str, Any]]:
        """The last question, dense and with these settings."""
        try:
            wanted = self.chosen(*controls)
        except ValueError as error:
            yield {"status": failure(error)}
            return
        yield {"status": note("The last question, dense and with these settings…")}
        done = {"status": note("Compared.")}
        for found in self._compare(self.sessions.get(key), wanted):
            yield found if "status" in found else found | done

    def changed(self, key: str, controls: Sequence) -> dict[str, Any]:
        """A setting was."""
        try:
            chart = self._chart(self.sessions.get(key), self.chosen(*controls))
            return chart | {"status": note("These settings hold from the next question on.")}
        except ValueError as error:
            return {"status": failure(error), "layers_text": failure(error)}  # near what was changed, too

    def start_anew(self, key: str) -> dict[str, Any]:
        """Forget the conversation."""
        self.sessions.get(key).clear()
        return {"chat": [], "box": None, "costs": "", "patches": None, "status": note("A new conversation.")}

    def _chart(self, session: Session, wanted: Settings) -> dict[str, Any]:
        picture, said = views.frozen_layers(self.shared, wanted, session.whole)
        return {"layers": picture, "layers_text": note(said)}

    def _pictures(self, session: Session, wanted: Settings, reply: Reply) -> dict[str, Any]:
        def draw(model: Any, own: Session) -> Any:
            return views.patches(model, self.shared.processor, own.upload, own.prompt, wanted.reduction)

        found: dict[str, Any] = {}
        try:
            found |= self._chart(session, wanted)
            return found | {"patches": session.draw(wanted, draw)}
        except ValueError as error:  # the answer stands
            return found | {"patches": None, "status": note(f"{views.summary(reply)} · {reason(error)}")}

    def _compare(self, session: Session, wanted: Settings) -> Iterator[dict[str, Any]]:
        answers = {"dense": "", "shortv": ""}
        try:
            for part in session.compare(wanted):
                if isinstance(part, dict):
                    yield {"costs": views.comparison(part)}
                elif part[1]:
                    answers[part[0]] += part[1]
                    yield {"costs": views.streaming(answers)}
        except Exception as error:
            said = note("The comparison was stopped.") if isinstance(error, Stopped) else failure(error)
            yield {"costs": "", "status": said}


def said_by(role: str, text: str) -> dict:
    """A message that is shown as it is: the chat takes its text for HTML, also without Markdown."""
    return {"role": role, "content": escape(text, quote=False).replace("\n", "<br>")}


def note(text: str) -> str:
    """A line that says what is going on, as HTML."""
    return f'<div class="status" role="status">{escape(text)}</div>'


def failure(error: Exception) -> str:
    """A line that says why something was not done, as HTML."""
    return f'<div class="status failed" role="alert">{escape(reason(error))}</div>'


def reason(error: Exception) -> str:
    """An error in a line."""
    return one_line(error).removeprefix("shortv: ")
