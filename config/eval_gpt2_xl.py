"""
Evaluate the pretrained gpt2-xl (1558M parameters) on the data set at hand.

    pip install transformers
    python train.py config/eval_gpt2_xl.py --dataset=shakespeare

Not run here: it needs GPT-2's weights from the Hugging Face hub.
"""

init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500  # use more batches to get a good estimate
batch_size = 8
