"""The peer's side: TRL's DPOTrainer on SmolLM2-135M-Instruct, float32, CPU, pairs in file order.

One process runs one mode, as peak memory is counted per process. See README.md for the commands.
"""

import argparse
import copy
import functools
import json
import os
import pathlib
import tempfile
import time

import record

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import datasets
import torch
import transformers
import trl
from tokenizers import pre_tokenizers


def load_tokenizer(file: pathlib.Path):
    """The model's tokenizer. Its file asks for the pre-tokenizer `smollm`, which splits numbers into digits before
    the byte-level pattern; transformers' reader leaves that part out, which changes white space before digits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return tokenizer


def load_model(file: pathlib.Path):
    """The file's dequantised weights in a plain model: transformers marks a model it read from a .gguf file as
    quantised, although its weights are float32, and its trainer refuses to train such a model."""
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return model


def rendered(row: dict, tokenizer) -> dict:
    """A row as plain text. Given messages, TRL would also score the newline that the template writes after the
    end-of-turn token; rendered text ends at that token, which TRL then does not add again."""
    prompt = tokenizer.apply_chat_template(row['prompt'], add_generation_prompt=True, tokenize=False)
    return {'prompt': prompt} | {name: row[name] + tokenizer.eos_token for name in ('chosen', 'rejected')}


def make_config(options: argparse.Namespace, steps: int, output: str) -> trl.DPOConfig:
    return trl.DPOConfig(
        output_dir=output,
        loss_type=['sigmoid'],
        beta=0.1,
        max_length=None,
        precompute_ref_log_probs=options.reference == 'precomputed',
        disable_dropout=True,
        per_device_train_batch_size=options.batch_pairs,
        gradient_accumulation_steps=1,
        gradient_checkpointing=options.gradient_checkpointing,
        train_sampling_strategy='sequential',
        max_steps=steps,
        learning_rate=1e-6,
        lr_scheduler_type='constant',
        warmup_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy='no',
        report_to='none',
        disable_tqdm=True,
        seed=0,
    )


class Recorder(transformers.TrainerCallback):
    """Wall time and metrics of each step, from the end of the step before to the log after it."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, **_):
        self.last, self.tokens = record.clocks(), 0

    def on_log(self, args, state, control, logs, **_):
        if 'loss' not in logs:
            return
        now = record.clocks()
        names = ('loss', 'grad_norm', 'rewards/margins', 'logps/chosen', 'logps/rejected')
        measured = record.elapsed(self.last, now) | {'tokens': int(logs['num_tokens']) - self.tokens}
        self.steps.append(measured | {name: logs[name] for name in names})
        self.last, self.tokens = now, int(logs['num_tokens'])


def make_trainer(options, rows: list[dict], steps: int, output: str) -> trl.DPOTrainer:
    file = record.model_file()
    tokenizer, model = load_tokenizer(file), load_model(file)
    return trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model) if options.reference == 'live' else None,
        args=make_config(options, steps, output),
        train_dataset=datasets.Dataset.from_list([rendered(row, tokenizer) for row in rows]),
        processing_class=tokenizer,
    )


def benchmark(options: argparse.Namespace, output: str) -> None:
    """Train for the warm-up and the timed steps and write the result."""
    steps = options.warmup_steps + options.timed_steps
    rows = record.read_rows(options.pairs, steps * options.batch_pairs)
    start = time.perf_counter()
    trainer = make_trainer(options, rows, steps, output)
    recorder = Recorder()
    trainer.add_callback(recorder)
    setup_seconds, setup_rss = time.perf_counter() - start, record.peak_rss_gib()
    trainer.train()
    trained = trainer.train_dataset
    triples = list(zip(trained['prompt_ids'], trained['chosen_ids'], trained['rejected_ids']))
    if sum(step['tokens'] for step in recorder.steps) != record.sequence_tokens(triples):
        raise SystemExit('TRL did not process every token of the pairs once per sequence.')
    checkpointing = 'on' if options.gradient_checkpointing else 'off'
    record.write_result(
        options.output,
        side='trl',
        mode=f'{options.reference} reference, gradient checkpointing {checkpointing}',
        steps=recorder.steps,
        warmup_steps=options.warmup_steps,
        pairs=record.pair_facts(options.pairs, triples),
        setup_seconds=setup_seconds,
        setup_peak_rss_gib=setup_rss,
        peak_rss_gib=record.peak_rss_gib(),
        threads=torch.get_num_threads(),
        versions={m.__name__: m.__version__ for m in (trl, transformers, torch, datasets)},
        attention=trainer.model.config._attn_implementation,
        settings=trainer.args.to_dict() | {'output_dir': None, 'logging_dir': None},
    )


def check_golden(options: argparse.Namespace, output: str) -> None:
    """Compare TRL's log-probabilities of the first pairs that `--golden` knows with the numbers it gives."""
    golden = json.loads(pathlib.Path(options.golden).read_text())['rows']
    name = pathlib.Path(options.pairs).name.removesuffix('.jsonl')
    golden = {row['id']: row for row in golden if row['file'] == name}
    with open(options.pairs, encoding='utf-8') as file:
        rows = [row for row in map(json.loads, file) if row['id'] in golden][: options.batch_pairs]
    options.reference = 'precomputed'
    scored = make_trainer(options, rows, 1, output).train_dataset
    for row, result in zip(rows, scored, strict=True):
        for side in ('chosen', 'rejected'):
            value, expected = result[f'ref_{side}_logps'], golden[row['id']][f'logp_{side}']
            print(f'{row["id"]} {side}: TRL {value:.4f}, golden {expected:.4f}, off by {value - expected:+.4f}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--pairs', default='../shared/data/ci/hh_helpful.train.jsonl')
    parser.add_argument('--reference', choices=['live', 'precomputed'], default='live')
    parser.add_argument('--gradient-checkpointing', action='store_true')
    parser.add_argument('--batch-pairs', type=int, default=4)
    parser.add_argument('--warmup-steps', type=int, default=2)
    parser.add_argument('--timed-steps', type=int, default=8)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--output', default='runs/benchmark/trl.json')
    parser.add_argument('--golden', help='only compare log-probabilities with this file, and train nothing')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = functools.partial(check_golden if options.golden else benchmark, options)
    with tempfile.TemporaryDirectory() as output:
        run(output)


if __name__ == '__main__':
    main()
