"""
The 16-layer vanilla GPT that nanoGPKANT set against its KAN-GPT, a fifth smaller than it in micro size, 7.10M parameters.

    python train.py config/train_shakespeare_char_micro_boosted.py

Not run to its end here: on a 2-core Xeon (AMX; torch 2.13, float32) an iteration takes 9.6 s
and 16.1 GB, so 5000 of them some 13 hours. nanoGPKANT logged 1.4630 (iteration 2500, then it overfits) in 8 minutes on a 4090.
"""

out_dir = 'out-shakespeare-char-micro-boosted'
eval_interval = 250
log_interval = 10
always_save_checkpoint = False
wandb_project = 'shakespeare-char'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 16
n_head = 6
n_embd = 192
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
