# A GPT in nano size with a learned function on each channel of its MLPs in place of GELU, 0.45M parameters.
#     python train.py config/train_shakespeare_char_nano_kan_channel.py

include = 'train_shakespeare_char_nano.py'
out_dir = 'out-shakespeare-char-nano-kan-channel'
n_layer = 4
mlp_hidden = 368 / 96  # as many parameters as the MLP has at 4
use_kan = True
kan_kind = 'channel'
grid_size = 8
spline_order = 2
grid_min = -4.0
grid_max = 4.0
spline_lr_scale = 16.0  # results/win
spline_weight_decay = 0.0
