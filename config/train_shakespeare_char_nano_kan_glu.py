# A GPT in nano size whose MLPs are KAN-GLU: SwiGLU with a learned function on each channel of its gates, 0.45M
# parameters.
#     python train.py config/train_shakespeare_char_nano_kan_glu.py

include = 'train_shakespeare_char_nano_kan_channel.py'
out_dir = 'out-shakespeare-char-nano-kan-glu'
mlp = 'swiglu'
mlp_hidden = 248 / 96  # as many parameters as SwiGLU has at 8 / 3, or the MLP at 4
