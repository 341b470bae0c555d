"""Claims about a model, proven on a reduced copy of it in one process:

    causal      a token does not change what comes before it
    stages      stages of consecutive layers, one after the other, give loss and gradients of the whole model
    documents   documents packed into a row give the loss and gradients of each document alone

The stages are those that train (models/stage.py); the reference is Hugging Face's own model, called plainly.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridtrain.analysis import parameters
from hybridtrain.analysis.classified import cross_entropy, of_texts, with_classes
from hybridtrain.config.schema import AdaptersConfig, TaskConfig
from hybridtrain.errors import UserError
from hybridtrain.models import build, classifier, encoder, heads, tracing
from hybridtrain.models.dropout import Dropouts
from hybridtrain.models.init import reset_buffers
from hybridtrain.models.keyed import keyed
from hybridtrain.models.reduced import VOCABULARY, reduced
from hybridtrain.models.stage import Stage
from hybridtrain.models.structure import OTHER, cannot_train, structure_of
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.tasks.classification import TextClassification
from hybridtrain.tasks.head import Head
from hybridtrain.tasks.next_sentence import NextSentence
from hybridtrain.tasks.question_answering import QuestionAnswering
from hybridtrain.tasks.task import Task
from hybridtrain.types import IGNORE_INDEX, AnswerBatch, Batch, PairBatch, TextBatch, TokenBatch

ROWS, LENGTH = 2, 12
_KEYS_B = torch.tensor([1, 2])
DOCUMENTS = ((5, 4, 3), (2, 10))
"""Lengths of the documents in each packed row."""
_CAUSAL: tuple[dict[str, Any], ...] = (
    {"is_decoder": True},
    {"is_decoder": True, "attention_type": "original_full"},
    {"causal": True},
)
"""Fields of encoders that may make them causal."""
TOLERANCE = 1e-5
"""Largest relative difference of the loss, and of a gradient by its norm."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The largest differences that were found."""

    loss: float
    gradient: float
    where: str
    """The parameter with the largest difference."""

    def __str__(self) -> str:
        return f"loss differs by {self.loss:.1e}, the gradient of {self.where} by {self.gradient:.1e}"

    @property
    def passed(self) -> bool:
        return self.loss <= TOLERANCE and self.gradient <= TOLERANCE


@dataclasses.dataclass(frozen=True)
class Copy:
    """A reduced copy: its transformers config, and Hugging Face's own model of it."""

    config: Any
    model: Any
    dropouts: Dropouts


def copy_of(config: Any, *, tp: int) -> Copy:
    """The reduced copy of a transformers config, its weights perturbed so that norms, biases and parts that
    start at zero count. `tp`: see reduced.
    """
    return perturbed(reduced(config, random=True, tp=tp), config)


def perturbed(small: Any, config: Any) -> Copy:
    """A copy of a transformers config with the sizes of `small`."""
    small._attn_implementation = config._attn_implementation
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build.plain_model(small)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return Copy(small, model, keyed(model, small, adapters=AdaptersConfig()))


def is_causal(copy: Copy) -> bool:
    """Whether tokens do not change the logits of those before them."""
    ids = tokens(length=LENGTH)
    other = ids.clone()
    other[:, LENGTH - 2 :] = (other[:, LENGTH - 2 :] + 7) % VOCABULARY
    with torch.no_grad():
        first, second = (_before_head(copy, each)[:, : LENGTH - 2] for each in (ids, other))
    return torch.allclose(first, second, rtol=1e-5, atol=1e-5)


def stages(copy: Copy, *, cuts: Sequence[int]) -> Result:
    """Stages that begin at the layers `cuts` against the whole model."""
    return _of_stages(copy)(cuts)


def comparison(copy: Copy) -> Callable[[Sequence[int]], bool]:
    """What tells whether stages that begin at given layers hold, with one plain pass for all."""
    claim = _of_stages(copy)
    return lambda cuts: not _why_not(lambda: claim(cuts))


def _of_stages(copy: Copy) -> Callable[[Sequence[int]], Result]:
    ids = tokens(length=LENGTH)
    batch = batch_for(copy, ids)
    reference = plain(copy, [(batch, 0)])
    return lambda cuts: _difference(reference, _chained(copy, batch, cuts=cuts))


def documents(copy: Copy) -> Result:
    """Documents in packed rows against each of them alone."""
    ids = tokens(length=LENGTH)
    batch = batch_of(ids, DOCUMENTS, packed=True)
    if classifier.is_classifier(copy.config.architectures):
        batch = with_classes(copy.config, batch)
    alone = []
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            tensors = {
                name: getattr(batch, name)[:, part]
                for name in ("input_ids_BT", "labels_BT", "position_ids_BT")
            }
            alone.append((dataclasses.replace(batch, **tensors).rows(row, row + 1), start))
            start += length
    return _difference(plain(copy, alone), _chained(copy, batch, cuts=()))


