"""
GPT-2 (124M) learns the sentiment of film reviews (SST, five classes). Only the layer that reads the answer off trains.

    python finetune.py config/finetune_sst_head.py
    python finetune.py config/finetune_sst_head.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-sst-head'
wandb_run_name = 'sst-head'

finetune_mode = 'head'
use_lora = False
