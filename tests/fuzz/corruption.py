"""A file of a corpus, a run or an export is damaged or replaced: it is refused by name, or what comes out is
what would have come out.

    LD_PRELOAD=faults.so python -m tests.fuzz.corruption --work DIR --out ROWS.jsonl --count 200 --seed 0

Of each case: one file, one mutation, one command that reads it. The oracle: no exception and no hang; exit
code 2 with the file, its folder or its option in the message; or exit code 0 with the losses, the exported
weights and config, or the evaluation of the undamaged folder, bit for bit. Files whose values are only shown
(metrics, events, summary, statistics) may hold another legal value: they must not end a command, no more.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import harness
from tests.fuzz.harness import PREPARE, TRAIN, Ended

RESUME = [*TRAIN, "train.steps=3", "train.eval_every=3"]
TUNE = [word for word in TRAIN if not word.startswith(("model", "run.dir"))]
TUNE += ["model.from_pretrained=runs/x/export", "run.dir=tuned", "train.steps=1"]
EVALUATE = [
    "evaluate",
    "evaluate.source=runs/x/export",
    "data.path=corpus",
    "data.seq_len=32",
    "train.eval_rows=4",
]
SHOWN = {
    "summary.json",
    "metrics.jsonl",
    "events.jsonl",
    "machine.json",
    "evaluation.json",
    "speed.json",
    "hybridtrain.json",
    "config.yaml",
    "lock",
}
"""Files whose values are shown, or compared with the command line: another legal value is no damage
that could be told."""
VALUES = [None, True, -1, 0, 10**400, 1e300, "text", [], {}, [1], "\u0000", "x" * 300, 0.5]


def _losses(folder: Path) -> Any:
    return [
        (row["step"], row["loss"], row["grad_norm"], row.get("eval_loss"))
        for row in harness.metrics(folder / "runs" / "x")
        if row["step"] == 3
    ]


def _export(folder: Path) -> Any:
    return harness.digests(
        folder / "runs" / "x" / "export",
        lambda name: name.endswith((".safetensors", "config.json", "tokenizer.json", "index.json")),
    )


def _tuned(folder: Path) -> Any:
    return [row["loss"] for row in harness.metrics(folder / "tuned")]


def _evaluated(said: str) -> Any:
    return [line for line in said.splitlines() if line.startswith(("loss", "tokens"))]


CHAT = [
    "prepare",
    "data=chat",
    "data.source=[talks]",
    "data.path=chat",
    "data.tokenizer=corpus/tokenizer",
    "data.chat_template=plain",
]
CHAT += ["data.eval_fraction=0.3", "data.seq_len=48"]
SFT = [word for word in TRAIN if not word.startswith(("data.", "run.dir"))] + [
    "data.path=chat",
    "data.seq_len=48",
    "run.dir=sft",
    "train.steps=1",
]
MEGATRON = [word for word in TRAIN if not word.startswith(("data.path", "run.dir"))] + [
    "data.path=mega/train",
    "run.dir=mega_run",
    "train.steps=1",
]
BRANCH = [word for word in TRAIN if not word.startswith("run.dir")]
BRANCH += ["run.dir=branch", "run.branch_from=runs/x", "optim.lr=0.02", "train.steps=3", "train.eval_every=3"]
GENERATE = [
    "generate",
    "generate.source=runs/x/export",
    "generate.prompt=number 7",
    "generate.max_new_tokens=4",
]


def _rows(name: str) -> Callable[[Path, str], Any]:
    return lambda folder, _: harness.metrics(folder / name)


COMMANDS: dict[str, tuple[list[str], Callable[[Path, str], Any]]] = {
    "resume": (RESUME, lambda folder, _: _losses(folder)),
    "export": (["export", "runs/x"], lambda folder, _: _export(folder)),
    "tune": (TUNE, lambda folder, _: _tuned(folder)),
    "evaluate": (EVALUATE, lambda _, said: _evaluated(said)),
    "report": (
        ["report", "runs/x"],
        lambda folder, _: (folder / "runs" / "x" / "report" / "index.html").is_file(),
    ),
    "runs": (["runs"], lambda *_: True),
    "branch": (BRANCH, _rows("branch")),
    "generate": (GENERATE, lambda _, said: said[-200:]),
    "sft": (SFT, _rows("sft")),
    "megatron": (MEGATRON, _rows("mega_run")),
    "verify_run": (["verify", "runs/x"], lambda *_: True),
    "verify_export": (["verify", "runs/x/export"], lambda *_: True),
    "verify_corpus": (["verify", "corpus"], lambda *_: True),
    "prepare_chat": (
        CHAT,
        lambda folder, _: harness.digests(
            folder / "chat", lambda name: name.endswith((".bin", ".idx", ".npy"))
        ),
    ),
    "prepare": (
        PREPARE,
        lambda folder, _: harness.digests(folder / "corpus", lambda name: name.endswith((".bin", ".idx"))),
    ),
}


def reads(path: str) -> list[str]:
    """The commands that read a file."""
    if path.startswith("chat/"):
        return ["sft", "prepare_chat"]
    if path.startswith("mega/"):
        return ["megatron"]
    if path.startswith("corpus/tokenizer"):
        return ["resume", "evaluate", "prepare", "export", "verify_corpus"]
    if path.startswith("corpus/"):
        return ["resume", "evaluate", "prepare", "verify_corpus"]
    if path.startswith("runs/x/export/"):
        return ["evaluate", "tune", "export", "generate", "verify_export"]
    if path.startswith("runs/x/checkpoints/"):
        return ["resume", "export", "branch", "verify_run"]
    return ["resume", "export", "report", "runs", "branch", "verify_run"]


NOT_VERIFIED = {
    "machine.json",
    "evaluation.json",
    "generation_config.json",
    ".lock",
    "lock",
    "corpus.json",
    "speed.json",
    ".prepare.json",
    "config.yaml",
}
"""Files beside those that `verify` holds against a record: other legal values pass. corpus.json
is the record itself."""


def mutate(file: Path, chance: random.Random) -> str:
    """Damage a file; what was done to it."""
    text = file.suffix in (".json", ".jsonl", ".yaml", ".jinja", ".txt")
    kinds = ["flip", "truncate", "empty", "junk", "folder", "gone", "pointer", "duplicate"]
    kinds += (
        ["value", "value", "value", "key", "brackets", "latin", "root"]
        if text
        else ["flip", "flip", "zeros", "sevens"]
    )
    kind = chance.choice(kinds)
    data = file.read_bytes()
    match kind:
        case "flip" if data:
            place = chance.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
        case "truncate":
            data = data[: chance.randrange(len(data) + 1)]
        case "empty":
            data = b""
        case "junk":
            data = chance.randbytes(chance.choice([1, 7, len(data) or 9]))
        case "zeros" | "sevens":
            data = (b"\0" if kind == "zeros" else b"\7") * len(data)
        case "pointer":
            data = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
        case "duplicate":
            data = data + data
        case "brackets":
            data = b"[" * 200_000
        case "latin":
            data = "é".encode("latin-1") + data
        case "root":
            data = chance.choice([b"[]", b"{}", b"null", b'"text"', b"7", b"[[1]]"])
        case "value" | "key":
            data = _changed(data, chance, drop=kind == "key")
    if kind in ("folder", "gone"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
    else:
        file.write_bytes(data)
    return kind


def _changed(data: bytes, chance: random.Random, *, drop: bool) -> bytes:
    """JSON with one value replaced or one key gone; a line of another text removed."""
    lines = data.decode(errors="replace").splitlines()
    for number in chance.sample(range(len(lines)), min(len(lines), 1)):
        try:
            whole = json.loads(data)
        except ValueError:
            try:
                row = json.loads(lines[number])
            except ValueError:
                return "\n".join(lines[:number] + lines[number + 1 :]).encode()
            lines[number] = json.dumps(_altered(row, chance, drop=drop))
            return ("\n".join(lines) + "\n").encode()
        return json.dumps(_altered(whole, chance, drop=drop)).encode()
    return data


def _altered(value: Any, chance: random.Random, *, drop: bool) -> Any:
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in (
            list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        ):
            spots.append((node, key))
            walk(node[key])

    walk(value)
    if not spots:
        return chance.choice(VALUES)
    node, key = chance.choice(spots[:400])
    if drop and isinstance(node, dict):
        del node[key]
    else:
        node[key] = chance.choice(VALUES)
    return value


def verdict(ended: Ended, path: str, *, command: str, changed: bool, found: Any, expected: Any) -> str:
    """What is wrong; empty: nothing. `changed`: the file is not what it was."""
    name, parent = Path(path).name, Path(path).parent.name
    named = name in ended.said or parent in ended.said or Path(path).parts[0] in ended.said
    if ended.crashed or ended.code not in (0, 2, *([1] if command.startswith("verify") else [])):
        return f"it ended with {ended.code}: {ended.said[-1500:]}"
    if ended.code:
        return "" if named else f"the refusal names neither file nor folder: {ended.said[-600:]}"
    if command.startswith("verify"):  # what it passes is what was written
        sealed = command != "verify_run" or "checkpoints" in path
        return "" if not changed or not sealed or name in NOT_VERIFIED | SHOWN else "verify finds nothing"
    if name in SHOWN or found == expected:
        return ""
    if name in ended.said and not name.endswith((".safetensors", ".bin", ".idx", ".distcp")):
        return ""  # a text that people edit is taken as it is, with a warning by name
    return f"another result: {str(found)[:400]} instead of {str(expected)[:400]}\n{ended.said[-300:]}"


def _more_sources(base: Path) -> None:
    """Conversations, and token files of another maker: the tokens of the text corpus under another name."""
    (base / "talks").mkdir()
    for n in range(8):
        messages = [
            {"role": "user", "content": f"what is {n} + {n}?"},
            {"role": "assistant", "content": f"it is {2 * n}"},
        ]
        (base / "talks" / f"{n}.jsonl").write_text(json.dumps({"messages": messages}) + "\n")


def _undisturbed(name: str, *, folder: Path) -> Any:
    """What a command makes of the undamaged folder."""
    argv, result = COMMANDS[name]
    ended, _ = harness.run(argv, folder=folder, arm=None, timeout_s=300)
    assert ended.code == 0, f"{name}: {ended.said}"
    return result(folder, ended.said)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, to see them again")
    return parser.parse_args()


def main() -> None:
    options = _options()
    harness.preload()
    base = options.work / "base"
    harness.write_texts(base)
    _more_sources(base)
    for argv in (PREPARE, [*TRAIN, "train.steps=2", "train.eval_every=2"], ["export", "runs/x"], CHAT):
        harness.must(argv, base)
    (base / "mega").mkdir()
    for ending in ("bin", "idx"):
        shutil.copy(base / "corpus" / f"train.{ending}", base / "mega" / f"train.{ending}")
    files = [
        str(path.relative_to(base))
        for path in sorted(base.rglob("*"))
        if path.is_file() and path.stat().st_size
    ]
    files = [
        path
        for path in files
        if not path.startswith(("texts/", "talks/", "runs/x/logs/", "runs/x/failures/"))
        and not path.endswith(".lock")
    ]
    fresh = harness.copies(base, options.work)
    expected: dict[str, Any] = {}
    with options.out.open("w") as out:
        for number in options.only or range(options.count):
            chance = random.Random(f"{options.seed}-{number}")
            path = chance.choice(files)
            name = chance.choice(reads(path))
            if name not in expected:
                expected[name] = _undisturbed(name, folder=next(fresh))
            folder = next(fresh)
            before = (folder / path).read_bytes()
            kind = mutate(folder / path, chance)
            changed = not (folder / path).is_file() or (folder / path).read_bytes() != before
            argv, result = COMMANDS[name]
            ended, _ = harness.run(argv, folder=folder, arm=None, timeout_s=60)
            found = None
            if ended.code == 0:
                found = result(folder, ended.said)
            wrong = verdict(ended, path, command=name, changed=changed, found=found, expected=expected[name])
            out.write(
                json.dumps(
                    {
                        "number": number,
                        "file": path,
                        "mutation": kind,
                        "command": name,
                        "code": ended.code,
                        "wrong": wrong,
                    }
                )
                + "\n"
            )
            out.flush()
    shutil.rmtree(options.work, ignore_errors=True)


if __name__ == "__main__":
    main()
