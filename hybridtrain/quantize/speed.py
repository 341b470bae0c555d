"""compare.speed: how long a model takes, and in how much memory, timed in turn with its reference.

    prefill   the first tokens of a held-out row at once, batch 1, into a KV cache
    decode    the others one after the other, each with the cache of those before it
    forward   a whole row, of a model that keeps no cache: encoders and classifiers

A round times each pass of both models, in the opposite order of the round before, so that a machine that gets
slower favours neither; what is compared is the ratio of the same round. A short pass is repeated until it has
taken _LEAST_S. The first round is for warming up.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hybridtrain.errors import refusal
from hybridtrain.models import classifier, encoder
from hybridtrain.quantize.measure import outputs
from hybridtrain.runtime.energy import Counter
from hybridtrain.types import Batch

FIELD = "compare.speed"
ROUNDS = 7
_LEAST_S = 0.1
PREFILL, DECODE, FORWARD = "prefill", "decode", "forward"


@dataclass(frozen=True)
class Pass:
    """Something that is timed."""

    tokens: int
    prepare: Callable[[], Any]
    """What comes before it, not timed."""
    run: Callable[[Any], None]


@dataclass(frozen=True)
class Timing:
    """Of a pass in a round, for a token."""

    seconds: float
    joules: float | None


Timings = Mapping[str, Sequence[Timing]]
"""Pass -> its timings, one for each round."""


def check(decoded: int, *, seq_len: int) -> None:
    """Refuse more tokens than a row has besides its prompt (raises UserError)."""
    if decoded >= seq_len:
        raise refusal(
            FIELD,
            decoded,
            f"a row has {seq_len} tokens, prompt and decoded ones together",
            allowed=f"0 to {seq_len - 1}",
            instead=f"{FIELD}={seq_len // 2}, or a larger data.seq_len",
        )


def keeps_cache(model: Any) -> bool:
    """Whether a model writes text, token by token."""
    others = classifier.is_classifier(model.config.architectures) or encoder.predicts(model.config)
    return not others and "use_cache" in inspect.signature(model.forward).parameters


def passes(model: Any, row: Batch, *, decoded: int) -> dict[str, Pass]:
    """What is timed of a model. `row`: of one row."""
    if not keeps_cache(model):
        return {
            FORWARD: Pass(row.input_ids_BT.shape[1], lambda: None, lambda _: _discard(outputs(model, row)))
        }
    ids = row.input_ids_BT.to(model.device)
    prompt, rest = ids[:, : ids.shape[1] - decoded], ids[:, ids.shape[1] - decoded :]
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def prefill() -> Any:
        return getattr(model(input_ids=prompt, use_cache=True, **last), "past_key_values", None)

    def decode(cache: Any) -> None:
        for place in range(decoded):
            model(input_ids=rest[:, place : place + 1], past_key_values=cache, use_cache=True)

    found = {PREFILL: Pass(prompt.shape[1], lambda: None, lambda _: _discard(prefill()))}
    with torch.inference_mode():
        if prefill() is not None:
            found[DECODE] = Pass(decoded, prefill, decode)
    return found


def _discard(_: Any) -> None:
    """For a pass, whose result nobody needs."""


@torch.inference_mode()
def in_turn(models: Sequence[Mapping[str, Pass]], *, counter: Counter | None) -> list[Timings]:
    """The timings of one model, or of two, round by round."""
    found: list[dict[str, list[Timing]]] = [{name: [] for name in each} for each in models]
    repeats = [{name: _repeats(each) for name, each in of_model.items()} for of_model in models]
    for number in range(ROUNDS):
        order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
        for index in order:
            for name, each in models[index].items():
                found[index][name].append(_timed(each, repeats[index][name], counter=counter))
    return list(found)


def _repeats(each: Pass) -> int:
    """How often a pass is repeated in a round; warms it up, too."""
    _timed(each, 1, counter=None)
    seconds = _timed(each, 1, counter=None).seconds * each.tokens
    return max(1, math.ceil(_LEAST_S / max(seconds, 1e-6)))


def _timed(each: Pass, repeats: int, *, counter: Counter | None) -> Timing:
    seconds = joules = 0.0
    for _ in range(repeats):
        given = each.prepare()
        _wait()
        before = counter.read() if counter else ()
        start = time.perf_counter()
        each.run(given)
        _wait()
        seconds += time.perf_counter() - start
        if counter:
            joules += counter.joules(before, counter.read())
    count = repeats * each.tokens
    return Timing(seconds / count, joules / count if counter else None)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def figures(of_model: Timings, reference: Timings | None) -> dict[str, dict[str, float | None]]:
    """Pass -> tokens a second, the median of all rounds, with the slowest and fastest round; joules a token,
    their mean; and, beside the timings of a reference of the same rounds, how many times as fast it is.
    """
    result = {}
    for name, timings in of_model.items():
        rates = [1 / each.seconds for each in timings]
        joules = [each.joules for each in timings if each.joules is not None]
        result[name] = {
            **_spread("tokens_per_s", rates),
            "joules_per_token": statistics.fmean(joules) if joules else None,
        }
        if reference is not None and name in reference:
            pairs = zip(timings, reference[name], strict=True)
            result[name] |= _spread("ratio", [base.seconds / own.seconds for own, base in pairs])
    return result


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {name: statistics.median(values), f"{name}_least": min(values), f"{name}_most": max(values)}


def resident_bytes(model: Any) -> int:
    """Of parameters and buffers in memory, each storage once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.inference_mode()
def peak_bytes(each: Pass) -> int:
    """Most bytes that torch has allocated at once in a pass, above those before it."""
    given = each.prepare()
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        before = sum(map(torch.cuda.memory_allocated, devices))
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        each.run(given)
        _wait()
        return sum(map(torch.cuda.max_memory_allocated, devices)) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        each.run(given)
    with tempfile.TemporaryDirectory(prefix="hybridtrain-") as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    now = most = 0
    for event in sorted((each for each in events if each["name"] == "[memory]"), key=lambda each: each["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most
