# Kansformers' gpt-nano on OpenWebText: KAN layers in attention, MLP and head, 27.39M parameters. Its gpt-micro,
# 78.69M, and gpt-mini, 132.79M, by flags:
#     python train.py config/train_kansformers_nano.py
#     python train.py config/train_kansformers_nano.py --n_layer=4 --n_head=4 --n_embd=128 --out_dir=out-micro
#     python train.py config/train_kansformers_nano.py --n_layer=6 --n_head=6 --n_embd=192 --out_dir=out-mini
# Not run: it needs OpenWebText and a GPU. Kansformers reports losses near 6 for its models.

out_dir = 'out-kansformers-nano'
eval_interval = 500
eval_iters = 100
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 64
block_size = 128

n_layer = 3
n_head = 3
n_embd = 48
dropout = 0.1
use_kan = True
kan_targets = 'attn,mlp,head'

learning_rate = 5e-4
decay_lr = False
max_iters = 10000
