"""
GPT-2 (124M) learns the sentiment of film reviews (CFIMDB, two classes). All weights train.

    python finetune.py config/finetune_cfimdb_full.py
    python finetune.py config/finetune_cfimdb_full.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-cfimdb-full'
task = 'cfimdb'
wandb_run_name = 'cfimdb-full'

finetune_mode = 'full'
use_lora = False
learning_rate = 2e-5
batch_size = 8
gradient_accumulation_steps = 4
