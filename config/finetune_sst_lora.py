"""
GPT-2 (124M) learns the sentiment of film reviews (SST, five classes). LoRA of rank 32 on the layers of attention and MLP.

    python finetune.py config/finetune_sst_lora.py
    python finetune.py config/finetune_sst_lora.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-sst-lora'
wandb_run_name = 'sst-lora'
