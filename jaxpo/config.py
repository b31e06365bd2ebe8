"""Every knob of a run. An experiment is a Python module whose `get_config()` returns a `Config`.

Data only: strings, numbers, tuples and dicts, so that a config prints, logs as JSON and can be overridden from the
command line as `--section.field value`. Units and meanings stand at the fields.
"""

import dataclasses
from typing import Literal

Scalar = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Model:
    source: str = ''
    """A local Hugging Face directory, a hub id, a .gguf file, `package:NAME` (the .gguf file an installed Python
    package ships), or `random:CONFIG.json` (random weights for a Hugging Face config)."""
    revision: str | None = None
    """Hub revision; a commit hash keeps a run reproducible. Only for hub ids."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer, where the model's source has none."""
    adapter: str | None = None
    """Directory of a PEFT LoRA adapter that is merged into the weights when they are read."""
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    """Compute dtype of the policy and the references. Master weights and log-probabilities are float32 always."""
    remat: Literal['none', 'dots', 'full'] = 'full'
    """What the backward pass recomputes: nothing, all but matrix products, or each layer whole (least memory)."""
    attention: Literal['auto', 'xla', 'splash', 'cudnn'] = 'auto'
    """Attention kernel. `auto`: splash on a TPU where it can do what the model and the rows ask for, else xla, which
    runs everywhere and takes memory by the square of a row's length. One that cannot is refused."""
    vocabulary_multiple: int = 1
    """Embedding and head get rows of zeros, masked out of every sum, until their number is a multiple of this: what
    `mesh.tensor` must divide."""


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = 0
    """Rank of the adapters that are trained in place of the weights; 0 trains the weights."""
    alpha: float = 16.0
    """Adapters' updates are multiplied by alpha / rank."""
    targets: tuple[Literal['query', 'key', 'value', 'output', 'gate', 'up', 'down'], ...] = (
        'query',
        'key',
        'value',
        'output',
        'gate',
        'up',
        'down',
    )
    """Matrices of each layer that get an adapter."""
    zero: Literal['a', 'b'] = 'a'
    """Which factor of B A x starts at 0, the other being random: starts with B = 0, as elsewhere, were seen to stall on
    TPU meshes."""


@dataclasses.dataclass(frozen=True)
class Reference:
    source: str = 'policy'
    """`policy` (its first weights: a frozen copy, or its adapter switched off) or any source a model may have."""
    revision: str | None = None
    """Hub revision, as for the model."""
    tokenizer: str | None = None
    """Directory or hub id of its tokenizer, where its source has none."""
    adapter: str | None = None
    """Directory of a PEFT LoRA adapter that is merged into the weights when they are read."""
    table: bool = False
    """Read its log-probabilities from a table on disk (computed where missing), and hold no weights of it. A model
    with another tokenizer than the policy can be read from a table only."""
    dtype: Literal['model', 'float32', 'bfloat16'] = 'model'
    """Dtype its matrices are held in; `model` is the compute dtype."""
    memory: Literal['device', 'pinned_host'] = 'device'
    """Where its weights lie between uses: on the accelerator, or in the host's memory, fetched at each step."""
    update_every: int | None = None
    """Steps between updates towards the policy (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656); None keeps it
    frozen."""
    update_rate: float = 0.6
    """Share of the policy in an update: 1 copies it (hard), less takes a step towards it (soft). TR-DPO: 0.5 to 0.6."""


@dataclasses.dataclass(frozen=True)
class Data:
    train: str = ''
    """Training pairs: a .jsonl or .parquet file (also .jsonl.gz), or a hub data set id. Unpaired rows (prompt,
    completion, label) are taken where all losses take them."""
    evaluation: str | None = None
    """Held-out pairs, as above."""
    validation: str | None = None
    """Pairs that choose mixing weights before training (vdw, vaw) or judge them during it (tsw), as above."""
    train_split: str = 'train'
    """Split of a hub data set to train on."""
    evaluation_split: str = 'test'
    """Split of a hub data set to evaluate on."""
    validation_split: str = 'validation'
    """Split of a hub data set that validates mixing weights."""
    revision: str | None = None
    """Hub revision of all."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Where the data name a column otherwise than the loss: `{'chosen_score': 'score_chosen'}`."""
    max_prompt_tokens: int = 512
    """Longer prompts are trimmed from the left."""
    max_completion_tokens: int = 512
    """Longer completions are cut from the right, and get no end-of-turn token."""
    bad_rows: Literal['drop', 'error'] = 'drop'
    """What to do with rows the audit rejects."""
    max_drop_rate: float = 0.1
    """Share of rows, 0 to 1, that may be dropped before the run is refused."""


