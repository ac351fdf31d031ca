# The vanilla GPT that costs what the KAN-GPT of train_shakespeare_char_nano_kan.py costs: 12,128,832 FLOPs per token.
#     python train.py config/train_shakespeare_char_nano_by_flops.py
# Found by `python study/balance.py config/train_shakespeare_char_nano_kan.py --by=flops`; learning rate and initial
# scale are those of nano_balanced.
# Measured over five seeds (results/nano): validation loss 1.690 ± 0.007, 5.2 minutes of training steps on one core of
# a Xeon (AMX; torch 2.13, float32).

include = 'train_shakespeare_char_nano.py'
out_dir = 'out-shakespeare-char-nano-by-flops'
n_layer = 16
mlp_hidden = 4.166666666666667
