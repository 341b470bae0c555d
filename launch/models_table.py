"""Write docs/models.md: what each causal language model of transformers can be trained with.

    python launch/models_table.py docs/models.md

Each model type is examined as `hybridtrain inspect` does, in the config that transformers has as its default:
on a reduced copy, in this process. About a second each.
"""

from __future__ import annotations

import logging
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hybridtrain.analysis import analyse, cuts
from hybridtrain.errors import UserError
from hybridtrain.plan.cuts import as_text

COLUMNS = ("pp", "documents", "tp")
LIMIT_S = 120
TEXT = """# Model types

What `hybridtrain inspect` finds for each causal language model of transformers {transformers} (torch
{torch}), in the config that transformers has as its default. `python launch/models_table.py docs/models.md`
writes this page.

*exact*: loss and every gradient of a reduced copy of the model are those of transformers' own model, in fp32.
*pp*: cut into pipeline stages, before each layer; *from 1-6*: before these layers. *documents*: documents
that are packed into rows do not attend to each other. Data parallelism and ZeRO work with every model that
has a row. Of {types} model types {whole} can be trained: {counts}.

| model type | {header} |
|---|{rule}|
{rows}

## Refused

| model type | why |
|---|---|
{refused}
"""


def examined(model_type: str) -> dict[str, str] | str:
    """Capability -> why not, or why the model cannot be trained at all."""
    from transformers import CONFIG_MAPPING

    try:
        config: Any = CONFIG_MAPPING[model_type]()
        config._attn_implementation = "sdpa"
        found = analyse.refused(config)
        begins = cuts.allowed(config, holds="pp" not in found)
        if begins is None:
            found.pop("pp", None)
        elif begins:
            found["pp"] = f"from {as_text(begins)}"
        return found
    except UserError as error:
        return str(error).splitlines()[0].partition(": ")[2]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _cell(why: str | None) -> str:
    """What the table says of a capability."""
    return "exact" if why is None else why if why.startswith("from ") else "refused"


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no end within {LIMIT_S} s")


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    logging.disable(logging.WARNING)
    signal.signal(
        signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"no end within {LIMIT_S} s"))
    )
    rows, refused = [], []
    exact = dict.fromkeys(COLUMNS, 0)
    names = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for name in names:
        signal.alarm(LIMIT_S)
        found = examined(name)
        signal.alarm(0)
        if isinstance(found, str):
            refused.append(f"| {name} | {found[:160].replace('|', ' ')} |")
            continue
        cells = [_cell(found.get(column)) for column in COLUMNS]
        for column in COLUMNS:
            exact[column] += _cell(found.get(column)) != "refused"
        rows.append(f"| {name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    text = TEXT.format(
        transformers=version("transformers"),
        torch=version("torch").partition("+")[0],
        types=len(names),
        whole=len(rows),
        counts=", ".join(f"{column} {number}" for column, number in exact.items()),
        header=" | ".join(COLUMNS),
        rule="|".join("---" for _ in COLUMNS),
        rows="\n".join(rows),
        refused="\n".join(refused),
    )
    Path(sys.argv[1]).write_text(text)


if __name__ == "__main__":
    main()
