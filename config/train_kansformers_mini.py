"""
Kansformers' gpt-mini on OpenWebText: KAN layers in attention, MLP and head, 132.79M parameters.

    python train.py config/train_kansformers_mini.py

Not run here: it needs OpenWebText (see data/openwebtext) and a GPU. Kansformers reports losses near 6 for its models.
"""

out_dir = 'out-kansformers-mini'
eval_interval = 500
eval_iters = 100
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 64
block_size = 128

n_layer = 6
n_head = 6
n_embd = 192
dropout = 0.1
use_kan = True
kan_targets = 'attn,mlp,head'

learning_rate = 5e-4
decay_lr = False
max_iters = 10000
