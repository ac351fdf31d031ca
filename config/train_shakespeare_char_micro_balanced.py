# The vanilla GPT with as many parameters as the KAN-GPT (within 1 %) in micro size, 8.87M parameters.
#     python train.py config/train_shakespeare_char_micro_balanced.py
# Not run to its end: on a 2-core Xeon (AMX; torch 2.13, float32) an iteration takes 11.6 s and 12.9 GB, so 5000
# of them some 16 hours. Meant for a GPU.

include = 'train_shakespeare_char_micro.py'
out_dir = 'out-shakespeare-char-micro-balanced'
n_layer = 20
