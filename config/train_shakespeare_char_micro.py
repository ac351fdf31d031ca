# The vanilla GPT in micro size, 0.90M parameters.
#     python train.py config/train_shakespeare_char_micro.py
# Not run to its end: on a 2-core Xeon (AMX; torch 2.13, float32) an iteration takes 1.5 s and 1.9 GB, so 5000 of
# them some 2.1 hours. nanoGPKANT logged 1.5373 in a minute on a 4090.

include = 'train_shakespeare_char.py'
out_dir = 'out-shakespeare-char-micro'
n_layer = 2
n_embd = 192
