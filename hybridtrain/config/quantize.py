"""Options of quantised inference (quantize/)."""

from __future__ import annotations

from dataclasses import field

from hybridtrain.config.options import Options, options

AUTOCAST = {"autocast_bf16": "bfloat16", "autocast_fp16": "float16"}
"""Of compare.dtypes -> the dtype of products."""


@options
class CompareConfig(Options):
    sources: list[str] = field(default_factory=list)
    """Runs, exports, Hugging Face folders or hub ids; the first is the reference. Empty: the run's export."""
    schemes: list[str] = field(default_factory=list)
    """Schemes in which the linear layers of the reference are stored, too, e.g. [int8,int4-g32-gptq]: their
    numbers are computed with, in its own dtype (docs/inference.md has the names)."""
    dtypes: list[str] = field(default_factory=list)
    """The whole reference in these, too: bfloat16, float16; autocast_bf16, autocast_fp16: its fp32 weights
    under torch.autocast."""
    as_trained: bool = False
    """Of a run whose linear layers multiplied in other formats than the rest (precision.compute,
    precision.rules): its export with the products of training, too, beside the export as it is."""
    rows: int = 0
    """Held-out rows to compare on; 0: as many as the evaluations during training."""
    calibration_rows: int = 128
    """Training rows for schemes that look at the inputs of layers (gptq, bias, a8s)."""
    speed: int = 0
    """Time each model in turn with the reference: a row of data.seq_len tokens, of which this many, the
    last, are decoded one by one with a KV cache, batch 1; of models without one, whole rows. Peak memory and,
    where a counter can be read, energy, too. 0: nothing is timed."""
    out: str = ""
    """JSON file to write, with a page (.html) beside it; empty: <run>/compare.json, without a run none."""


@options
class QuantizeConfig(Options):
    source: str = ""
    """Export, checkpoint, Hugging Face folder or hub id; empty: <run>/export."""
    scheme: str = "int4-g32-gptq"
    """How the linear layers are stored (docs/inference.md): bf16, fp16, int8, int4-g32-gptq,
    fp8_e4m3-a8 ... Not given: as quantisation-aware training has rounded them, if it has."""
    dtype: str = "bfloat16"
    """dtype of all other weights, and in which the model then computes: bfloat16, float16 or float32."""
    rows: int = 128
    """Training rows for schemes that look at the inputs of layers (gptq, a8s)."""
    prompts_file: str = ""
    """A UTF-8 file with a text on each line, which these schemes look at in place of training rows."""
    plan: str = ""
    """Another scheme for each layer, in place of quantize.scheme: a YAML file, or auto: search one that keeps
    quantize.budget."""
    budget: float = 0.01
    """quantize.plan=auto: largest relative increase of the perplexity on held-out rows, 0.01 for 1 %."""
    ladder: list[str] = field(default_factory=lambda: ["bf16", "int8", "int4-g32-gptq"])
    """quantize.plan=auto: schemes that a layer may have, the widest first."""
    joined: bool = True
    """quantize.plan=auto: one scheme for layers that read the same input (q, k and v; gate and up): vLLM
    multiplies them as one."""
    eval_rows: int = 0
    """quantize.plan=auto: held-out rows, drawn by run.seed: 8 to search on, half of the others to verify the
    plan, half to report it; 0: all."""
    out: str = ""
    """Folder to write; empty: <run>/quantised."""
