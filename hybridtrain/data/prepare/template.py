"""A tokenizer's chat template: rendering with a time limit, and its properties.

A template is untrusted code. It runs in transformers' sandbox, and each rendering may take LIMIT_S of CPU
time: a second thread raises an exception in the rendering thread, which ends any loop. Single operations that
can take for ever (powers of numbers) are refused when the template is loaded.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hybridtrain.errors import refusal

LIMIT_S = 1.0
PLAIN = (
    "{% if tools %}{{ '<|tools|>\n' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}{{ '<|tool_calls|>' + (message['tool_calls'] | tojson) }}{% endif %}"
    "{{ eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""For tokenizers without a template: a line with the role, then the content; answers end
with the end-of-text token."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LOOK_S = 0.1

Span = tuple[int, int]


class Unrendered(Exception):
    """The template failed on a conversation."""


class _OutOfTime(BaseException):
    """Raised inside a template at its time limit. A BaseException, so that no other code handles it."""


def set_template(tokenizer: Any, *, choice: str) -> None:
    """Set the template of `data.chat_template`: "own" or "plain". Raises UserError if it cannot be used."""
    if choice == "plain":
        if tokenizer.eos_token is None:
            raise refusal(
                "data.chat_template",
                choice,
                "the tokenizer has no end-of-text token to end an answer with",
                allowed="a tokenizer that has one",
                instead="another data.tokenizer",
            )
        tokenizer.chat_template = PLAIN
    Template(tokenizer, name=tokenizer.name_or_path)


class Template:
    """The chat template of a tokenizer.

    Raises UserError if there is none, or if tokenizer or template cannot be used.
    """

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        """`name`: the tokenizer's name for messages."""
        self.tokenizer, self.name = tokenizer, name
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise refusal(
                "data.tokenizer",
                name,
                "it has no chat template",
                allowed="for conversations, a tokenizer with a chat template",
                instead="the tokenizer of an instruction-tuned model, or data.chat_template=plain",
            ) from error
        self._with_tools = tokenizer.get_chat_template(tools=[{}])  # some have a second template for tools
        if _has_powers(self.source) or _has_powers(self._with_tools):
            words = "its chat template raises numbers to powers, which may take for ever"
            raise refusal(
                "data.tokenizer",
                name,
                words,
                allowed="templates without **",
                instead="another data.tokenizer, or data.chat_template=plain",
            )
        if not tokenizer.is_fast:
            raise refusal(
                "data.tokenizer",
                name,
                "it is written in Python and does not tell which characters a token is of",
                allowed="for conversations, tokenizers with a tokenizer.json",
                instead="a tokenizer folder with tokenizer.json",
            )
        self.marks = bool(_MARKED.search(self.source))
        """Whether it marks the assistant's text with {% generation %}."""
        self.special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.literal = re.compile(
            "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)"
        )
        """Matches control tokens written as text."""

    @property
    def dated(self) -> bool:
        """Whether it writes the current date."""
        return "strftime_now" in self.source

    def render(
        self, messages: list[dict[str, Any]], *, tools: Any, options: dict[str, Any], header: bool
    ) -> str:
        """The text of a conversation, with `header` followed by the header of an answer.

        Raises Unrendered.
        """
        return self._run(messages, tools=tools, add_generation_prompt=header, **options)[0][0]

    def marked(
        self, messages: list[dict[str, Any]], *, tools: Any, options: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the spans that the template marks. Raises Unrendered."""
        (text,), (spans,) = self._run(messages, tools=tools, return_assistant_tokens_mask=True, **options)
        return text, spans

    def end(self, text: str) -> int:
        """End of an answer at the end of `text`: after its last control token, without the
        line break that follows.
        """
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self.special) else len(text)

    def _run(self, messages: list[dict[str, Any]], *, tools: Any, **options: Any) -> Any:
        """Result of transformers' renderer.

        `apply_chat_template` would remove content that is None, which some templates use.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self._with_tools if tools else self.source
        try:
            with _limited(LIMIT_S):
                return render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=source,
                    **{**self.tokenizer.special_tokens_map, **options},
                )
        except _OutOfTime:
            raise Unrendered(
                f"the chat template of {self.name} took more than {LIMIT_S:g} s {_words(messages)}"
            ) from None
        except Exception as error:  # a template can raise anything
            raise Unrendered(
                f"the chat template of {self.name} fails {_words(messages)}: {type(error).__name__}: {error}"
            ) from error


def end_of_turn(tokenizer: Any) -> int | None:
    """Id of the control token that ends an answer in the tokenizer's chat template; None if an
    answer ends with text.

    Also None if the template fails on a simple conversation. Raises UserError for a tokenizer
    without a chat template.
    """
    template = Template(tokenizer, name=tokenizer.name_or_path)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        if template.marks:
            text, spans = template.marked(talk, tools=None, options={})
            answer = text[: spans[-1][1]] if spans else ""
        else:
            text = template.render(talk, tools=None, options={}, header=False)
            answer = text[: template.end(text)]
    except Unrendered:
        return None
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids[-1] if ids and str(tokenizer.convert_ids_to_tokens(ids[-1])) in template.special else None


def facts(tokenizer: Any) -> dict[str, Any]:
    """Properties of a template for corpus.json: {end_of_turn_id, end_of_turn, eos, dated}; tokens
    are text or None.
    """
    end = end_of_turn(tokenizer)
    token = None if end is None else str(tokenizer.convert_ids_to_tokens(end))
    return {
        "end_of_turn_id": end,
        "end_of_turn": token,
        "eos": tokenizer.eos_token,
        "dated": Template(tokenizer, name=tokenizer.name_or_path).dated,
    }


def _words(messages: list[dict[str, Any]]) -> str:
    roles = ", ".join(str(message.get("role")) for message in messages[:6])
    return f"on a conversation of {roles}{', ...' if len(messages) > 6 else ''}"


def _has_powers(source: str) -> bool:
    import jinja2

    try:
        return any(kind == "operator" and text == "**" for _, kind, text in jinja2.Environment().lex(source))
    except jinja2.TemplateError:
        return False  # rendering it reports the error


# -- the limit -----------------------------------------------------------------------------------------------


class _Watch:
    """A thread that stops renderings at their time limit."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends: dict[int, float] = {}
        """Thread id -> CPU time of the thread at which it is stopped."""
        self.thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        with self.lock:
            self.ends[threading.get_ident()] = _clock(threading.get_ident()) + seconds
            if self.thread is None or not self.thread.is_alive():  # it does not survive a fork
                self.thread = threading.Thread(target=self._look, name="template limit", daemon=True)
                self.thread.start()

    def end(self) -> None:
        """Remove the limit of this thread, and an exception that is set but not raised yet."""
        with self.lock:
            self.ends.pop(threading.get_ident(), None)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            with self.lock:
                for thread in [thread for thread, end in self.ends.items() if _clock(thread) > end]:
                    del self.ends[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(_OutOfTime)
                    )


_watch = _Watch()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _OutOfTime in the block after `seconds` of CPU time of this thread."""
    _watch.begin(seconds)
    try:
        yield
    finally:
        try:
            _watch.end()
        except _OutOfTime:
            _watch.end()


def _clock(thread: int) -> float:
    """CPU time of a thread in seconds, which unlike wall time is independent of load; wall time if
    the system has none.
    """
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.monotonic()
