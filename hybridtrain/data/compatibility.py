"""Whether data, model and options go together: what is refused, and what the data decides of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from hybridtrain.config.schema import Config
from hybridtrain.data.blend import Blend
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.prepare.sources import ANSWERS, LABELLED, LABELLED_WORDS
from hybridtrain.data.special import special_tokens
from hybridtrain.data.user_rows import UserRows
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import log
from hybridtrain.types import ModelFacts

_log = log.get("data")


C = TypeVar("C", bound=Config)
CLASSIFIED = {
    "classification": LABELLED,
    "token_classification": LABELLED_WORDS,
    "question_answering": ANSWERS,
}
"""Tasks with classes -> data.format of their data."""


def check_vocab(blend: Blend, *, vocab: int) -> None:
    """Refuse corpora with token ids that the model does not have.

    Token files from elsewhere are checked when they are read.
    """
    for corpus in blend.corpora:
        if corpus.largest_id is not None and corpus.largest_id >= vocab:
            assert corpus.vocab_size is not None
            raise refusal(
                "model.config.vocab_size",
                vocab,
                f"{corpus.path} holds token id {corpus.largest_id}",
                allowed=f"{corpus.largest_id + 1} or more (its tokenizer has {corpus.vocab_size})",
                instead=(
                    f"model.config.vocab_size={max(corpus.vocab_size, corpus.largest_id + 1)}, "
                    "or text prepared with the model's own tokenizer"
                ),
            )


def adapt_model(config: C, blend: Blend, *, facts: ModelFacts) -> C:
    """`config` with the vocabulary size of the data for a new model, unless it is set."""
    return _with_vocabulary(config, blend, vocab=facts.vocab)


def own_rows(blend: Blend, *, facts: ModelFacts) -> Blend:
    """The data with one text in a row, for an encoder that classifies."""
    return blend.in_own_rows() if facts.encoder and facts.labels else blend


def adapt_task(config: C, blend: Blend, *, encoder: bool) -> C:
    """`config` with the special tokens of the data's tokenizer, for tasks of encoders without others.
    `encoder`: whether the model is one.

    Raises UserError for data without these tokens, and for masked ones data that are no text.
    """
    if config.task.kind in CLASSIFIED and encoder:
        needed = ("cls", "sep", "pad") if config.task.kind == "classification" else ("pad",)
        return _with_tokens(config, blend, needed=needed)
    if config.task.kind != "masked_lm":
        return config
    if packed := next((corpus for corpus in blend.corpora if corpus.packed), None):
        problem = "it holds conversations or texts with labels"
        instead = "hybridtrain prepare of text, or another task"
        raise refusal("data.path", packed.path, problem, allowed="a corpus of text", instead=instead)
    corpora = [corpus for corpus in blend.corpora if isinstance(corpus, Corpus)]
    if config.task.next_sentence and not (corpora and all(corpus.paired for corpus in corpora)):
        problem, allowed = "rows of a program are no pairs", "a corpus prepared with data.sentences=true"
        raise refusal(
            "task.next_sentence", True, problem, allowed=allowed, instead="task.next_sentence=false"
        )
    return _with_tokens(
        config, blend, needed=("mask", "cls", "sep", "pad") if config.task.next_sentence else ("mask",)
    )


def _with_tokens(config: C, blend: Blend, *, needed: tuple[str, ...]) -> C:
    tokens = dict(config.task.tokens)
    corpora = [corpus for corpus in blend.corpora if isinstance(corpus, Corpus)]
    if not tokens and corpora:
        tokens = special_tokens(corpora[0].tokenizer_dir)
    if config.task.kind in CLASSIFIED and not corpora:  # a program's rows
        return config
    if missing := [name for name in needed if name not in tokens]:
        problem = f"the tokenizer of {blend.name} has no {missing[0]} token"
        raise refusal(
            "task.tokens",
            tokens or "{}",
            problem,
            allowed=f"ids by name, with {', '.join(needed)} among them",
            instead="data of the model's own tokenizer, or task.tokens={mask: ID, cls: ID, sep: ID}",
        )
    return dataclasses.replace(config, task=dataclasses.replace(config.task, tokens=tokens))


def check_masks(config: Config, *, facts: ModelFacts) -> None:
    """Refuse special tokens that the model does not have (raises UserError); tell of an untrained head."""
    vocab = facts.vocab
    if config.task.kind == "masked_lm" and facts.pairs and not config.task.next_sentence:
        _log.warning("the model's head for pairs is not trained: task.next_sentence=false")
    for name, number in config.task.tokens.items():
        if not 0 <= number < vocab:
            problem, allowed = f"the model has {vocab} tokens", f"0 to {vocab - 1}"
            instead = "the model's own tokenizer, or a larger model.config.vocab_size"
            raise refusal(f"task.tokens.{name}", number, problem, allowed=allowed, instead=instead)


def with_classes(config: C, blend: Blend, *, known: Sequence[str]) -> C:
    """`config` with the labels of the data, for a classifier without names of its own (`known`).

    Raises UserError if the data have other or no labels.
    """
    if config.task.kind not in CLASSIFIED:
        return config
    wanted = CLASSIFIED[config.task.kind]
    for corpus in blend.corpora:
        if isinstance(corpus, Corpus) and corpus.kind != wanted:
            of = {LABELLED: "whole texts", LABELLED_WORDS: "words", ANSWERS: "answers in contexts"}[wanted]
            problem = f"its labels are not of {of}" if corpus.labels else "its documents have no labels"
            others = [kind for kind, form in CLASSIFIED.items() if form == corpus.kind] or ["causal_lm"]
            raise refusal(
                "data.path",
                corpus.path,
                problem,
                allowed=f"a corpus of data.format={wanted}",
                instead=f"hybridtrain prepare data.format={wanted}"
                + (" data.labels=[...]" if wanted != ANSWERS else "")
                + f", or task={others[0]}",
            )
    labelled = [(corpus.path, corpus.labels) for corpus in blend.corpora if isinstance(corpus, Corpus)]
    expected = config.model.labels or list(known) or (labelled[0][1] if labelled else [])
    for path, labels in labelled:
        if list(labels) != list(expected):
            problem, allowed = (
                f"{path} has the labels {', '.join(labels)}",
                "the labels of the data, in its order",
            )
            raise refusal(
                "model.labels",
                f"[{','.join(expected)}]",
                problem,
                allowed=allowed,
                instead=f"model.labels=[{','.join(labels)}]",
            )
    if known or not expected:
        return config
    _log.info("labels    %s", ", ".join(expected))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, labels=list(expected)))


def _with_vocabulary(config: C, blend: Blend, *, vocab: int) -> C:
    """`config` with a vocabulary that has every token of the corpus, for new weights without a
    requested size; else `config`.

    A vocabulary is enlarged only if training would be refused otherwise, so that existing
    runs keep their size.
    """
    needed = max(
        (corpus.largest_id + 1 for corpus in blend.corpora if corpus.largest_id is not None), default=0
    )
    if config.model.from_pretrained or needed <= vocab or type(config.model.config.get("vocab_size")) is int:
        return config
    size = max(needed, *(corpus.vocab_size or 0 for corpus in blend.corpora))
    _log.info("vocabulary %d -> %d: that of the corpus", vocab, size)
    model = dataclasses.replace(config.model, config={**config.model.config, "vocab_size": size})
    return dataclasses.replace(config, model=model)


def check_train_rows(blend: Blend, *, seq_len: int) -> None:
    """Refuse a corpus without a row to train on (raises UserError)."""
    for corpus in blend.corpora:
        if corpus.count("train", seq_len=seq_len) < 1:
            raise refusal(
                "data.seq_len",
                seq_len,
                f"{corpus.path} holds no whole row of training tokens",
                allowed="shorter rows",
                instead="a smaller data.seq_len, or more text",
            )
        if not corpus.has_targets("train", seq_len=seq_len):
            raise _no_targets(
                corpus.path, field="data.path" if len(blend.corpora) == 1 else "data.blend", value=corpus.path
            )


def check_labels(blend: Blend, config: Config) -> None:
    """Refuse to predict tokens on a user's rows that have a class number: only that would be learned."""
    for corpus in blend.corpora:
        tokens = config.task.kind in ("causal_lm", "masked_lm")
        if tokens and isinstance(corpus, UserRows) and corpus.labelled:
            problem = f"rows of {corpus.path} have a class number as `label`"
            allowed, instead = "classification, or rows without it", "task=classification model.labels=[...]"
            raise refusal("task.kind", config.task.kind, problem, allowed=allowed, instead=instead)


