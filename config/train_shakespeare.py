# The baby GPT on Shakespeare in GPT-2's byte pairs, 29.94M parameters, most of them in the vocabulary.
#     python train.py config/train_shakespeare.py
# Not run to its end: on a 2-core Xeon (AMX; torch 2.13, float32) an iteration takes 15 s, so 1000 of them 4
# hours.

include = 'train_shakespeare_char.py'
out_dir = 'out-shakespeare'
wandb_project = 'shakespeare'
dataset = 'shakespeare'
batch_size = 32
max_iters = 1000  # the text is 0.3 million tokens: 27 epochs
lr_decay_iters = 1000
