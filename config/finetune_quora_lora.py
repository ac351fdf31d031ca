"""
GPT-2 (124M) learns whether two questions are the same (Quora). LoRA of rank 32 on the layers of attention and MLP.

    python finetune.py config/finetune_quora_lora.py
    python finetune.py config/finetune_quora_lora.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-quora-lora'
task = 'quora'
wandb_run_name = 'quora-lora'

epochs = 5
