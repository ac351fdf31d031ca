"""
Kansformers' gpt-mini on OpenWebText: KAN layers in attention, MLP and head, 132.79M parameters.

    python train.py config/train_kansformers_mini.py

Not run here: it needs OpenWebText (see data/openwebtext) and a GPU. Kansformers reports losses near 6 for its models.
"""

include = 'train_kansformers_nano.py'
out_dir = 'out-kansformers-mini'

n_layer = 6
n_head = 6
n_embd = 192
