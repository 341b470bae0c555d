"""Conversations: which tokens carry loss, and how whole conversations fill rows."""

import itertools
import re
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridtrain.data import chat, fit
from hybridtrain.data.indexed import IndexedReader, IndexedWriter
from hybridtrain.types import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
LAST_DIFFERS = (
    "{% for m in messages %}{{ m['role'] + ': ' + ('(thinking) ' if loop.last and m['role'] == 'assistant' else '') + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Où?"},
    {"role": "assistant", "content": "  Là-bas  ☺"},
    {"role": "user", "content": "And\nthen?"},
    {"role": "assistant", "content": "Home.\n\n"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, spaces in pairs joined, and three special tokens."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate([*bytes_, "ĠĠ"])}, merges=[("Ġ", "Ġ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return fast


def learnt(tokenizer, conversation, template) -> list[str]:
    """The text of each run of tokens that carry loss, after checking that the ids are those of the rendered conversation."""
    tokenizer.chat_template = template
    ((ids, mask),) = chat.encode([conversation], tokenizer=tokenizer)
    assert (ids.dtype, mask.dtype, ids.shape) == (np.int32, np.uint8, mask.shape)
    assert ids.tolist() == tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False), add_special_tokens=False)["input_ids"]
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges]


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (chat.PLAIN, "<|endoftext|>"), (BARE, "\n")],
    ids=["chatml", "marked", "plain", "bare"],
)
def test_only_what_the_assistant_says_carries_loss(tokenizer, template, end):
    assert learnt(tokenizer, TALK, template) == [f"  Là-bas  ☺{end}", f"Home.\n\n{end}"]


def test_many_conversations_are_encoded_as_one_by_one(tokenizer):
    tokenizer.chat_template = CHATML
    talks = [TALK, TALK[1:3], [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]]
    for (ids, mask), talk in zip(chat.encode(talks, tokenizer=tokenizer), talks, strict=True):
        ((alone, alone_mask),) = chat.encode([talk], tokenizer=tokenizer)
        assert np.array_equal(ids, alone)
        assert np.array_equal(mask, alone_mask)
    assert chat.encode([], tokenizer=tokenizer) == []


def test_a_template_that_rewrites_earlier_answers_is_refused(tokenizer):
    assert learnt(tokenizer, TALK[:3], LAST_DIFFERS) == ["(thinking)   Là-bas  ☺\n"]
    with pytest.raises(UserError, match=r"data\.tokenizer=.*renders message 2 \(assistant\) otherwise when more messages follow"):
        chat.encode([TALK], tokenizer=tokenizer)


def test_a_tokenizer_without_template_is_refused_and_may_get_a_plain_one(tokenizer):
    with pytest.raises(UserError, match=r"no chat template[\s\S]*data\.chat_template=plain"):
        chat.encode([TALK], tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"no chat template"):
        chat.set_template(tokenizer, choice="own")
    chat.set_template(tokenizer, choice="plain")
    ((ids, mask),) = chat.encode([TALK[1:3]], tokenizer=tokenizer)
    assert tokenizer.decode(ids) == "<|user|>\nOù?\n<|assistant|>\n  Là-bas  ☺<|endoftext|>\n"
    assert tokenizer.decode(ids[mask == 1]) == "  Là-bas  ☺<|endoftext|>"


def test_a_template_that_fails_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="fails on a conversation of system, user, assistant, user, assistant: TemplateError: roles must alternate"):
        chat.encode([TALK], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("hello", "no list of messages"),
        ([], "no list of messages"),
        ([{"content": "x"}], "message 0 is no object with a role"),
        ([{"role": "user"}, {"role": "assistant", "content": "x"}], r"message 0 \(user\) has no content"),
        (TALK[:2], "no assistant message"),
        (TALK[2:], "begins with the assistant's answer"),
        (TALK, None),
    ],
)
def test_records_that_are_no_conversations(record, words):
    found = chat.problem(record)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(words, found)


def filled(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Tokens in each row of a packing, after checking that no row overflows and no row is missing."""
    row_of = fit.pack(sizes, capacity=capacity)
    full = np.bincount(row_of, weights=sizes).astype(int)
    assert full.max() <= capacity
    assert full.min() > 0
    return full


def best_fit(sizes: np.ndarray, capacity: int) -> int:
    """Rows that best fit, the longest first, needs; one item at a time."""
    left: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fits = [(room, row) for row, room in enumerate(left) if room >= size]
        if fits:
            left[min(fits)[1]] -= size
        else:
            left.append(capacity - size)
    return len(left)


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_as_few_as_best_fit_makes(seed):
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(5, 200))
    sizes = generator.integers(1, capacity + 1, size=400) if seed % 2 else np.minimum(capacity, 1 + generator.geometric(5 / capacity, size=400))
    assert len(filled(sizes, capacity)) == best_fit(sizes, capacity)


def test_a_million_conversations_fill_their_rows_in_seconds():
    sizes = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, size=1_000_000), 4, 4097).astype(np.int32)
    start = time.perf_counter()
    full = filled(sizes, 4097)
    assert time.perf_counter() - start < 30  # measured 1 s
    assert full.sum() / (len(full) * 4097) > 0.999


def test_the_row_index(tmp_path: Path):
    sizes = [5, 9, 3, 20, 4, 1, 8]
    with IndexedWriter(tmp_path / "train", dtype=np.dtype("<u2")) as writer:
        for size in sizes:
            writer.add(np.arange(size))
    made = fit.build(tmp_path, split="train", seq_len=9)
    assert (made.conversations, made.cut) == (7, 1)
    ids, starts = (np.load(path, mmap_mode="r") for path in fit.row_files(tmp_path, split="train"))
    assert sorted(ids.tolist()) == list(range(7))
    rows = [ids[start:stop].tolist() for start, stop in itertools.pairwise(starts)]
    assert len(rows) == made.rows
    lengths = [sum(min(10, sizes[conversation]) for conversation in row) for row in rows]
    assert max(lengths) <= 10
    assert made.fill == sum(lengths) / (10 * len(rows))
    before = [path.read_bytes() for path in fit.row_files(tmp_path, split="train")]
    assert IndexedReader(tmp_path / "train").documents == 7
    fit.build(tmp_path, split="train", seq_len=9)
    assert [path.read_bytes() for path in fit.row_files(tmp_path, split="train")] == before
