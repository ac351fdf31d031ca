# A small GPT for the fine-tuning tasks where GPT-2's weights cannot be had: GPT-2's shape and byte pairs at 7.3M
# parameters, 6.4M of them the embeddings of the tokens.
#     python train.py config/train_taskmix.py
# Measured once: validation loss 4.942 after 4.1M tokens, 37 minutes on two cores of an AMD EPYC without AMX (torch
# 2.13, float32; about 1 s per iteration; 3.9 GB).

out_dir = 'out-taskmix'
eval_interval = 250
eval_iters = 24
log_interval = 50
always_save_checkpoint = False
wandb_project = 'taskmix'

dataset = 'taskmix'
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256  # 2048 tokens per iteration

n_layer = 4
n_head = 4
n_embd = 128
bias = True  # as in GPT-2

learning_rate = 3e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 100
