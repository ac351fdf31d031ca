"""
GPT-2 (124M) learns the sentiment of film reviews (SST, five classes). The hybrid of arXiv 2504.10490: its MLPs become KAN layers, and LoRA changes their base weights and splines.

    python finetune.py config/finetune_sst_kan_base_lora.py
    python finetune.py config/finetune_sst_kan_base_lora.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-sst-kan-base-lora'
wandb_run_name = 'sst-kan-base-lora'

use_kan = True
lora_kind = 'kan_base'
lora_targets = 'mlp'
