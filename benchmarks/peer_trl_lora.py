"""One run of the peer as a shell's loop over settings has it: TRL's DPOTrainer with adapters, in a process of its own.

It loads the model, tokenises, computes the reference's log-probabilities, evaluates, trains, evaluates and writes what
it did; `study.py` times the whole process beside a study of jaxpo's. Weights, tokens and arithmetic as `peer_trl.py`.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile

import peer_trl
import peft
import record
import torch
import trl
from datasets import Dataset

TARGETS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


def make_config(options: argparse.Namespace, steps: int, output: str) -> trl.DPOConfig:
    """As of the other benchmark, with the loop's settings; its own evaluation before the first step."""
    return dataclasses.replace(
        peer_trl.make_config(options, steps, output),
        loss_type=[options.loss],
        beta=options.beta,
        learning_rate=options.learning_rate,
        seed=options.seed,
        train_sampling_strategy='random',
        per_device_eval_batch_size=options.batch_pairs,
        eval_on_start=True,
    )


def read(path: str, tokenizer) -> Dataset:
    with open(path, encoding='utf-8') as file:
        return Dataset.from_list([peer_trl.rendered(json.loads(line), tokenizer) for line in file])


def run(options: argparse.Namespace, output: str) -> None:
    file = record.model_file()
    tokenizer, model = peer_trl.load_tokenizer(file), peer_trl.load_model(file)
    training = read(options.pairs, tokenizer)
    trainer = trl.DPOTrainer(
        model=model,
        args=make_config(options, len(training) // options.batch_pairs, output),
        train_dataset=training,
        eval_dataset=read(options.evaluation, tokenizer),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=list(TARGETS)),
    )
    recorder = peer_trl.Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    evaluated = trainer.evaluate()
    trained = trainer.train_dataset
    triples = list(zip(trained['prompt_ids'], trained['chosen_ids'], trained['rejected_ids']))
    result = {
        'loss': options.loss,
        'pairs': record.pair_facts(options.pairs, triples),
        'tokens': sum(step['tokens'] for step in recorder.steps),
        'steps': recorder.steps,
        'trainable_parameters': sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        'evaluation': {name: value for name, value in evaluated.items() if isinstance(value, float | int)},
        'peak_rss_gib': record.peak_rss_gib(),
        'threads': torch.get_num_threads(),
        'versions': {module.__name__: module.__version__ for module in (trl, peft, torch)},
    }
    pathlib.Path(options.output).write_text(json.dumps(result, indent=1) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--pairs', required=True)
    parser.add_argument('--evaluation', required=True)
    parser.add_argument('--output', required=True)
    parser.add_argument('--loss', choices=['sigmoid', 'ipo', 'hinge'], default='sigmoid')
    parser.add_argument('--beta', type=float, default=0.1)
    parser.add_argument('--learning-rate', type=float, default=1e-4)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rank', type=int, default=8)
    parser.add_argument('--batch-pairs', type=int, default=8)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--reference', choices=['live', 'precomputed'], default='precomputed')
    options = parser.parse_args()
    options.gradient_checkpointing = False
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as output:
        run(options, output)


if __name__ == '__main__':
    main()