def batch_of(ids: Tensor, lengths: Sequence[Sequence[int]], *, packed: bool) -> Batch:
    """Next-token prediction within documents of these lengths."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), IGNORE_INDEX)], dim=1)
    ends = torch.cat([positions[:, 1:] == 0, torch.ones(len(ids), 1, dtype=torch.bool)], dim=1)
    labels = labels.masked_fill(ends, IGNORE_INDEX)
    return Batch(ids, labels, positions, packed=packed, keys_B=_KEYS_B)


def batch_for(copy: Copy, ids: Tensor) -> Batch:
    """A batch of which the whole rows are documents; pairs, for a model that has a head for them; texts and
    padding, for an encoder that classifies.
    """
    batch = batch_of(ids, [[ids.shape[1]]] * ROWS, packed=False)
    if classifier.is_classifier(copy.config.architectures):
        return with_classes(copy.config, batch)
    if encoder.predicts(copy.config) != encoder.PRETRAINING:
        return batch
    values = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    return PairBatch(*values, segment_ids_BT=ids % 2, unrelated_B=torch.arange(ROWS) % 2)


def task_of(batch: Batch) -> Task:
    """The task whose losses are compared."""
    if isinstance(batch, AnswerBatch):
        return QuestionAnswering(tokens={})
    if isinstance(batch, TextBatch) and not isinstance(batch, TokenBatch):
        return TextClassification(labels=VOCABULARY, tokens={})
    settings = TaskConfig(tokens={"mask": 0, "cls": 0, "sep": 0, "pad": 0})
    return NextSentence(settings, vocab=VOCABULARY) if isinstance(batch, PairBatch) else CausalLM()


def loss_of(sums: Tensor, batch: Batch) -> Tensor:
    """The loss, 0-d, from the task's sums."""
    return (sums * sums.new_tensor(list(task_of(batch).weights.values()))).sum()


def tokens(*, length: int) -> Tensor:
    """ROWS rows of random tokens."""
    return torch.randint(3, VOCABULARY - 1, (ROWS, length), generator=torch.Generator().manual_seed(1))


def logits(copy: Copy, ids: Tensor) -> Tensor:
    """Of `tokens`, by transformers' own model in training; of a classifier what its head returns."""
    return _logits(copy, ids, keys_B=_KEYS_B, start=0)


def _logits(copy: Copy, ids: Tensor, *, keys_B: Tensor, start: int) -> Tensor:
    with copy.dropouts.of(keys_B, start=start, length=ids.shape[1]):
        if classifier.is_classifier(copy.config.architectures):
            return heads.results_of(copy.model, {"input_ids": ids})
        return build.logits_of(copy.model(input_ids=ids))


def _before_head(copy: Copy, ids: Tensor) -> Tensor:
    """What the last layer of a classifier returns, (B, T, D); logits of tokens of another model."""
    if not classifier.is_classifier(copy.config.architectures):
        return logits(copy, ids)
    found: list[Any] = []
    listed: Any = copy.model.get_submodule(structure_of(copy.config).layers)
    with tracing.hooked(listed[-1].register_forward_hook(lambda *given: found.append(given[-1]))):
        logits(copy, ids)
    return found[0] if isinstance(found[0], Tensor) else found[0][0]


Found = tuple[float, Mapping[str, Tensor]]
"""(loss, parameter -> gradient)."""


def plain(copy: Copy, parts: Sequence[tuple[Batch, int]]) -> Found:
    """Of Hugging Face's own model. `parts`: of rows, and the place of their first position."""
    model, total = copy.model, 0.0
    model.zero_grad()
    for batch, start in parts:
        assert batch.keys_B is not None
        targets, keys_B = batch.labels_BT, batch.keys_B
        if isinstance(batch, PairBatch):
            with copy.dropouts.of(keys_B, start=start, length=targets.shape[1]):
                logits, of_pairs = build.pair_logits(model, batch)
            loss = cross_entropy(logits, targets) + cross_entropy(of_pairs, batch.unrelated_B)
        elif isinstance(batch, TextBatch):
            with copy.dropouts.of(keys_B, start=start, length=targets.shape[1]):
                logits = heads.text_logits(model, batch)
            loss = of_texts(logits, batch)
        else:
            loss = cross_entropy(_logits(copy, batch.input_ids_BT, keys_B=keys_B, start=start), targets)
        if loss.requires_grad and bool((targets != IGNORE_INDEX).any()):
            loss.backward()
            total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _chained(copy: Copy, batch: Batch, *, cuts: Sequence[int]) -> Found:
    count = copy.config.get_text_config(decoder=True).num_hidden_layers
    bounds = [0, *cuts, count]
    weights = dict(copy.model.named_parameters())
    x: Tensor = batch.input_ids_BT
    made = []
    for first, last in itertools.pairwise(bounds):
        stage = Stage(
            copy.config,
            layers=range(first, last),
            first=first == 0,
            last=last == count,
            head=partial(Head, task=task_of(batch), loss_chunk=0),
        )
        stage.to_empty(device="cpu")
        stage.tie()
        reset_buffers(stage, device=torch.device("cpu"))
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                parameter.copy_(weights[stage.owner(name)])
        made.append(stage)
        x = stage(x, batch=batch)
        if last != count and x.shape != stage.hidden_shape(rows=ROWS, positions=LENGTH):
            raise ValueError(f"hidden states between its layers have the shape {tuple(x.shape)}")
    loss = loss_of(x, batch)
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for stage in made:
        for name, parameter in stage.named_parameters():
            if parameter.grad is not None:
                owner = stage.owner(name)
                gradients[owner] = gradients.get(owner, 0) + parameter.grad
    return loss.item(), gradients


