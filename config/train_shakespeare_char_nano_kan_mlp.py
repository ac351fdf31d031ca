# A KAN-GPT with KAN layers in the MLP only, their inputs normalised, on a wider grid: nano size, 1.56M parameters.
#     python train.py config/train_shakespeare_char_nano_kan_mlp.py
# Measured over five seeds (results/nano): validation loss 1.713 ± 0.013, 3.8 minutes of training steps on one core of
# a Xeon (AMX; torch 2.13, float32).

include = 'train_shakespeare_char_nano.py'
out_dir = 'out-shakespeare-char-nano-kan-mlp'
use_kan = True
kan_norm = True  # the hidden layer lies on the grid of the second KAN layer, too
grid_min = -3.0
grid_max = 3.0
init_std = 0.04  # this and the learning rate: see results/nano, finalists
learning_rate = 1.6e-2
