# GPT-2 XL (1558M parameters), fine-tuned on Shakespeare as in nanoGPT. --init_from=gpt2 takes the smallest one
# instead.
#     pip install transformers
#     python train.py config/train_gpt2_shakespeare.py
# Not run: it needs a GPU with some 40 GB and GPT-2's weights from the Hugging Face hub.

out_dir = 'out-gpt2-shakespeare'
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
wandb_project = 'shakespeare'

dataset = 'shakespeare'
init_from = 'gpt2-xl'

# 1 batch_size * 32 grad_accum * 1024 tokens = 32,768 tokens per iteration
# shakespeare has 301,966 tokens, so 1 epoch ~= 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# finetune at constant learning rate
learning_rate = 3e-5
decay_lr = False
