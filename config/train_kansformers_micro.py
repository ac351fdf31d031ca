"""
Kansformers' gpt-micro on OpenWebText: KAN layers in attention, MLP and head, 78.69M parameters.

    python train.py config/train_kansformers_micro.py

Not run here: it needs OpenWebText (see data/openwebtext) and a GPU. Kansformers reports losses near 6 for its models.
"""

include = 'train_kansformers_nano.py'
out_dir = 'out-kansformers-micro'

n_layer = 4
n_head = 4
n_embd = 128
