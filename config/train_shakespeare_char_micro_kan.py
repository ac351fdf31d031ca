# The KAN-GPT: KAN layers in attention and MLP in micro size, 8.86M parameters.
#     python train.py config/train_shakespeare_char_micro_kan.py
# Not run to its end: on a 2-core Xeon (AMX; torch 2.13, float32) an iteration takes 4.4 s and 2.2 GB, so 5000 of
# them some 6 hours. nanoGPKANT logged 1.5540 in 38 minutes on a 4090.

include = 'train_shakespeare_char_micro.py'
out_dir = 'out-shakespeare-char-micro-kan'
use_kan = True
kan_targets = 'attn,mlp'  # every linear layer but the head
