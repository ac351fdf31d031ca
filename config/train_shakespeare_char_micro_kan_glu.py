# A GPT in micro size whose MLPs are KAN-GLU, as many parameters as train_shakespeare_char_micro.py has, 0.90M.
#     python train.py config/train_shakespeare_char_micro_kan_glu.py

include = 'train_shakespeare_char_micro_kan_channel.py'
out_dir = 'out-shakespeare-char-micro-kan-glu'
mlp = 'swiglu'
mlp_hidden = 504 / 192  # as many parameters as SwiGLU has at 8 / 3, or the MLP at 4
