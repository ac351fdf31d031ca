# The vanilla GPT in micro size, 0.90M parameters.
#
#     python train.py config/train_shakespeare_char_micro.py
#
# Not run to its end here: on a 2-core Xeon (AMX; torch 2.13, float32) an iteration takes 1.5 s and 1.9 GB, so 5000 of
# them some 2.1 hours. nanoGPKANT logged 1.5373 in a minute on a 4090.

out_dir = 'out-shakespeare-char-micro'
eval_interval = 250
log_interval = 10
always_save_checkpoint = False
wandb_project = 'shakespeare-char'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 2
n_head = 6
n_embd = 192
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
