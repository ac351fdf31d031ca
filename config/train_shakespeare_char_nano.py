# The vanilla GPT in nano size, 0.23M parameters.
#     python train.py config/train_shakespeare_char_nano.py
# Measured over five seeds (results/nano): validation loss 1.721 ± 0.007, 0.7 minutes of training steps on one core of
# a Xeon (AMX; torch 2.13, float32).

out_dir = 'out-shakespeare-char-nano'
eval_interval = 200
eval_iters = 100
log_interval = 50
always_save_checkpoint = False
wandb_project = 'shakespeare-char'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 2  # so that two processes can share it
batch_size = 16
block_size = 64

n_layer = 2
n_head = 3
n_embd = 96
init_std = 0.08  # this and the learning rate: see results/nano, finalists

learning_rate = 4e-3
max_iters = 1000
lr_decay_iters = 1000
min_lr = 2e-4
beta2 = 0.99
warmup_iters = 100
