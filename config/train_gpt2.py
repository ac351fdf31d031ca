# GPT-2 (124M parameters) on OpenWebText, as in nanoGPT: the defaults of train.py, on 8 GPUs.
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# Not run. nanoGPT reports a loss of about 2.85 after 4 days on 8 A100 40GB for this setting.

# 12 batch size * 1024 block size * 5 gradaccum * 8 GPUs = 491,520 tokens per iteration, 600,000 times: 300B tokens
out_dir = 'out-gpt2'
eval_interval = 1000
log_interval = 10
