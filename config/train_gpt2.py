"""
GPT-2 (124M parameters) on OpenWebText, as in nanoGPT.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Not run here. nanoGPT reports a loss of about 2.85 after 4 days on 8 A100 40GB for this setting.
"""

wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# these make the total batch size be ~0.5M
# 12 batch size * 1024 block size * 5 gradaccum * 8 GPUs = 491,520
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# this makes the total number of tokens be 300B
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
