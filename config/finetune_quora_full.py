"""
GPT-2 (124M) learns whether two questions are the same (Quora). All weights train.

    python finetune.py config/finetune_quora_full.py
    python finetune.py config/finetune_quora_full.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-quora-full'
task = 'quora'
wandb_run_name = 'quora-full'

finetune_mode = 'full'
use_lora = False
learning_rate = 2e-5
epochs = 5
