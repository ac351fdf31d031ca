"""
GPT-2's shape on OpenWebText with KAN layers in the MLPs, their hidden layer narrowed to 0.4 n_embd: PARAMS parameters,
as many as GPT-2.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_kan.py

Not run here: it needs several GPUs for days.
"""

out_dir = 'out-gpt2-kan'
wandb_project = 'owt'
wandb_run_name = 'gpt2-kan-124M'

use_kan = True
kan_targets = 'mlp'
kan_hidden = 0.4  # 10 numbers an edge (base, 8 splines, scaler) instead of 1, so a tenth of the MLP's 4

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
