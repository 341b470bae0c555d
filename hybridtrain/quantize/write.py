"""`hybridtrain quantize`: a Hugging Face folder with quantised linear layers, layer by layer.

<out>/model-00000.safetensors       all that is outside the layers
      model-00001.safetensors ...   a layer each
      config.json                   with quantization_config: transformers and vLLM load it
      plan.yaml                     the scheme of each layer
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hybridtrain import evaluate
from hybridtrain.checkpoint import export_record
from hybridtrain.config.schema import QuantizeRoot
from hybridtrain.errors import refusal
from hybridtrain.evaluate import held_out
from hybridtrain.evaluate.held_out import HeldOut
from hybridtrain.export import destination
from hybridtrain.export.hf import DTYPES
from hybridtrain.models import hub, tokens
from hybridtrain.models.linears import is_transposed
from hybridtrain.models.tokens import load_tokenizer
from hybridtrain.quantize import auto, calibration, progress, schemes, sets, stored, table, trained, walk
from hybridtrain.quantize import plan as plans
from hybridtrain.quantize.experts import Part, key
from hybridtrain.quantize.plan import Plan
from hybridtrain.quantize.progress import Progress
from hybridtrain.quantize.schemes import Scheme
from hybridtrain.quantize.source import Source
from hybridtrain.quantize.weights import Writer
from hybridtrain.runtime import cpu
from hybridtrain.runtime.files import unwritable, write_json
from hybridtrain.types import Batch

SCHEME, OUT, ROWS, SOURCE = "quantize.scheme", "quantize.out", "quantize.rows", "quantize.source"


def run(config: QuantizeRoot) -> int:
    """Write the folder, and print its name and size."""
    options, run_dir = config.quantize, Path(config.run.dir)
    out = Path(options.out).expanduser() if options.out else run_dir / "quantised"
    scheme = schemes.parse(options.scheme, field=SCHEME)
    steps = auto.ladder(options.ladder) if options.plan == plans.AUTO else []
    destination.check(out, field=OUT)
    cpu.return_freed_memory()
    with evaluate.loadable(options.source, run_dir=run_dir, field=SOURCE) as source:
        work = _Work(config, source, run_dir=run_dir)
        results: dict[str, Any] = {}
        if steps:
            plan, results = work.search(steps)
        elif options.plan:
            plan = plans.read(Path(options.plan).expanduser(), work.linears)
        elif (rounded := work.trained) is not None and SCHEME not in config.given:
            plan = rounded.plan
        else:
            plan = plans.uniform(scheme, work.linears)
        if options.prompts_file and not any(scheme.calibrates for scheme in (*plan.values(), *steps)):
            raise refusal(
                calibration.FIELD,
                options.prompts_file,
                "no layer is calibrated",
                allowed="schemes that look at the inputs of layers (gptq, a8s)",
                instead=f"{SCHEME}=int4-g32-gptq, or without {calibration.FIELD}",
            )
        field = plans.FIELD if options.plan else SCHEME
        work.calibration(plan, field=field)  # a refusal costs no layer that an interrupted start finished
        try:
            with destination.replacing(out, field=OUT, keeps=progress.FILE) as partial:
                size, bits = work.write(plan, partial, results=results, field=field)
        except OSError as error:
            raise unwritable(OUT, out, error) from error
    print(f"{out}\n{size / 1e6:.2f} MB, {bits:.2f} bits for a weight of {len(plan)} linear layers")
    return 0


class _Work(Source):
    """A model that is quantised."""

    def __init__(self, config: QuantizeRoot, source: str, *, run_dir: Path):
        super().__init__(source, trust_remote_code=config.model.trust_remote_code, field=SOURCE)
        self.config, self.options, self.run_dir = config, config.quantize, run_dir
        stored.check_layout(self.meta, source, field=SOURCE)
        self.trained = trained.of_source(source, self.linears, field=SOURCE)
        self._rows: HeldOut | None = None
        self.reference: Any = None
        self.report: Sequence[Batch] = []

    def rows(self, *, count: int, field: str) -> HeldOut:
        """The data, with `count` held-out rows."""
        if self._rows is None:
            settings = held_out.settings_of(self.config, run_dir=self.run_dir)
            data, plan, rows = held_out.data_for(settings, rows=count, field=field)
            held_out.check_tokenizer(self.folder, settings)
            vocab = self.built.get_text_config(decoder=True).vocab_size
            self._rows = held_out.of_model(self.built, settings, vocab=vocab, data=data, plan=plan, rows=rows)
        return self._rows

    def calibration(self, plan: Plan, *, field: str) -> list[Batch]:
        """Calibration rows, if the plan needs them, after a check that it fits the model."""
        transposed = any(is_transposed(self.meta.get_submodule(path)) for path in plan)
        stored.check(plan.values(), field=field, transposed=transposed)
        experts = dict.fromkeys(key(linear) for linear in self.linears if isinstance(linear, Part))
        stored.check_experts({path: plan.get(path) for path in experts}, self.options.dtype, field=field)
        rows: list[Batch] = []
        if any(scheme.calibrates for scheme in plan.values()):
            rows = self._calibration_rows
        count = sum(batch.input_ids_BT.numel() for batch in rows)
        walk.check(self.linears, plans.choice(plan), tokens=count, field=field, rows_field=ROWS)
        return rows

    @cached_property
    def _calibration_rows(self) -> list[Batch]:
        count, file = self.options.rows, self.options.prompts_file
        if not file:
            return calibration.batches(self.rows(count=0, field=""), rows=count, seed=self.config.run.seed)
        settings, trusts = (
            held_out.settings_of(self.config, run_dir=self.run_dir),
            self.model.trust_remote_code,
        )
        return calibration.of_texts(
            Path(file),
            tokenizer=load_tokenizer(self.folder, field=calibration.FIELD, trust_remote_code=trusts),
            vocab=self.built.get_text_config(decoder=True).vocab_size,
            rows=count,
            size=settings.batch.micro_batch_size,
            seq_len=settings.data.seq_len,
        )

    def search(self, steps: list[Scheme]) -> tuple[Plan, dict[str, Any]]:
        """A plan within the budget, and what it was measured to cost beside uniform ones."""
        rows = self.rows(count=sets.pool(self.options.eval_rows), field=sets.ROWS)
        reference = evaluate.load_model(
            self.folder, field=SOURCE, trust_remote_code=self.model.trust_remote_code
        )
        stored.check(steps, field=auto.LADDER, transposed=False)
        drawn = sets.drawn(rows.batches(), rows=self.options.eval_rows, seed=self.config.run.seed)
        self.report = drawn.report
        cast = stored.name_of(DTYPES[self.options.dtype])

        def plan_of(scheme: Scheme) -> Plan:
            plan = plans.uniform(scheme, self.linears)
            if stored.cast(scheme) is not None:
                stored.check_cast(scheme, cast, field=auto.LADDER)
            self.calibration(plan, field=auto.LADDER)
            return plan

        plan, results = auto.found(
            reference,
            self.built,
            self.weights,
            steps,
            budget=self.options.budget,
            calibration=self._calibration_rows,
            rows=drawn,
            plan_of=plan_of,
            dtype=DTYPES[self.options.dtype],
            one=self.options.joined,
        )
        self.reference = reference
        return plan, results

    def write(
        self, plan: Plan, partial: Path, *, results: Mapping[str, Any], field: str
    ) -> tuple[int, float]:
        """Write the folder; returns (bytes of its weights, bits of a weight)."""
        rows, dtype = self.calibration(plan, field=field), DTYPES[self.options.dtype]
        weights = self.weights
        if self.trained is not None:
            self.trained.say(plan)
            if self.trained.is_plan(plan):
                weights = self.trained.weights(weights)
                dtype = dtype if "quantize.dtype" in self.config.given else self.trained.stored
        casts = {stored.cast(scheme) for scheme in plan.values()}
        if len(casts) == 1 and None not in casts and "quantize.dtype" not in self.config.given:
            dtype = next(each for each in casts if each is not None)
        quantised = {path: scheme for path, scheme in plan.items() if stored.cast(scheme) is None}
        for scheme in set(plan.values()) - set(quantised.values()):
            stored.check_cast(scheme, stored.name_of(dtype), field=field)
        writer = Writer(self.built, self.meta, weights, quantised, dtype=dtype, field=field)
        folder = hub.weights_folder(self.model)
        of = progress.of(folder, self.fields, plan, dtype=dtype, rows=rows)
        finished = Progress(partial, of, layers=self.built.get_text_config(decoder=True).num_hidden_layers)
        size, bits = writer.write(finished, rows=rows)
        config = {**self.fields, "dtype": str(dtype).removeprefix("torch."), **writer.description()}
        config.pop("torch_dtype", None)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        results = self._measured(partial, results) if results else {}
        plans.write(plan, partial / plans.FILE, comment=auto.comment(results) if results else "")
        self._copy(folder, partial, names=sorted({scheme.name for scheme in plan.values()}))
        return size, bits

    def _measured(self, partial: Path, results: Mapping[str, Any]) -> dict[str, Any]:
        """The results with those of the folder itself, printed and written."""
        model = evaluate.load_model(str(partial), field=OUT, trust_remote_code=self.model.trust_remote_code)
        found = auto.of_folder(model, self.reference, rows=self.report, results=results)
        print("\n".join(table.lines(found["candidates"])) + f"\n\n{auto.comment(found)}\n")
        write_json(partial / "plan.json", found)
        return found

    def _copy(self, folder: Path, partial: Path, *, names: list[str]) -> None:
        """Tokenizer, sampling values, and the record."""
        if (folder / tokens.GENERATION).is_file():
            shutil.copyfile(folder / tokens.GENERATION, partial / tokens.GENERATION)
        tokens.copy_tokenizer(folder, out=partial)
        step = export_record.step_of(folder)
        record = {"scheme": ", ".join(names), **({} if step is None else {"step": step})}
        (partial / export_record.ORIGIN).write_text(json.dumps(record) + "\n")
