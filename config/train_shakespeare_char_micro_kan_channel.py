# A GPT in micro size with a learned function on each channel of its MLPs in place of GELU; as many parameters as
# train_shakespeare_char_micro.py has, 0.90M.
#     python train.py config/train_shakespeare_char_micro_kan_channel.py

include = 'train_shakespeare_char_micro.py'
out_dir = 'out-shakespeare-char-micro-kan-channel'
mlp_hidden = 752 / 192  # as many parameters as the MLP has at 4
use_kan = True
kan_kind = 'channel'
grid_size = 8
spline_order = 2
grid_min = -4.0
grid_max = 4.0
spline_lr_scale = 16.0  # results/win
spline_weight_decay = 0.0
