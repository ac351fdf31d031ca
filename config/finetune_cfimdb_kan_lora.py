"""
GPT-2 (124M) learns the sentiment of film reviews (CFIMDB, two classes). Adapters of two small KAN layers in a row, on the layers of attention and MLP.

    python finetune.py config/finetune_cfimdb_kan_lora.py
    python finetune.py config/finetune_cfimdb_kan_lora.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-cfimdb-kan-lora'
task = 'cfimdb'
wandb_run_name = 'cfimdb-kan-lora'

lora_kind = 'kan'
lora_rank = 16
batch_size = 8
gradient_accumulation_steps = 4
