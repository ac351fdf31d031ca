"""
GPT-2 (124M) learns the sentiment of film reviews (CFIMDB, two classes). LoRA of rank 32 on the layers of attention and MLP.

    python finetune.py config/finetune_cfimdb_lora.py
    python finetune.py config/finetune_cfimdb_lora.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-cfimdb-lora'
task = 'cfimdb'
wandb_run_name = 'cfimdb-lora'

batch_size = 8
gradient_accumulation_steps = 4