def _difference(expected: Found, actual: Found) -> Result:
    loss = abs(expected[0] - actual[0]) / max(abs(expected[0]), 1e-9)
    total = torch.stack([g.norm() for g in expected[1].values()]).norm().item()
    worst, where = 0.0, ""
    for name in {**expected[1], **actual[1]}:
        one, other = expected[1].get(name), actual[1].get(name)
        if one is None or other is None:
            size = (one if one is not None else other).norm().item()  # type: ignore[union-attr]
            difference = size / total
        else:
            difference = ((one - other).norm() / max(one.norm().item(), 1e-3 * total)).item()
        if not difference <= worst:
            worst, where = difference, name
    return Result(loss, worst, where)


def refused(config: Any) -> dict[str, str]:
    """What cannot be done with the model of a transformers config: capability -> why.

    Raises UserError for one that cannot be trained at all.
    """
    copy = copied(config)
    if problem := parameters.problem_of(config, copy.model, structure=structure_of(copy.config)):
        raise cannot_train(config.model_type, problem, instead=OTHER)
    causal = is_causal(copy)
    encodes = encoder.predicts(config) or heads.is_encoder(config)
    if encodes and causal:
        problem = "its tokens do not see those that follow, so it is no encoder"
        raise cannot_train(config.model_type, problem, instead=OTHER)
    if not (causal or encodes):
        problem = "its tokens see those that follow, so it is no causal language model"
        raise cannot_train(config.model_type, problem, instead=_causal_with(config) or OTHER)
    if _ties_in_name_only(copy):
        problem = "its config ties the head to the embedding, but transformers' model does not"
        raise cannot_train(config.model_type, problem, instead="model.config.tie_word_embeddings=false")
    if not (whole := stages(copy, cuts=())).passed:
        problem = f"a reduced copy does not train as transformers' own model does: {whole}"
        raise cannot_train(config.model_type, problem, instead=OTHER)
    found: dict[str, str] = {}
    if not heads.is_encoder(config) and (why := _why_not(lambda: documents(copy))):
        found["documents"] = why
    count = copy.config.get_text_config(decoder=True).num_hidden_layers
    for cut in range(1, count):
        if why := _why_not(lambda cut=cut: stages(copy, cuts=(cut,))):  # type: ignore[misc]
            found["pp"] = f"a stage that begins at layer {cut} of the reduced copy: {why}"
            break
    return found


def copied(config: Any) -> Copy:
    """The reduced copy. Raises UserError for a model that transformers does not build either."""
    if not hasattr(config.get_text_config(decoder=True), "num_hidden_layers"):
        problem = "its config has no number of layers (num_hidden_layers)"
        raise cannot_train(config.model_type, problem, instead=OTHER)
    try:
        return copy_of(config, tp=1)
    except Exception as error:  # a model's own code, with whatever it raises
        try:
            build.meta_model(config)
        except Exception as own:
            problem = f"transformers does not build it from this config ({words(own)})"
            instead = "the fields of a published model of this architecture"
            raise cannot_train(config.model_type, problem, instead=instead) from error
        raise


def _ties_in_name_only(copy: Copy) -> bool:
    """Whether head and embedding are two matrices, which its config calls one."""
    embed, head = copy.model.get_input_embeddings(), copy.model.get_output_embeddings()
    return (
        getattr(copy.config, "tie_word_embeddings", False)
        and head is not None
        and head.weight is not embed.weight
    )


def _causal_with(config: Any) -> str:
    """The fields with which the model is causal; empty if there are none."""
    for fields in _CAUSAL:
        if all(hasattr(config, field) for field in fields):
            changed = deepcopy(config)
            for field, value in fields.items():
                setattr(changed, field, value)
            if is_causal(copy_of(changed, tp=1)):
                return " ".join(f"model.config.{field}={str(fields[field]).lower()}" for field in fields)
    return ""


def _why_not(claim: Callable[[], Result]) -> str:
    """Empty for a claim that holds."""
    try:
        result = claim()
    except UserError as error:
        return str(error).splitlines()[0]
    except Exception as error:  # a model's own code, with whatever it raises
        return words(error)
    return "" if result.passed else str(result)


def words(error: Exception) -> str:
    """The type and the first line of an error of other code, or two lines if the first ends with a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {first[:200]}"
