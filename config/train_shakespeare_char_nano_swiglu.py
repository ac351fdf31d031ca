# The vanilla GPT with SwiGLU in its MLPs and as many parameters as the KAN-GPT (within 1 %) in nano size, 2.23M
# parameters.
#     python train.py config/train_shakespeare_char_nano_swiglu.py
# Measured over five seeds (results/nano): validation loss 1.645 ± 0.004, 6.8 minutes of training steps on one core of
# a Xeon (AMX; torch 2.13, float32).

include = 'train_shakespeare_char_nano.py'
out_dir = 'out-shakespeare-char-nano-swiglu'
n_layer = 20
mlp = 'swiglu'
mlp_hidden = 8 / 3  # three matrices with as many parameters as the MLP's two
