"""
GPT-2 (124M) learns the sentiment of film reviews (SST, five classes). Its MLPs become KAN layers that compute what the MLPs did, and all weights train.

    python finetune.py config/finetune_sst_kan.py
    python finetune.py config/finetune_sst_kan.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-sst-kan'
wandb_run_name = 'sst-kan'

finetune_mode = 'full'
use_lora = False
use_kan = True
learning_rate = 2e-5
