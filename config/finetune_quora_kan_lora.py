"""
GPT-2 (124M) learns whether two questions are the same (Quora). Adapters of two small KAN layers in a row, on the layers of attention and MLP.

    python finetune.py config/finetune_quora_kan_lora.py
    python finetune.py config/finetune_quora_kan_lora.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-quora-kan-lora'
task = 'quora'
wandb_run_name = 'quora-kan-lora'

lora_kind = 'kan'
lora_rank = 16
epochs = 5
