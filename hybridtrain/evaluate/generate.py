"""`hybridtrain generate`: continue prompts, or answer messages, with an export, a checkpoint, or any
Hugging Face causal LM."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hybridtrain import evaluate
from hybridtrain.checkpoint import export_record
from hybridtrain.config.schema import GenerateConfig, GenerateRoot, InferenceConfig
from hybridtrain.errors import refusal
from hybridtrain.evaluate import placement
from hybridtrain.evaluate.guard import Guard
from hybridtrain.models import classifier, encoder
from hybridtrain.models.tokens import check_ids, continuation, load_tokenizer, prompt_ids, read_texts

FIELD = "generate.source"


def run(config: GenerateRoot) -> int:
    """Print each prompt with its continuation (of a chat only the answer); on stderr, of which step.

    The same seed gives the same texts.
    """
    options = config.generate
    prompts, run_dir = _prompts(options), Path(config.run.dir)
    seed = config.run.seed if options.seed < 0 else options.seed
    with evaluate.loadable(options.source, run_dir=run_dir, field=FIELD) as source:
        if (step := export_record.step_of(Path(source))) is not None:
            print(f"source {options.source or run_dir / 'export'}, step {step}", file=sys.stderr)
        texts = sample(
            source,
            prompts=prompts,
            options=options,
            inference=config.inference,
            seed=seed,
            trust_remote_code=config.model.trust_remote_code,
        )
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        if len(prompts) > 1:
            print(f"[{number}]" if number == 1 else f"\n[{number}]")
        print(text if options.chat else prompt + text)
    return 0


def _prompts(options: GenerateConfig) -> list[str]:
    if not options.prompts_file:
        return list(options.prompts) or [options.prompt]
    return read_texts(Path(options.prompts_file), field="generate.prompts_file")


def sample(
    source: str | Path,
    *,
    prompts: Sequence[str],
    options: GenerateConfig,
    inference: InferenceConfig,
    seed: int,
    trust_remote_code: bool,
) -> list[str]:
    """The continuation of each prompt by the model of `source` (folder or hub id),
    by nucleus sampling (arXiv:1904.09751).

    `options.temperature` 0 is greedy. A text ends at max_new_tokens, at an end token of
    generation_config.json (else of the tokenizer), or before one of `options.stop`. The caller's random state
    does not change. Raises UserError if model or tokenizer cannot be loaded, a chat has no template, a prompt
    has tokens that the model lacks, or there are too few positions.
    """
    tokenizer = load_tokenizer(str(source), field=FIELD, trust_remote_code=trust_remote_code)
    inputs = [_ids(prompt, tokenizer=tokenizer, options=options) for prompt in prompts]
    model = evaluate.load_within(inference, str(source), field=FIELD, trust_remote_code=trust_remote_code)
    classifies = classifier.is_classifier(model.config.architectures)
    if classifies or encoder.predicts(model.config):
        raise refusal(
            FIELD,
            source,
            f"it is {'a classifier' if classifies else 'an encoder'}, which writes no text",
            allowed="a causal language model",
            instead="hybridtrain evaluate",
        )
    _check_tokens(model)
    for ids in inputs:
        check_ids(ids, rows=model.get_input_embeddings().num_embeddings, field="generate.prompt")
        _check_room(model, prompt_tokens=len(ids), max_new_tokens=options.max_new_tokens)
    watched = Guard(model, on=inference.guard)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        texts = [_continue(model, tokenizer, ids, options=options) for ids in inputs]
    print("".join(f"{line}\n" for line in watched.lines()), end="", file=sys.stderr)
    return texts


def _ids(prompt: str, *, tokenizer: Any, options: GenerateConfig) -> list[int]:
    if options.chat:
        return tokenizer(
            _render(prompt, tokenizer=tokenizer, system=options.system), add_special_tokens=False
        )["input_ids"]
    return prompt_ids(prompt, tokenizer=tokenizer, field="generate.prompt")


def _render(message: str, *, tokenizer: Any, system: str) -> str:
    """A user message formatted by the chat template, up to the start of the answer."""
    if not tokenizer.chat_template:
        raise refusal(
            "generate.chat",
            "true",
            "the tokenizer has no chat template",
            allowed="a model with a chat template",
            instead="generate.chat=false",
        )
    messages = [{"role": "system", "content": system}] if system else []
    try:
        return tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program, which can raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        words = f"the chat template fails: {reason[0]}"
        raise refusal(
            "generate.chat",
            "true",
            words,
            allowed="messages that the template takes",
            instead="generate.system='', or another model",
        ) from error


def _continue(model: Any, tokenizer: Any, given: list[int], *, options: GenerateConfig) -> str:
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        # transformers' own top_k is 50
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    if options.stop:
        sampling |= {"stop_strings": list(options.stop), "tokenizer": tokenizer}
    if model.generation_config.eos_token_id is None:
        sampling["eos_token_id"] = tokenizer.eos_token_id
    ids = torch.tensor([given], device=placement.device_of(model))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=pad,
            **sampling,
        )
    except (ValueError, TypeError, NotImplementedError) as error:  # invalid values in generation_config.json
        raise evaluate.unloadable(
            "the model", field=FIELD, what="generation_config.json", error=error
        ) from error
    text = continuation(out[0].tolist(), prompt=len(given), tokenizer=tokenizer)
    places = [place for stop in options.stop if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _check_tokens(model: Any) -> None:
    """Refuse special tokens in generation_config.json that are not integers: true would count as token 1."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.generation_config, name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int for token in ids):
            problem = f"the {name} of its generation_config.json is {str(value)[:40]}"
            raise refusal(
                FIELD,
                model.name_or_path,
                problem,
                allowed="ids of tokens",
                instead="a folder as it was exported",
            )


def _check_room(model: Any, *, prompt_tokens: int, max_new_tokens: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise refusal(
            "generate.max_new_tokens",
            max_new_tokens,
            f"with the prompt's {prompt_tokens} tokens more than the model's {positions} positions",
            allowed=f"up to {max(0, positions - prompt_tokens)}",
            instead=f"generate.max_new_tokens={positions - prompt_tokens}"
            if prompt_tokens < positions
            else "a shorter generate.prompt",
        )
