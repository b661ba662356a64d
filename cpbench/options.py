"""The flags of the command line: names, placeholders, and one line of help each. What they do is in cli.py and scenario.py.

Values arrive as text and are checked with the scenario's fields, so that a flag, a YAML file and `--set` take the same and complain alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cpbench import completion as complete

_WHAT, _LONG, _CONTINUE, _OUTPUT = "What to measure", "How long", "Continue a sweep", "Output"


def _option(panel: str, names: str, metavar: str, text: str, *, hidden: bool = False, values: complete.Complete | None = None) -> Any:
    return typer.Option(*names.split(), metavar=metavar, rich_help_panel=panel, help=text, show_default=False, hidden=hidden, autocompletion=values)


def _axis(name: str, metavar: str, text: str, values: complete.Complete | None = None) -> Any:
    return Annotated[list[str] | None, _option(_WHAT, name, metavar, text, values=values)]


def _rare_axis(name: str, metavar: str, text: str) -> Any:
    """An axis that --help names in one line only (MORE)."""
    return Annotated[list[str] | None, _option(_WHAT, name, metavar, text, hidden=True)]


def _text(panel: str, name: str, metavar: str, text: str, values: complete.Complete | None = None) -> Any:
    return Annotated[str | None, _option(panel, name, metavar, text, values=values)]


def _path(panel: str, names: str, text: str) -> Any:
    return Annotated[Path | None, _option(panel, names, "FILE", text)]


def _flag(panel: str, names: str, text: str, *, hidden: bool = False) -> Any:
    return Annotated[bool, _option(panel, names, "", text, hidden=hidden)]


def _rare(name: str, metavar: str, text: str, values: complete.Complete | None = None) -> Any:
    """A flag that --help names in one line only (MORE)."""
    return Annotated[str | None, _option(_WHAT, name, metavar, text, hidden=True, values=values)]


_STRATEGIES, _LAYOUTS = complete.list_of(complete.strategies), complete.list_of(complete.layouts)
_MODEL, _FIELD = complete.one_of(complete.models), complete.one_of(complete.settings)
_DTYPES = complete.one_of(complete.choices("dtype"))


SCENARIO = Annotated[
    Path | None, _option(_WHAT, "--scenario", "NAME|FILE", "One of cpbench list scenarios, or YAML with any field below and more; flags override it.")
]
SEQ = _axis("--seq", "LENGTHS", "New tokens per sequence, a comma list: 36k,128k. Default: 36k.")
BATCH = _axis("--batch", "SIZES", "Sequences per batch, a comma list. Default: 1.")
LENGTHS = _axis("--lengths", "LENGTHS", "One batch, the new tokens of each sequence: 1003,517,36k; may be repeated. Instead of --seq and --batch.")
PREFIX = _rare_axis("--prefix", "LENGTHS", "Cached tokens: with --seq a comma list to try, with --lengths those of each sequence. Default: 0.")
CP = _axis("--cp", "DEGREES", "Context-parallel degrees: 2,4,8; a sweep adds cp=1 as the baseline. Default: 1.")
TP = _axis("--tp", "DEGREES", "Tensor-parallel degrees. Default: 1.")
DP = _axis("--dp", "DEGREES", "Attention data-parallel degrees: groups that share out the sequences. Default: 1.")
PP = _axis("--pp", "DEGREES", "Pipeline stages, which share out the layers. Default: 1.")
EP = _rare_axis("--ep", "DEGREES", "Expert-parallel degrees; they divide the ranks of a stage. Default: 1.")
LAYOUTS = _axis("--layouts", "NAMES", "Layouts by name instead of degrees: tp8,cp8u4,pp2cp4.", _LAYOUTS)
GPUS = _rare_axis("--gpus", "NUMBERS", "Every layout of so many ranks, instead of degrees.")
STRATEGY = _axis(
    "--strategy", "NAMES", "Context-parallel algorithms (cpbench list), u4r2 (Ulysses 4 x ring 2), or all. Default: allgather,ring,ulysses.", _STRATEGIES
)
MODEL = _text(_WHAT, "--model", "NAME", "Preset, or path of a config.json. Default: qwen3-tiny on CPU, qwen3-8b on CUDA.", _MODEL)
TARGET = _rare("--target", "NAME", "prefill (time to first token), layer or attention. Default: prefill.", complete.one_of(complete.choices("target")))
SET = _axis("--set", "A.B=C", "Any field of a scenario, for example timing.precision=1%; may be repeated.", _FIELD)
AB = Annotated[
    tuple[str, str] | None,
    _option(_WHAT, "--ab", "A B", "Two variants whose passes alternate in one process group: strategy=ring strategy=allgather.", hidden=True),
]
PAIR = _flag(_WHAT, "--pair", "Pair lists that have several values instead of crossing them.", hidden=True)
PARTITION = _rare(
    "--partition", "NAME", "Which tokens a rank holds (cpbench list partitions). Default: what the strategy prefers.", complete.one_of(complete.partitions)
)
CHUNK = _rare("--chunk", "TOKENS", "Prefill in chunks of so many new tokens of each sequence. Default: all at once.")
EXPERTS = _rare("--experts", "N", "Experts per layer instead of the model's own number. Default: the model's.")
LAYERS = _rare("--layers", "N", "Decoder layers of a prefill. Default: 1 on CPU, 4 on CUDA.")
WEIGHTS = _rare("--weights", "DIR", "A Hugging Face checkpoint instead of random weights: config.json and *.safetensors.")
PROMPT = _rare("--prompt", "FILE", "A text as the input, in the tokens of the tokenizer.json of --weights.")
DTYPE = _rare("--dtype", "NAME", "Of weights and activations. Default: float32 on CPU, bfloat16 on CUDA.", _DTYPES)
QUANT = _rare(
    "--quant",
    "NAME",
    "Projections: none (as --dtype says) or fp8 (W8A8, scales per channel and token). Default: none.",
    complete.one_of(complete.choices("quant")),
)
ROUTER = _rare(
    "--router",
    "RULE",
    "Of models with experts: trained (the model's own), uniform or zipf:1.2 for skewed load. Default: trained.",
    complete.one_of(complete.ROUTERS),
)
DETERMINISTIC = _flag(_WHAT, "--deterministic", "Sums and products in an order that gives every layout the same bits.", hidden=True)
SEED = _rare("--seed", "N", "Of weights, tokens and the order of later rounds. Default: 0.")
THREADS = _rare("--threads", "N", "CPU threads per rank. Default: cores // ranks.")
ROUNDS = _text(_LONG, "--rounds", "N", "Fresh passes over all cells. Default: 1.")
BUDGET = _rare("--budget", "TIME", "Skip cells that do not fit into it: 20m. Default: no limit.")
CELL_TIMEOUT = _rare("--cell-timeout", "TIME", "End a cell that takes longer in one round. Default: 10m.")
MEMORY_LIMIT = _rare("--memory-limit", "SIZE", "What a rank may have: 512M, 8G. On CPU live tensors are held against it. Default: no limit.")
RESUME = _flag(_CONTINUE, "--resume", "Continue the newest unfinished result, or the one named by -o.")
RETRY = _rare(
    "--retry",
    "STATUSES",
    "What --resume runs again: oom,timeout,crash,... Default: interrupted.",
    complete.list_of(complete.RETRIED),
)
FORCE = _flag(_CONTINUE, "--force", "Let --resume continue although the machine or the software has changed.", hidden=True)
_RARE = (
    "Also: --prefix LENGTHS (cached tokens), --target NAME (prefill, layer, attention), --ep DEGREES, --gpus N (every layout of N ranks), --pair "
    "(lists in pairs, not crossed), --partition NAME, --chunk TOKENS, --layers N, --experts N, --weights DIR (a checkpoint), --prompt FILE (a text), "
    "--dtype NAME, --quant fp8, --router RULE, --deterministic (the same bits in every layout), --seed N, --threads N, --cell-timeout TIME, "
    "--memory-limit SIZE"
)
MORE = (
    f"{_RARE}, --ab A B (two variants, pass by pass: strategy=ring strategy=allgather), --budget TIME; with --resume, --retry STATUSES, --force. "
    "The README explains them."
)
MORE_OF_ONE = f"{_RARE}. The README explains them."
SWEEP_ONLY = ("ab", "rounds", "budget", "resume", "retry", "force", "dry_run")  # flags of a sweep that make no sense for one cell
PROJECT_ONLY = (*SWEEP_ONLY[:-1], "cell_timeout", "memory_limit")  # flags of a sweep that make no sense where nothing is timed
_DEVICES = "Which devices"
PROJECT_FILE = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A sweep whose skipped cells are projected, instead of flags.", show_default=False)]
HARDWARE = _text(
    _DEVICES,
    "--hardware",
    "NAME|FILE",
    "h100, h200, b200, a100, h800, h20, ascend-910b, cpu, or a profile by calibrate. Default: h200.",
    complete.one_of(complete.hardware),
)
NODES = _text(_DEVICES, "--nodes", "N", "Nodes there are. With neither degrees nor layouts, every layout of all their devices.")
PER_NODE = _text(_DEVICES, "--gpus-per-node", "N", "Devices that the fast links join. Default: as the profile says, 8.")
LINK = _text(_DEVICES, "--link", "NAME|RATE", "Between nodes 400G, 200Gb/s or 50GB/s, nvlink; inside pcie4 or pcie5. Default: as the profile says.")
COMPUTE = _text(
    _DEVICES,
    "--compute",
    "lookup|measured",
    "Work looked up in the profile, or measured on this machine. Default: lookup.",
    complete.one_of(complete.words("lookup", "measured")),
)
TOP = Annotated[int | None, _option(_OUTPUT, "--top", "N", "Show only the N shortest times that fit into memory; the file has all.")]
EXPLAIN_PROJECTION = _flag(_OUTPUT, "--explain", "Show one layer of one cell: work and transfers of ranks that differ over time, as a table and a figure.")
NSYS = _flag(_OUTPUT, "--nsys", "Under Nsight Systems instead of the torch profiler: a report per rank, and its NVTX summary.")
_VERIFY = "What to verify"
VERIFY_STRATEGY = Annotated[
    list[str] | None, _option(_VERIFY, "--strategy", "NAMES", "Context-parallel algorithms (cpbench list), u4r2, or all. Default: all.", values=_STRATEGIES)
]
VERIFY_CP = Annotated[list[str] | None, _option(_VERIFY, "--cp", "DEGREES", "Context-parallel degrees. Default: 2,3,4,8, and 1 for comparison.")]
VERIFY_TP = Annotated[list[str] | None, _option(_VERIFY, "--tp", "DEGREES", "Tensor-parallel degrees. Default: 1, and 2 with cp 1 and 4.")]
VERIFY_LAYOUTS = Annotated[list[str] | None, _option(_VERIFY, "--layouts", "NAMES", "Layouts by name instead of degrees: pp2cp2,dp2cp2tp2.", values=_LAYOUTS)]
VERIFY_LENGTHS = Annotated[
    list[str] | None, _option(_VERIFY, "--lengths", "LENGTHS", "One batch instead of the grid's, the new tokens of each sequence: 101,67,130.")
]
VERIFY_PREFIX = Annotated[list[str] | None, _option(_VERIFY, "--prefix", "LENGTHS", "Cached tokens of each sequence of --lengths. Default: 0.")]
VERIFY_CHUNK = _text(_VERIFY, "--chunk", "TOKENS", "Prefill every batch in chunks of so many new tokens. Default: one batch of the grid.")
VERIFY_MODEL = _text(_VERIFY, "--model", "NAME", "The heads of a preset or config.json, reduced in width. Default: 8 query and 2 kv heads.", _MODEL)
VERIFY_DTYPE = _text(_VERIFY, "--dtype", "NAME", "Default: float32 and bfloat16.", _DTYPES)
VERIFY_SEED = _text(_VERIFY, "--seed", "N", "Of weights and inputs, and of the random batches of --deep. Default: 0.")
VERIFY_DETERMINISTIC = _flag(_VERIFY, "--deterministic", "Sums and products in an order that gives every layout the same bits.")
VERIFY_SET = Annotated[
    list[str] | None, _option(_VERIFY, "--set", "A=B", "Another field for all rows: kernel, partition, target, page_size, head_groups, quant.", values=_FIELD)
]
_LOGPROBS = "Log-probabilities of one layout, instead of the grid"
VERIFY_FILE = Annotated[Path | None, typer.Argument(metavar="FILE", help="Log-probabilities stored by -o, to be compared.", show_default=False)]
AGAINST = _text(
    _LOGPROBS, "--against", "LAYOUT|FILE", "Compare those of --layouts (--cp, --tp; default: one rank), or of FILE, with these. Exit code 1 if a bit differs."
)
TRACE = _flag(_LOGPROBS, "--trace-divergence", "Name the first module whose output differs between two layouts, and its error.")
TEMPERATURE = _text(_LOGPROBS, "--temperature", "T", "Divides logits. Default: 1.")
ROUNDING = _text(
    _LOGPROBS,
    "--rounding",
    "NAME",
    "trainer-fp32 (logits to fp32 first) or rollout (all in --dtype). Default: trainer-fp32.",
    complete.one_of(complete.words("trainer-fp32", "rollout")),
)
VERIFY_OUTPUT = _path(_LOGPROBS, "--output -o", "Store the log-probabilities and what they are of.")
_EXPLAIN = "What to explain"
EXPLAIN_LAYOUT = Annotated[str, _option(_EXPLAIN, "--layout", "NAME", "The layout: tp4sp, cp4tp2sp, cp2tp4/ep4tp2.", values=complete.one_of(complete.layouts))]
EXPLAIN_LAYER = Annotated[int | None, _option(_EXPLAIN, "--layer", "N", "One decoder layer, from 0 on. Default: the whole pass.")]
EXPLAIN_RANK = Annotated[int, _option(_EXPLAIN, "--rank", "N", "The rank whose exchanges are shown.")]
EXPLAIN_MODEL = _text(_EXPLAIN, "--model", "NAME", "Preset, or path of a config.json. Default: qwen3-tiny on CPU, qwen3-8b on CUDA.", _MODEL)
EXPLAIN_SEQ = _text(_EXPLAIN, "--seq", "N", "New tokens. Default: 36k.")
EXPLAIN_STRATEGY = _text(_EXPLAIN, "--strategy", "NAME", "Context-parallel algorithm. Default: allgather.", complete.one_of(complete.strategies))
EXPLAIN_SET = Annotated[
    list[str] | None, _option(_EXPLAIN, "--set", "A=B", "Any other field of a scenario: target, layers, dtype, sp_gather, dispatch.", values=_FIELD)
]
_MAXSEQ = "What to look for"
MAXSEQ_LAYOUTS = Annotated[list[str] | None, _option(_MAXSEQ, "--layouts", "NAMES", "Layouts by name: cp8,tp8,cp4tp2.", values=_LAYOUTS)]
MAXSEQ_STRATEGY = Annotated[
    list[str] | None,
    _option(_MAXSEQ, "--strategy", "NAMES", "Context-parallel algorithms (cpbench list), u4r2, or all. Default: allgather,ring,ulysses.", values=_STRATEGIES),
]
MAXSEQ_MODEL = _text(_MAXSEQ, "--model", "NAME", "Preset, or path of a config.json. Default: qwen3-tiny on CPU, qwen3-8b on CUDA.", _MODEL)
MAXSEQ_LAYERS = _text(_MAXSEQ, "--layers", "N", "Decoder layers. Default: 1 on CPU, 4 on CUDA.")
MAXSEQ_MEMORY = _text(_MAXSEQ, "--memory-limit", "SIZE", "What a rank may have: 512M, 8G. Needed on CPU. Default on CUDA: what the GPU has.")
MAXSEQ_SEQ = _text(_MAXSEQ, "--seq", "TOKENS", "The length that is tried first; then it is doubled. Default: 4k.")
MAXSEQ_PRECISION = _text(_MAXSEQ, "--precision", "PART", "How close to the longest length: 1% of it. Default: 1%.")
MAXSEQ_SET = Annotated[
    list[str] | None, _option(_MAXSEQ, "--set", "A.B=C", "Any other field of a scenario: dtype, batch, prefix, chunk, quant, kv_cache.", values=_FIELD)
]
_NODES, _SLURM, _KUBERNETES = "How many", "Slurm", "Kubernetes"
LAUNCH_SYSTEM = Annotated[str, typer.Argument(metavar="SYSTEM", help="slurm (an sbatch script) or kubernetes (a Kubeflow manifest).", show_default=False)]
LAUNCH_COMMAND = Annotated[
    list[str] | None, typer.Argument(metavar="-- COMMAND", help="sweep or maxseq with their flags, behind two dashes.", show_default=False)
]
LAUNCH_NODES = Annotated[int, _option(_NODES, "--nodes", "N", "Nodes. Default: 2.")]
LAUNCH_GPUS = Annotated[int, _option(_NODES, "--gpus-per-node", "N", "GPUs of a node, a rank on each. Default: 8.")]
LAUNCH_RANKS = Annotated[int | None, _option(_NODES, "--ranks-per-node", "N", "Ranks of a node without GPUs.")]
LAUNCH_NAME = Annotated[str, _option(_NODES, "--name", "NAME", "Of the job. Default: cpbench.")]
LAUNCH_IMAGE = _text(_NODES, "--image", "IMAGE", "A container image with cpbench in it; Slurm needs its pyxis plugin for that.")
LAUNCH_PARTITION = _text(_SLURM, "--partition", "NAME", "Where to run.")
LAUNCH_ACCOUNT = _text(_SLURM, "--account", "NAME", "Who pays.")
LAUNCH_TIME = _text(_SLURM, "--time", "TIME", "How long at most: 90m, 2h.")
LAUNCH_KIND = Annotated[
    str, _option(_KUBERNETES, "--kind", "trainjob|pytorchjob", "What Kubeflow has there: Trainer, or the older operator. Default: trainjob.")
]
LAUNCH_NAMESPACE = _text(_KUBERNETES, "--namespace", "NAME", "Where to run.")
LAUNCH_CLAIM = _text(_KUBERNETES, "--claim", "NAME", "A volume claim for results, mounted where the command runs (pytorchjob).")
MAXSEQ_OUTPUT = _path(_OUTPUT, "--output -o", "The result file, all trials in it. Default: results/maxseq-TIME.json.")
CALIBRATE_OUTPUT = _path(_OUTPUT, "--output -o", "The profile, for --hardware. Default: calibration.json.")
CALIBRATE_DEVICE = _text(_WHAT, "--device", "NAME", "cpu or cuda. Default: cuda where there is a GPU.")
CALIBRATE_RANKS = Annotated[int | None, _option(_WHAT, "--max-ranks", "N", "Ranks that are busy and communicate. Default: all GPUs, or a rank for each core.")]
QUICK = _flag(_LONG, "--quick", "A few sizes of each kind: seconds, to see that it works.")
_FIGURE = "Which figures"
PLOT_FILES = Annotated[list[Path], typer.Argument(metavar="FILE", help="Result files or journals. Of two, what changed is plotted too.", show_default=False)]
PLOT_FIGURE = _text(
    _FIGURE,
    "--figure",
    "NAMES",
    "time, throughput, memory, efficiency, split, heatmap, pareto, forest. Default: all that can be filled.",
    complete.list_of(complete.figures),
)
PLOT_X = _text(_FIGURE, "--x", "FIELD", "One figure instead: a field or metric, as seq, world_size, peak_bytes. Default: seq.")
PLOT_Y = _text(_FIGURE, "--y", "METRIC", "The metric of that figure: ttft_s, comm_bytes, skew. Default: the time that was measured.")
PLOT_BY = _text(_FIGURE, "--by", "FIELDS", "One line for each value of these: strategy,cp. Default: layout and strategy.")
PLOT_FACET = _text(_FIGURE, "--facet", "FIELDS", "One panel for each value of these. Default: what is different work, as model and dtype.")
PLOT_WHERE = _text(_FIGURE, "--where", "FILTER", "Only cells like this: 'strategy==ring and seq>=128k'.")
PLOT_FORMAT = _text(_OUTPUT, "--format", "NAMES", "svg, png or both: svg,png. Default: svg.", complete.list_of(complete.words("svg", "png")))
PLOT_OUTPUT = Annotated[Path | None, _option(_OUTPUT, "--output -o", "FOLDER", "Where NAME-FIGURE.svg is written. Default: beside the first file.")]
DEEP = _flag(_VERIFY, "--deep", "The long grid: more degrees, heads, batches, dtypes and page sizes. Minutes.")
OUTPUT = _path(_OUTPUT, "--output -o", "The result file. Default: results/NAME-TIME.json.")
DRY_RUN = _flag(_OUTPUT, "--dry-run", "Show cells, reasons and estimates; run nothing.")
JSON = _flag(_OUTPUT, "--json", "Print JSON instead of a table.")
QUIET = _flag(_OUTPUT, "--quiet -q", "Print only the result.")
VERSION = _flag("Options", "--version", "Print the version and exit.")
FILES = Annotated[list[Path], typer.Argument(metavar="FILE", help="Result files, or the journals of unfinished ones.", show_default=False)]
UPGRADE_FILES = Annotated[list[Path], typer.Argument(metavar="FILE", help="Result files of this or an older version.", show_default=False)]
WHERE = _text("What to show", "--where", "FILTER", "Only the cells that it keeps: 'strategy==ring and seq>=128k'.")
FORMAT = _text(
    _OUTPUT,
    "--format",
    "NAME",
    "text, md (for a pull request), csv, parquet or json. Default: as -o is named, else text.",
    complete.one_of(complete.words("text", "md", "csv", "parquet", "json")),
)
SHOW_OUTPUT = _path(_OUTPUT, "--output -o", "Write a file instead of printing.")
NAMES = Annotated[list[str], typer.Argument(metavar="NAME", help="Axes and sizes: cp4tp2, pp2cp4u2 (Ulysses 2), cp2tp4/ep4tp2 (experts).", show_default=False)]
_LISTS = complete.one_of(complete.LISTED)
_LISTED = "strategies, kernels, models, partitions or scenarios; all without it."
LIST = Annotated[str | None, typer.Argument(metavar="WHAT", help=_LISTED, show_default=False, autocompletion=_LISTS)]
REPORT_FILES = Annotated[list[Path], typer.Argument(metavar="FILE [NEW]", help="A result file; with a newer one, what changed.", show_default=False)]
REPORT_OUTPUT = _path(_OUTPUT, "--output -o", "The page. Default: NAME.html beside the first file.")
REPORT_FORCE = _flag(_OUTPUT, "--force", "Overwrite FILE although it is not a report.")
_COMPARE = "How to compare"
COMPARE_FILES = Annotated[list[Path], typer.Argument(metavar="FILE", help="Result files or journals. Several are compared with the first.", show_default=False)]
COMPARE_METRIC = Annotated[
    list[str] | None, _option(_COMPARE, "--metric", "NAMES", "time, memory, profile, all, or metrics by name: skew,comm_bytes. Default: time,memory.")
]
COMPARE_BY = _text(_COMPARE, "--by", "FIELD", "Compare cells that differ in strategy, layout or cp, in one file or across; strategy=ring names the reference.")
COMPARE_NOISE = _text(_COMPARE, "--noise", "PART", "A change up to here is none. Default: 2%; 5% at least where there are fewer than 4 rounds.")
COMPARE_STRICT = _flag(_COMPARE, "--strict", "p for the whole table and not for each row (Benjamini-Hochberg).")
COMPARE_ACROSS = Annotated[
    list[str] | None,
    _option(
        _COMPARE,
        "--across",
        "WHAT",
        "Compare all the same: kernel (another was dispatched), kind (measured, derived, projected).",
        values=complete.list_of(complete.words("kernel", "kind")),
    ),
]
FAIL_ON = _text(
    _OUTPUT,
    "--fail-on",
    "WHAT",
    "Exit code 1 on a regression (slower, worse or broke), or on broke alone.",
    complete.one_of(complete.words("regression", "broke")),
)
COMPARE_FORMAT = _text(
    _OUTPUT, "--format", "NAME", "text, md (for a pull request), json or csv. Default: text.", complete.one_of(complete.words("text", "md", "json", "csv"))
)
ALL = _flag(_OUTPUT, "--all", "List every row: also cells of one file alone, and all that is the same.")
