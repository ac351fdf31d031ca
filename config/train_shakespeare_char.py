# nanoGPT's baby GPT on the characters of Shakespeare, 10.65M parameters.
#     python train.py config/train_shakespeare_char.py
# Not run to its end: on a 2-core Xeon (AMX; torch 2.13, float32) an iteration takes 7 s and 8.0 GB. nanoGPT
# reports a validation loss of 1.4697 after 3 minutes on an A100.

out_dir = 'out-shakespeare-char'
eval_interval = 250
log_interval = 10
always_save_checkpoint = False
wandb_project = 'shakespeare-char'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
