# A GPT in nano size whose MLPs are KAN-GLU: SwiGLU with a learned function on each channel of its gates, 0.46M
# parameters.
#     python train.py config/train_shakespeare_char_nano_kan_glu.py

include = 'train_shakespeare_char_nano.py'
out_dir = 'out-shakespeare-char-nano-kan-glu'
n_layer = 4
mlp = 'swiglu'
mlp_hidden = 248 / 96  # as many parameters as SwiGLU has at 8 / 3, or the MLP at 4
use_kan = True
kan_kind = 'channel'
grid_size = 8
spline_order = 2
grid_min = -4.0
grid_max = 4.0
spline_lr_scale = 16.0  # results/win
spline_weight_decay = 0.0