def check_cuts(blend: Blend, config: Config) -> None:
    """Refuse sequence-length warm-up of rows that are not running text: their pieces would lack
    what comes before them."""
    whole = config.task.kind in CLASSIFIED or config.task.next_sentence
    start, words = config.batch.seq_len_start, [f"task={config.task.kind}"] if whole else []
    words += [
        f"{corpus.path} holds conversations or texts with labels" for corpus in blend.corpora if corpus.packed
    ]
    if start and words:
        problem = f"{words[0]}: a piece of a row lacks what comes before it"
        raise refusal(
            "batch.seq_len_start",
            start,
            problem,
            allowed="0, or a corpus of text",
            instead="batch.seq_len_start=0 batch.seq_len_steps=0",
        )


def check_documents(blend: Blend, *, facts: ModelFacts) -> None:
    """Refuse documents that do not attend to each other where the model cannot keep them apart: those of a
    row, and the padding of pairs.
    """
    if facts.refused.get("documents") and any(getattr(corpus, "paired", False) for corpus in blend.corpora):
        problem = f"a {facts.model_type} model does not keep padding apart: {facts.refused['documents']}"
        instead = "task.next_sentence=false"
        raise refusal("task.next_sentence", True, problem, allowed="false with this model", instead=instead)
    why = facts.refused.get("documents")
    if why and blend.documents:
        problem = f"a {facts.model_type} model does not keep the documents of a row apart: {why}"
        raise refusal(
            "data.document_mask",
            True,
            problem,
            allowed="false, and a corpus of text",
            instead="data.document_mask=false",
        )


def check_eval_rows(blend: Blend, *, seq_len: int, field: str, value: object) -> None:
    """Refuse an evaluation without held-out rows (raises UserError).

    `field`, `value`: the option that requests it.
    """
    if blend.count("eval", seq_len=seq_len) < 1:
        raise refusal(
            field,
            value,
            f"{blend.name} holds no held-out row of {seq_len} tokens",
            allowed="a corpus with held-out documents",
            instead=(
                "train.eval_every=0, a larger data.eval_fraction in prepare, "
                "or data.eval_path=PREFIX of held-out token files"
            ),
        )
    if not any(
        corpus.has_targets("eval", seq_len=seq_len)
        for corpus, _ in blend.parts("eval")
        if corpus.count("eval", seq_len=seq_len)
    ):
        raise _no_targets(f"the held-out part of {blend.name}", field=field, value=value)


def _no_targets(where: object, *, field: str, value: object) -> UserError:
    problem = f"no token of {where} carries loss: every answer is cut off"
    return refusal(
        field,
        value,
        problem,
        allowed="conversations with answers within a row",
        instead="prepare again with a larger data.seq_len",
    )
