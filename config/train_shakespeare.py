# The baby GPT on Shakespeare in GPT-2's byte pairs, 29.96M parameters, most of them in the vocabulary.
#
#     python train.py config/train_shakespeare.py
#
# Not run to its end here: on a 2-core Xeon (AMX; torch 2.13, float32) an iteration takes 15 s, so 1000 of them 4
# hours.

out_dir = 'out-shakespeare'
eval_interval = 250
log_interval = 10
always_save_checkpoint = False
wandb_project = 'shakespeare'

dataset = 'shakespeare'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 1000  # the text is 0.3 million tokens: 27 epochs
lr_decay_iters = 1000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
