"""`hybridtrain quantize`: a Hugging Face folder with quantised linear layers, layer by layer.

<out>/model-00000.safetensors       all that is outside the layers
      model-00001.safetensors ...   a layer each
      config.json                   with quantization_config: transformers and vLLM load it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hybridtrain import evaluate
from hybridtrain.checkpoint import export_record
from hybridtrain.config.schema import ModelConfig, QuantizeRoot
from hybridtrain.evaluate import held_out
from hybridtrain.export import destination
from hybridtrain.models import build, hub, tokens
from hybridtrain.models.conversion import as_stored
from hybridtrain.models.init import WeightSource, draw
from hybridtrain.models.linears import Linear, is_transposed, linears_of
from hybridtrain.models.load import pretrained
from hybridtrain.models.source import read_config
from hybridtrain.models.structure import structure_of
from hybridtrain.quantize import calibration, schemes, stored, walk
from hybridtrain.quantize.schemes import Scheme
from hybridtrain.quantize.walk import Quantised
from hybridtrain.runtime import log
from hybridtrain.runtime.files import unwritable
from hybridtrain.types import Batch

SCHEME, OUT, ROWS, SOURCE = "quantize.scheme", "quantize.out", "quantize.rows", "quantize.source"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_log = log.get("quantize")


def run(config: QuantizeRoot) -> int:
    """Write the folder, and print its name and size."""
    options, run_dir = config.quantize, Path(config.run.dir)
    scheme = schemes.parse(options.scheme, field=SCHEME)
    out = Path(options.out).expanduser() if options.out else run_dir / "quantised"
    destination.check(out, field=OUT)
    with evaluate.loadable(options.source, run_dir=run_dir, field=SOURCE) as source:
        model = ModelConfig(from_pretrained=source, trust_remote_code=config.model.trust_remote_code)
        fields = read_config(model)
        if fields.get("quantization_config"):
            raise stored.already(source, field=SOURCE)
        built = build.hf_config(fields, chosen={}, attention="sdpa")
        rows = _rows(config, built, scheme, source=source, run_dir=run_dir)
        work = _Work(built, scheme, rows=rows, dtype=_DTYPES[options.dtype], model=model)
        try:
            with destination.replacing(out, field=OUT) as partial:
                size = work.write(partial)
                _write_rest(partial, work, fields, source=source)
        except OSError as error:
            raise unwritable(OUT, out, error) from error
    print(
        f"{out}\n{size / 1e6:.2f} MB, {work.bits:.2f} bits for a weight of {len(work.chosen)} linear layers"
    )
    return 0


def _rows(config: QuantizeRoot, built: Any, scheme: Scheme, *, source: str, run_dir: Path) -> list[Batch]:
    """Calibration rows, if the scheme needs them."""
    if not scheme.calibrates:
        return []
    settings = held_out.settings_of(config, run_dir=run_dir)
    data, plan, rows = held_out.data_for(settings, rows=0, field="train.eval_rows")
    held_out.check_tokenizer(source, settings)
    vocab = built.get_text_config(decoder=True).vocab_size
    of_model = held_out.of_model(built, settings, vocab=vocab, data=data, plan=plan, rows=rows)
    return calibration.batches(of_model, rows=config.quantize.rows, seed=config.run.seed)


class _Work:
    """A model that is quantised and written."""

    def __init__(
        self, built: Any, scheme: Scheme, *, rows: list[Batch], dtype: torch.dtype, model: ModelConfig
    ):
        self.built, self.scheme, self.rows = built, scheme, rows
        self.meta = build.meta_model(built)
        self.path = structure_of(built).layers
        self.cast = stored.cast(scheme)
        self.dtype = self.cast or dtype
        found = linears_of(built)
        self.chosen = [linear for linear in found if not linear.router]
        transposed = any(is_transposed(self.meta.get_submodule(linear.path)) for linear in self.chosen)
        stored.check(scheme, field=SCHEME, transposed=transposed)
        tokens_here = sum(batch.input_ids_BT.numel() for batch in rows)
        walk.check(found, self.choose, tokens=tokens_here, field=SCHEME, rows_field=ROWS)
        self.source: WeightSource = pretrained(model, built, fresh=draw(built, seed=0))
        self.format = None if self.cast else stored.Format(field=SCHEME)
        self.bits = 0.0

    def choose(self, linear: Linear) -> Scheme | None:
        """Every linear layer but routers of experts; none where weights are only cast."""
        return None if self.cast or linear.router else self.scheme

    def write(self, partial: Path) -> int:
        """Write the weights; returns their size in bytes."""
        count = self.built.get_text_config(decoder=True).num_hidden_layers
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        where: dict[str, str] = {}
        total = bits = weights = 0
        layers = walk.layers(
            self.built, self.source, self.choose, rows=self.rows, device=device, field=SCHEME
        )
        for number in range(count + 1):
            file = f"model-{number:05d}.safetensors"
            found = next(layers) if number and not self.cast else []
            tensors = self._rest(number - 1, {each.linear.path for each in found})
            for each in found:
                tensors |= self._quantised(each)
                bits += each.scheme.stored_bits(each.linear.outputs, each.linear.inputs)
                weights += each.linear.outputs * each.linear.inputs
            save_file(tensors, partial / file, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            _log.info("%d/%d layers, %.2f GB", number, count, total / 1e9)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        self.bits = bits / weights if weights else 8.0 * self.dtype.itemsize
        return total

    def _quantised(self, layer: Quantised) -> Mapping[str, Tensor]:
        assert self.format is not None
        tensors = self.format.tensors(layer)
        return {f"{layer.linear.path}.{name}": value.contiguous() for name, value in tensors.items()}

    def _rest(self, layer: int, quantised: set[str]) -> dict[str, Tensor]:
        """The tensors of a layer, or with -1 those outside the layers, that are not quantised, as stored."""
        prefix = f"{self.path}."

        def belongs(name: str) -> bool:
            inside = name.startswith(prefix)
            number = int(name.removeprefix(prefix).partition(".")[0]) if inside else -1
            path, _, key = name.rpartition(".")
            return number == layer and not (path in quantised and key == "weight")

        tensors = {}
        for name, parameter in self.meta.named_parameters():
            if belongs(name):
                slices = tuple(slice(0, size) for size in parameter.shape)
                tensors[name] = self.source(name, tuple(parameter.shape), slices).to(self.dtype)
        for name, buffer in build.saved_buffers(self.meta).items():
            if belongs(name):
                slices = tuple(slice(0, size) for size in buffer.shape)
                tensors[name] = self.source(name, tuple(buffer.shape), slices).to(buffer.dtype)
        return {name: tensor.contiguous() for name, tensor in as_stored(self.meta, tensors).items()}


def _write_rest(partial: Path, work: _Work, fields: Mapping[str, Any], *, source: str) -> None:
    """config.json, generation_config.json, tokenizer, and the record."""
    config = {**fields, "dtype": str(work.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    if work.format is not None:
        chosen = {linear.path for linear in work.chosen}
        others = {
            path
            for path, module in work.meta.named_modules()
            if isinstance(module, torch.nn.Linear) and path not in chosen
        }
        config["quantization_config"] = work.format.description(
            dict.fromkeys(sorted(chosen), work.scheme), ignored=others
        )
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    folder = hub.weights_folder(ModelConfig(from_pretrained=source))
    for name in (tokens.GENERATION,):
        if (folder / name).is_file():
            (partial / name).write_bytes((folder / name).read_bytes())
    tokens.copy_tokenizer(folder, out=partial)
    step = export_record.step_of(folder)
    record = {"scheme": work.scheme.name, **({} if step is None else {"step": step})}
    (partial / export_record.ORIGIN).write_text(json.dumps(record) + "\n")
