"""
The KAN-GPT: KAN layers in attention and MLP in micro size, 8.86M parameters.

    python train.py config/train_shakespeare_char_micro_kan.py

Not run to its end here: on a 2-core Xeon (AMX; torch 2.13, float32) an iteration takes 4.4 s
and 2.2 GB, so 5000 of them some 6 hours. nanoGPKANT logged 1.5540 in 38 minutes on a 4090.
"""

out_dir = 'out-shakespeare-char-micro-kan'
eval_interval = 250
log_interval = 10
always_save_checkpoint = False
wandb_project = 'shakespeare-char'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 2
n_head = 6
n_embd = 192
dropout = 0.2

use_kan = True
kan_targets = 'attn,mlp'  # every linear layer but the head

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
