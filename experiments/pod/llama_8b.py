"""DPO of Llama-3.1-8B-Instruct on UltraFeedback, over the 256 chips of a v5e pod.

    jaxpo plan experiments/pod/llama_8b.py --topology v5e:16x16
    jaxpo train experiments/pod/llama_8b.py --output gs://BUCKET/llama_8b

Planned, never run: there was no pod. `tpu_setup/README.md` is the way to one. The model is gated; its sizes stand
beside this file, so that it can be planned without it: `--model.source random:experiments/pod/llama_8b.json`.
"""

from jaxpo.config import Config, Data, Mesh, Model, Optimizer, Processes, Reference, Rows, Train

CHIPS = 256


def get_config() -> Config:
    return Config(
        output='runs/llama_8b',
        model=Model(source='meta-llama/Llama-3.1-8B-Instruct', dtype='bfloat16', remat='full'),
        references={'initial': Reference()},
        objective={'dpo': {'beta': 0.1}},
        data=Data(
            train='HuggingFaceH4/ultrafeedback_binarized',
            train_split='train_prefs',
            evaluation='HuggingFaceH4/ultrafeedback_binarized',
            evaluation_split='test_prefs',
            max_prompt_tokens=512,
            max_completion_tokens=768,
        ),
        rows=Rows(layout='shared', lengths=(1024, 2048), microbatch=CHIPS),
        optimizer=Optimizer(learning_rate=5e-7, warmup_steps=20),
        mesh=Mesh(fsdp=CHIPS),
        processes=Processes(platform='tpu'),
        train=Train(batch_pairs=CHIPS, epochs=1, checkpoint_every=20, evaluate_every=50),
    )
