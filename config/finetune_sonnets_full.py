"""
GPT-2 (124M) learns Shakespeare's sonnets. All weights train.

    python finetune.py config/finetune_sonnets_full.py
    python finetune.py config/finetune_sonnets_full.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-sonnets-full'
task = 'sonnets'
wandb_run_name = 'sonnets-full'

finetune_mode = 'full'
use_lora = False
learning_rate = 2e-5
batch_size = 8
epochs = 15
