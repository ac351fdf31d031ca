"""
The vanilla GPT that costs what the KAN-GPT of train_shakespeare_char_nano_kan.py costs:
193 ms per step, 1.018 times as long, on Intel(R) Xeon(R) Processor, 2 threads, float32.

    python train.py config/train_shakespeare_char_nano_by_seconds.py

Found by `python study/balance.py config/train_shakespeare_char_nano_kan.py --by=seconds`;
learning rate and initial scale are those of nano_balanced.

Measured over five seeds (results/nano): validation loss 1.697 ± 0.010, 5.3 minutes of training steps on one core of a Xeon
(AMX; torch 2.13, float32).
"""

out_dir = 'out-shakespeare-char-nano-by-seconds'
eval_interval = 200
log_interval = 50
eval_iters = 100
always_save_checkpoint = False
wandb_project = 'shakespeare-char'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 2
batch_size = 16
block_size = 64
n_layer = 17
n_head = 3
n_embd = 96
init_std = 0.08
learning_rate = 0.004
max_iters = 1000
beta2 = 0.99
warmup_iters = 100
lr_decay_iters = 1000
min_lr = 0.0002
