"""`hybridtrain generate`: continue a prompt with an export, a checkpoint, or any Hugging Face causal LM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybridtrain import evaluate
from hybridtrain.config.schema import GenerateRoot
from hybridtrain.types import refusal

FIELD = "generate.source"


def run(config: GenerateRoot) -> int:
    """Print the prompt of `generate.prompt` and what `generate.source` makes of it; the same text for the same run.seed."""
    options = config.generate
    with evaluate.exported(options.source, run_dir=Path(config.run.dir), field=FIELD) as source:
        continuation = sample(
            source,
            prompt=options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=config.run.seed,
            trust_remote_code=config.model.trust_remote_code,
        )
    print(options.prompt + continuation)
    return 0


def sample(folder: str | Path, *, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int, trust_remote_code: bool) -> str:
    """The text that the model in `folder` (or a hub id) puts after `prompt`, by nucleus sampling (arXiv:1904.09751).

    `temperature` 0 is greedy. Ends at max_new_tokens or the end-of-text token. The caller's random state is left as it was.
    Raises UserError when model or tokenizer cannot be loaded, or the model has too few positions.
    """
    source = str(folder)
    tokenizer = _load_tokenizer(source, trust_remote_code=trust_remote_code)
    model = evaluate.load_model(source, field=FIELD, trust_remote_code=trust_remote_code)
    prompt_ids = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    _check_room(model, prompt_tokens=len(prompt_ids), max_new_tokens=max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}  # transformers' own top_k is 50
    ids = torch.tensor([prompt_ids], device=model.device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **_end(model, tokenizer), **sampling
        )
    # Decoded together: a tokenizer may drop the space in front of a text that begins with the continuation.
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt_ids, out[0].tolist()))
    return whole[len(before) :]


def _load_tokenizer(source: str, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise evaluate.unloadable(source, field=FIELD, what="tokenizer", error=error) from error


def _end(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The end-of-text token, where the model's own generation config does not name one (or several)."""
    return {} if model.generation_config.eos_token_id is not None else {"eos_token_id": tokenizer.eos_token_id}


def _check_room(model: Any, *, prompt_tokens: int, max_new_tokens: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise refusal(
            "generate.max_new_tokens",
            max_new_tokens,
            f"with the prompt's {prompt_tokens} tokens more than the model's {positions} positions",
            allowed=f"up to {max(0, positions - prompt_tokens)}",
            instead=f"generate.max_new_tokens={positions - prompt_tokens}" if prompt_tokens < positions else "a shorter generate.prompt",
        )
