"""
Kansformers' gpt-micro on OpenWebText: KAN layers in attention, MLP and head, 78.69M parameters.

    python train.py config/train_kansformers_micro.py

Not run here: it needs OpenWebText (see data/openwebtext) and a GPU. Kansformers reports losses near 6 for its models.
"""

out_dir = 'out-kansformers-micro'
eval_interval = 500
eval_iters = 100
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 64
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.1
use_kan = True
kan_targets = 'attn,mlp,head'

learning_rate = 5e-4
decay_lr = False
max_iters = 10000
