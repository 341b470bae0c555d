"""Questions with the answer in a context: token ids of both, and where the answer is
(tasks/question_answering.py).

{"question": "Who sleeps?", "context": "Ada sleeps.", "answer": "Ada", "answer_start": 0}

    token ids   [CLS]   who   sleeps   [SEP]   A   ##da   sleeps   [SEP]   -    one more than both have
    marks         0      0      0        0     0    3       5        1     1

A mark is of the token before: 1 in the second segment, + 2 for the answer's first token, + 4 for its last.

A context that does not fit into a row becomes several samples, windows of it that overlap by half. In those
without the whole answer, it is at the first token ([CLS]), as in SQuAD's baselines (arXiv 1810.04805).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hybridtrain.data.prepare.chat import Encoded, Sample
from hybridtrain.data.prepare.labelled import LabelRecipe
from hybridtrain.errors import refusal
from hybridtrain.types import ANSWER_FIRST, ANSWER_LAST, SECOND_SEGMENT

FIELDS = ("question", "context", "answer", "answer_start")
WINDOWS = "contexts longer than a row, divided into windows that overlap by half"
NO_ROOM = "questions that leave a row less room than for 8 tokens of a context, left out"
NO_TOKEN = "records whose answer is whole in no row, left out"
_LEAST = 8


class Answered(NamedTuple):
    """A question, its context, and the characters of the answer in that."""

    question: str
    context: str
    start: int
    stop: int

    @property
    def text(self) -> str:
        """To train a tokenizer on."""
        return f"{self.question} {self.context}"


def document(record: Mapping[str, Any]) -> tuple[Answered | None, bytes, str]:
    """(document, its identity, problem) from a record."""
    if missing := next((name for name in FIELDS if record.get(name) in (None, ...)), None):
        return None, b"", f"its field {missing!r} is missing or null"
    texts = [record[name] for name in FIELDS[:3]]
    for name, text in zip(FIELDS, texts, strict=False):
        if not isinstance(text, str) or not text.strip():
            return None, b"", f"its field {name!r} holds no text but {repr(text)[:60]}"
    question, context, answer = (
        text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts
    )
    start = record["answer_start"]
    if isinstance(start, bool) or not isinstance(start, int):
        return None, b"", f"its field 'answer_start' holds no number but {repr(start)[:60]}"
    stop = start + len(answer)
    if start < 0 or context[start:stop] != answer:
        there = repr(context[start:stop])[:60] if 0 <= start < len(context) else "no text"
        problem = (
            f"its answer {repr(answer)[:60]} is not at character {start} of the context, where is {there}"
        )
        return None, b"", problem
    start, stop = start + len(answer) - len(answer.lstrip()), start + len(answer.rstrip())
    return Answered(question, context, start, stop), f"{question}\0{context}\0{start}\0{stop}".encode(), ""


def encode(documents: list[Answered], *, tokenizer: Any, recipe: LabelRecipe) -> list[Encoded]:
    """A sample for each document, or several for a context that does not fit."""
    whole = _tokens(tokenizer, documents)
    return [
        _kept([_sample(document, whole, number)], notes=[])
        if len(whole["input_ids"][number]) <= recipe.seq_len
        else _windows(document, whole, number, tokenizer=tokenizer, seq_len=recipe.seq_len)
        for number, document in enumerate(documents)
    ]


def check(tokenizer: Any) -> None:
    """Refuse a tokenizer whose texts do not begin with a special token (raises UserError)."""
    if not tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][0]:
        raise refusal(
            "data.tokenizer",
            "of the corpus",
            "its texts do not begin with a special token, which is the answer of windows without one",
            allowed="the tokenizer of an encoder",
            instead="data.tokenizer=FOLDER of one, or data.encoder_tokens=true",
        )


def _tokens(tokenizer: Any, documents: list[Answered], **more: Any) -> Any:
    questions, contexts = ([each[place] for each in documents] for place in (0, 1))
    return tokenizer(questions, contexts, return_offsets_mapping=True, return_token_type_ids=True, **more)


def _windows(document: Answered, whole: Any, number: int, *, tokenizer: Any, seq_len: int) -> Encoded:
    inside = whole.sequence_ids(number).count(1)
    room = seq_len - (len(whole["input_ids"][number]) - inside)
    if room < _LEAST:
        return Encoded([], [NO_ROOM], "", "")
    parts = _tokens(
        tokenizer,
        [document],
        truncation="only_second",
        max_length=seq_len,
        stride=room // 2,
        return_overflowing_tokens=True,
    )
    samples = [_sample(document, parts, place) for place in range(len(parts["input_ids"]))]
    return _kept(samples, notes=[WINDOWS])


def _kept(samples: list[Sample], *, notes: list[str]) -> Encoded:
    """Of a document; without samples if none has the answer."""
    found = any(marks is not None and not marks[1] & ANSWER_FIRST for _, marks in samples)
    return Encoded(samples, notes, "", "") if found else Encoded([], [NO_TOKEN], "", "")


def _sample(document: Answered, tokens: Any, number: int) -> Sample:
    """Token ids and marks of a row."""
    ids, offsets = tokens["input_ids"][number], tokens["offset_mapping"][number]
    marks = np.zeros(len(ids) + 1, dtype=np.uint8)
    marks[1:] = SECOND_SEGMENT * (np.array(tokens["token_type_ids"][number]) > 0)
    starts, stops = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.array([each == 1 for each in tokens.sequence_ids(number)]) & (stops > starts)
    answer = np.flatnonzero(inside & (starts < document.stop) & (stops > document.start))
    within = len(answer) and starts[inside].min() <= document.start and document.stop <= stops[inside].max()
    first, last = (answer[0], answer[-1]) if within else (0, 0)
    marks[1 + first] |= ANSWER_FIRST
    marks[1 + last] |= ANSWER_LAST
    return np.array([*ids, *ids[-1:]], dtype=np.int32), marks