@dataclasses.dataclass(frozen=True)
class Rows:
    layout: Literal['padded', 'packed', 'shared'] = 'shared'
    """One pair a row; many pairs a row; many pairs a row with each prompt held once."""
    lengths: tuple[int, ...] = (512, 1024)
    """Row lengths in tokens. A batch uses the cheapest of them that holds its longest pair."""
    microbatch: int = 8
    """Most rows computed at once, over all devices; longer batches accumulate gradients."""
    pairs_per_row: int = 16
    """Most pairs in a packed row."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    kind: Literal['adamw', 'adafactor'] = 'adamw'
    """Adafactor keeps a row and a column in place of AdamW's second moment of each matrix, and no first moment; it does
    not scale updates by the size of parameters, and beta1, beta2 and epsilon are AdamW's alone."""
    moment_dtype: Literal['float32', 'bfloat16'] = 'float32'
    """Dtype of AdamW's first moment."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal['constant', 'linear', 'cosine'] = 'linear'
    """Decay after warm-up, to `final_learning_rate_ratio` of the peak at the last step."""
    final_learning_rate_ratio: float = 0.0
    """Learning rate of the last step over the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; vectors (norms, biases) are never decayed."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    """Clip gradients to this global norm; those of a method's own parts to the same, apart."""
    method_learning_rate: float = 1e-3
    """Peak learning rate of parts that a method trains beside the policy (masks, value heads); same schedule."""
    method_weight_decay: float = 0.01
    """Weight decay of those parts."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    replica: int = 1
    """Slices of a pod (or other groups of devices) over which rows are split and parameters copied: the one axis whose
    traffic may leave a slice. A multiple of their number where there are several slices."""
    data: int = -1
    """Devices of a replica over which rows are split and parameters copied; -1 takes all that remain."""
    fsdp: int = 1
    """Devices over which rows, parameters and optimizer state are split, these by width."""
    tensor: int = 1
    """Devices over which heads, hidden units of the MLP and the vocabulary are split, and every row is shared."""


@dataclasses.dataclass(frozen=True)
class Processes:
    platform: Literal['any', 'cpu', 'gpu', 'tpu'] = 'any'
    """Refuse to run on anything else; `any` takes what JAX finds."""
    coordinator: str | None = None
    """`HOST:PORT` of process 0, where neither a TPU's metadata nor SLURM tells; with `count` and `index`."""
    count: int | None = None
    """Number of processes."""
    index: int | None = None
    """This process, from 0."""
    start_seconds: int = 300
    """How long to wait for all processes to arrive."""
    heartbeat_seconds: int = 100
    """After how long a silent process counts as dead, and ends the others."""


@dataclasses.dataclass(frozen=True)
class Train:
    batch_pairs: int = 8
    """Pairs of one optimizer step, over all devices."""
    epochs: float = 1.0
    """Passes over the training pairs; ignored where `steps` is given."""
    steps: int | None = None
    """Optimizer steps."""
    seed: int = 0
    """Seed of the data order, of random weights and of sampling."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int | None = None
    """Steps between evaluations; None evaluates before and after training only."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None saves the last step only."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    pairs: int | None = None
    """Held-out pairs to score; None scores all."""
    validation_pairs: int = 64
    """Validation pairs, drawn anew for each step, that judge it where the mixture's weights are `tsw`."""
    sample_prompts: int = 0
    """Held-out prompts to sample two completions each for, as `sample` says; 0 samples none."""
    show: int = 3
    """Sampled prompts whose greedy completions are printed, from before and after training."""


@dataclasses.dataclass(frozen=True)
class Sample:
    policy: Literal['newest', 'initial'] = 'newest'
    """Whom `jaxpo sample` samples: the run's newest checkpoint (the model's source where there is none), or always the
    model's source."""
    prompts: str = ''
    """Prompts of `jaxpo sample`: a .txt file (one prompt a line) or pairs as in `data`. Empty: those of
    `data.evaluation`."""
    completions: int = 1
    """Completions of each prompt."""
    max_new_tokens: int = 64
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Nucleus: sample from the likeliest tokens that hold this much probability."""
    batch: int = 32
    """Completions generated at once."""
    output: str = 'samples.jsonl'
    """Where `jaxpo sample` writes its lines, within the run's directory unless absolute."""
    pairs: str = ''
    """File for the preference pairs that `jaxpo sample` makes (best against worst completion of each prompt by the
    experiment's `reward`); empty makes none."""


@dataclasses.dataclass(frozen=True)
class Export:
    directory: str = 'export'
    """Where `jaxpo export` writes the Hugging Face directory, within the run's directory unless absolute."""
    form: Literal['model', 'adapter'] = 'model'
    """The whole model, a trained adapter merged into it; or the adapter alone, as PEFT reads it."""
    dtype: Literal['source', 'float32', 'bfloat16'] = 'source'
    """Dtype of the written tensors; `source` is that of the model's source."""
    max_shard_gigabytes: float = 5.0
    """Largest safetensors file."""


@dataclasses.dataclass(frozen=True)
class Config:
    output: str
    """Directory of the run: config, report, metrics, checkpoints."""
    model: Model = Model()
    lora: Lora = Lora()
    references: dict[str, Reference] = dataclasses.field(default_factory=lambda: {'initial': Reference()})
    """Frozen models the policy is measured against, by name. One that no loss reads serves evaluation only (the KL to
    it); `{}` holds none."""
    objective: dict[str, dict[str, Scalar]] = dataclasses.field(default_factory=lambda: {'dpo': {}})
    """Losses by name, each with its hyperparameters and a `weight`; and, where there are several references, the
    `mixture` that makes one of them (`jaxpo.references.mixture`)."""
    tables: str = 'runs/reference_tables'
    """Directory of the tables of reference log-probabilities, which runs share."""
    data: Data = Data()
    rows: Rows = Rows()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    processes: Processes = Processes()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    sample: Sample = Sample()
    export: Export = Export()
