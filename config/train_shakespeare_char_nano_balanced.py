# The vanilla GPT with as many parameters as the KAN-GPT (within 1 %) in nano size, 2.23M parameters.
#     python train.py config/train_shakespeare_char_nano_balanced.py
# Measured over five seeds (results/nano): validation loss 1.697 ± 0.011, 6.3 minutes of training steps on one core of
# a Xeon (AMX; torch 2.13, float32).

include = 'train_shakespeare_char_nano.py'
out_dir = 'out-shakespeare-char-nano-balanced'
n_layer = 20
