# The 16-layer vanilla GPT that nanoGPKANT set against its KAN-GPT, a fifth smaller than it in micro size, 7.10M
# parameters.
#     python train.py config/train_shakespeare_char_micro_boosted.py
# Not run to its end: on a 2-core Xeon (AMX; torch 2.13, float32) an iteration takes 9.6 s and 16.1 GB, so 5000
# of them some 13 hours. nanoGPKANT logged 1.4630 (iteration 2500, then it overfits) in 8 minutes on a 4090.

include = 'train_shakespeare_char_micro.py'
out_dir = 'out-shakespeare-char-micro-boosted'
n_layer = 16
