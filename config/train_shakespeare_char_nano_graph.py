"""
The vanilla GPT in nano size with graph attention behind its MLPs, 0.25M parameters.

    python train.py config/train_shakespeare_char_nano_graph.py

Needs torch-geometric (requirements-finetune.txt). Measured over three seeds (1, 2, 3): validation loss 1.715 ± 0.004, 1.7 minutes of
training steps on one core of an AMD EPYC without AMX (torch 2.13, float32). No more than a hint beside nano's 1.721 ± 0.007: the learning
rate and init_std are nano's, and the model is larger.
"""

out_dir = 'out-shakespeare-char-nano-graph'
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
init_std = 0.08  # this and the learning rate: see results/nano_finalists

use_graph = True

learning_rate = 4e-3
max_iters = 1000
lr_decay_iters = 1000
min_lr = 2e-4
beta2 = 0.99
warmup_iters = 100
