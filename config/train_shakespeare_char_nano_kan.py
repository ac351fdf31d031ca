# The KAN-GPT: KAN layers in attention and MLP in nano size, 2.22M parameters.
#     python train.py config/train_shakespeare_char_nano_kan.py
# Measured over five seeds (results/nano): validation loss 1.678 ± 0.007, 5.2 minutes of training steps on one core of
# a Xeon (AMX; torch 2.13, float32).

include = 'train_shakespeare_char_nano.py'
out_dir = 'out-shakespeare-char-nano-kan'
use_kan = True
kan_targets = 'attn,mlp'  # every linear layer but the head
init_std = 0.04  # this and the learning rate: see results/nano, finalists
learning_rate = 8e-3
