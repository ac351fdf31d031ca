"""
GPT-2 (124M) learns the sentiment of film reviews (SST, five classes). What reads the answer off trains alone.

    python finetune.py config/finetune_sst_head.py
    python finetune.py config/finetune_sst_head.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py
"""

out_dir = 'out-finetune-sst-head'
wandb_run_name = 'sst-head'

finetune_mode = 'head'
use_lora = False
